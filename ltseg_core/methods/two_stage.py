"""Baselines that re-train or correct the classifier of a finished network, and re-sampling.

Each builder changes the classifier of the network it is given, in place, and keeps everything before it; the
network must hold the weights of a finished run, usually of plain cross-entropy. z = classifier(x) are the logits
(B, C, h, w) of the features x (B, D, h, w), pi_k the share of class k of the labelled training pixels.
A stage with share 0 takes no optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core.config import IGNORE_INDEX, UserError, choose
from ltseg_core.losses import Prior, _require, build_loss, check_labels, class_sizes, one_hot, per_pixel, pixel_nll
from ltseg_core.methods.base import PixelCriterion, Stage, checked
from ltseg_core.models import CosineClassifier, Output, SegmentationNetwork, padding, reinitialise
from ltseg_core.stats import ClassCounts

Balance = Literal["sampling", "weights"]


# --- re-trained classifiers --------------------------------------------------------------------------------


@checked
def crt(
    network: SegmentationNetwork, counts: ClassCounts, *, balance: Balance = "sampling", samples: int = 4096
) -> list[Stage]:
    """cRT: a new classifier, trained with class-balanced pixels on frozen features (Kang et al., ICLR 2020).

    balance: "sampling" draws pixels, see `BalancedSampling`; "weights" weighs them by 1/n_k, scaled to mean 1 over
        the training pixels. Both estimate the mean over the classes of each class's mean cross-entropy.
    samples: pixels drawn per image, on average
    Raises UserError for another balance, or samples < 1.
    """
    criterion = balanced_criterion(counts, balance, samples)
    reinitialise(network.classifier)
    return [Stage("crt", network, criterion, frozen=before_classifier(network))]


@checked
def balanced_bound(
    network: SegmentationNetwork, counts: ClassCounts, *, split: Literal["train", "val"] = "train"
) -> list[Stage]:
    """DisAlign's bound, the classifier re-trained on balanced data, for segmentation, where no such data exist:
    re-trained on all pixels of a split, weighted by 1/n_k (scaled to mean 1 over these pixels).

    split: "train", the images that the features were learnt from. For a linear classifier the problem is convex: it
        then differs from `crt` with balance="weights" only in its start, the finished classifier, and reaches the same
        optimum, so it says how far cRT was from converging, not more. "val", labelled images that the first stage has
        not seen, with their own counts: scores on the split `val` are then those of training images.
    Raises UserError for another split; training does for a data set that lacks it, and for "val" with a `target`.
    """
    criterion = balanced_criterion(counts, "weights")

    def count(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        found = pixel_counts((target for _, target in batches), counts.num_classes)
        criterion.load_state_dict(balanced_criterion(found, "weights").state_dict())

    return [
        Stage(
            "balanced_bound",
            network,
            criterion,
            frozen=before_classifier(network),
            prepare=None if split == "train" else count,
            split=split,
        )
    ]


@checked
def lws(
    network: SegmentationNetwork, counts: ClassCounts, *, balance: Balance = "sampling", samples: int = 4096
) -> list[Stage]:
    """LWS: f_k z_k with one learned f_k per class, 1 at the start, all else frozen (Kang et al., ICLR 2020).

    The bias is scaled with its weights, as in the authors' code. Options and errors as in `crt`.
    """
    criterion = balanced_criterion(counts, balance, samples)
    base = network.classifier
    network.classifier = PerClassAffine(base, learn_scale=True)
    return [Stage("lws", network, criterion, frozen=(*before_classifier(network), base))]


# --- corrections without training --------------------------------------------------------------------------


@checked
def tau_norm(network: SegmentationNetwork, counts: ClassCounts, *, tau: float = 1.0) -> list[Stage]:
    """tau-normalisation: w_k / |w_k|^tau on the finished classifier, no bias (Kang et al., ICLR 2020).

    tau 0 only drops the bias; the authors choose tau on validation data. A weight of zeros stays zeros.
    Raises UserError for tau < 0, and for a classifier that is not linear.
    """
    _require("tau", tau, tau >= 0, ">= 0")
    classifier = network.classifier
    if not isinstance(classifier, nn.Conv2d):
        raise UserError(f"tau_norm needs a linear classifier, got {type(classifier).__name__}: use ncm or lws with it")
    with torch.no_grad():
        norm = classifier.weight.flatten(1).norm(dim=1).clamp(min=torch.finfo(classifier.weight.dtype).tiny)
        classifier.weight.div_(norm.pow(tau).view(-1, 1, 1, 1))
    classifier.bias = None
    return [untrained("tau_norm", network, counts)]


@checked
def posthoc_logit_adjustment(
    network: SegmentationNetwork, counts: ClassCounts, *, tau: float = 1.0, prior: Prior = "pixel"
) -> list[Stage]:
    """Predict with z_k - tau log pi_k (Menon et al., ICLR 2021, Eq. 9). tau 0 changes nothing.

    prior: what pi_k is the share of: pixels, or images that contain the class ("region")
    A class that never occurs, of which Eq. 9 says nothing (log 0), counts as the most frequent one (which shifts
    all logits alike): with tau >= 0 it wins no pixel that it did not win before. Counted as one pixel it would win
    nearly all.
    Raises UserError for a tau that is not finite, and for another prior.
    """
    _require("tau", tau, True, "finite")
    sizes = class_sizes(counts, prior, "most frequent")
    network.classifier = PerClassAffine(network.classifier, offset=-tau * (sizes / sizes.sum()).log())
    return [untrained("posthoc_logit_adjustment", network, counts)]


@checked
def ncm(
    network: SegmentationNetwork,
    counts: ClassCounts,
    *,
    distance: Literal["cosine", "euclidean"] = "cosine",
    labels: Literal["exact", "nearest"] = "exact",
) -> list[Stage]:
    """NCM: the class whose mean training feature is nearest (Kang et al., ICLR 2020).

    distance: see `NearestMean`. labels: see `class_means`. Raises UserError for another value of either.
    """
    classes = network.classifier.out_channels
    classifier = NearestMean(network.feature_channels, classes, distance)

    def prepare(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        means, pixels = class_means(network, batches, classes, labels=labels)
        classifier.set_means(means, pixels > 0)

    network.classifier = classifier
    return [untrained("ncm", network, counts, prepare)]


@checked
def tde(network: SegmentationNetwork, counts: ClassCounts, *, alpha: float = 1.0) -> list[Stage]:
    """De-confounded TDE: what the mean direction of the features gives is taken off (Tang et al., NeurIPS 2020).

    d = m / |m|, m the mean feature of the labelled training pixels; see `Deconfounded` for alpha, 0 of which changes
    nothing. Differs: the authors train with a normalised classifier of several heads, and m is a moving average over
    the training; here both are of the finished network, linear or cosine. In their detectors the background is left
    out of m and keeps its score; a segmentation need not have one. A class without training pixels may win some: what
    the classifier learned against it lies partly along d. Raises UserError for an alpha that is not finite.
    """
    _require("alpha", alpha, True, "finite")
    classifier = Deconfounded(network.classifier, alpha)

    def prepare(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        means, pixels = class_means(network, batches, classifier.out_channels)
        classifier.direction.copy_(F.normalize(pixels @ means, dim=0).view(-1, 1, 1))

    network.classifier = classifier
    return [untrained("tde", network, counts, prepare)]


class Deconfounded(nn.Module):
    """W (x - alpha d d.x) + b, or for a cosine classifier s w_k/|w_k| . (v - alpha d d.v) with v = x / |x|, which is
    the paper's total direct effect with one head, and without the small constant that it adds to |w_k|.

    direction: d, (D, 1, 1), of length 1
    """

    direction: Tensor

    def __init__(self, base: Any, alpha: float) -> None:
        super().__init__()
        self.base, self.alpha = base, alpha
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        self.register_buffer("direction", torch.zeros(base.in_channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        if isinstance(self.base, CosineClassifier):
            return self.base.classify_direction(self._remove(F.normalize(features, dim=1)))
        return self.base(self._remove(features))

    def _remove(self, x: Tensor) -> Tensor:
        return x - self.alpha * self.direction * (x * self.direction).sum(1, keepdim=True)


class PerClassAffine(nn.Module):
    """f_k z_k + o_k on the logits of a classifier.

    learn_scale: f is learned, from 1; otherwise it stays 1. offset: o, (C,); default 0
    """

    offset: Tensor

    def __init__(self, base: Any, *, learn_scale: bool = False, offset: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        self.scale = nn.Parameter(torch.ones(self.out_channels)) if learn_scale else None
        self.register_buffer("offset", torch.zeros(self.out_channels) if offset is None else offset.float())

    def forward(self, features: Tensor) -> Tensor:
        logits = self.base(features)
        if self.scale is not None:
            logits = self.scale.view(-1, 1, 1) * logits
        return logits + self.offset.view(-1, 1, 1)


class NearestMean(nn.Module):
    """Logits that are largest for the nearest class mean mu_k. (B, D, h, w) -> (B, C, h, w)

    distance: "cosine", cos(x, mu_k); "euclidean", 2 mu_k.x - |mu_k|^2 = |x|^2 - |x - mu_k|^2, a linear classifier.
    The mean is that of the features as they are. A class without a mean has the logit -1e30. As probabilities
    the logits mean nothing. Computed in the type of the means, also under autocast: the distances are differences.
    Raises UserError for another distance.
    """

    weight: Tensor  # (C, D, 1, 1)
    bias: Tensor  # (C,)

    def __init__(self, in_channels: int, out_channels: int, distance: str = "cosine") -> None:
        super().__init__()
        self.distance = choose("distance", distance, ("cosine", "euclidean"))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.register_buffer("weight", torch.zeros(out_channels, in_channels, 1, 1))
        self.register_buffer("bias", torch.zeros(out_channels))

    def set_means(self, means: Tensor, seen: Tensor) -> None:
        """means (C, D), seen (C,) bool: whether the class has a mean."""
        cosine = self.distance == "cosine"
        bias = torch.zeros_like(seen, dtype=means.dtype) if cosine else -means.square().sum(1)
        self.weight.copy_((F.normalize(means, dim=1) if cosine else 2 * means)[..., None, None])
        self.bias.copy_(torch.where(seen, bias, -1e30))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(self.weight.dtype)
            return F.conv2d(F.normalize(x, dim=1) if self.distance == "cosine" else x, self.weight, self.bias)


@torch.no_grad()
def class_means(
    network: SegmentationNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    labels: Literal["exact", "nearest"] = "exact",
) -> tuple[Tensor, Tensor]:
    """Mean feature of each class over labelled batches, with the network in evaluation mode.

    batches: image (B, 3, H, W), target (B, H, W)
    labels: "exact" takes the features at each pixel, as if they were brought to the size of the image like the
        logits, without computing them there: the labels go through the transposed interpolation instead;
        "nearest" takes the label nearest to each position of the features, and loses objects smaller than that.
    Returns the means (C, D), 0 for a class that has none, and the pixels that each is the mean of (C,), on the CPU.
    Raises UserError if no pixel is labelled.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    sums: Tensor | float = 0.0
    sizes = torch.zeros(num_classes, dtype=torch.float64)
    for image, target in batches:
        features = network.features(image)
        low = features.new_zeros(len(image), num_classes, *features.shape[-2:])
        if labels == "nearest":
            share = one_hot(nearest_labels(target, features, network.stride), low)
        else:
            share = transposed_resize(network, image, target, low)
        sums = sums + torch.einsum("bchw,bdhw->cd", share, features).cpu().double()
        sizes += share.sum((0, 2, 3)).cpu().double()
    for module, mode in modes.items():
        module.training = mode
    if isinstance(sums, float) or not sizes.any():
        raise UserError("no pixel of the training images has a label: nearest class means need labelled images")
    return sums / sizes.where(sizes > 0, torch.ones(())).unsqueeze(1), sizes


