"""Class counts and the long-tail statistics computed from them."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ltseg_core.config import UserError, choose, cores
from ltseg_core.data.base import SegmentationDataset

GROUPS = ("head", "body", "tail")
HEAD_SHARE, TAIL_SHARE = 0.01, 0.001
"""Shares of the labelled pixels from which a class is head, below which it is tail (MEDOE, Sec. 4.1)."""


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """How often each class occurs in a set of label maps.

    pixels: (C,) integers, labelled pixels of the class;  images: (C,) integers, images that contain it
    Both are kept as int64 tensors. A class that never occurs has 0 in both.
    Raises ValueError, naming the value, for counts that are not 1-D, of one length, integer and >= 0, and for
    a class that has pixels but no image or an image but no pixels.
    """

    pixels: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        for name in ("pixels", "images"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        if len(self.pixels) != len(self.images):
            raise ValueError(f"pixels and images differ in length: {len(self.pixels)} and {len(self.images)} classes")
        for k in torch.nonzero((self.pixels > 0) != (self.images > 0)).flatten()[:1].tolist():
            raise ValueError(f"class {k} has {self.pixels[k]} pixels but occurs in {self.images[k]} images")

    @property
    def num_classes(self) -> int:
        return len(self.pixels)

    def pixel_share(self) -> Tensor:
        """Share of all labelled pixels, (C,) float64; sums to 1. ValueError if nothing is labelled."""
        if not self.pixels.any():
            raise ValueError("no class has a pixel: the share of labelled pixels is not defined")
        return self.pixels.double() / self.pixels.sum()


def _counts(name: str, values: Tensor | Sequence[int]) -> Tensor:
    counts = torch.as_tensor(values)
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"{name} must have shape (C,) with C >= 1, got {tuple(counts.shape)}")
    if counts.is_floating_point() and not counts.isfinite().all():
        raise ValueError(f"{name} must be finite, got {counts[~counts.isfinite()][0]}")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {counts.dtype}, e.g. {counts[0]}")
    if (counts < 0).any():
        raise ValueError(f"{name} must be >= 0, got {counts[counts < 0][0]}")
    return counts.long()


COLUMNS = ("class_index", "class_name", "train_pixels", "train_images")


def read_counts(path: str | os.PathLike[str]) -> tuple[ClassCounts, list[str]]:
    """Counts and class names from a CSV with the columns class_index, class_name, train_pixels, train_images.

    Raises UserError when the file is missing, lacks a column, or its rows are not the classes 0, 1, 2, ...
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if [int(row["class_index"]) for row in rows] != list(range(len(rows))):
            raise ValueError("class_index must count 0, 1, 2, ...")
        counts = ClassCounts(
            torch.tensor([int(row["train_pixels"]) for row in rows]),
            torch.tensor([int(row["train_images"]) for row in rows]),
        )
        return counts, [row["class_name"] for row in rows]
    except FileNotFoundError:
        raise UserError(f"no class counts at {path}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): expected the columns {', '.join(COLUMNS)}") from None


