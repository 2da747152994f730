"""Confusion counts and calibration counts per image, the scores computed from them, and their intervals.

Everywhere rows are the target class and columns the prediction, scores are fractions in float64, and a class
that gives 0/0 (absent from target and prediction; for Acc and precision already from one of them) is NaN, left
out of every mean. `class_mean` tells how many classes a mean is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltseg_core.config import IGNORE_INDEX
from ltseg_core.stats import GROUPS, percentile_interval, resampling_weights

Array = Any  # np.ndarray or Tensor; every function below returns the kind it was given
UNBOUNDED = (float("-inf"), float("inf"))


class Marginals(NamedTuple):
    """True positives, false positives and false negatives of each class, each (..., C) float64."""

    tp: Array
    fp: Array
    fn: Array


class ClassMean(NamedTuple):
    """A mean over classes and the number of classes it is over (NaN and 0 if there are none)."""

    value: float
    classes: int


def marginals(counts: Array | Marginals) -> Marginals:
    """TP, FP, FN from confusion counts (..., C, C), which may be rates; marginals pass unchanged."""
    if isinstance(counts, Marginals):
        return counts
    counts = counts.double() if isinstance(counts, Tensor) else np.asarray(counts, dtype=np.float64)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"confusion counts must have shape (..., C, C), got {tuple(counts.shape)}")
    # diagonal of the last two axes, which numpy and torch name differently
    tp = counts.diagonal(0, -2, -1)
    return Marginals(tp, counts.sum(-2) - tp, counts.sum(-1) - tp)


def iou(counts: Array | Marginals) -> Array:
    """TP / (TP + FP + FN), (..., C)."""
    m = marginals(counts)
    return _ratio(m.tp, m.tp + m.fp + m.fn)


def acc(counts: Array | Marginals) -> Array:
    """Class accuracy (recall) TP / (TP + FN), (..., C); NaN where the class does not occur in the target."""
    m = marginals(counts)
    return _ratio(m.tp, m.tp + m.fn)


def precision(counts: Array | Marginals) -> Array:
    """TP / (TP + FP), (..., C); NaN where the class is never predicted."""
    m = marginals(counts)
    return _ratio(m.tp, m.tp + m.fp)


def dice(counts: Array | Marginals) -> Array:
    """2 TP / (2 TP + FP + FN), (..., C)."""
    m = marginals(counts)
    return _ratio(2 * m.tp, 2 * m.tp + m.fp + m.fn)


def miou(counts: Array | Marginals) -> Array:
    """Mean IoU over the classes that occur in target or prediction, (...)."""
    return nanmean(iou(counts))


def macc(counts: Array | Marginals) -> Array:
    """Mean class accuracy over the classes that occur in the target, (...)."""
    return nanmean(acc(counts))


def pixel_acc(counts: Array | Marginals) -> Array:
    """Share of the labelled pixels that are predicted right, (...)."""
    m = marginals(counts)
    return _ratio(m.tp.sum(-1), (m.tp + m.fn).sum(-1))


def weighted_iou(counts: Array | Marginals) -> Array:
    """IoU weighted by the class's share of the target pixels (frequency-weighted IoU), (...)."""
    m = marginals(counts)
    pixels, scores = m.tp + m.fn, iou(m)
    return _ratio((pixels * _zero_nan(scores)).sum(-1), pixels.sum(-1))


def dice_error(counts: Array | Marginals) -> Array:
    """1 - mean over classes of 2 TP / (2 TP + FP + FN), (...): PAT's error, with hard predictions.

    PAT does not define its error. Differs: counted over the whole set with no epsilon, absent classes left out.
    """
    return 1 - nanmean(dice(counts))


METRICS: dict[str, Callable[[Array | Marginals], Array]] = {
    "iou": iou,
    "acc": acc,
    "precision": precision,
    "dice": dice,
    "miou": miou,
    "macc": macc,
    "pixel_acc": pixel_acc,
    "weighted_iou": weighted_iou,
    "dice_error": dice_error,
}


