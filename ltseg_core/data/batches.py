"""From data set to training batch: order of the images, collation, augmentation on the training device.

Every random number is a function of (seed, step), never of what ran before: a resumed run sees the batches an
undisturbed one would have seen, and several processes see the slices of the batch one process would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ltseg_core.config import IGNORE_INDEX
from ltseg_core.data.base import InMemory, SegmentationDataset

IN_MEMORY_BYTES = 4 * 2**30
_IN_MEMORY: WeakKeyDictionary[SegmentationDataset, SegmentationDataset] = WeakKeyDictionary()


class Batch(NamedTuple):
    """image: (B, 3, H, W) uint8;  label: (B, H, W) uint8;  sizes: (B, 2) valid height and width in pixels.

    Images of different sizes are padded at the right and bottom: image with 0, label with 255.
    """

    image: Tensor
    label: Tensor
    sizes: Tensor


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Stack pairs of (3, h, w) images and (h, w) labels of any sizes into one padded `Batch`."""
    sizes = torch.tensor([label.shape for _, label in items])
    height, width = sizes.amax(0).tolist()

    def pad(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)

    image = torch.stack([pad(image, 0) for image, _ in items])
    return Batch(image, torch.stack([pad(label, IGNORE_INDEX) for _, label in items]), sizes)


def unlabelled(batch: Batch) -> Batch:
    """The batch without what its labels say: 0 inside the images, 255 in the padding."""
    height, width = (size.view(-1, 1, 1) for size in batch.sizes.T)
    rows, columns = (torch.arange(n, device=batch.sizes.device) for n in batch.label.shape[1:])
    inside = (rows[:, None] < height) & (columns < width)
    return batch._replace(label=torch.where(inside, 0, IGNORE_INDEX).to(batch.label.dtype))


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the whole key only (splitmix-style hash of its integers)."""
    state = 0
    for part in key:
        state = ((state ^ part) + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator(device).manual_seed(state % 2**63)


class BatchOrder:
    """Image indices of the steps start..stop-1: seeded permutations, one after the other.

    weights: (N,), one for each index; if given, every batch is drawn with replacement, in proportion to them
    With several processes each takes its share of every batch, in order of rank.
    Raises ValueError for another number of weights.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        if weights is not None and weights.shape != (len(indices),):
            raise ValueError(f"expected weights of shape ({len(indices)},), got {tuple(weights.shape)}")
        self.indices, self.batch_size, self.seed = torch.as_tensor(indices), batch_size, seed
        self.weights = weights
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        for batch in self._permuted() if self.weights is None else self._drawn(self.weights):
            yield batch[self.rank * share : (self.rank + 1) * share]

    def _permuted(self) -> Iterator[list[int]]:
        count, epoch, order = len(self.indices), -1, self.indices
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // count != epoch:
                    epoch = position // count
                    order = self.indices[torch.randperm(count, generator=generator(self.seed, 1, epoch))]
                batch.append(int(order[position % count]))
            yield batch

    def _drawn(self, weights: Tensor) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            source = generator(self.seed, 1, step)
            drawn = torch.multinomial(weights, self.batch_size, replacement=True, generator=source)
            yield self.indices[drawn].tolist()


def loader(dataset: SegmentationDataset, order: BatchOrder, *, workers: int) -> DataLoader[Batch]:
    """Batches in the given order; `workers` processes decode unless the data set is held in memory."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # of items, which collate turns into batches
        batch_sampler=order,
        collate_fn=collate,
        num_workers=0 if isinstance(dataset, InMemory) else workers,
        pin_memory=torch.cuda.is_available(),
    )


def in_memory_if_small(dataset: SegmentationDataset) -> SegmentationDataset:
    """Hold the data set in memory when its decoded images are expected to need less than 4 GiB.

    As long as `dataset` itself is held by somebody, the copy is kept for the next caller.
    """
    if dataset not in _IN_MEMORY:
        if sum(x.numel() for x in dataset[0]) * len(dataset) >= IN_MEMORY_BYTES:
            return dataset
        _IN_MEMORY[dataset] = InMemory(dataset)
    return _IN_MEMORY[dataset]


class Draw(NamedTuple):
    """Random parameters of the augmentation of B images, float32: see `augment`."""

    zoom: Tensor  # (B,)
    place: Tensor  # (B, 2) in [0, 1]
    flip: Tensor  # (B,) 0 or 1
    colour: Tensor  # (B, 3) factors of brightness, contrast, saturation


def draw(count: int, source: torch.Generator, *, scale_range: tuple[float, float], flip: float, colour: float) -> Draw:
    """Zoom uniform in `scale_range`, place uniform, flip with its probability, colour in [1 - c, 1 + c]."""
    low, high = scale_range
    zoom = low + (high - low) * torch.rand(count, generator=source)
    place = torch.rand(count, 2, generator=source)
    flips = (torch.rand(count, generator=source) < flip).float()
    return Draw(zoom, place, flips, 1 + colour * (2 * torch.rand(count, 3, generator=source) - 1))


def augment(batch: Batch, chosen: Draw, crop: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Zoom, crop, flip and recolour a batch in one resampling, on the device of its tensors.

    The window of `crop` = (h, w) output pixels (default: the batch's size) lies inside the zoomed image where
    that is larger, around it where it is smaller; what is outside becomes black and 255.
    Returns image (B, 3, h, w) float32 in [0, 1] (bilinear) and target (B, h, w) int64 (nearest neighbour).
    """
    device = batch.image.device
    zoom, place, flip, colour = (t.to(device, non_blocking=True) for t in chosen)
    height, width = batch.image.shape[-2:]
    h, w = crop or (height, width)
    inside = batch.sizes.to(device, torch.float32, non_blocking=True)  # (B, 2)
    zoomed = zoom[:, None] * inside  # (B, 2); numbers, not new tensors, below: those would wait for the device
    y = (place[:, :1] * (zoomed[:, :1] - h) + torch.arange(h, device=device) + 0.5) / zoom[:, None]  # (B, h) input px
    x = (place[:, 1:] * (zoomed[:, 1:] - w) + torch.arange(w, device=device) + 0.5) / zoom[:, None]  # (B, w)
    x = torch.where(flip[:, None] > 0, inside[:, 1:] - x, x)
    grid = torch.stack(torch.broadcast_tensors((2 * x / width - 1)[:, None], (2 * y / height - 1)[:, :, None]), -1)
    image = F.grid_sample(batch.image.float() / 255, grid, mode="bilinear", align_corners=False)
    # uint8 wraps: 255 + 1 = 0 is also what grid_sample writes outside the image, and 0 - 1 = 255 again
    shifted = F.grid_sample((batch.label + 1)[:, None].float(), grid, mode="nearest", align_corners=False)
    target = (shifted[:, 0].to(torch.uint8) - 1).long()
    return recolour(image, colour), target


def recolour(image: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast (around the image's mean grey) and saturation; (B, 3, H, W) in [0, 1].

    factors: (B, 3) float, 1 leaves the property as it is
    """
    brightness, contrast, saturation = factors.T[..., None, None, None]  # each (B, 1, 1, 1)
    image = image * brightness
    grey = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
    mean = grey.mean((2, 3), keepdim=True)
    image = mean + contrast * (image - mean)
    grey = mean + contrast * (grey - mean)
    return (grey + saturation * (image - grey)).clamp_(0, 1)