def write_counts(path: str | os.PathLike[str], counts: ClassCounts, names: Sequence[str]) -> None:
    """Write what `read_counts` reads."""
    if len(names) != counts.num_classes:
        raise ValueError(f"{len(names)} names for {counts.num_classes} classes")
    rows = zip(range(len(names)), names, counts.pixels.tolist(), counts.images.tolist(), strict=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def count_classes(dataset: SegmentationDataset, workers: int | None = None) -> ClassCounts:
    """Pixels and images of each class. `workers` threads decode and count; None takes every core.

    Raises UserError for an empty data set and for a label value that is neither a class nor ignore_index.
    """
    histograms = _per_image(dataset, dataset.histogram, workers)
    return ClassCounts(torch.from_numpy(histograms.sum(0, dtype=np.int64)), torch.from_numpy((histograms > 0).sum(0)))


def class_presence(dataset: SegmentationDataset, workers: int | None = None) -> Tensor:
    """Which classes each image contains, (N, C) bool; `count_classes` counts them, with the same errors."""
    return torch.from_numpy(_per_image(dataset, dataset.histogram, workers) > 0)


def component_counts(dataset: SegmentationDataset, workers: int | None = None) -> np.ndarray:
    """Number of 8-connected components of each class, all images together, (C,) int64."""
    counts = _per_image(dataset, lambda index: _components(dataset.label(index)).tolist(), workers)
    return counts.sum(0, dtype=np.int64)


def mask_sizes(dataset: SegmentationDataset, workers: int | None = None) -> pd.DataFrame:
    """One row for each class present in an image: image (its name), class_id, pixels."""
    histograms = _per_image(dataset, dataset.histogram, workers)
    image, class_id = histograms.nonzero()
    names = np.asarray(dataset.names)[image]
    return pd.DataFrame({"image": names, "class_id": class_id, "pixels": histograms[image, class_id]})


def image_imbalance(sizes: pd.DataFrame) -> pd.DataFrame:
    """Per image of `mask_sizes`: image, classes (number present), largest, smallest (pixels), ratio of the two."""
    table = sizes.groupby("image", sort=False)["pixels"].agg(classes="size", largest="max", smallest="min")
    return table.assign(ratio=table["largest"] / table["smallest"]).reset_index()


def _per_image(dataset: SegmentationDataset, count: Callable[[int], Sequence[int]], workers: int | None) -> np.ndarray:
    """count(i) is 256 numbers, one per label value; returns its class part for all images, (N, C) int32.

    Decoding, generating and counting happen outside the interpreter lock, so threads suffice. One task per
    thread: at half a millisecond per image the executor's own bookkeeping would cost a tenth of the time.
    """
    if len(dataset) == 0:
        raise UserError(f"split {dataset.split!r} of {dataset.name} is empty: there is nothing to count")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be >= 1 or None, got {workers}")
    threads = workers or cores()
    classes, ignored = len(dataset.classes), dataset.ignore_index
    counts = np.zeros((len(dataset), classes), dtype=np.int32)

    def share(start: int) -> None:
        for index in range(start, len(dataset), threads):
            values = count(index)
            counts[index] = values[:classes]
            if sum(values[classes:]) != values[ignored]:
                value = next(v for v in range(classes, 256) if values[v] and v != ignored)
                raise UserError(
                    f"label {dataset.names[index]!r} of {dataset.name} has the value {value}, which is neither a"
                    f" class (0..{classes - 1}) nor {ignored} (ignored): correct the label or the class list"
                )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
    return counts


def _components(label: np.ndarray) -> np.ndarray:
    """Number of 8-connected components of each value of an (H, W) uint8 map, (256,) int64.

    All values at once: horizontal runs are the nodes of a graph; runs of one value that touch in two
    neighbouring rows, straight or diagonally, are its edges.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    start = np.ones(label.shape, dtype=bool)
    start[:, 1:] = label[:, 1:] != label[:, :-1]
    run = (np.cumsum(start, dtype=np.int32) - 1).reshape(label.shape)
    value = label[start]
    edges = []
    width = label.shape[1]
    for shift in (-1, 0, 1):
        upper = np.s_[:-1, max(0, -shift) : width - max(0, shift)]
        lower = np.s_[1:, max(0, shift) : width - max(0, -shift)]
        # two runs meet along a stretch of columns: its first column is the start of one of them
        meet = (label[upper] == label[lower]) & (start[upper] | start[lower])
        edges.append((run[upper][meet], run[lower][meet]))
    rows, columns = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(value), len(value)))
    number, component = connected_components(graph, directed=False)
    value_of = np.empty(number, dtype=np.uint8)
    value_of[component] = value
    return np.bincount(value_of, minlength=256)


def imbalance_factors(counts: ClassCounts) -> tuple[float, float]:
    """Pixel and region imbalance factor: largest over smallest pixel count and image count.

    Over the classes that occur (CCP names classes that never do). Region frequency is the number of images
    that contain the class (Region Rebalance, Eq. 7). Raises ValueError if no class occurs.
    """
    occurs = counts.pixels > 0
    if not occurs.any():
        raise ValueError(f"none of the {counts.num_classes} classes occurs: imbalance is not defined")
    pixels, images = counts.pixels[occurs].tolist(), counts.images[occurs].tolist()
    return max(pixels) / min(pixels), max(images) / min(images)


def groups(
    counts: ClassCounts,
    rule: Literal["pixel_share", "index"] = "pixel_share",
    *,
    cuts: tuple[int, int] = (20, 75),
) -> list[str]:
    """Group of each class, "head", "body" or "tail"; a class without pixels is tail.

    pixel_share: at least 1 % of the labelled pixels, [0.1 %, 1 %), less than 0.1 % (MEDOE; 21/56/73 by ADE20K's
                 exact counts, 21/55/74 in the paper)
    index:       the first cuts[0] classes by falling pixel count are head, those up to cuts[1] body, the rest
                 tail (DisAlign on ADE20K: 20 and 75 of 150)
    Raises UserError for another rule and ValueError unless 0 < cuts[0] <= cuts[1] < C.
    """
    if choose("rule of groups", rule, ("pixel_share", "index")) == "pixel_share":
        share = counts.pixel_share().numpy()
        position = (share < HEAD_SHARE).astype(int) + (share < TAIL_SHARE)
    else:
        if not 0 < cuts[0] <= cuts[1] < counts.num_classes:
            raise ValueError(f"cuts must satisfy 0 < a <= b < {counts.num_classes} (classes), got {cuts}")
        rank = (-counts.pixels).argsort(stable=True).argsort().numpy()
        position = np.searchsorted(cuts, rank, side="right")
        position[(counts.pixels == 0).numpy()] = 2
    return [GROUPS[i] for i in position]


def occupied_groups(counts: ClassCounts) -> tuple[list[str], list[int] | None]:
    """Head, body and tail, each with a class that occurs if three do: `groups` by share where that fills all,
    else thirds of the occurring classes by falling pixel count.

    The second value is None in the first case, and the cuts of rule "index" in the other (CamVid has no tail class by
    share); as MEDOE's hyper-parameter `cuts` they give its experts the same groups.
    """
    by_share, occurs = groups(counts), (counts.pixels > 0).tolist()
    if {group for group, present in zip(by_share, occurs, strict=True) if present} == set(GROUPS):
        return by_share, None
    cuts = round(sum(occurs) / 3), round(2 * sum(occurs) / 3)
    return groups(counts, "index", cuts=cuts), list(cuts)


def correlation(
    x: np.ndarray | Tensor | Sequence[float],
    y: np.ndarray | Tensor | Sequence[float],
    *,
    less: np.ndarray | Tensor | Sequence[float] | None = None,
    kind: Literal["pearson", "spearman"] = "pearson",
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Correlation over classes with its bootstrap percentile interval: (value, low, high).

    x, y: (C,) one value per class. With `less`, also (C,), the difference correlation(x, y) - correlation(less, y)
    and its interval, both taken from the same resamples.
    A class with NaN in one of them is left out (IoU of an absent class). Classes are resampled with replacement; a
    resample in which one of them is constant has no correlation and is left out. (NaN, NaN, NaN) if one is constant
    over all classes. Spearman takes mean ranks of ties, in each resample anew.
    Raises ValueError for different shapes, infinite values (log of a zero count) and fewer than three classes.
    """
    points = [np.asarray(v, dtype=np.float64) for v in (y, x, less) if v is not None]
    if points[0].ndim != 1 or len({v.shape for v in points}) > 1:
        raise ValueError(f"all values must have one shape (C,), got {' and '.join(str(v.shape) for v in points)}")
    values = np.stack(points)  # (2 or 3, C), y first
    values = values[:, ~np.isnan(values).any(0)]
    samples = resampled_correlations(values[1:], values[:1], kind=kind, replicates=replicates, seed=seed)[..., 0]
    samples = samples[:, 0] - samples[:, 1:].sum(1)
    low, high = percentile_interval(samples[1:], confidence)
    return (value, float(low), float(high)) if (value := float(samples[0])) == value else (np.nan, np.nan, np.nan)


def resampled_correlations(
    x: np.ndarray,
    y: np.ndarray,
    *,
    kind: Literal["pearson", "spearman"] = "pearson",
    replicates: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Correlation over classes of each row of x (K, C) with each row of y (M, C): (1 + replicates, K, M) float64.

    First that of the classes as they are, then those of resamples of the classes, the same ones for all rows, so that
    differences and means of coefficients can be taken resample by resample. NaN where one of the two is constant.
    Raises ValueError for NaN or infinite values and fewer than three classes.
    """
    choose("kind of correlation", kind, ("pearson", "spearman"))
    if (n := x.shape[1]) < 3:
        raise ValueError(f"a correlation needs at least 3 classes with all values, got {n}")
    for values in (x, y):
        if not (finite := np.isfinite(values)).all():
            raise ValueError(f"values must be finite, got {values[~finite][0]} (log of a zero count?)")
    times = np.vstack([np.ones(n), resampling_weights(seed, replicates, n)])  # (1 + R, n)

    def standardised(values: np.ndarray) -> np.ndarray:  # (n,) -> (1 + R, n): mean 0 and length 1 in each resample
        first = values[(times > 0).argmax(1), None]
        constant = ((values == first) | (times == 0)).all(1)
        if kind == "spearman":
            values = _mean_ranks(values, times)
        centred = values - (times * values).sum(1, keepdims=True) / n
        length = np.sqrt((times * centred**2).sum(1))
        return centred / np.where(constant, np.nan, length)[:, None]

    weighed = [times * standardised(row) for row in x]
    columns = [[(w * own).sum(1) for w in weighed] for own in map(standardised, y)]  # M x K of (1 + R,)
    return np.array(columns).transpose(2, 1, 0).clip(-1, 1)


def _mean_ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Ranks of values (n,) in samples that hold value i times[:, i] times, ties at their mean rank; (samples, n)."""
    distinct, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(distinct)))
    size = np.add.reduceat(times[:, order], starts, axis=1)  # (samples, distinct)
    return (size.cumsum(1) - (size - 1) / 2)[:, place]