def uniform_test(counts: Array) -> Array:
    """Confusion rates (..., C, C) of a test set with equally many pixels of each class: row k divided by n_k.

    The exact form of MEDOE's uniform test distribution, without sampling. A class absent from the target keeps
    a row of zeros. Every score here accepts the result.
    """
    marginals(counts)  # refuses another shape
    counts = counts.double() if isinstance(counts, Tensor) else np.asarray(counts, dtype=np.float64)
    return _zero_nan(_ratio(counts, counts.sum(-1)[..., None]))


def iou_at(acc: Array, fp_per_tp: Array) -> Array:
    """IoU of a class with accuracy `acc` in (0, 1] and `fp_per_tp` false positives per true positive, broadcast.

    1 / IoU = 1 / Acc + FP / TP (Region Rebalance, Eq. 3). Its slope over Acc at a fixed FP / TP is (IoU / Acc)^2.
    """
    return 1 / (1 / acc + fp_per_tp)


def fp_per_tp(counts: Array | Marginals, classes: Sequence[int] | np.ndarray) -> Array:
    """False positives per true positive of some classes together, (...); NaN where none of their pixels is found.

    For one class it is 1 / precision - 1 (Region Rebalance, Sec. 3.1.1).
    """
    m = marginals(counts)
    tp, fp = m.tp[..., classes].sum(-1), m.fp[..., classes].sum(-1)
    return _ratio(fp, tp) * _ratio(tp, tp)  # 0 / 0 is NaN where fp / 0 would be infinite


def same_labels(a: Array | Marginals, b: Array | Marginals) -> bool:
    """Whether two methods were evaluated on as many labelled pixels TP + FN of every class."""
    x, y = marginals(a), marginals(b)
    return bool(np.array_equal(x.tp + x.fn, y.tp + y.fn))


def remark1(before: Array | Marginals, after: Array | Marginals) -> np.ndarray:
    """Whether each class meets Remark 1 of Region Rebalance, (..., C) bool: its IoU then does not fall.

    With Acc going from A to (1 + K) A: FP' - (1 + K) FP <= K n (Eq. 12-16), n the labelled pixels of the class.
    Multiplied by TP it is a comparison of integers, and it covers classes that were not found before.
    before, after: integer counts on the same labels; CPU tensors or arrays.
    """
    (tp, fp, fn), (tp2, fp2, _) = ([np.asarray(x).astype(np.int64) for x in marginals(c)] for c in (before, after))
    return tp * fp2 - tp2 * fp <= (tp2 - tp) * (tp + fn)


