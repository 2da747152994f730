"""CIFAR-100 with an exponential long tail: a training subset of imbalance 50, what balances it, and the test set."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.download import archive_files, download, remove, write_atomically
from data_prep.install import AGAIN, csv_bytes, install
from ltseg_core.config import UserError
from ltseg_core.data.cifar100 import (
    BALANCED,
    CLASSES,
    MOST_BALANCED,
    SIDE,
    images_of,
    read_classes,
    read_table,
    read_tiles,
)

HOST = "https://www.cs.toronto.edu"
ARCHIVE = "~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
"""Of the archive, as its authors and torchvision state it."""
ACROSS = 100  # tiles in a row of a mosaic
README = f"""# CIFAR-100, long-tailed training subset and full test set (lossless)

    train_lt50    .webp and .csv, long tail: class k keeps int(500 / {MOST_BALANCED}^(k/99)) training images
    train_extra   likewise, further training images, which bring every class to {BALANCED} at least
    test          likewise, the whole test set, 100 images a class
    classes.txt   names; line number - 1 = label

Each .webp is one lossless mosaic of 32 x 32 tiles, {ACROSS} a row, the last row padded with zeros; each .csv has one
row a tile: index, label, rank, file. The rank orders the images of a class by the SHA-256 of their file names, so that
the subset of every imbalance is the same for everyone who prepares it so, and a larger one contains it. (The results
kept in ltseg's results/cifar100.csv are of another order.)

Source: {HOST}/{ARCHIVE}, MD5 {MD5}. A. Krizhevsky. Learning multiple layers of features from tiny images. Technical
report, University of Toronto, 2009.
"""


def prepare(root: Path, *, base_url: str | None = None, keep_archive: bool = False) -> str:
    """Install ROOT/cifar100; returns one line on what was done.

    Raises UserError as `download` does, for an archive of another checksum, and for wrong counts; then nothing is
    installed.
    """

    def build(work: Path, folder: Path) -> None:
        archive = work / "cifar100.tar.gz"
        download(f"{base_url or HOST}/{ARCHIVE}", archive)
        if (found := hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()) != MD5:
            remove(archive)
            raise UserError(
                f"{ARCHIVE}: checksum differs: MD5 {found}, expected {MD5}."
                f" It was deleted and nothing was installed: {AGAIN}"
            )
        # pickles are read only from the archive of this checksum
        parts = {name: pickle.loads(content, encoding="latin1") for name, content in archive_files(archive, _wanted)}
        for stem, (images, rows) in tables(parts["train"], parts["test"]).items():
            write_atomically(folder / f"{stem}.webp", mosaic(images))
            numbered = [(i, *row) for i, row in enumerate(rows)]
            write_atomically(folder / f"{stem}.csv", csv_bytes(("index", "label", "rank", "file"), numbered))
        write_atomically(folder / "classes.txt", "\n".join([*parts["meta"]["fine_label_names"], ""]).encode())
        write_atomically(folder / "README.md", README.encode())

    return f"{install('cifar100', root, build, check, keep=keep_archive)}: every class count is as expected"


def _wanted(path: str) -> bool:
    return path in ("train", "test", "meta")


def tables(train: Any, test: Any) -> dict[str, tuple[np.ndarray, list[tuple[int, int, str]]]]:
    """Stem -> images (N, 32, 32, 3) uint8 and rows (label, rank, file), by label and rank.

    train, test: the archive's batches: `data` (N, 3072) uint8, red before green before blue, `fine_labels`, `filenames`
    """
    images, rows = _ranked(train)
    label, rank = np.array([row[:2] for row in rows]).T
    kept = images_of(MOST_BALANCED)[label]
    parts = {"train_lt50": rank < kept, "train_extra": (rank >= kept) & (rank < BALANCED)}
    found = {stem: np.flatnonzero(chosen) for stem, chosen in parts.items()}
    return {stem: (images[at], [rows[i] for i in at]) for stem, at in found.items()} | {"test": _ranked(test)}


def _ranked(batch: Any) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    names, labels = batch["filenames"], batch["fine_labels"]
    order = sorted(range(len(names)), key=lambda i: (labels[i], hashlib.sha256(names[i].encode()).digest()))
    sizes = np.bincount(labels)
    ranks = np.concatenate([np.arange(size) for size in sizes]).tolist()
    images = np.asarray(batch["data"], np.uint8).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)[order]
    return images, [(labels[i], rank, names[i]) for i, rank in zip(order, ranks, strict=True)]


def mosaic(images: np.ndarray) -> bytes:
    """Images (N, 32, 32, 3) uint8 -> lossless WebP, row by row."""
    down = -(-len(images) // ACROSS)
    tiles = np.zeros((down * ACROSS, SIDE, SIDE, 3), np.uint8)
    tiles[: len(images)] = images
    whole = tiles.reshape(down, ACROSS, SIDE, SIDE, 3).swapaxes(1, 2).reshape(down * SIDE, ACROSS * SIDE, 3)
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "WEBP", lossless=True)
    return file.getvalue()


def check(folder: Path) -> None:
    """Raise UserError unless `folder` holds the names, the tables with the expected images of each class, the tiles."""
    read_classes(folder / "classes.txt")
    long_tail = images_of(MOST_BALANCED)
    expected = {
        "train_lt50": long_tail,
        "train_extra": (BALANCED - long_tail).clip(min=0),
        "test": np.full(CLASSES, 100),
    }
    for stem, counts in expected.items():
        labels = read_table(folder / stem)[0]
        found = np.bincount(labels, minlength=CLASSES)
        for k in np.flatnonzero(found != counts):
            raise UserError(f"{folder / stem}.csv: class {k} has {found[k]} images, expected {counts[k]}")
        read_tiles(folder / stem, len(labels))