def slope_through_origin(
    x: np.ndarray,
    y: np.ndarray,
    unit: np.ndarray,
    *,
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Least-squares slope of y over x through the origin, sum x y / sum x^2, with its interval: (value, low, high).

    x, y: (n,) values;  unit: (n,) what each belongs to, e.g. its class. Whole units are drawn with replacement;
    resamples in which all x are zero are left out. NaN where all x are zero.
    Raises ValueError for other shapes and NaN or infinite values.
    """
    x, y, unit = (np.asarray(v) for v in (x, y, unit))
    if not x.ndim == 1 or not x.shape == y.shape == unit.shape:
        raise ValueError(f"x, y and unit must have one shape (n,), got {x.shape}, {y.shape} and {unit.shape}")
    if not (np.isfinite(x) & np.isfinite(y)).all():
        raise ValueError("x and y must be finite")
    names, place = np.unique(unit, return_inverse=True)
    sums = np.stack([np.bincount(place, x * other, len(names)) for other in (y, x)], 1)  # (units, 2)
    drawn = resampling_weights(seed, replicates, len(names)) @ sums
    with np.errstate(invalid="ignore", divide="ignore"):
        value, samples = sums[:, 0].sum() / sums[:, 1].sum(), drawn[:, 0] / drawn[:, 1]
    low, high = percentile_interval(samples, confidence)
    return float(value), float(low), float(high)


def difference_of_independent(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Difference of two independent estimates, each (value, low, high), with its interval of the same confidence.

    The distances from value to limit are added in quadrature, side by side (Zou 2007), so skewed intervals stay skewed.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    return a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


@lru_cache(maxsize=8)
def resampling_weights(seed: int, replicates: int, n: int) -> np.ndarray:
    """How often each of n items is drawn in n draws with replacement, (R, n) float64, read-only: it is kept."""
    if replicates < 1:
        raise ValueError(f"replicates must be >= 1, got {replicates}")
    cells = np.random.default_rng(seed).integers(n, size=(replicates, n)) + n * np.arange(replicates)[:, None]
    weights = np.bincount(cells.ravel(), minlength=replicates * n).reshape(replicates, n).astype(np.float64)
    weights.flags.writeable = False
    return weights


def percentile_interval(samples: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Central `confidence` interval of bootstrap samples (R, ...) -> low, high (...); NaN samples are left out."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class absent from every resample: NaN is the answer
        low, high = np.nanquantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