def false_positive_sources(counts: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """False positives of each class by the group that the pixels truly belong to, (..., 3, C), see `stats.GROUPS`.

    counts: (..., C, C);  groups: C names. The sum over the groups is FP (MEDOE, Eq. 14 splits it in two).
    """
    wrong = np.asarray(counts) * ~np.eye(len(groups), dtype=bool)
    return np.stack([wrong[..., np.asarray(groups) == name, :].sum(-2) for name in GROUPS], -2)


def fates(counts: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Where the pixels of each true group go, (..., 3, 5): the shares right, wrong inside the group, and called
    head, body or tail where that is another group; see `stats.GROUPS`.

    counts: (..., C, C);  groups: C names. Means over the classes of the group with labelled pixels; they add up to 1.
    NaN for a group without any.
    """
    member = np.array([[group == name for group in groups] for name in GROUPS])  # (3, C)
    rates = uniform_test(np.asarray(counts))  # rows sum to 1
    right, to = np.diagonal(rates, 0, -2, -1), rates @ member.T  # (..., C), (..., C, 3)
    inside = (to * member.T).sum(-1) - right
    each = np.concatenate([np.stack([right, inside], -1), to * ~member.T], -1)  # (..., C, 5)
    weight = member * (rates.sum(-1) > 0)[..., None, :]  # (..., 3, C)
    return _ratio(weight @ each, weight.sum(-1, keepdims=True))


def error_map(label: np.ndarray, predicted: np.ndarray, class_id: int) -> np.ndarray:
    """What a prediction does with one class, (H, W) uint8: 1 true positive, 2 false positive, 3 false negative.

    0 where neither names the class, IGNORE_INDEX where the label does not count. label, predicted: (H, W) integers.
    Raises ValueError for different shapes.
    """
    if label.shape != predicted.shape:
        raise ValueError(f"label and predicted must share one shape, got {label.shape} and {predicted.shape}")
    true, called = label == class_id, predicted == class_id
    errors = np.where(true, np.where(called, 1, 3), np.where(called, 2, 0))
    return np.where(label == IGNORE_INDEX, IGNORE_INDEX, errors).astype(np.uint8)


def class_mean(per_class: Array) -> ClassMean:
    """Mean of (C,) scores without the NaN, and the number of classes averaged."""
    return ClassMean(float(nanmean(per_class)), int((per_class == per_class).sum()))


def group_means(per_class: Array, groups: Sequence[str]) -> dict[str, ClassMean]:
    """Mean score of the head, body and tail classes; an empty group gives NaN over 0 classes, never 0.

    per_class: (C,) scores;  groups: C names, see `stats.groups`. Raises ValueError for another length or name.
    """
    if tuple(per_class.shape) != (len(groups),):
        raise ValueError(f"expected scores of shape ({len(groups)},), one per group name, got {tuple(per_class.shape)}")
    if unknown := set(groups) - set(GROUPS):
        raise ValueError(f"groups must be among {GROUPS}, got {sorted(unknown)[0]!r}")
    names = np.asarray(groups)
    return {group: class_mean(per_class[np.flatnonzero(names == group)]) for group in GROUPS}


class ConfusionCounts:
    """Confusion counts of each image, collected on the device of the predictions.

        counts = ConfusionCounts(num_classes)
        for image, target in batches:
            counts.update(model(image).argmax(1), target)
        counts.miou()

    One `bincount` per batch, and nothing else that waits for the device: values out of range are noticed when a
    result is read, which then raises ValueError naming the value. Memory is 4 C^2 bytes per image.
    ignore_index must be in [C, 255], so that target maps fit in uint8.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        if not 1 <= num_classes <= 255:
            raise ValueError(f"num_classes must be in [1, 255], got {num_classes}")
        if not num_classes <= ignore_index <= 255:
            raise ValueError(f"ignore_index must be in [num_classes, 255] = [{num_classes}, 255], got {ignore_index}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._counts: list[Tensor] = []
        self._ranges: list[Tensor] = []

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch. pred, target: (B, H, W) integers in [0, C), in target also ignore_index.

        Raises ValueError for another or an empty shape and TypeError for tensors that are not integer.
        """
        if pred.ndim != 3 or pred.shape != target.shape or not pred.numel():
            raise ValueError(
                f"pred and target must share one shape (B, H, W), got {tuple(pred.shape)} and {tuple(target.shape)}"
            )
        pred, target = _integers("pred", pred), _integers("target", target)
        # In uint8 the sum wraps: ignored pixels get row 0, class k row first + k, anything above is no class.
        first = 256 - self.ignore_index
        row, column = target.to(torch.uint8) + first, pred.to(torch.uint8)
        extremes = (*pred.aminmax(), *target.aminmax(), row.amax())
        self._ranges.append(torch.stack([value.long() for value in extremes]))

        rows, columns = first + self.num_classes, self.num_classes
        image = torch.arange(len(pred), dtype=torch.int32, device=pred.device)[:, None, None]
        cell = (image * rows + row.clamp(max=rows - 1)) * columns + column.clamp(max=columns - 1)  # (B, H, W)
        counts = torch.bincount(cell.flatten(), minlength=len(pred) * rows * columns)
        self._counts.append(counts.view(-1, rows, columns)[:, first:].int())

    @property
    def counts(self) -> Tensor:
        """(N, C, C) int32 on the device of the predictions; rows are the target class, columns the prediction.

        Raises ValueError if a batch held a prediction or a target that is no class.
        """
        if not self._counts:
            return torch.zeros(0, self.num_classes, self.num_classes, dtype=torch.int32)
        if self._ranges:
            self._check_ranges(torch.stack(self._ranges).cpu())
            self._counts, self._ranges = [torch.cat(self._counts)], []
        return self._counts[0]

    def _check_ranges(self, ranges: Tensor) -> None:
        last, row_of_class_0 = self.num_classes - 1, 256 - self.ignore_index
        low, high = ranges.amin(0).tolist(), ranges.amax(0).tolist()
        for name, value, valid in (
            ("pred", low[0], low[0] >= 0),
            ("pred", high[1], high[1] <= last),
            ("target", low[2], low[2] >= 0),
            ("target", high[3], high[3] <= self.ignore_index),
            ("target", high[4] - row_of_class_0, high[4] - row_of_class_0 <= last),
        ):
            if not valid:
                or_ignored = f" or {self.ignore_index} (ignored)" if name == "target" else ""
                raise ValueError(f"{name} must be a class in [0, {last}]{or_ignored}, got {value}")

    def total(self) -> Tensor:
        """Confusion counts of all images together, (C, C) int64 on the CPU."""
        return self.counts.sum(0, dtype=torch.int64).cpu()

    def iou(self) -> Tensor:
        """IoU of each class over all images, (C,) float64."""
        return iou(self.total())

    def acc(self) -> Tensor:
        return acc(self.total())

    def precision(self) -> Tensor:
        return precision(self.total())

    def dice(self) -> Tensor:
        return dice(self.total())

    def miou(self) -> float:
        return float(miou(self.total()))

    def macc(self) -> float:
        return float(macc(self.total()))

    def pixel_acc(self) -> float:
        return float(pixel_acc(self.total()))

    def dice_error(self) -> float:
        return float(dice_error(self.total()))


def calibration_counts(logits: Tensor, target: Tensor, *, bins: int = 15, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labelled pixels, their summed confidence and how many are predicted right, (2, B, C, bins, 3) float64.

    logits: (B, C, H, W) float;  target: (B, H, W) integers in [0, C), or ignore_index
    The confidence of a pixel is its largest softmax probability; bin m of M holds those in (m / M, (m + 1) / M].
    First axis: the pixels of each class by their true, then by their predicted class. All entries add up over images,
    and over the classes of a group; `ece` and `overconfidence` take any such sum. On the device of the logits.
    Raises ValueError for another shape, bins < 1, and a target that is no class.
    """
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    target, own = _rows(logits, target, ignore_index)
    batch, classes = logits.shape[:2]
    confidence, predicted = logits.float().softmax(1).max(1)  # (B, H, W)
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)[1:-1]
    counts = []
    for row in (own, own + (predicted - target).where(target != ignore_index, 0)):
        cell = row * bins + torch.bucketize(confidence, edges)
        sums = _sums(cell, batch * (classes + 1) * bins, confidence, predicted == target)
        counts.append(sums.view(batch, classes + 1, bins, 3)[:, :classes])
    return torch.stack(counts)


def truth_counts(logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labelled pixels of each class, how many are predicted right, and their summed 1 - p_y, (B, C, 3) float64.

    logits: (B, C, H, W) float;  target: (B, H, W) integers in [0, C), or ignore_index
    p_y is the softmax probability of the true class; -inf logits take their class out. All entries add up over images.
    The second over the first is Acc, the third over it the bias of MEDOE's Table 11 (as we read its Eq. 9). On the
    device of the logits. Raises ValueError as `calibration_counts`.
    """
    target, row = _rows(logits, target, ignore_index)
    batch, classes = logits.shape[:2]
    true = target.where(target != ignore_index, 0).unsqueeze(1)
    missing = 1 - logits.float().softmax(1).gather(1, true).squeeze(1).double()
    right = logits.max(1).indices == target
    return _sums(row, batch * (classes + 1), right, missing).view(batch, classes + 1, 3)[:, :classes]


def region_prediction(logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels decided region by region, (B, H, W) int64: a region, all pixels of one true class in an image, is called
    the class of its largest mean logit.

    logits: (B, C, H, W) float;  target: (B, H, W) integers in [0, C), or ignore_index (these pixels are one region)
    Where the logits are a linear function of features, so is their mean: what a linear classifier makes of the mean
    feature of a region (Region Rebalance, Sec. 3.3.1). In the confusion counts of one image a region is one entry. On
    the device of the logits. Raises ValueError as `calibration_counts`.
    """
    _, row = _rows(logits, target, ignore_index)
    batch, classes = logits.shape[:2]
    total = logits.new_zeros(batch * (classes + 1), classes, dtype=torch.float64)
    total.index_add_(0, row.flatten(), logits.movedim(1, -1).reshape(-1, classes).double())
    return total.max(1).indices[row]  # the largest sum is the largest mean


def _rows(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The target as int64, and for each pixel the row b (C + 1) + y of its image and class, (B, H, W); what is ignored
    has the last row of its image. Raises ValueError for another shape and a target that is no class."""
    if logits.ndim != 4 or target.shape != logits[:, 0].shape:
        raise ValueError(
            f"expected logits (B, C, H, W) and target (B, H, W), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    batch, classes = logits.shape[:2]
    target = _integers("target", target).long()
    labelled = target != ignore_index
    if (wrong := target[labelled & ((target < 0) | (target >= classes))]).numel():
        raise ValueError(f"target must be a class in [0, {classes - 1}] or {ignore_index} (ignored), got {wrong[0]}")
    image = torch.arange(batch, device=logits.device)[:, None, None]
    return target, image * (classes + 1) + torch.where(labelled, target, classes)


def _sums(cell: Tensor, cells: int, *weights: Tensor) -> Tensor:
    """How many pixels each cell has, and their sum of each weight, (cells, 1 + weights) float64."""
    cell = cell.flatten()
    columns = [torch.bincount(cell, minlength=cells).double()]
    return torch.stack([*columns, *(torch.bincount(cell, x.double().flatten(), cells) for x in weights)], -1)


def ece(counts: Array) -> Array:
    """Expected calibration error of `calibration_counts` (..., bins, 3), a fraction, (...); NaN without a pixel.

    sum_m n_m / n |acc_m - conf_m|, n_m pixels in bin m, acc_m the share of them that is right, conf_m their mean
    confidence (Guo et al., ICML 2017, Eq. 3).
    """
    pixels, confidence, right = (counts[..., i] for i in range(3))
    return _ratio(abs(confidence - right).sum(-1), pixels.sum(-1))


def overconfidence(counts: Array) -> Array:
    """Mean confidence minus the share that is right, of `calibration_counts` (..., bins, 3), a fraction, (...).

    Positive where the network is surer than it may be; between -ece and ece.
    """
    pixels, confidence, right = (counts[..., i].sum(-1) for i in range(3))
    return _ratio(confidence - right, pixels)


class Resampled(NamedTuple):
    """Counts of S seeds and their bootstrap replicates: made once by `resample`, used by the interval of any metric."""

    seeds: Marginals  # (S, C), all images
    replicates: Marginals  # (S, R, C), as many images drawn with replacement, the same ones for every seed
    images: int


def resample(counts: Array | Marginals | Resampled, *, replicates: int = 2000, seed: int = 0) -> Resampled:
    """Bootstrap replicates over the images of counts (S, N, C, C), or of their marginals; passes its own result.

    The draw depends on `seed`, `replicates` and N alone, so the replicates of two methods are paired.
    Raises ValueError for other shapes and replicates < 1.
    """
    if isinstance(counts, Resampled):
        return counts
    # TP, FP, FN as one array (3, S, N, C): C instead of C^2 numbers per image
    m = np.stack([v.cpu().numpy() if isinstance(v, Tensor) else v for v in marginals(counts)])
    if m.ndim != 4 or 0 in m.shape:
        raise ValueError(f"expected counts of shape (S, N, C, C), none of them 0, got marginals of shape {m.shape[1:]}")
    drawn = resampling_weights(seed, replicates, m.shape[2])  # (R, N)
    return Resampled(Marginals(*m.sum(2)), Marginals(*np.matmul(drawn, m)), m.shape[2])


def interval(
    counts: Array | Marginals | Resampled,
    metric: Callable[[Array | Marginals], Array] = miou,
    *,
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    within: tuple[float, float] = UNBOUNDED,
) -> tuple[Any, Any, Any]:
    """Score of one method with its interval over test images and training seeds: (value, low, high).

    counts: (S, N, C, C) per training seed and test image, their marginals, or what `resample` made of them (then
    `replicates` and `seed` are those given there);  metric: a function of this module.
    The score is the mean over seeds of the metric over all images (seeds where it is NaN left out). The images are
    resampled (bootstrap percentiles of that mean, resamples with a NaN left out); the seeds, too few to be resampled,
    enter by Student's t; the two half-widths are added in quadrature. With one seed the interval covers the
    images only, with one image the seeds only; NaN limits where there is one of each. Floats, or (C,) arrays for a
    per-class metric.
    within: the range of the metric, e.g. (0, 1), which Student's t does not know: limits beyond it are cut off there
    """
    drawn = resample(counts, replicates=replicates, seed=seed)
    return with_limits(metric(drawn.seeds), metric(drawn.replicates), confidence, images=drawn.images, within=within)


def paired_interval(
    a: Array | Marginals | Resampled,
    b: Array | Marginals | Resampled,
    metric: Callable[[Array | Marginals], Array] = miou,
    *,
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """Difference a - b of two methods with its paired interval: (difference, low, high).

    As `interval`, of the differences seed by seed, the images resampled alike for both methods; they must come in
    the same order of seeds and images. Raises ValueError for other shapes, and for different ones or other labels.
    """
    x, y = (resample(counts, replicates=replicates, seed=seed) for counts in (a, b))
    if x.replicates.tp.shape != y.replicates.tp.shape or x.images != y.images:
        (s, n, c), (s2, n2, c2) = ((len(d.seeds.tp), d.images, d.seeds.tp.shape[1]) for d in (x, y))
        raise ValueError(
            "a and b must come from the same seeds, images and classes, got "
            f"{s} x {n} x {c} and {s2} x {n2} x {c2} (seeds x images x classes)"
        )
    if not same_labels(x.seeds, y.seeds):
        raise ValueError("a and b differ in their labelled pixels: other images, or labels that changed since")
    return contrast((1, x, metric), (-1, y, metric), confidence=confidence)


def contrast(
    *parts: tuple[float, Array | Marginals | Resampled, Callable[[Array | Marginals], Array]],
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """Sum over parts (coefficient, counts, metric) of coefficient x metric, with its interval: (value, low, high).

    As `paired_interval`, the contrast of 1 and -1; e.g. the difference of two differences. The counts must come in the
    same order of seeds and images, but may weigh their pixels differently. Raises ValueError for other numbers of them.
    """
    drawn = [(a, resample(counts, replicates=replicates, seed=seed), score) for a, counts, score in parts]
    if len(sizes := {(len(d.seeds.tp), d.images, d.replicates.tp.shape[1]) for _, d, _ in drawn}) != 1:
        raise ValueError(f"the parts must come from the same seeds and images, got (seeds, images, replicates) {sizes}")
    total, samples = (sum(a * score(getattr(d, of)) for a, d, score in drawn) for of in ("seeds", "replicates"))
    return with_limits(total, samples, confidence, images=drawn[0][1].images)


def bootstrap(
    sums: Array,
    score: Callable[[np.ndarray], np.ndarray],
    *,
    replicates: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    within: tuple[float, float] = UNBOUNDED,
) -> tuple[Any, Any, Any]:
    """Any score of sums over images with its interval over test images and seeds, as `interval`: (value, low, high).

    sums: (S, N, ...) what each image adds for each seed, e.g. counts of two methods for a paired score, (S, N, 2, C, C)
    score: a function (..., the last axes of sums) -> (...), or (..., K) for K scores at once, of what was summed over
           the images, e.g. `lambda counts: miou(uniform_test(counts))`;  within: its range, as in `interval`
    The draws are those of `interval`; memory is bounded. Floats, or (K,) arrays.
    Raises ValueError for sums without an image or a seed, and replicates < 1.
    """
    sums = np.asarray(sums.cpu() if isinstance(sums, Tensor) else sums, dtype=np.float64)
    if sums.ndim < 2 or 0 in sums.shape:
        raise ValueError(f"expected sums of shape (S, N, ...), none of them 0, got {sums.shape}")
    drawn = resampling_weights(seed, replicates, sums.shape[1])  # (R, N)
    parts = np.array_split(drawn, -(-replicates * sums[:, 0].size // 2**23))  # 64 MB of replicates at a time
    flat = sums.reshape(*sums.shape[:2], -1)
    samples = [score((part @ flat).reshape(len(flat), len(part), *sums.shape[2:])) for part in parts]
    replicated = np.concatenate(samples, 1)
    return with_limits(score(sums.sum(1)), replicated, confidence, images=sums.shape[1], within=within)


def with_limits(
    scores: np.ndarray, samples: np.ndarray, confidence: float, *, images: int, within: tuple[float, float] = UNBOUNDED
) -> tuple[Any, Any, Any]:
    """Mean over seeds with its interval over images and seeds, as in `interval`: (value, low, high).

    scores: (S,) or (S, C) per seed;  samples: (S, R) or (S, R, C) their bootstrap replicates over `images` images
    """
    value = nanmean(np.moveaxis(scores, 0, -1))
    low, high = percentile_interval(nanmean(np.moveaxis(samples, 0, -1)), confidence)
    _, seeds_low, seeds_high = seed_interval(scores, confidence=confidence)
    half = np.nan_to_num((seeds_high - seeds_low) / 2)
    below, above = np.hypot(value - low, half), np.hypot(high - value, half)
    if images == 1:  # nothing to resample
        below = above = (seeds_high - seeds_low) / 2
    return _plain(value), _plain(np.maximum(value - below, within[0])), _plain(np.minimum(value + above, within[1]))


def seed_interval(values: Sequence[float] | Array, *, confidence: float = 0.95) -> tuple[Any, Any, Any]:
    """Mean over training seeds with its Student-t interval: (mean, low, high).

    values: (S,) or (S, C), e.g. paired differences, one per seed; NaN are left out. Fewer than two seeds have no
    interval: (value, NaN, NaN). Raises ValueError if there is none.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 0 or not len(x):
        raise ValueError(f"expected at least one value per seed, got shape {x.shape}")
    present = ~np.isnan(x)
    n, mean = present.sum(0), nanmean(np.moveaxis(x, 0, -1))
    squares = np.where(present, (x - mean) ** 2, 0).sum(0)
    half = np.where(n > 1, t.ppf((1 + confidence) / 2, np.maximum(n - 1, 1)), np.nan) * np.sqrt(
        squares / np.maximum(n - 1, 1) / np.maximum(n, 1)
    )
    return _plain(mean), _plain(mean - half), _plain(mean + half)


def _plain(x: np.ndarray) -> Any:
    return float(x) if np.ndim(x) == 0 else x


def _integers(name: str, x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {x.dtype}")
    # torch has few kernels for the wider unsigned types
    return x.long() if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x


def _ratio(numerator: Array, denominator: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return numerator / denominator


def nanmean(values: Array) -> Array:
    """Mean over the last axis without NaN; NaN if nothing is left."""
    present = values == values
    return _ratio(_zero_nan(values).sum(-1), present.sum(-1))


def _zero_nan(values: Array) -> Array:
    present = values == values
    return values.where(present, 0) if isinstance(values, Tensor) else np.where(present, values, 0)
