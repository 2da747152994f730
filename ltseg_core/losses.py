"""Pixel losses. `build_loss(name, counts, **hyper)` returns a module `loss(logits, target) -> scalar`.

Shapes and types of every loss
    logits  (B, C, H, W) of any floating type; bf16 and fp16 are computed in float32, float64 stays float64
    target  (B, H, W) of any integer type; 0 <= y < C, or IGNORE_INDEX (255) for a pixel without label

What every loss keeps (a `Differs:` note says where one does not)
    - It is divided by the number of valid pixels, those with y != IGNORE_INDEX, of the whole batch.
    - An ignored pixel changes nothing and receives a gradient of exactly 0; a batch of them gives 0.
    - A class that never occurs counts as the rarest one that occurs in weights, margins and noise, whose scale it
      would set otherwise, and as one pixel (or image) in all else: see `class_sizes`. An offset or factor that favours
      rare classes in training then hardly pushes it down.
    - No host synchronisation and no loop over classes or images. So a label that is no class is a ValueError on the
      CPU only (`check_labels`); CUDA stops with a device-side assertion. `train.fit` refuses such label files before
      training.
    - A training loop may set `loss.progress` (0 at the first step, 1 at the last); schedules read it.

Symbols: n_k pixels (or images) of class k in the training labels, pi_k = n_k / sum_j n_j, z logits,
p = softmax(z), y the true class. A new loss is one class here, one line of `LOSSES` and its test: most add an
offset to the logits (`adjust`) or weigh the pixels (`reduce`) around the same cross-entropy.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core.config import IGNORE_INDEX, UserError, check_options, choose
from ltseg_core.stats import ClassCounts

Prior = Literal["pixel", "region"]
"""What n_k counts: labelled pixels of the class, or training images that contain it."""
Form = Literal["gaussian", "uniform", "beta", "exponential", "bernoulli", "constant", "mean"]
"""The variation of `BLV`."""

# Tables are kept in float64 and rounded once, to the type of the logits. Metal has no float64.
_TABLE = torch.float32 if torch.backends.mps.is_available() else torch.float64


def build_loss(name: str, counts: ClassCounts, **hyper: Any) -> PixelLoss:
    """The loss `name` (a key of `LOSSES`) for a training set with these class counts.

    Raises UserError for an unknown name or hyper-parameter (naming the nearest valid one), a wrong type or a
    value out of range, and for counts that are no ClassCounts or all zero. Other bad counts ClassCounts itself refuses.
    """
    name = choose("loss", name, LOSSES)
    check_counts(counts)
    return LOSSES[name](counts, **check_options(f"hyper-parameter of loss {name!r}", hyper, LOSSES[name]))


def check_counts(counts: Any) -> None:
    """Raise UserError for counts that are no ClassCounts or all zero."""
    if not isinstance(counts, ClassCounts):
        raise UserError(f"counts must be ClassCounts, of pixels and images, got {type(counts).__name__}")
    if not counts.pixels.any():
        raise UserError(f"the counts of all {counts.num_classes} classes are 0: there is nothing to learn from")


def check_labels(target: Tensor, classes: int) -> None:
    """Raise ValueError for a label of a target (B, H, W) on the CPU that is neither a class nor IGNORE_INDEX.

    Elsewhere nothing is looked for: the device would have to be waited for.
    """
    if target.device.type == "cpu" and target.numel():
        low, high = (int(end) for end in target.masked_fill(target == IGNORE_INDEX, 0).aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"the target has the label {low if low < 0 else high}: expected 0 to {classes - 1}, the classes, or"
                f" {IGNORE_INDEX} for a pixel without label"
            )


def pixel_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log p_y of every pixel, (B, H, W) in float32 or float64; exactly 0 at ignored pixels."""
    return F.cross_entropy(_wide(logits), target.long(), ignore_index=IGNORE_INDEX, reduction="none")


