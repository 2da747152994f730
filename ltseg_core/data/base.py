"""What every data set offers: named classes, a palette, and (image, label map) pairs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ltseg_core.config import IGNORE_INDEX


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Base class. A data set defines `__len__`, `sample` and, where it is cheaper than `sample`, `label`.

    name, split: str;  classes: C names;  palette: (C, 3) uint8;  names: one stem per image
    """

    name: str
    split: str
    classes: tuple[str, ...]
    palette: np.ndarray
    names: list[str]
    ignore_index = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and label map (H, W) uint8 in [0, C) or ignore_index."""
        raise TypeError(f"{type(self).__name__} does not define sample()")

    def label(self, index: int) -> np.ndarray:
        """Label map alone, (H, W) uint8."""
        return self.sample(index)[1]

    def histogram(self, index: int) -> list[int]:
        """Pixels of each label value, 256 numbers; those not labelled at ignore_index."""
        return Image.fromarray(self.label(index)).histogram()  # twice as fast as np.bincount on uint8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) uint8 and label map (H, W) uint8."""
        image, label = self.sample(index)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)

    def evenly_spaced(self, images: int) -> SegmentationDataset:
        """That many of its images, from the first to the last; the same object each time, so that what was decoded for
        one run serves the next.
        """
        kept: dict[int, Subset] = self.__dict__.setdefault("_evenly_spaced", {})
        if images not in kept:
            kept[images] = Subset(self, np.linspace(0, len(self) - 1, images).round().astype(int).tolist())
        return kept[images]


class Resized(SegmentationDataset):
    """`dataset` with images, and labels if `resize_labels`, brought to `size` = (height, width) pixels.

    Images are resampled bilinearly with antialiasing, labels by nearest neighbour. Evaluation keeps the labels
    at their own size: the prediction is scaled to the label, never the label to the prediction.
    """

    def __init__(self, dataset: SegmentationDataset, size: tuple[int, int], *, resize_labels: bool) -> None:
        self.dataset, self.size, self.resize_labels = dataset, size, resize_labels
        self.name, self.split, self.names = dataset.name, dataset.split, dataset.names
        self.classes, self.palette = dataset.classes, dataset.palette

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.dataset.sample(index)
        height, width = self.size
        if image.shape[:2] != self.size:
            image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        if self.resize_labels and label.shape != self.size:
            label = np.array(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
        return image, label


class InMemory(SegmentationDataset):
    """`dataset` decoded once, by several threads, and kept as uint8 tensors."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.name, self.split, self.names = dataset.name, dataset.split, dataset.names
        self.classes, self.palette = dataset.classes, dataset.palette
        with ThreadPoolExecutor() as pool:  # PIL releases the GIL while it decodes and resizes
            self.items = list(pool.map(dataset.__getitem__, range(len(dataset))))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.items[index]
        return image.permute(1, 2, 0).numpy(), label.numpy()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


class Subset(SegmentationDataset):
    """The images `indices` of `dataset`, in that order."""

    def __init__(self, dataset: SegmentationDataset, indices: list[int]) -> None:
        self.dataset, self.indices = dataset, indices
        self.name, self.split, self.classes, self.palette = (
            dataset.name,
            dataset.split,
            dataset.classes,
            dataset.palette,
        )
        self.names = [dataset.names[i] for i in indices]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.dataset.sample(self.indices[index])

    def label(self, index: int) -> np.ndarray:
        return self.dataset.label(self.indices[index])

    def histogram(self, index: int) -> list[int]:
        return self.dataset.histogram(self.indices[index])