def nearest_labels(target: Tensor, features: Tensor, stride: int) -> Tensor:
    """The label at the centre of each position of the features of the padded image. (B, H, W) -> (B, h, w) int64"""
    bottom, right = padding(target.shape, stride)
    padded = F.pad(target, (0, right, 0, bottom), value=IGNORE_INDEX).unsqueeze(1).float()
    return F.interpolate(padded, features.shape[-2:], mode="nearest-exact").squeeze(1).long()


def transposed_resize(network: SegmentationNetwork, image: Tensor, target: Tensor, low: Tensor) -> Tensor:
    """A^T y for the one-hot labels y (B, C, H, W) and the linear map A = network.resize; in the shape of `low`.

    sum_i y_ki (A x)_i = sum_j (A^T y)_kj x_j: sums over the pixels of resized features, without resizing them.
    """
    with torch.enable_grad():
        low = low.detach().requires_grad_()
        high = network.resize(low, image)
    return torch.autograd.grad(high, low, one_hot(target.long(), high.detach()))[0]


# --- what the stages share ---------------------------------------------------------------------------------


class BalancedSampling(nn.Module):
    """Cross-entropy of pixels drawn with replacement: each class of the batch equally often, its pixels evenly.

    Pixel i is drawn Poisson(M / (K n_{y_i})) times, with K classes and n_k pixels of class k in the batch and
    M = samples x images; the summed cross-entropy is divided by M. So its expectation is exactly the mean over
    the classes of the batch of each class's mean cross-entropy; a batch without labels gives 0.
    Differs: divided by the drawn, not the valid pixels. The authors draw images, which in segmentation cannot
    balance the classes. Raises UserError for samples < 1.
    """

    def __init__(self, num_classes: int, samples: int) -> None:
        super().__init__()
        _require("samples", samples, samples >= 1, ">= 1")
        self.num_classes, self.samples = num_classes, samples

    def forward(self, output: Output, target: Tensor) -> Tensor:
        check_labels(target, self.num_classes)
        nll, target = pixel_nll(output.logits, target), target.long()
        bins = target.clamp(max=self.num_classes).flatten()  # the last bin for ignored pixels
        size = target.new_zeros(self.num_classes + 1).scatter_add_(0, bins, torch.ones_like(bins))[:-1]
        drawn = self.samples * len(target)
        rate = drawn / ((size > 0).sum().clamp(min=1) * size.clamp(min=1))
        times = torch.poisson(per_pixel(rate.to(nll.dtype), target))
        return (times * nll).sum() / drawn


