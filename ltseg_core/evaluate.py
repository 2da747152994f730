"""From network and data set to predictions and confusion counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice

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
def predictions(
    network: nn.Module,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predicted, true) label maps of the images, each (H, W) uint8 at the label's own size, on the device.

    The network sees each image at the data set's image size, in batches of neighbours of one size (so padding never
    changes a score); its logits are brought bilinearly to the label's size.
    """
    device = next(network.parameters()).device
    with evaluation_mode(network):
        for _, same in groupby((dataset[i] for i in indices), key=lambda item: item[0].shape):
            while items := list(islice(same, batch_size)):
                image = torch.stack([image for image, _ in items]).to(device, torch.float32, non_blocking=True) / 255
                with autocast(device, precision):
                    logits = network(image).logits
                for own, (_, label) in zip(logits.float(), items, strict=True):
                    if own.shape[1:] != label.shape:
                        own = F.interpolate(own[None], label.shape, mode="bilinear", align_corners=False)[0]
                    predicted = own.max(0).indices.to(torch.uint8)  # argmax takes four times as long on a CPU
                    yield predicted, label.to(device, non_blocking=True)


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
