"""From network and data set to predictions and confusion counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core.data.base import SegmentationDataset
from ltseg_core.data.batches import collate
from ltseg_core.metrics import ConfusionCounts


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def predictions(
    network: nn.Module,
    dataset: SegmentationDataset,
    indices: list[int],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predicted, true) label maps of the images, each (H, W) uint8 at the label's own size, on the device.

    The network sees the image at the data set's image size; its logits are brought bilinearly to the label's size.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    for start in range(0, len(indices), batch_size):
        items = [dataset[i] for i in indices[start : start + batch_size]]
        blank = [(image, image.new_zeros(image.shape[-2:])) for image, _ in items]
        image = collate(blank).image.to(device, torch.float32, non_blocking=True) / 255
        with autocast(device, precision):
            logits = network(image).logits
        for own, (x, label) in zip(logits, items, strict=True):
            own = own[None, :, : x.shape[-2], : x.shape[-1]]
            if x.shape[-2:] != label.shape:
                own = F.interpolate(own, label.shape, mode="bilinear", align_corners=False)
            yield own[0].argmax(0).to(torch.uint8), label.to(device, non_blocking=True)
    network.train(training)


def confusion(
    network: nn.Module,
    dataset: SegmentationDataset,
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """Confusion counts per image, (N, C, C) integer on the network's device, rows: label, columns: prediction.

    With several processes each fills the rows of its images; the sum over processes is the whole.
    """
    indices = list(range(rank, len(dataset), world))
    counts = ConfusionCounts(len(dataset.classes))
    for predicted, label in predictions(network, dataset, indices, batch_size=batch_size, precision=precision):
        counts.update(predicted[None], label[None])
    if world == 1:
        return counts.counts
    device = next(network.parameters()).device
    classes = len(dataset.classes)
    whole = torch.zeros(len(dataset), classes, classes, dtype=torch.int64, device=device)
    if indices:
        whole[indices] = counts.counts.long()
    return whole