def balanced_criterion(counts: ClassCounts, balance: Balance, samples: int = 1) -> nn.Module:
    """The class-balanced cross-entropy of `crt`. Raises UserError for an unknown balance, or samples < 1."""
    if choose("balance", balance, ("sampling", "weights")) == "sampling":
        return BalancedSampling(counts.num_classes, samples)
    return PixelCriterion(build_loss("weighted_ce", counts, normalisation="pixel"))


def pixel_counts(targets: Iterable[Tensor], num_classes: int) -> ClassCounts:
    """Counts of label maps (B, H, W) integer."""
    maps = (label for target in targets for label in target)
    counts = torch.stack([label[label != IGNORE_INDEX].bincount(minlength=num_classes).cpu() for label in maps])
    return ClassCounts(counts.sum(0), (counts > 0).sum(0))


def before_classifier(network: SegmentationNetwork) -> tuple[nn.Module, ...]:
    """All of the network but its classifier, an auxiliary head too."""
    return tuple(module for name, module in network.named_children() if name != "classifier")


def untrained(
    name: str,
    network: SegmentationNetwork,
    counts: ClassCounts,
    prepare: Callable[[Iterable[tuple[Tensor, Tensor]]], None] | None = None,
) -> Stage:
    """A stage without steps, nothing of which could learn."""
    criterion = PixelCriterion(build_loss("ce", counts))
    return Stage(name, network, criterion, share=0.0, frozen=(network,), prepare=prepare)