def mean_over_valid(values: Tensor, target: Tensor) -> Tensor:
    """Sum of `values` (B, H, W), which are 0 at ignored pixels, over the number of valid pixels."""
    return values.sum() / (target != IGNORE_INDEX).sum().clamp(min=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-1/|valid| sum_valid log p_y. Raises ValueError for labels that are none (`check_labels`)."""
    check_labels(target, logits.shape[1])
    return mean_over_valid(pixel_nll(logits, target), target)


class PixelLoss(nn.Module):
    """Mean over valid pixels of CE(adjust(z), y); subclasses override `adjust`, `reduce` or all of `loss`.

    forward raises ValueError for logits or targets of the wrong shape or type, another number of classes, and
    labels that are none (`check_labels`).
    """

    progress: float = 0.0
    """Share of the training steps done, in [0, 1]."""
    pseudo_labelled: bool = False
    """Whether the targets are pseudo-labels; a training loop says so before each of its terms."""

    def __init__(self, counts: ClassCounts) -> None:
        super().__init__()
        self.num_classes = counts.num_classes

    def observe(self, pseudo_labels: Tensor) -> None:
        """A training loop may show the pseudo-labels (B, H, W) of each step here, for a loss that counts them."""

    def end_epoch(self) -> None:
        """Called after each pass over the images without labels."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.ndim != 4 or not logits.is_floating_point() or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"expected floating logits (B, {self.num_classes}, H, W) for counts of {self.num_classes} "
                f"classes, got {logits.dtype} {tuple(logits.shape)}"
            )
        if target.shape != (len(logits), *logits.shape[2:]) or target.is_floating_point():
            raise ValueError(
                f"expected an integer target {(len(logits), *logits.shape[2:])}, "
                f"got {target.dtype} {tuple(target.shape)}"
            )
        check_labels(target, self.num_classes)
        return self.loss(_wide(logits), target.long())

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.reduce(pixel_nll(self.adjust(logits, target), target), target)

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits whose cross-entropy is taken."""
        return logits

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        """The loss, from the cross-entropy of each pixel (B, H, W), 0 at ignored ones; p_y = exp(-nll)."""
        return mean_over_valid(nll, target)


class CrossEntropy(PixelLoss):
    """-log p_y."""


class WeightedCrossEntropy(PixelLoss):
    """-w_y log p_y with w_k proportional to n_k^-power: re-weighting by inverse frequency.

    power 0 is plain cross-entropy, 1 gives every class the same total weight.
    normalisation: "class", the weights have mean 1 over the classes; "pixel", mean 1 over the training
        pixels, so that the loss keeps the scale of cross-entropy; "sum", they sum to 1 (power 0 is CE / C).
        These divide by the number of valid pixels. Differs: "batch" divides by the summed weights of the
        valid pixels of the batch, as PyTorch's `cross_entropy(weight=...)` does.
    """

    weight: Tensor  # (C,)

    def __init__(
        self,
        counts: ClassCounts,
        *,
        power: float = 1.0,
        normalisation: Literal["class", "pixel", "sum", "batch"] = "class",
        prior: Prior = "pixel",
    ) -> None:
        super().__init__(counts)
        _require("power", power, power >= 0, ">= 0")
        self.normalisation = normalisation
        weight = class_sizes(counts, prior, "rarest").pow(-power)
        if normalisation == "pixel":
            pixels = class_sizes(counts, "pixel")
            weight = weight * pixels.sum() / (weight * pixels).sum()
        else:
            weight = weight / (weight.sum() if normalisation == "sum" else weight.mean())
        self.register_buffer("weight", weight)

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        weight = per_pixel(self.weight.to(nll.dtype), target)
        if self.normalisation == "batch":
            return (weight * nll).sum() / weight.sum().clamp(min=torch.finfo(nll.dtype).tiny)
        return mean_over_valid(weight * nll, target)


class GeneralizedReweighting(WeightedCrossEntropy):
    """-1/N sum_i w_{y_i} log p_{y_i},  w_c = (1/r_c)^rho / sum_k (1/r_k)^rho  (DisAlign, Eq. 7-11).

    rho 0 is plain cross-entropy, 1 class-balanced, more is allowed; 0.2 is the authors' value for ADE20K.
    normalisation: "class" gives weights of mean 1, "sum" those of Eq. 11, which sum to 1 (C times smaller).
    Differs: Eq. 11 prints "sum"; the authors' code multiplies by C, so that rho 0 is plain cross-entropy.
    """

    def __init__(
        self,
        counts: ClassCounts,
        *,
        rho: float = 0.2,
        normalisation: Literal["class", "sum"] = "class",
        prior: Prior = "pixel",
    ) -> None:
        _require("rho", rho, rho >= 0, ">= 0")
        super().__init__(counts, power=rho, normalisation=normalisation, prior=prior)


class Focal(PixelLoss):
    """-(1 - p_y)^gamma log p_y  (Lin et al., Focal Loss, ICCV 2017, Eq. 4). gamma 0 is plain cross-entropy.

    Differs: divided by all valid pixels; the paper's detector divides by the number of assigned anchors.
    """

    def __init__(self, counts: ClassCounts, *, gamma: float = 2.0) -> None:
        super().__init__(counts)
        _require("gamma", gamma, gamma >= 0, ">= 0")
        self.gamma = gamma

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        return mean_over_valid(focal_factor(nll, self.gamma) * nll, target)


class ClassBalanced(PixelLoss):
    """-w_y log p_y,  w_k proportional to (1 - beta) / (1 - beta^n_k), sum_k w_k = C  (Cui et al., CVPR 2019).

    (1 - beta^n) / (1 - beta) is the effective number of n samples: n for n << 1 / (1 - beta), and never more
    than 1 / (1 - beta). Pixel counts exceed that limit for every class at the published beta (0.9, ...,
    0.9999): all weights become equal and the loss is plain cross-entropy, of which a warning tells. Hence n_k
    counts images by default (prior="region"); with pixels choose 1 - beta near 1 / (pixels of a body class).
    beta 0 gives equal weights, beta -> 1 weights in inverse proportion to n_k.
    """

    weight: Tensor  # (C,)

    def __init__(self, counts: ClassCounts, *, beta: float = 0.9999, prior: Prior = "region") -> None:
        super().__init__(counts)
        sizes = class_sizes(counts, prior, "rarest")
        weight = effective_number_weights(sizes, beta)
        if beta > 0 and weight.max() < 1.01 * weight.min() and sizes.max() > 1.01 * sizes.min():
            warnings.warn(
                "class-balanced weights are all equal: every class has far more samples than the "
                f"{1 / (1 - beta):.6g} that beta={beta} can tell apart; use prior='region' or a larger beta",
                stacklevel=2,
            )
        self.register_buffer("weight", weight)

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        return mean_over_valid(per_pixel(self.weight.to(nll.dtype), target) * nll, target)


class ClassBalancedFocal(ClassBalanced):
    """-w_y (1 - p_y)^gamma log p_y with the weights of `ClassBalanced`  (Cui et al., CVPR 2019)."""

    def __init__(
        self, counts: ClassCounts, *, beta: float = 0.9999, gamma: float = 2.0, prior: Prior = "region"
    ) -> None:
        super().__init__(counts, beta=beta, prior=prior)
        _require("gamma", gamma, gamma >= 0, ">= 0")
        self.gamma = gamma

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        return super().reduce(focal_factor(nll, self.gamma) * nll, target)


class LogitAdjustment(PixelLoss):
    """CE(z_k + tau log pi_k, y)  (Menon et al., Long-tail learning via logit adjustment, ICLR 2021, Eq. 10).

    tau 0 is plain cross-entropy, tau 1 balanced softmax. Predict with plain z.
    """

    offset: Tensor  # (C,)

    def __init__(self, counts: ClassCounts, *, tau: float = 1.0, prior: Prior = "pixel") -> None:
        super().__init__(counts)
        _require("tau", tau, True, "finite")
        sizes = class_sizes(counts, prior)
        self.register_buffer("offset", tau * (sizes / sizes.sum()).log())

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits + per_channel(self.offset, logits)


class BalancedSoftmax(LogitAdjustment):
    """-log( n_y e^{z_y} / sum_k n_k e^{z_k} )  (Ren et al., Balanced Meta-Softmax, NeurIPS 2020).

    prior: pixels, or images with the class ("region", the prior of Region Rebalance's region branch).
    Zero logits give -log pi_y.
    """

    def __init__(self, counts: ClassCounts, *, prior: Prior = "pixel") -> None:
        super().__init__(counts, tau=1.0, prior=prior)


class VectorScaling(LogitAdjustment):
    """CE(delta_k z_k + tau log pi_k),  delta_k = (n_k / max_j n_j)^gamma  (Kini et al., VS-loss, NeurIPS 2021).

    The factors shrink the logits of rare classes in training, so that they need a larger margin; they do what the
    offsets cannot once all training pixels are fitted. gamma 0 is logit adjustment, and with tau 0 cross-entropy.
    prior: what n_k and pi_k count; counts of 0 enter as 1. Raises UserError for gamma < 0.
    """

    factors: Tensor

    def __init__(self, counts: ClassCounts, *, gamma: float = 0.15, tau: float = 1.0, prior: Prior = "pixel") -> None:
        super().__init__(counts, tau=tau, prior=prior)
        _require("gamma", gamma, gamma >= 0, ">= 0")
        sizes = class_sizes(counts, prior)
        self.register_buffer("factors", ((sizes / sizes.max()) ** gamma).to(_TABLE))

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().adjust(per_channel(self.factors, logits) * logits, target)


class LDAM(PixelLoss):
    """CE(s (z - Delta_y e_y), y),  Delta_k = mu n_k^-1/4 / max_j n_j^-1/4  (Cao et al., LDAM, NeurIPS 2019).

    The largest margin, that of the rarest class, is mu. mu 0 with scale 1 is plain cross-entropy.
    drw: progress from which the pixels are weighted too (deferred re-weighting; 0.8 in the paper), with
        `effective_number_weights` of the *image* counts at drw_beta: those of pixel counts are all equal.
    Differs: the margin acts on the logits of a linear classifier, whose scale is learned, hence s = 1; for a
    cosine classifier set scale (the authors' code 30, PAT's comparison 20).
    """

    margin: Tensor  # (C,)
    weight: Tensor  # (C,)

    def __init__(
        self,
        counts: ClassCounts,
        *,
        mu: float = 0.5,
        scale: float = 1.0,
        drw: float | None = None,
        drw_beta: float = 0.9999,
        prior: Prior = "pixel",
    ) -> None:
        super().__init__(counts)
        _require("mu", mu, mu >= 0, ">= 0")
        _require("scale", scale, scale > 0, "> 0")
        _require("drw", drw, drw is None or 0 <= drw <= 1, "in [0, 1] or null")
        self.scale, self.drw = scale, drw
        rarity = class_sizes(counts, prior, "rarest").pow(-0.25)
        self.register_buffer("margin", mu * rarity / rarity.max())
        images = class_sizes(counts, "region", "rarest")
        self.register_buffer("weight", effective_number_weights(images, drw_beta, "drw_beta"))

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        return subtract_margin(logits, target, self.margin).mul_(self.scale)

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        if self.drw is not None and self.progress >= self.drw:
            nll = per_pixel(self.weight.to(nll.dtype), target) * nll
        return mean_over_valid(nll, target)


class Seesaw(PixelLoss):
    """-log( e^{z_y} / (e^{z_y} + sum_{j != y} S_yj e^{z_j}) ),  S_yj = M_yj C_yj  (Wang et al., CVPR 2021).

    M_yj = min(1, (n_j / n_y)^p) spares rarer classes, C_yj = max(1, (p_j / p_y)^q) restores the penalty where
    class j was wrongly preferred; C is a constant for the gradient. p = q = 0 is plain cross-entropy.
    online: n_k are what was seen while training, this batch included; with several processes, what the first one saw
    and each one's own batch. Else the counts of the training set, from the first step.
    Differs: the authors' code bounds p_y from below by 0.01 in C; the paper and this do not.
    """

    log_sizes: Tensor  # (C,)
    seen: Tensor  # (C,)

    def __init__(
        self,
        counts: ClassCounts,
        *,
        p: float = 0.8,
        q: float = 2.0,
        prior: Prior = "pixel",
        online: bool = True,
    ) -> None:
        super().__init__(counts)
        _require("p", p, p >= 0, ">= 0")
        _require("q", q, q >= 0, ">= 0")
        self.p, self.q, self.prior, self.online = p, q, prior, online
        self.register_buffer("log_sizes", class_sizes(counts, prior).log())
        if online:
            self.register_buffer("seen", torch.zeros_like(self.log_sizes))

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        true = target.clamp(max=self.num_classes - 1).unsqueeze(1)  # (B, 1, H, W); ignored pixels: any class
        if self.online and self.training:
            size = pixels_of_classes(target, self.num_classes)[1][:, :-1]
            self.seen += (size if self.prior == "pixel" else size > 0).sum(0)
        log_sizes = (self.seen.clamp(min=1).log() if self.online else self.log_sizes).to(logits.dtype)
        log_m = (log_sizes.view(1, -1, 1, 1) - log_sizes[true]).clamp_(max=0).mul_(self.p)
        z = logits.detach()
        log_c = (z - z.gather(1, true)).clamp_(min=0).mul_(self.q)
        return log_m.add_(log_c).add_(logits)


class Lovasz(PixelLoss):
    """Lovasz extension of the Jaccard loss, mean over the classes of the batch  (Berman et al., CVPR 2018).

    Errors are 1 - p_c on pixels of class c and p_c elsewhere, sorted over the whole batch (the authors'
    per_image=False, classes="present"), times the increments of the Jaccard loss along that order.
    Equals the mean of 1 - IoU for hard predictions. ce_weight adds that much cross-entropy.
    Differs: a mean over classes, not over pixels. The increments are written as quotients; the authors' code
    subtracts neighbouring losses, which loses digits in float32.
    """

    def __init__(self, counts: ClassCounts, *, ce_weight: float = 0.0) -> None:
        super().__init__(counts)
        _require("ce_weight", ce_weight, ce_weight >= 0, ">= 0")
        self.ce_weight = ce_weight

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        truth = one_hot(target, logits).transpose(0, 1).flatten(1)  # (C, P), P = B H W
        prob = logits.softmax(1).transpose(0, 1).flatten(1)
        ignored = (target == IGNORE_INDEX).view(1, -1)
        errors = (truth - prob).abs().masked_fill(ignored, -1.0)  # sorted to the end, where they count 0
        errors, order = errors.sort(dim=1, descending=True)
        truth = truth.gather(1, order).int()  # integers: exact, and cumsum of floats is not deterministic on CUDA
        size = truth.sum(1, keepdim=True)
        intersection = (size - truth.cumsum(1)).to(errors.dtype)
        union = (size + (1 - truth).cumsum(1)).to(errors.dtype)
        missed = 1 / union.clamp(min=1)
        false_alarm = intersection / (union * (union - 1)).clamp(min=1)
        extension = (errors.clamp(min=0) * torch.where(truth > 0, missed, false_alarm)).sum(1)
        present = size[:, 0] > 0
        loss = (extension * present).sum() / present.sum().clamp(min=1)
        return loss + self.ce_weight * cross_entropy(logits, target) if self.ce_weight else loss


class Dice(PixelLoss):
    """1 - 1/C sum_k (2 sum p_k y_k + eps) / (sum p_k^2 + sum y_k^2 + eps)  (Milletari et al., 3DV 2016).

    Sums run over the valid pixels of the whole batch, eps is in pixels. An absent class is included and
    pushes its p_k to zero; present_only=True averages over the classes of the batch instead.
    ce_weight adds that much cross-entropy (`dice_ce`: 1).
    Differs: a mean over classes, not over pixels; V-Net has two classes and no eps.
    """

    def __init__(
        self, counts: ClassCounts, *, eps: float = 1.0, present_only: bool = False, ce_weight: float = 0.0
    ) -> None:
        super().__init__(counts)
        _require("eps", eps, eps > 0, "> 0")
        _require("ce_weight", ce_weight, ce_weight >= 0, ">= 0")
        self.eps, self.present_only, self.ce_weight = eps, present_only, ce_weight

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        truth = one_hot(target, logits)
        prob = logits.softmax(1) * (target != IGNORE_INDEX).unsqueeze(1)
        size = truth.sum((0, 2, 3))
        overlap, total = (prob * truth).sum((0, 2, 3)), prob.square().sum((0, 2, 3)) + size
        score = (2 * overlap + self.eps) / (total + self.eps)
        counted = (size > 0) if self.present_only else torch.ones_like(size)
        loss = ((1 - score) * counted).sum() / counted.sum().clamp(min=1)
        return loss + self.ce_weight * cross_entropy(logits, target) if self.ce_weight else loss


class DiceCE(Dice):
    """`Dice` plus ce_weight times cross-entropy."""

    def __init__(
        self, counts: ClassCounts, *, eps: float = 1.0, present_only: bool = False, ce_weight: float = 1.0
    ) -> None:
        super().__init__(counts, eps=eps, present_only=present_only, ce_weight=ce_weight)


class BLV(PixelLoss):
    """CE(z_k + c_k / max_j c_j |delta(sigma)|, y),  c_k = log(sum_j q_j / q_k)  (BLV, Eq. 3).

    delta is drawn anew for every image, class and pixel, on the device of the logits; predict with plain z.
    An auxiliary head keeps plain cross-entropy. The teacher of self-training gives its pseudo-labels from plain z.

    form: "gaussian" N(0, sigma^2), treated as `clamp` says; "uniform" U[0, 1], "beta" Beta(1/2, 1/2),
        "exponential" Exp(1) clipped to 1 (Table 6); "bernoulli" 0 or 1, the printed algorithm at large sigma;
        "constant" 1 (Table 8, "w/o variation"); "mean" the mean of the gaussian form, its other reading.
    sigma, clamp and temporal concern "gaussian" and "mean" only.
    clamp: "code" min(|delta|, 1); "printed" max(0, min(delta, 1)), Algorithm 1; "none" |delta|, Eq. 3 alone.
    sigma: 6 in the paper (Appendix B), 4 in the authors' configurations. 0 is plain cross-entropy.
    temporal: sigma rises linearly from 0 to its value at progress 3/4 and falls back to 0 (Appendix C; the
        curve itself is lost, only t_mid = 30k of 40k is given).
    balance: False gives every class the amplitude 1 (Table 8, "w/o balance").
    sign: -1 subtracts, as GCL and, in expectation, logit adjustment do. The published +1 lowers the test-time
        logit of rare classes: at the optimum E softmax(z + a delta) is the posterior.
    reference: "sum" as Eq. 3, "max" log(max_j q_j / q_k), the authors' first commit: no noise on the head.
    permute: seed of a permutation of the counts over the classes, in [0, 2^63): a control for what they contribute.
    terms: which terms of the student's loss in self-training have the noise, each its own: "all" (the paper does not
        say), those of "labels" only, or those of "pseudo_labels" only, images of ClassMix among them. Without
        self-training there are no others than of labels.
    pseudo: after each epoch over the images without labels q are the pixels of their pseudo-labels in it (Eq. 4), as
        the batches showed them: cropped, unsure ones left out. In the first epoch, and without such images, q are
        the labelled pixels. With several processes those of the first one's images count.

    With equal counts the amplitude is 1 for all classes ("sum"; noise remains) or 0 ("max").
    Differs: the authors' code draws on the CPU and averages over all pixels, the ignored ones included; with OCRNet
    it puts the noise on the auxiliary head instead.
    """

    amplitude: Tensor  # (C,)
    seen: Tensor  # (2, C) pixels and images of the pseudo-labels in this epoch

    def __init__(
        self,
        counts: ClassCounts,
        *,
        sigma: float = 6.0,
        form: Form = "gaussian",
        clamp: Literal["code", "printed", "none"] = "code",
        temporal: bool = False,
        balance: bool = True,
        sign: Literal[1, -1] = 1,
        reference: Literal["sum", "max"] = "sum",
        prior: Prior = "pixel",
        permute: int | None = None,
        terms: Literal["all", "labels", "pseudo_labels"] = "all",
        pseudo: bool = False,
    ) -> None:
        super().__init__(counts)
        _require("sigma", sigma, sigma >= 0, ">= 0")
        _require("permute", permute, permute is None or 0 <= permute < 2**63, "in [0, 2^63) or null")
        if not balance and (permute is not None or pseudo):
            raise UserError("balance=False takes no counts: leave out permute and pseudo")
        if temporal and form not in ("gaussian", "mean"):
            raise UserError(f"temporal changes sigma, which form={form!r} does not have: use form='gaussian'")
        self.sigma, self.form, self.clamp, self.temporal = sigma, form, clamp, temporal
        self.balance, self.sign, self.reference = balance, sign, reference
        self.prior, self.permute, self.terms, self.pseudo = prior, permute, terms, pseudo
        self.register_buffer("amplitude", torch.ones(self.num_classes, dtype=_TABLE))
        if pseudo:
            self.register_buffer("seen", torch.zeros(2, self.num_classes, dtype=torch.int64))
        self.set_counts(counts)

    def observe(self, pseudo_labels: Tensor) -> None:
        if self.pseudo:
            pixels = pixels_of_classes(pseudo_labels.long(), self.num_classes)[1][:, :-1]
            self.seen += torch.stack([pixels.sum(0), (pixels > 0).sum(0)])

    def end_epoch(self) -> None:
        if self.pseudo:
            counts = ClassCounts(*self.seen.to("cpu", copy=True))
            if counts.pixels.any():
                self.set_counts(counts)
            self.seen.zero_()

    def set_counts(self, counts: ClassCounts) -> None:
        """Take the amplitudes from these counts. Raises ValueError for another number of classes."""
        if counts.num_classes != self.num_classes:
            raise ValueError(f"expected counts of {self.num_classes} classes, got {counts.num_classes}")
        amplitude = variation_amplitude(class_sizes(counts, self.prior, "rarest"), self.reference)
        if self.permute is not None:
            generator = torch.Generator().manual_seed(self.permute)
            amplitude = amplitude[torch.randperm(self.num_classes, generator=generator)]
        self.amplitude.copy_(self.sign * (amplitude if self.balance else torch.ones_like(amplitude)))

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.terms == ("labels" if self.pseudo_labelled else "pseudo_labels"):
            return logits
        sigma = self.sigma
        if self.temporal:
            sigma *= max(0.0, min(self.progress / 0.75, (1 - self.progress) / 0.25))
        return add_variation(logits, self.amplitude, self.form, sigma, self.clamp)


class GCL(PixelLoss):
    """CE(s (z_k - a_k min(|eps|, 1) - m [k = y]), y),  a_k = log(n_max / n_k) / log(n_max / n_min),
    eps ~ N(0, sigma^2)  (Li, Cheung & Lu, Gaussian clouded logit adjustment, CVPR 2022).

    BLV with the opposite sign, sigma 1/3 and no noise on the most frequent class. With margin 0 and scale 1,
    sigma 0 or equal counts give plain cross-entropy.
    Differs: for a linear classifier, hence s = 1; the authors' cosine classifier has s = 30. Their second
    stage (classifier re-training) is a method, not part of the loss.
    """

    amplitude: Tensor  # (C,), negative

    def __init__(
        self,
        counts: ClassCounts,
        *,
        sigma: float = 1 / 3,
        margin: float = 0.0,
        scale: float = 1.0,
        prior: Prior = "pixel",
    ) -> None:
        super().__init__(counts)
        _require("sigma", sigma, sigma >= 0, ">= 0")
        _require("margin", margin, margin >= 0, ">= 0")
        _require("scale", scale, scale > 0, "> 0")
        self.sigma, self.margin, self.scale = sigma, margin, scale
        self.register_buffer("amplitude", -variation_amplitude(class_sizes(counts, prior, "rarest"), "max"))

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        z = add_variation(logits, self.amplitude, "gaussian", self.sigma, "code")
        if self.margin:
            z = subtract_margin(z, target, z.new_full((self.num_classes,), self.margin))
        return z.mul_(self.scale)


class PAT(PixelLoss):
    """-1/B sum_i sum_{l: S_i^l > 0} 1/S_i^l sum_{j: y_ij = l} beta_ij log p_ij^l,
    beta_ij = exp((1 - p_ij^l - epsilon) / T)  (PAT, Eq. 4-5); S_i^l are the pixels of class l in image i.

    mask_size: the factor 1/S. Without it the weighted pixels are averaged over all valid ones, as in CE.
    confidence: the factor beta, in [1, e^(1/T)] e^(-epsilon/T). Both off is plain cross-entropy.
    temperature: T, 20 in the paper (of 5, 10, 20, 50). epsilon only rescales the loss; no value is given. At 1 beta is
        e^(-p/T), Eq. 5 divided by its largest value: in [e^(-1/T), 1], our reading of the weight that Figure 1 says is
        normalised to [0, 1]. No epsilon makes it reach 0.
    detach: beta is a weight and has no gradient (the paper does not say; otherwise the gradient grows by
        1 - p ln(p) / T, at most 1 + 0.37 / T).
    channels: "true", Eq. 4, where beta is one number of a pixel, that of its label. "all" is a reading of the text and
        of Figure 1, where the weights have the size of the logits and multiply the normalised prediction: the
        probability of every class is multiplied by its own beta, and all are normalised again, so that the logits are
        z_k - p_k / T and those of sure classes count for less. epsilon then changes nothing.
    mean_over_classes: divide by the number of classes present in each image. Eq. 4 sums over them, so that
        the loss, and with it the effective learning rate, grows with their number.
    Differs: with mask_size the division is by images, those without a valid pixel left out, not by pixels.
    """

    def __init__(
        self,
        counts: ClassCounts,
        *,
        temperature: float = 20.0,
        epsilon: float = 0.0,
        mask_size: bool = True,
        confidence: bool = True,
        detach: bool = True,
        channels: Literal["true", "all"] = "true",
        mean_over_classes: bool = False,
    ) -> None:
        super().__init__(counts)
        _require("temperature", temperature, temperature > 0, "> 0")
        _require("epsilon", epsilon, True, "finite")
        if mean_over_classes and not mask_size:
            raise UserError("mean_over_classes averages the class means of mask_size: switch mask_size on")
        if channels == "all" and not confidence:
            raise UserError("channels='all' is about the confidence weight: switch confidence on")
        self.temperature, self.epsilon, self.detach = temperature, epsilon, detach
        self.mask_size, self.confidence, self.mean_over_classes = mask_size, confidence, mean_over_classes
        self.channels = channels

    def adjust(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.channels == "true":
            return logits
        p = (logits.detach() if self.detach else logits).softmax(1)
        return logits - p / self.temperature  # z + log beta, up to a constant of the pixel

    def reduce(self, nll: Tensor, target: Tensor) -> Tensor:
        if self.confidence and self.channels == "true":
            p = (nll.detach() if self.detach else nll).neg().exp()
            nll = nll * ((1 - p - self.epsilon) / self.temperature).exp()
        if not self.mask_size:
            return mean_over_valid(nll, target)
        bins, size = pixels_of_classes(target, self.num_classes)
        present = (size[:, :-1] > 0).sum(1)  # classes in each image
        weight = size.clamp(min=1).to(nll.dtype).reciprocal()
        if self.mean_over_classes:
            weight = weight / present.clamp(min=1).unsqueeze(1)
        return (weight.flatten()[bins] * nll).sum() / (present > 0).sum().clamp(min=1)


LOSSES: dict[str, type[PixelLoss]] = {
    "ce": CrossEntropy,
    "weighted_ce": WeightedCrossEntropy,
    "focal": Focal,
    "cb": ClassBalanced,
    "cb_focal": ClassBalancedFocal,
    "balanced_softmax": BalancedSoftmax,
    "vs": VectorScaling,
    "ldam": LDAM,
    "seesaw": Seesaw,
    "logit_adjustment": LogitAdjustment,
    "lovasz": Lovasz,
    "dice": Dice,
    "dice_ce": DiceCE,
    "blv": BLV,
    "gcl": GCL,
    "pat": PAT,
    "grw_ce": GeneralizedReweighting,
}


# --- the mathematics shared by several losses --------------------------------------------------------------


def class_sizes(counts: ClassCounts, prior: Prior, absent: Literal["one", "rarest", "most frequent"] = "one") -> Tensor:
    """n_k of pixels or images, (C,) on the CPU. A class that never occurs counts as 1: its logarithm stays finite.

    absent="rarest": it counts as the rarest class that occurs, so that it cannot set the scale of the others. So in
    weights, margins and noise, which are divided by a sum or a largest value over all classes.
    absent="most frequent": it counts as the most frequent class, so that a prediction that favours rare classes does
    not favour one that never occurs.
    """
    sizes = (counts.images if prior == "region" else counts.pixels).to("cpu", _TABLE)
    occurs, largest = sizes > 0, sizes.max()
    counted_as = {
        "one": torch.ones_like(largest),
        "rarest": sizes.where(occurs, largest).min(),
        "most frequent": largest,
    }
    return sizes.where(occurs, counted_as[absent].clamp(min=1))


def pixels_of_classes(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Bin of every pixel, and how many pixels of each class an image has. (B, H, W) -> (B, H, W), (B, C + 1)

    The second is counted on the device, without waiting for it; its last column are the ignored pixels, and the bins
    are places in it, flattened.
    """
    first = (classes + 1) * torch.arange(len(target), device=target.device).view(-1, 1, 1)
    bins = target.clamp(max=classes) + first
    size = target.new_zeros(len(target) * (classes + 1))
    size.scatter_add_(0, bins.flatten(), torch.ones_like(bins).flatten())
    return bins, size.view(len(target), -1)


