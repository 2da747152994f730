"""What decoder features look like: the same pixels seen by every network, measures of them without a unit, t-SNE.

A measure gives one number per pixel, (N,); `by_class` averages it over classes and resamples the images. None changes
when the features are shifted, turned or multiplied by a number, so networks may be compared by them. Distances may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core import evaluate, metrics, stats
from ltseg_core.config import UserError
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.models import padding, stride_of

ROWS_AT_ONCE = 1024  # of the distances between all pixels


# ----------------------------------------------------------------------------------------------------- pixels


class Pixels(NamedTuple):
    """Pixels drawn from the label maps of a data set, image after image; four arrays (N,) int64."""

    image: np.ndarray
    """Index of the image."""
    row: np.ndarray
    column: np.ndarray
    label: np.ndarray
    """Class, in [0, C)."""


def draw_pixels(dataset: SegmentationDataset, *, images: int = 8, pixels: int = 25, seed: int = 0) -> Pixels:
    """The same number of pixels of every class, from the same number of images: `pixels` in each of `images` images.

    Rare classes live in few images, and the variance within m images lacks a share 1/m of what lies between images:
    drawn from all, frequent classes would be wider by that alone. Only images with at least `pixels` pixels of a class
    count for it; a class with fewer such images has fewer pixels in the result, down to none (see `coverage`).
    Raises ValueError for numbers < 1 and UserError if no class has an image that counts.
    """
    if min(images, pixels) < 1:
        raise ValueError(f"images and pixels must be >= 1, got {images} and {pixels}")
    classes = len(dataset.classes)
    occurs = np.array([dataset.histogram(i)[:classes] for i in range(len(dataset))]).reshape(-1, classes)
    order = np.random.default_rng(seed).random(occurs.shape)
    order[occurs < pixels] = np.inf
    chosen = (order.argsort(0).argsort(0) < images) & np.isfinite(order)  # (images of the data set, C)
    if not chosen.any():
        raise UserError(
            f"no image of split {dataset.split!r} of {dataset.name} has {pixels} pixels of a class: draw fewer"
        )
    parts = []
    for i in np.flatnonzero(chosen.any(1)).tolist():
        label = dataset.label(i)
        wanted = np.zeros(256, dtype=bool)
        wanted[:classes] = chosen[i]
        flat = np.flatnonzero(wanted[label])
        flat = np.random.default_rng((seed, i)).permutation(flat)
        own = label.ravel()[flat].astype(np.int64)
        by_class = own.argsort(kind="stable")
        start = np.searchsorted(own[by_class], own[by_class])  # where the class of each begins
        kept = by_class[np.arange(len(own)) - start < pixels]
        parts.append((np.full(len(kept), i), *np.divmod(flat[kept], label.shape[1]), own[kept]))
    return Pixels(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def coverage(pixels: Pixels, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """From how many images, and how many pixels, each class was drawn: two arrays (C,) int64, 0 for an absent class."""
    pairs = np.unique(np.stack([pixels.image, pixels.label]), axis=1)
    return np.bincount(pairs[1], minlength=num_classes), np.bincount(pixels.label, minlength=num_classes)


def at_pixels(
    network: nn.Module, dataset: SegmentationDataset, pixels: Pixels, *, batch_size: int = 8, precision: str = "fp32"
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and logits (N, C) of a network at `pixels`, float64.

    Each map is sampled bilinearly at the centre of the pixel, the values at its border continued; for the logits that
    is what an evaluation does before it takes the largest. Images are seen as in `evaluate.outputs`.
    """
    stride = stride_of(network)
    visited, first = np.unique(pixels.image, return_index=True)
    bounds = [*first.tolist(), len(pixels.image)]
    parts, done = [], 0
    for output, labels in evaluate.outputs(
        network, dataset, visited.tolist(), batch_size=batch_size, precision=precision
    ):
        sides = output.logits.shape[-2:]
        # share of the padded image that is image
        inside = [side / (side + more) for side, more in zip(sides, padding(sides, stride), strict=True)]
        for features, logits, label in zip(output.features, output.logits, labels, strict=True):
            own = slice(bounds[done], bounds[done + 1])
            row, column = (pixels.row[own] + 0.5) / label.shape[0], (pixels.column[own] + 0.5) / label.shape[1]
            parts.append((_sampled(features, row * inside[0], column * inside[1]), _sampled(logits, row, column)))
            done += 1
    features, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    return features, logits