# --- re-sampling -------------------------------------------------------------------------------------------


def repeat_factors(presence: Tensor, *, threshold: float) -> Tensor:
    """How often each image is shown per epoch: max over its classes of max(1, sqrt(t / f_k)), f_k being the share
    of images that contain class k (Gupta et al., LVIS, CVPR 2019).

    presence: (N, C), nonzero where image i contains class k (a histogram of labels will do)
    threshold: t, the share of images below which a class is repeated
    Returns (N,) float64, >= 1; 1 for an image without labels.
    Raises ValueError for another shape, UserError for a threshold outside (0, 1].
    """
    if presence.ndim != 2 or not presence.numel():
        raise ValueError(f"presence must have shape (N, C) with N, C >= 1, got {tuple(presence.shape)}")
    _require("threshold", threshold, 0 < threshold <= 1, "in (0, 1]")
    present = presence > 0
    share = present.double().mean(0).clamp(min=1 / len(present))  # an absent class is in no image's maximum
    return torch.where(present, (threshold / share).sqrt(), 1.0).amax(1).clamp(min=1)


@checked
def repeat_factor(network: SegmentationNetwork, counts: ClassCounts, *, threshold: float = 0.25) -> list[Stage]:
    """Cross-entropy of the whole network, in one stage, on images drawn in proportion to their `repeat_factors`.

    threshold: t. LVIS repeats the classes in fewer than 100 of its 100 000 images, t = 0.001, which in less than 1000
        images repeats nothing, as f_k >= 1/N. The default means the same 100 images where there are 400; a class in
        only one of them counts 10 times, as there.
    Images that share a class cannot balance it: the rarest class of CamVid is in 47 % of the images, and t = 0.25
    draws them evenly. Differs: every batch is drawn anew with replacement, so that it depends on the step alone; the
    authors' epoch holds image i floor(r_i) or ceil(r_i) times. Raises UserError for a threshold outside (0, 1].
    """
    _require("threshold", threshold, 0 < threshold <= 1, "in (0, 1]")
    criterion = PixelCriterion(build_loss("ce", counts), network.auxiliary_weight)
    return [Stage("repeat_factor", network, criterion, sampling=partial(repeat_factors, threshold=threshold))]


