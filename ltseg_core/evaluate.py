"""From network and data set to outputs, predictions and confusion counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core.data.base import SegmentationDataset
from ltseg_core.metrics import ConfusionCounts


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, and each in its own mode again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def outputs(
    network: nn.Module,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
) -> Iterator[tuple[Any, list[Tensor]]]:
    """The network's Output in evaluation mode and the label maps, each (H, W) uint8, of batch after batch of images.

    The network sees each image at the data set's image size, in batches of neighbours of one size (so padding never
    changes a score). The logits are float32; everything but the labels is on the network's device.
    """
    device = next(network.parameters()).device
    with evaluation_mode(network):
        for _, same in groupby((dataset[i] for i in indices), key=lambda item: item[0].shape):
            while items := list(islice(same, batch_size)):
                image = torch.stack([image for image, _ in items]).to(device, torch.float32, non_blocking=True) / 255
                with autocast(device, precision):
                    output = network(image)
                yield output._replace(logits=output.logits.float()), [label for _, label in items]


@torch.inference_mode()
def logit_maps(
    network: nn.Module,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    read: Callable[[Any], Tensor] = attrgetter("logits"),
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (C, H, W) float32, true label map (H, W) uint8) of the images, at the label's own size, on the device.

    Images are seen as in `outputs`; the logits are brought bilinearly to the label's size.
    read: what to take of the network's output, (B, C, H, W)
    """
    for output, maps in outputs(network, dataset, indices, batch_size=batch_size, precision=precision):
        for own, label in zip(read(output).float(), maps, strict=True):
            yield at_size(own, label.shape), label.to(own.device, non_blocking=True)


def at_size(logits: Tensor, shape: Sequence[int]) -> Tensor:
    """Logits (C, h, w) brought bilinearly to the size `shape`, (C, H, W)."""
    if logits.shape[1:] == shape:
        return logits
    return F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0]


def predicted_labels(logits: Tensor) -> Tensor:
    """The class of the largest logit of each pixel, (C, H, W) -> (H, W) uint8, the first of equal ones."""
    return logits.max(0).indices.to(torch.uint8)  # argmax takes four times as long on a CPU


@torch.inference_mode()
def predictions(
    network: nn.Module,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predicted, true) label maps of the images, each (H, W) uint8; see `logit_maps`."""
    for logits, label in logit_maps(network, dataset, indices, batch_size=batch_size, precision=precision):
        yield predicted_labels(logits), label


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


Name = TypeVar("Name")


@torch.inference_mode()
def tally(
    maps: Iterable[tuple[Tensor, Tensor]], rules: Mapping[Name, Callable[[Tensor, Tensor], Tensor]], num_classes: int
) -> dict[Name, np.ndarray]:
    """Confusion counts of each image under several rules, (N, C, C) integers, from one pass over `logit_maps`.

    rules: (logits (1, C', H, W), target (1, H, W)) -> labels (1, H, W); C' = C but for networks with several heads
    """
    counts = {name: ConfusionCounts(num_classes) for name in rules}
    for logits, target in maps:
        for name, rule in rules.items():
            counts[name].update(rule(logits[None], target[None]), target[None])
    return {name: each.counts.cpu().numpy() for name, each in counts.items()}