def effective_number_weights(sizes: Tensor, beta: float, name: str = "beta") -> Tensor:
    """(1 - beta) / (1 - beta^n), scaled to sum C  (Cui et al., CVPR 2019). (C,) -> (C,)"""
    _require(name, beta, 0 <= beta < 1, "in [0, 1)")
    log_beta = math.log(beta) if beta else -math.inf
    weight = -1 / torch.expm1(sizes * log_beta)
    return weight / weight.mean()


def variation_amplitude(sizes: Tensor, reference: Literal["sum", "max"]) -> Tensor:
    """c_k / max_j c_j with c_k = log(sum n / n_k) or log(max n / n_k); 0 if every c_k is 0. (C,) -> (C,)"""
    c = (sizes.sum() if reference == "sum" else sizes.max()).log() - sizes.log()
    return c / c.max() if c.max() > 0 else torch.zeros_like(c)


def add_variation(logits: Tensor, amplitude: Tensor, form: Form, sigma: float, clamp: str) -> Tensor:
    """z_k + amplitude_k * delta with the forms and clamps of `BLV`. The only large tensor is the result."""
    amplitude = per_channel(amplitude, logits)
    if form in ("constant", "mean"):
        return logits + amplitude * (1.0 if form == "constant" else mean_variation(sigma, clamp))
    noise = torch.empty_like(logits)  # exponential_ and bernoulli_ are 4 times slower than what stands here
    if form == "gaussian":
        noise.normal_(0, sigma)
        if clamp == "printed":
            noise.clamp_(0, 1)
        else:
            noise.abs_()
            if clamp == "code":
                noise.clamp_(max=1)
    elif form == "uniform":
        noise.uniform_()
    elif form == "beta":
        noise.uniform_().mul_(math.pi / 2).sin_().square_()  # the inverse of its distribution function
    elif form == "exponential":
        noise.uniform_().log_().neg_().clamp_(max=1)
    else:  # bernoulli
        noise.uniform_().round_()
    return noise.mul_(amplitude).add_(logits)


