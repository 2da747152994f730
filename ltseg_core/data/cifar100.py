"""CIFAR-100 with a long tail, as label maps of one class each: what segmentation is compared with."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ltseg_core.config import UserError, choose
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.data.folders import distinct_colours

CLASSES, SIDE = 100, 32
LARGEST = 500  # training images of a class
MOST_BALANCED = 50  # the imbalance factor of the file
BALANCED = 126  # images of each class in the balanced subset, about as many in all as with imbalance 50
HELD_OUT = 10
FILES = {"train": ("train_lt50", "train_extra"), "val": ("train_lt50", "train_extra"), "test": ("test",)}


class CIFAR100(SegmentationDataset):
    """CIFAR-100 (Krizhevsky 2009): 100 classes, images of 32 x 32 pixels, all of whose pixels have the one label.

    A classifier is then a network with the same logits at every pixel (`ImageClassifier`), and every method, score
    and statistic of segmentation is one of image classification, in which pixels and images count the same.

    split:     "train", "val" or "test" (100 images of each class)
    imbalance: of the training images class k = 0, ..., 99 keeps int(500 imbalance^(-k/99)), the first in an order that
               is the same for every factor (Cao et al. 2019: 100 and 10); at least 50, and at most 500, where one is
               left of the rarest class. None: 126 of each class
    val:       of each class up to 10 of the other training images; the most frequent classes have fewer, or none

    Raises UserError for files that are missing or damaged, another split, and a factor out of range; for the pictures
    when the first one is read.
    """

    def __init__(self, root: Path, split: str, *, imbalance: float | None = 100) -> None:
        if imbalance is not None and not MOST_BALANCED <= imbalance <= LARGEST:
            raise UserError(f"imbalance must be in [{MOST_BALANCED}, {LARGEST}], or None for balanced, got {imbalance}")
        if not root.is_dir():
            raise UserError(
                f"no data set 'cifar100' at {root}: fetch it with `python -m data_prep cifar100 --root {root.parent}`,"
                " or point --data-root or LTSEG_DATA to the folder that holds it"
            )
        self.name, self.split = "cifar100", choose("split of cifar100", split, FILES)
        self.classes = read_classes(root / "classes.txt")
        self.palette = np.array(distinct_colours(len(self.classes)), dtype=np.uint8)
        parts = {root / stem: read_table(root / stem) for stem in FILES[self.split]}
        self._tiles = {stem: len(part[0]) for stem, part in parts.items()}
        labels, ranks, names = (np.concatenate(column) for column in zip(*parts.values(), strict=True))
        kept = np.arange(len(labels))
        if self.split != "test":
            own = BALANCED if imbalance is None else images_of(imbalance)[labels]
            kept = np.flatnonzero(ranks < own if self.split == "train" else ranks >= own)
        if self.split == "val":
            order = kept[np.lexsort([ranks[kept], labels[kept]])]
            first = np.searchsorted(labels[order], labels[order])  # where its class begins
            kept = order[np.arange(len(order)) - first < HELD_OUT]
        self._kept, self._labels, self.names = kept, labels[kept], names[kept].tolist()

    @cached_property
    def _images(self) -> np.ndarray:
        """(N, 32, 32, 3) uint8, decoded when the first one is asked for."""
        return np.concatenate([read_tiles(stem, count) for stem, count in self._tiles.items()])[self._kept]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._images[index], self.label(index)

    def label(self, index: int) -> np.ndarray:
        return np.full((SIDE, SIDE), self._labels[index], dtype=np.uint8)


def images_of(imbalance: float) -> np.ndarray:
    """Training images of each class under an exponential long tail, (100,) int64: int(500 imbalance^(-k/99))."""
    return (LARGEST * (1 / imbalance) ** (np.arange(CLASSES) / (CLASSES - 1))).astype(np.int64)


def read_classes(path: Path) -> tuple[str, ...]:
    """The 100 names, one a line. Raises UserError for a file that is missing or damaged, as the next two do."""
    with _named(path):
        if len(names := tuple(path.read_text(encoding="utf-8").split())) != CLASSES:
            raise ValueError(f"{len(names)} names, expected {CLASSES}")
        return names


def read_table(stem: Path) -> tuple[np.ndarray, ...]:
    """Labels, ranks in their class, and names without suffix, (N,) each."""
    path = stem.with_suffix(".csv")
    with _named(path), path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
        labels, ranks = (np.array([int(row[column]) for row in rows]) for column in ("label", "rank"))
        if labels.min() < 0 or labels.max() >= CLASSES:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {CLASSES - 1}")
        return labels, ranks, np.array([Path(row["file"]).stem for row in rows])


def read_tiles(stem: Path, count: int) -> np.ndarray:
    """The first tiles of a mosaic, row by row, (count, 32, 32, 3) uint8."""
    path = stem.with_suffix(".webp")
    with _named(path), Image.open(path) as picture:
        mosaic = np.asarray(picture.convert("RGB"))
        down, across = mosaic.shape[0] // SIDE, mosaic.shape[1] // SIDE
        if down * across < count:
            raise ValueError(f"{down * across} tiles for the {count} rows of {stem.name}.csv")
        tiles = mosaic[: down * SIDE, : across * SIDE].reshape(down, SIDE, across, SIDE, 3).swapaxes(1, 2)
        return tiles.reshape(-1, SIDE, SIDE, 3)[:count]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes a UserError that names it."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is missing or damaged ({error!r}): fetch it again") from None