def keep_rates(counts: ClassCounts, quantile: float = 0.0) -> Tensor:
    """min(1, q / n_k): the share of its pixels each class keeps so that none is expected to keep more than q, the
    given quantile of the pixel counts of the classes that occur. (C,) float64; 1 for a class without pixels.

    quantile 0 is the rarest class, so that all keep equally many; 0.5 spares the rarer half; 1 keeps everything.
    Raises UserError for a quantile outside [0, 1], ValueError if no class has a pixel.
    """
    _require("quantile", quantile, 0 <= quantile <= 1, "in [0, 1]")
    pixels = counts.pixels.double()
    if not pixels.any():
        raise ValueError("no class has a pixel: there is nothing to sample from")
    return (pixels[pixels > 0].quantile(quantile) / pixels.clamp(min=1)).clamp(max=1)


def mask_pixels(target: Tensor, keep: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The labels with pixels of class k kept with probability keep_k (C,) and set to IGNORE_INDEX otherwise.

    Raises ValueError for labels that are none (`check_labels`).
    """
    check_labels(target, len(keep))
    drawn = torch.rand(target.shape, generator=generator, device=target.device)
    return target.masked_fill(drawn >= per_pixel(keep.to(drawn.dtype), target.long()), IGNORE_INDEX)


class Undersampled(nn.Module):
    """A criterion on labels thinned by `mask_pixels`, anew at each call. keep: (C,)"""

    keep: Tensor

    def __init__(self, criterion: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.criterion = criterion
        self.register_buffer("keep", keep.float())

    def forward(self, output: Output, target: Tensor) -> Tensor:
        return self.criterion(output, mask_pixels(target, self.keep))


@checked
def undersampling(network: SegmentationNetwork, counts: ClassCounts, *, quantile: float = 0.0) -> list[Stage]:
    """Cross-entropy of the whole network, in one stage, on pixels thinned to balance the classes: see `keep_rates`.

    Divided by the number of pixels kept. Raises UserError for a quantile outside [0, 1].
    """
    criterion = Undersampled(
        PixelCriterion(build_loss("ce", counts), network.auxiliary_weight), keep_rates(counts, quantile)
    )
    return [Stage("undersampling", network, criterion)]