def mean_variation(sigma: float, clamp: str) -> float:
    """E delta: sigma sqrt(2/pi) (1 - e^(-1 / 2 sigma^2)) + P(|N(0, sigma^2)| > 1) with clamp "code"."""
    if sigma == 0:
        return 0.0
    if clamp == "none":
        return sigma * math.sqrt(2 / math.pi)
    saturated = math.erfc(1 / (sigma * math.sqrt(2)))
    mean = saturated - sigma * math.sqrt(2 / math.pi) * math.expm1(-0.5 / sigma**2)
    return mean / 2 if clamp == "printed" else mean


def subtract_margin(logits: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """z - margin_y e_y: the margin of the true class off its own logit. margin (C,)"""
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    return torch.where(classes == target.unsqueeze(1), -per_channel(margin, logits), 0.0).add_(logits)


def focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p_y)^gamma from -log p_y; the bound keeps the gradient at p_y = 1 finite for gamma < 1."""
    return torch.expm1(-nll).neg().clamp(min=torch.finfo(nll.dtype).eps).pow(gamma)


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """(B, H, W) -> (B, C, H, W) in the type of the logits; all 0 at ignored pixels."""
    valid = (target != IGNORE_INDEX).unsqueeze(1)
    return torch.zeros_like(logits).scatter_(1, target.unsqueeze(1) * valid, valid.to(logits.dtype))


def per_pixel(table: Tensor, target: Tensor) -> Tensor:
    """table[y] of every pixel, 0 at ignored ones. (C,), (B, H, W) -> (B, H, W)"""
    rows = target.clamp(max=len(table)).flatten()
    return F.pad(table, (0, 1)).index_select(0, rows).view(target.shape)  # a sixth of the time of indexing


def per_channel(table: Tensor, logits: Tensor) -> Tensor:
    """A (C,) table in the shape (1, C, 1, 1) and the type of the logits."""
    return table.to(logits.dtype).view(1, -1, 1, 1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _require(name: str, value: float | None, holds: bool, rule: str) -> None:
    if not holds or (value is not None and not math.isfinite(value)):
        raise UserError(f"{name} must be {rule}, got {value!r}")
