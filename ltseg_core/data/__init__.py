"""Data sets by name: the embedded scenes, public data sets found under the data root, or any folder."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from ltseg_core.config import check_options, choose, data_root
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.data.folders import SPECS, FolderDataset

DATASETS = ("scenes", *SPECS)
CLASSIFICATION = ("cifar100",)
"""Data sets of images with one class each."""


def _locate(name: str, root: str | os.PathLike[str] | None) -> tuple[str, Path | None]:
    """Canonical name and folder (None for the embedded scenes) of a data set."""
    if os.sep in name:
        return Path(name).name, Path(name).expanduser()
    name = choose("data set", name, (*DATASETS, *CLASSIFICATION))
    return name, None if name == "scenes" else data_root(root) / name


def load(name: str, split: str, root: str | os.PathLike[str] | None = None, **options: Any) -> SegmentationDataset:
    """One split of a data set.

    name:    `scenes` (embedded, nothing to download), `camvid`, `ccp`, `cifar100`, or the path (with a `/`) of a
             folder that holds <split>/images, <split>/labels and, if you like, classes.csv
    root:    the data root (default: $LTSEG_DATA, else ./data)
    options: keyword arguments of the data set, e.g. the knobs of `Scenes`; `images` keeps only that many (not of
             `cifar100`, whose own is `imbalance`)
    Raises UserError for an unknown name, split or option and for everything `FolderDataset` or `CIFAR100` refuses.
    """
    name, folder = _locate(name, root)
    if folder is None:
        from ltseg_core.data.scenes import Scenes

        return _scenes_once(split, **check_options(f"option of {name}", options, Scenes))
    if name == "cifar100":
        from ltseg_core.data.cifar100 import CIFAR100

        return CIFAR100(folder, split, **check_options(f"option of {name}", options, CIFAR100, hidden=("root",)))
    options = check_options(f"option of {name}", options, FolderDataset, hidden=("name", "spec"))
    return FolderDataset(folder, split, name=name, spec=SPECS.get(name), **options)


@lru_cache(maxsize=16)
def _scenes_once(split: str, **options: Any) -> SegmentationDataset:
    """The same object for the same options: what was drawn and kept in memory for one run serves the next."""
    from ltseg_core.data.scenes import Scenes

    return Scenes(split, **options)


def splits(name: str, root: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The splits of a data set that exist, of train, val, test."""
    name, folder = _locate(name, root)
    if name in CLASSIFICATION:
        return ("train", "val", "test") if folder and folder.is_dir() else ()
    return tuple(s for s in ("train", "val", "test") if folder is None or (folder / s / "images").is_dir())


def found(root: str | os.PathLike[str] | None = None) -> list[str]:
    """The named data sets that can be loaded from this data root."""
    return [name for name in DATASETS if "train" in splits(name, root)]