def _sampled(values: Tensor, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A map (D, h, w) at places given as shares of its height and width, both (n,): (n, D) float64."""
    grid = torch.from_numpy(np.stack([column, row], axis=-1) * 2 - 1)[None, None].to(values.device)
    found = F.grid_sample(values[None].double(), grid, padding_mode="border", align_corners=False)
    return found[0, :, 0].T.cpu().numpy()


# --------------------------------------------------------------------------------------------------- measures


def class_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the features of each class, (C, D); NaN for a class without pixels. features: (N, D), labels: (N,)"""
    member = np.zeros((labels.max() + 1, len(labels)))
    member[labels, np.arange(len(labels))] = 1
    with np.errstate(invalid="ignore"):
        return member @ features / member.sum(1, keepdims=True)


def spread(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """|x - mu_y|^2 / (mean of |mu_j - mu_k|^2 over all pairs of classes), (N,).

    features: (N, D);  labels: (N,) integers. Its mean over a class is the class's variance, which is to a disc of
    that variance as its area: the square root is the radius, in units of the distance between class means.
    Raises ValueError as all measures do for other shapes, values that are not finite, and fewer than two classes.
    """
    features, labels = _checked(features, labels)
    means = class_means(features, labels)
    present = means[~np.isnan(means).any(1)]
    n = len(present)
    between = 2 * n / (n - 1) * present.var(0).sum()  # sum over pairs = n times the sum over their centre
    return np.square(features - means[labels]).sum(1) / between


def margin(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(b - a) / max(a, b) with a = |x - mu_y| and b the distance to the nearest other class mean, (N,) in [-1, 1].

    Positive where the nearest class mean is the right one; 0 where a = b = 0. This is the silhouette with class means
    in place of all pixels (Rousseeuw 1987). A pixel counts in its own class mean. Errors as in `spread`.
    """
    features, labels = _checked(features, labels)
    distance = np.sqrt(_squared_distances(features, np.nan_to_num(class_means(features, labels), nan=np.inf)))
    rows = np.arange(len(labels))
    own = distance[rows, labels]
    distance[rows, labels] = np.inf
    other = distance.min(1)
    largest = np.maximum(own, other)
    return np.divide(other - own, largest, out=np.zeros_like(own), where=largest > 0)


def purity(
    features: np.ndarray, labels: np.ndarray, *, neighbours: int = 10, blocks: np.ndarray | None = None
) -> np.ndarray:
    """Share of the nearest other pixels that have the pixel's own class, (N,) in [0, 1]; leave-one-out.

    blocks: (N,) integers, e.g. the image of each pixel: neighbours are sought in other blocks only, since those in
    the same image may show the same object. Euclidean distances, to rounding. Pixels tied for the last places share
    them evenly, so the order of the pixels does not matter. NaN where no pixel of the class lies in another block.
    Raises ValueError as `spread`, and if a pixel has fewer than `neighbours` pixels outside its block.
    """
    features, labels = _checked(features, labels)
    _, block, sizes = np.unique(
        np.arange(len(labels)) if blocks is None else blocks, return_inverse=True, return_counts=True
    )
    outside = len(labels) - sizes.max()
    if not 1 <= neighbours <= outside:
        raise ValueError(f"neighbours must be in [1, {outside}] (pixels outside the largest block), got {neighbours}")
    one_hot = np.eye(labels.max() + 1)[labels]
    inside = np.zeros((len(sizes), one_hot.shape[1]))
    np.add.at(inside, block, one_hot)  # pixels of each class in each block
    possible = one_hot.sum(0)[labels] > inside[block, labels]
    shares = []
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distance = _squared_distances(features[rows], features)
        distance[block[rows, None] == block] = np.inf
        last = np.partition(distance, neighbours - 1, axis=1)[:, neighbours - 1, None]
        closer, tied = (distance < last).astype(float), (distance == last).astype(float)
        free = neighbours - closer.sum(1, keepdims=True)
        votes = (closer + tied * (free / tied.sum(1, keepdims=True))) @ one_hot
        shares.append(np.take_along_axis(votes, labels[rows, None], 1)[:, 0] / neighbours)
    return np.where(possible, np.concatenate(shares), np.nan)


def _checked(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 features around zero, where distances lose least to rounding, and the labels."""
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"expected features (N, D) and integer labels (N,), got {features.shape} and {labels.shape} {labels.dtype}"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"features must be finite, got {features[~np.isfinite(features)][0]}")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"expected pixels of at least two classes, got {len(labels)} pixels of {np.unique(labels)}")
    return features - features.mean(0), labels


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2, (n, m); inf where b_j is."""
    known = np.isfinite(b).all(1)
    found = np.full((len(a), len(b)), np.inf)
    found[:, known] = np.square(a).sum(1)[:, None] + np.square(b[known]).sum(1) - 2 * a @ b[known].T
    return found.clip(0)


# -------------------------------------------------------------------------------------------------- intervals


class ByClass(NamedTuple):
    """Class means of a measure for S seeds, and their bootstrap replicates over images; NaN for an absent class."""

    seeds: np.ndarray  # (S, C)
    replicates: np.ndarray  # (S, R, C), the same images drawn for every seed
    images: int


def by_class(
    values: Sequence[np.ndarray], pixels: Pixels, num_classes: int, *, replicates: int = 1000, seed: int = 0
) -> ByClass:
    """Mean of a measure over the pixels of each class. values: (S, N), one row per training seed; NaN is left out.

    The images that were drawn from are resampled whole, as their pixels are alike; what a measure takes from all
    pixels (class means, neighbours) stays as it is. A class that a resample misses is NaN in it. The draw depends on
    `pixels`, `replicates` and `seed` alone, so two methods are paired.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 2 or v.shape[1] != len(pixels.label):
        raise ValueError(f"expected values (S, {len(pixels.label)}), one per pixel, got {v.shape}")
    _, image = np.unique(pixels.image, return_inverse=True)
    n = image.max() + 1
    cell = image * num_classes + pixels.label  # (N,)
    present = ~np.isnan(v)
    shape = (len(v), n, num_classes)
    flat = (np.arange(len(v))[:, None] * n * num_classes + cell).ravel()
    sums, sizes = (
        np.bincount(flat, weight.ravel(), minlength=np.prod(shape)).reshape(shape)
        for weight in (np.where(present, v, 0), present.astype(float))
    )
    drawn = stats.resampling_weights(seed, replicates, n)  # (R, n)
    with np.errstate(invalid="ignore"):
        return ByClass(sums.sum(1) / sizes.sum(1), (drawn @ sums) / (drawn @ sizes), n)


Score = Callable[[np.ndarray], np.ndarray]


def interval(
    measure: ByClass,
    score: Score = np.asarray,
    *,
    less: ByClass | None = None,
    confidence: float = 0.95,
    within: tuple[float, float] = metrics.UNBOUNDED,
) -> tuple[Any, Any, Any]:
    """Mean over seeds of score(class means) with its interval over images and seeds: (value, low, high).

    score: (..., C) -> (...) or (..., C).  less: of another method on the same pixels and seeds, to take the paired
    difference to.  within: the range of the score, as in `metrics.interval`. Images by bootstrap, seeds by Student's
    t, added in quadrature; with one seed the images only (`metrics.interval`).
    Raises ValueError if the two differ in shape.
    """
    if less is not None and measure.replicates.shape != less.replicates.shape:
        raise ValueError(
            f"expected measures of the same pixels and seeds, got {measure.replicates.shape} and"
            f" {less.replicates.shape} (seeds, replicates, classes)"
        )
    seeds, drawn = score(measure.seeds), score(measure.replicates)
    if less is not None:
        seeds, drawn = seeds - score(less.seeds), drawn - score(less.replicates)
    return metrics.with_limits(seeds, drawn, confidence, images=measure.images, within=within)


def log_ratio(groups: Sequence[str], over: str, under: str) -> Score:
    """Score log(mean over group `over` / mean over group `under`), geometric means, natural logarithm.

    (..., C) -> (...). Of `spread` it compares areas: 0 where both groups take up equal ones. Classes without a value
    are left out; NaN for a group of which none is left.
    """
    member = np.array([[g == wanted for g in groups] for wanted in (over, under)])

    def score(values: np.ndarray) -> np.ndarray:
        logs = np.log(values)
        first, second = (metrics.nanmean(np.where(own, logs, np.nan)) for own in member)
        return first - second

    return score


# ------------------------------------------------------------------------------------------------------ t-SNE


def tsne(
    spaces: Mapping[str, np.ndarray], *, perplexity: float = 30.0, steps: int = 500, seed: int = 0
) -> dict[str, np.ndarray]:
    """Two-dimensional t-SNE maps (N, 2) of the same N pixels in several spaces (N, D), all from one start.

    The start is the first space's plane of largest variance, so a class that moves has moved in the features. A map
    keeps neighbours; it evens out densities, so areas and distances between groups in it mean nothing.
    steps: of gradient descent; at 500 points twice as many lower the divergence it minimises by 0.5 %.
    Raises ValueError if the spaces differ in N, and unless perplexity < N.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len({len(x) for x in spaces.values()}) != 1:
        raise ValueError(f"expected the same pixels in every space, got {[len(x) for x in spaces.values()]}")
    plane = PCA(2, random_state=seed).fit_transform(next(iter(spaces.values())))
    start = (1e-4 * plane / plane[:, 0].std()).astype(np.float32)
    return {
        name: TSNE(perplexity=perplexity, max_iter=steps, init=start.copy(), random_state=seed).fit_transform(x)
        for name, x in spaces.items()
    }
