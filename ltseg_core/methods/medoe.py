"""MEDOE: a multi-expert decoder and output ensemble for long-tailed semantic segmentation (no public code).

Classes sorted by falling pixel count are cut into K groups, head first. Expert i = 1..K has its own decoder and
classifier over all C classes, and learns from the pixels whose class is in its label set S_i (Eq. 1-2):

    L^i     = L_ce^i + alpha L_aux^i,  L_ce^i = -1/|Omega_i| sum_{u in Omega_i} log softmax(z_iu)_{y_u}
    L_aux^i = sum_{k not in S_i} ||z_i^k||_2 + sum_{k in S_i} p_i^k log(p_i^k / q^k)                (Eq. 3-4)

All experts learn together, or expert 1 before the others; the encoder has the gradient of expert 1 only, the others
read it through a stop-gradient. So no gradient joins the experts, and a step computes one after the other, forward and
backward: of all their maps only one expert's are in memory. The auxiliary head of a network that has one belongs to
expert 1. A short last stage learns how to combine the frozen experts (Eq. 7-9), or a fixed rule does.
Symbols: z_i (B, C, H, W) logits of expert i, p_i = softmax(z_i), Omega valid pixels, Omega_i those with y in S_i.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ltseg_core.config import IGNORE_INDEX, UserError, choose
from ltseg_core.losses import (
    _require,
    _wide,
    build_loss,
    check_labels,
    class_sizes,
    cross_entropy,
    mean_over_valid,
    per_channel,
    per_pixel,
)
from ltseg_core.methods.base import PixelCriterion, Stage, checked
from ltseg_core.models import Output, SegmentationNetwork, reinitialise
from ltseg_core.stats import HEAD_SHARE, TAIL_SHARE, ClassCounts

Sets = Literal["overlap", "disjoint", "disjoint_all", "all"]
Rule = Literal["average", "group_average", "argmax", "threshold", "head"]
Learned = Literal["moe_mean", "moe_weighted", "moe_logits", "moe_gate"]
Select = Literal["class", "expert"]
SETS, RULES, LEARNED = get_args(Sets), get_args(Rule), get_args(Learned)


@checked
def build(
    network: SegmentationNetwork,
    counts: ClassCounts,
    *,
    shares: Sequence[float] = (HEAD_SHARE, TAIL_SHARE),
    cuts: Sequence[int] | None = None,
    sets: Sets = "overlap",
    share: Literal["encoder", "decoder", "nothing"] = "encoder",
    shared_gradient: Literal["head", "all"] = "head",
    order: Literal["joint", "head_first"] = "joint",
    head_share: float = 0.5,
    softmax: Literal["all", "own"] = "all",
    alpha: float = 0.2,
    l2: Literal["pixel", "class", "none"] = "pixel",
    l2_pixels: Literal["valid", "own"] = "valid",
    kl: Literal["batch", "pixel", "none"] = "batch",
    ensemble: Learned | Rule = "moe_mean",
    select: Select = "class",
    ensemble_share: float = 0.1,
    initial_weight: float = 1.0,
    threshold: float = 0.3,
) -> list[Stage]:
    """Training of the experts, then (for `moe_*`) of the ensemble of the frozen experts.

    shares:   falling shares of the labelled pixels between the groups; K = len(shares) + 1 experts, () is one
    cuts:     used instead of `shares` if given: how many of the most frequent classes come before groups 2..K,
              e.g. (21, 76) on ADE20K, (4, 8) on Cityscapes
    sets:     "overlap" S_i = groups i..K; "disjoint" S_i = group i; "disjoint_all" so, but S_1 = all classes (the
              paper's arm without overlap is one of the two); "all" S_i = all classes
    share:    what the experts have in common: the "encoder"; the "decoder" too, so that only classifiers differ
              (arm MCN); or "nothing", K whole networks (arm ME, with sets="all", alpha=0, ensemble="average"), whose
              encoders start from the same weights, as pretrained ones do
    shared_gradient: the common part learns from expert 1, the "head" expert, or from "all"
    order:    "joint", all experts at once, loss sum_i L^i; or "head_first", expert 1 and what is shared with loss L^1,
              then the others with the sum of theirs, while all of the first is frozen (the paper may mean either)
    head_share: of the experts' steps for expert 1 in order="head_first". Half, so that no expert has more than another
    softmax:  of L_ce^i, over "all" classes, which pushes those outside S_i down, or over its "own", S_i
    alpha:    weight of L_aux; 0.2 in the paper
    l2:       what the norm of Eq. 3 is over. "pixel": ||z_iu over k not in S_i||_2 of each pixel, averaged; "class":
              the root mean square over the pixels for each k, summed. A sum over pixels would dwarf L_ce
    l2_pixels: on all "valid" pixels, or on the expert's "own" Omega_i
    kl:       what p_i^k of Eq. 4 is, restricted to S_i and renormalised, as is q, the pixel share of class k: the
              mean of p_i over Omega_i ("batch"), or that of each "pixel", averaged. The latter penalises confidence
    ensemble: of `LearnedEnsemble` (trained) or `SimpleEnsemble` (one stage only)
    select:   what the ensemble is trained towards, y_se of Eq. 9: the label of the "class", as in the formula; or, as
              Figure 3 can be read, the index of the "expert" to select, that of the label's group, which needs weights
              of the experts: ensemble="moe_gate" (see ExpertSelection)
    ensemble_share: of the steps for the second stage; 1.6k / 81.6k = 0.02 in the paper, more here, as a few
              hundred steps in all would leave it no more than a handful. Differs: the paper adds them to those of the
              first stage, here every method has the same number of steps
    initial_weight: w at the start (see LearnedEnsemble); the paper does not say
    threshold: of ensemble="threshold"
    An auxiliary head of the network, or the supervision of OCR's regions, stays with expert 1, which is trained with
    it as in plain cross-entropy, on the pixels of S_1; the other experts have none, so that their own OCR regions
    learn from their pixels only through the attention.
    Raises UserError for a value out of range, contradicting options, and cuts that leave an expert without a class
    that occurs.
    """
    _require("alpha", alpha, alpha >= 0, ">= 0")
    _require("ensemble_share", ensemble_share, 0 < ensemble_share < 1, "in (0, 1)")
    _require("head_share", head_share, 0 < head_share < 1, "in (0, 1)")
    _require("initial_weight", initial_weight, True, "finite")
    _require("threshold", threshold, 0 <= threshold <= 1, "in [0, 1]")
    if share == "nothing" and shared_gradient == "all":
        raise UserError("shared_gradient='all' has no meaning for share='nothing': whole networks share no part")
    if order == "head_first" and share == "nothing":
        raise UserError(
            "order='head_first' has no meaning for share='nothing': whole networks do not build on the first"
        )
    if order == "head_first" and shared_gradient == "all":
        raise UserError("order='head_first' contradicts shared_gradient='all': the other experts find it frozen")
    if select == "expert" and ensemble != "moe_gate":
        raise UserError(
            f"select='expert' trains weights of the experts: ensemble='moe_gate' has them, not {ensemble!r}"
        )
    if alpha and l2 == kl == "none":
        raise UserError(f"l2='none' and kl='none' leave nothing for alpha={alpha:g} to weigh: set alpha to 0")
    group = class_groups(counts, shares=shares, cuts=cuts)
    labels = label_sets(group, sets)
    experts = Experts(network, len(labels), share=share, shared_gradient=shared_gradient)
    criterion = partial(
        ExpertCriterion,
        counts=counts,
        softmax=softmax,
        alpha=alpha,
        l2=l2,
        l2_pixels=l2_pixels,
        kl=kl,
        auxiliary_weight=network.auxiliary_weight,
    )
    learner: nn.Module = experts
    last = []
    if ensemble in RULES:
        learner = Combined(experts, SimpleEnsemble(labels, ensemble, threshold))
    else:
        learned = LearnedEnsemble(len(labels), counts.num_classes, ensemble, initial_weight)
        towards = PixelCriterion(build_loss("ce", counts)) if select == "class" else ExpertSelection(learned, group)
        last = [Stage("ensemble", Combined(experts, learned), towards, share=ensemble_share, frozen=(experts,))]
    left = 1 - sum(stage.share for stage in last)
    loss = in_turn if shared_gradient == "head" else None
    if order == "joint" or len(labels) == 1:
        return [Stage("experts", learner, criterion(labels), share=left, loss=loss), *last]
    rest = left * (1 - head_share)
    return [
        Stage("head", Experts(network, 1), criterion(labels[:1]), share=left * head_share),
        Stage("others", learner, criterion(labels[1:]), share=rest, frozen=(network,), loss=loss),
        *last,
    ]


# --- which classes an expert learns ---


def class_groups(
    counts: ClassCounts, *, shares: Sequence[float] = (HEAD_SHARE, TAIL_SHARE), cuts: Sequence[int] | None = None
) -> Tensor:
    """Group of each class, 0 (head) .. K-1 (tail), (C,) int64; see `build` for the cuts.

    A class with a share of exactly shares[i] is in group i; one without pixels is in the last.
    Raises UserError unless 1 > shares[0] > shares[1] > ... > 0, or 0 < cuts[0] < cuts[1] < ... < C, and if no class
    of a group has a pixel.
    """
    steps = list(shares if cuts is None else cuts)
    if cuts is None:
        if not all(a > b for a, b in zip([1.0, *steps], [*steps, 0.0], strict=True)):
            raise UserError(f"shares must fall strictly between 1 and 0, got {tuple(steps)}")
        group = (counts.pixel_share().unsqueeze(1) < torch.tensor(steps, dtype=torch.float64)).sum(1)
    else:
        if not all(type(c) is int for c in steps) or not all(
            a < b for a, b in zip([0, *steps], [*steps, counts.num_classes], strict=True)
        ):
            raise UserError(f"cuts must rise strictly between 0 and {counts.num_classes} classes, got {tuple(steps)}")
        rank = counts.pixels.argsort(descending=True, stable=True).argsort()
        group = torch.bucketize(rank, torch.tensor(steps, dtype=torch.int64), right=True)
    group[counts.pixels == 0] = len(steps)
    sizes = group[counts.pixels > 0].bincount(minlength=len(steps) + 1).tolist()
    if 0 in sizes:
        name = "shares" if cuts is None else "cuts"
        raise UserError(
            f"expert {sizes.index(0) + 1} would have no classes: {name}={tuple(steps)} put {sizes} classes that occur"
            f" into the {len(sizes)} groups, head first; choose other {name}, e.g. shorter ones for fewer experts"
        )
    return group


def label_sets(group: Tensor, sets: str = "overlap") -> Tensor:
    """Which classes each expert learns, (K, C) bool, from their groups (C,); see `build`."""
    expert = torch.arange(int(group.max()) + 1, device=group.device).unsqueeze(1)
    if choose("sets", sets, SETS) == "overlap":
        return group >= expert
    return (group == expert) | (sets == "all") | ((sets == "disjoint_all") & (expert == 0))


def expert_target(target: Tensor, labels: Tensor) -> Tensor:
    """y where y is in S_i, IGNORE_INDEX elsewhere. target (B, H, W) integer, labels (C,) bool

    Raises ValueError for labels that are none (`check_labels`).
    """
    check_labels(target, len(labels))
    return target.masked_fill(~per_pixel(labels, target), IGNORE_INDEX)


# --- the networks ---


class ExpertOutput(NamedTuple):
    """An Output with the logits of every expert, each (B, C, H, W); features and logits are those of the first."""

    features: Tensor
    logits: Tensor
    experts: tuple[Tensor, ...]
    auxiliary: Tensor | None = None  # of expert 1


class Experts(nn.Module):
    """K experts that share the encoder, the encoder and decoder, or nothing of a network.

    forward: images (B, 3, H, W) -> ExpertOutput, with the logits of expert 1. Expert 1 is the network itself; what the
    others have of their own is copied from it and drawn anew, but for the encoder.
    While the others train with expert 1 frozen, the output is theirs alone, and expert 1 computes what it shares only.
    """

    def __init__(
        self, network: SegmentationNetwork, number: int, *, share: str = "encoder", shared_gradient: str = "head"
    ) -> None:
        from segmentation_models_pytorch.base.initialization import initialize_decoder

        super().__init__()
        self.base, self.share, self.shared_gradient = network, share, shared_gradient
        self.others = nn.ModuleList()
        for _ in range(number - 1):
            # the parts that are shared are left out of the copy
            shared = {"encoder": ["encoder"], "decoder": ["encoder", "decoder", "neck"], "nothing": []}[share]
            own = copy.deepcopy(network, {id(getattr(network, part)): nn.Identity() for part in shared})
            own.auxiliary, own.auxiliary_weight = None, 0.0
            if share != "decoder":
                for module in own.decoder.modules():
                    if isinstance(module, nn.ConvTranspose2d):  # the library's initialisation leaves them out
                        module.reset_parameters()
                initialize_decoder(own.decoder)
                initialize_decoder(own.neck)
            reinitialise(own.classifier)
            self.others.append(own)

    def forward(self, image: Tensor) -> ExpertOutput:
        outputs = [output for _, output in self.turns(image)]
        first = outputs[0]
        return ExpertOutput(first.features, first.logits, tuple(o.logits for o in outputs), first.auxiliary)

    def turns(self, image: Tensor) -> Iterator[tuple[SegmentationNetwork, Output]]:
        """Each expert and its output, computed when it is asked for."""
        base: Any = self.base
        others: Any = self.others
        if self.share == "nothing":
            yield from ((expert, expert(image)) for expert in (base, *others))
            return
        learned = self.training and not base.training  # expert 1, before the others
        maps: Any = base.encode(image)
        features: Any = None
        auxiliary = None
        if self.share == "decoder" or not learned:
            features, auxiliary = base.decode_with_auxiliary(maps, image)
        if not learned:
            yield base, Output(features, base.resize(base.classify(features), image), auxiliary)
        read = features if self.share == "decoder" else maps
        if self.shared_gradient == "head":
            read = _detached(read)
        del maps, features, auxiliary  # nothing is kept that no other expert reads
        for expert in others:
            own = read if self.share == "decoder" else expert.decode(read)
            yield expert, Output(own, base.resize(expert.classify(own), image))
            del own


def _detached(maps: Any) -> Any:
    """Tensors, possibly in nested lists, without their history."""
    if isinstance(maps, (list, tuple)):
        return [_detached(m) for m in maps]
    return maps.detach() if isinstance(maps, Tensor) else maps


class Combined(nn.Module):
    """The experts, with the logits of an ensemble of them.

    While the experts of a rule without parameters train, nothing is combined and the logits are those of the first.
    """

    def __init__(self, experts: Experts, ensemble: nn.Module) -> None:
        super().__init__()
        self.experts, self.ensemble = experts, ensemble

    def forward(self, image: Tensor) -> ExpertOutput:
        output = self.experts(image)
        if self.training and isinstance(self.ensemble, SimpleEnsemble):
            return output
        return output._replace(logits=self.ensemble(output.experts))


# --- stage 1 ---


class ExpertCriterion(nn.Module):
    """sum_i L_ce^i + alpha L_aux^i for labels (K, C) bool; see `build` for the readings of L_aux.

    auxiliary_weight: of the cross-entropy of the auxiliary logits, where there are any, over the pixels of S_1
    """

    labels: Tensor
    order: Tensor
    log_prior: Tensor

    def __init__(
        self,
        labels: Tensor,
        counts: ClassCounts,
        *,
        alpha: float,
        softmax: str = "all",
        l2: str = "pixel",
        l2_pixels: str = "valid",
        kl: str = "batch",
        auxiliary_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.auxiliary_weight, self.softmax = auxiliary_weight, softmax
        self.alpha, self.l2, self.l2_pixels, self.kl = alpha, l2, l2_pixels, kl
        self.numbers_outside = (~labels).sum(1).tolist()  # classes outside each S_i, which come first in `order`
        self.register_buffer("labels", labels)
        self.register_buffer("order", labels.long().argsort(stable=True, dim=1), persistent=False)
        self.register_buffer("log_prior", class_sizes(counts, "pixel").log())  # up to a constant

    def forward(self, output: ExpertOutput, target: Tensor) -> Tensor:
        auxiliary = (output.auxiliary, *[None] * (len(self.labels) - 1))
        pairs = enumerate(zip(output.experts, auxiliary, strict=True))
        return torch.stack([self.of_expert(i, z, target, own) for i, (z, own) in pairs]).sum()

    def of_expert(self, number: int, logits: Tensor, target: Tensor, auxiliary: Tensor | None = None) -> Tensor:
        """Loss of an expert, counted from 0, with that of its auxiliary logits, if any: each (B, C, H, W)."""
        labels, outside = self.labels[number], self.order[number, : self.numbers_outside[number]]
        loss = self.expert_loss(logits, target, labels, outside)
        if auxiliary is None:
            return loss
        return loss + self.auxiliary_weight * cross_entropy(auxiliary, expert_target(target, labels))

    def expert_loss(self, logits: Tensor, target: Tensor, labels: Tensor, outside: Tensor) -> Tensor:
        """L^i for z_i (B, C, H, W), y (B, H, W), S_i (C,) bool and the other classes (C - |S_i|,) int64."""
        target, logits = target.long(), _wide(logits)
        if not (narrow := len(outside) > 0):
            check_labels(target, len(labels))  # as expert_target does
        own = expert_target(target, labels) if narrow else target
        restricted = self.softmax == "own" and narrow
        if self.alpha and self.kl == "batch":
            loss, z, y = cross_entropy_and_mean(logits, own)
        else:
            loss, z, y = None, logits, own
        if loss is None or restricted:
            loss = cross_entropy(logits.index_fill(1, outside, -math.inf) if restricted else logits, own)
        if self.alpha and self.l2 != "none" and narrow:
            pixels = own if self.l2_pixels == "own" else target
            loss = loss + self.alpha * outside_norm(logits.index_select(1, outside), pixels, self.l2)
        if self.alpha and self.kl != "none":
            loss = loss + self.alpha * prior_divergence(z, y, labels, self.log_prior)
        return loss


def in_turn(network: nn.Module, criterion: ExpertCriterion, image: Tensor, target: Tensor) -> Tensor:
    """criterion(network(image), target) for experts that no gradient joins, one expert's maps in memory at a time.

    The gradient of an expert's loss is taken as soon as that is known, which frees its maps before the next expert's
    are computed; the backward pass of the result hands it on. It has no second derivative.
    """
    experts: Any = network.experts if isinstance(network, Combined) else network
    losses: list[Tensor] = []
    for expert, output in experts.turns(image):  # enumerate would keep the output of the one before
        loss = criterion.of_expert(len(losses), output.logits, target, output.auxiliary)
        own = [p for p in expert.parameters() if p.requires_grad]
        with torch.autocast(image.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, own, allow_unused=True)
        losses.append(WithGradients.apply(loss.detach(), gradients, *own))
        del output, loss  # before the next expert
    return torch.stack(losses).sum()


class WithGradients(torch.autograd.Function):
    """apply(loss, gradients, *parameters): the loss, whose gradients to the parameters (None for none) are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = list(gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients, scaled = ctx.gradients, None, []
        while gradients:  # one by one: all at once would need their memory twice
            g = gradients.pop()
            scaled.append(None if g is None else g * scale)
        return None, None, *reversed(scaled)


def cross_entropy_and_mean(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy; the mean softmax of the valid pixels, as logits (1, C, 1, 1) of a single pixel up to a
    constant; and the target (1, 1, 1) of that pixel: ignored if there are none, else valid."""
    nll, mass = SoftmaxSums.apply(logits, target)
    number = (target != IGNORE_INDEX).sum()
    mean = mass.clamp(min=torch.finfo(mass.dtype).tiny).log().view(1, -1, 1, 1)
    return nll / number.clamp(min=1), mean, torch.where(number > 0, 0, IGNORE_INDEX).view(1, 1, 1)


class SoftmaxSums(torch.autograd.Function):
    """(-sum_u log p_{u,y_u}, sum_u p_uk) over the valid pixels u, p = softmax(z): a scalar and (C,).

    apply(logits (B, C, H, W) float32 or float64, target (B, H, W) int64). All that L_ce^i and the batch's p_i need, in
    fewer passes over maps of all classes than autograd makes. With the gradients a of the first sum and g of the other,
    that of z_uk is  p_uk (a + g_k - sum_j g_j p_uj) - a [k = y_u].  It has no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(1)
        nll = F.nll_loss(log_p, target, ignore_index=IGNORE_INDEX, reduction="sum")
        p = log_p.exp_().mul_((target != IGNORE_INDEX).unsqueeze(1).to(log_p.dtype))
        ctx.save_for_backward(p, target)
        return nll, p.sum((0, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, g: Tensor) -> tuple[Tensor, None]:
        p, target = ctx.saved_tensors
        gradient = p * g.view(1, -1, 1, 1)
        gradient.addcmul_(p, a - gradient.sum(1, keepdim=True))
        target, valid = target.unsqueeze(1), (target != IGNORE_INDEX).unsqueeze(1)
        return gradient.scatter_add_(1, target.where(valid, 0), valid * -a), None


def outside_norm(logits: Tensor, target: Tensor, form: str = "pixel") -> Tensor:
    """Norm of logits (B, N, H, W), those of the classes outside S_i, over the valid pixels; 0 if there are none.

    "pixel": 1/|Omega| sum_u sqrt(sum_k z_uk^2);  "class": sum_k sqrt(1/|Omega| sum_u z_uk^2)
    """
    squares, valid = logits.square(), (target != IGNORE_INDEX).to(logits.dtype)
    if form == "pixel":
        return mean_over_valid(_root(squares.sum(1)) * valid, target)
    return _root((squares * valid.unsqueeze(1)).sum((0, 2, 3)) / valid.sum().clamp(min=1)).sum()


def _root(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    positive = squares > 0
    return squares.where(positive, 1).sqrt() * positive


def prior_divergence(logits: Tensor, target: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
    """Mean over the valid pixels of KL(p || q), softmax p and prior q over the classes of S_i; 0 if there are none.

    logits: (B, C, H, W), or what differs from them by a constant of each pixel
    log_prior: (C,), log q up to a constant
    """
    lowest = torch.finfo(torch.float32).min / 4  # -inf would give NaN gradients
    log_q = log_prior.to(logits.dtype).masked_fill(~labels, lowest).log_softmax(0)
    log_p = logits.masked_fill(~labels.view(1, -1, 1, 1), lowest).log_softmax(1)
    divergence = (log_p.exp() * (log_p - per_channel(log_q, log_p))).sum(1)
    return mean_over_valid(divergence.masked_fill(target == IGNORE_INDEX, 0), target)


# --- stage 2 ---


class SimpleEnsemble(nn.Module):
    """Rules without parameters: logits of K experts -> log of a score, (B, C, H, W), for arg max over classes.

    average:       mean_i p_i (the arm ME)
    group_average: for each class the mean of p_i over the experts that learn it
    argmax:        the class of the largest confidence of any expert: max_i p_i
    threshold:     p_i of the last, most specialised expert whose largest p_i is at least `threshold`; else p_1
    head:          p_1
    The paper names three of them, with 0.3, but does not define them (Table 6): these are readings.
    """

    labels: Tensor

    def __init__(self, labels: Tensor, rule: str, threshold: float = 0.3) -> None:
        super().__init__()
        self.rule, self.threshold = choose("rule", rule, RULES), threshold
        self.register_buffer("labels", labels)

    def forward(self, experts: Sequence[Tensor]) -> Tensor:
        if self.rule == "head":
            return _wide(experts[0]).log_softmax(1)
        log_p = torch.stack([_wide(z).log_softmax(1) for z in experts])  # (K, B, C, H, W)
        if self.rule == "average":
            return log_p.logsumexp(0) - math.log(len(experts))
        if self.rule == "group_average":
            log_p = log_p.masked_fill(~self.labels[:, None, :, None, None], -torch.inf)
            return log_p.logsumexp(0) - per_channel(self.labels.sum(0), log_p).log()
        if self.rule == "argmax":
            return log_p.amax(0)
        sure = log_p.amax(2).exp() >= self.threshold  # (K, B, H, W)
        number = torch.arange(len(experts), device=sure.device).view(-1, 1, 1, 1)
        chosen = (sure * number).amax(0)
        return log_p.gather(0, chosen[None, :, None].expand_as(log_p[:1]))[0]


class LearnedEnsemble(nn.Module):
    """Readings of Eq. 7-8, weights w and biases beta (K, C): logits of K experts -> log p_final (B, C, H, W).

    Eq. 7 is p^_i = softmax_j(w_i^j p_i^j + beta_i^j), of probabilities. Eq. 8, 1/K sum_i w_i p^_i, is no
    distribution and can be negative, so that the log of it in Eq. 9 is undefined. Readings:

    moe_mean:     p_final = 1/K sum_i p^_i: without the second w
    moe_weighted: p_final^j proportional to sum_i |w_i^j| / sum_l |w_l^j| p^_i^j
    moe_logits:   p_final = softmax_j(sum_i w_i^j z_i^j + beta^j); here w starts at 1/K times its initial value
    moe_gate:     p_final^j proportional to sum_i g_i^j p_i^j,  g = softmax_i(w_i^j p_i^j + beta_i^j): the softmax
                  of Eq. 7 over experts
    The cross-entropy of these logits is Eq. 9 with p_final normalised over the classes. w = initial_weight, beta = 0 at
    the start. At w = 1 the distributions p^_i are almost uniform (largest ratio e), but their order is that of p_i.
    """

    def __init__(self, number: int, classes: int, reading: str, initial_weight: float = 1.0) -> None:
        super().__init__()
        self.reading = choose("reading", reading, LEARNED)
        logits = reading == "moe_logits"
        self.weight = nn.Parameter(torch.full((number, classes), initial_weight / (number if logits else 1)))
        self.bias = nn.Parameter(torch.zeros((classes,) if logits else (number, classes)))

    def forward(self, experts: Sequence[Tensor]) -> Tensor:
        z = torch.stack([_wide(z) for z in experts])  # (K, B, C, H, W)
        if self.reading == "moe_logits":
            return (self._rows(self.weight, z) * z).sum(0) + per_channel(self.bias, z)
        log_p = z.log_softmax(2)
        if self.reading == "moe_gate":
            return (self.scores(log_p).log_softmax(0) + log_p).logsumexp(0)
        log_p = self.scores(log_p).log_softmax(2)
        if self.reading == "moe_mean":
            return log_p.logsumexp(0) - math.log(len(experts))
        size = self._rows(self.weight, z).abs().clamp(min=torch.finfo(z.dtype).tiny)
        return (log_p + size.log() - size.sum(0).log()).logsumexp(0)

    def scores(self, log_p: Tensor) -> Tensor:
        """w_i^j p_i^j + beta_i^j from log p of the experts, both (K, B, C, H, W)."""
        return self._rows(self.weight, log_p) * log_p.exp() + self._rows(self.bias, log_p)

    @staticmethod
    def _rows(table: Tensor, maps: Tensor) -> Tensor:
        return table.to(maps.dtype)[:, None, :, None, None]


class ExpertSelection(nn.Module):
    """-1/|Omega| sum_u log g_{i(y_u)}^{y_u}, g the weights of the experts in `moe_gate`, i(k) the group of class k.

    A reading of Eq. 9 whose target is the expert to select. What it learns is almost given by the groups alone: a bias
    that grows without limit lets each class have the probability of its own expert.
    ensemble: a LearnedEnsemble, which stays the network's;  group: (C,) int64, see `class_groups`
    """

    group: Tensor

    def __init__(self, ensemble: LearnedEnsemble, group: Tensor) -> None:
        super().__init__()
        self.of_network = (ensemble,)  # a tuple: no part of the criterion
        self.register_buffer("group", group)

    def forward(self, output: ExpertOutput, target: Tensor) -> Tensor:
        check_labels(target, len(self.group))
        target = target.long()
        log_p = torch.stack([_wide(z).log_softmax(1) for z in output.experts])
        log_gate = self.of_network[0].scores(log_p).log_softmax(0)  # (K, B, C, H, W)
        own = per_channel(self.group, target.unsqueeze(1)).expand_as(log_gate[0]).unsqueeze(0)
        of_own = log_gate.gather(0, own)[0]  # for every class, that of its own expert
        return mean_over_valid(F.nll_loss(of_own, target, ignore_index=IGNORE_INDEX, reduction="none"), target)


# --- the oracle ---


def oracle_prediction(
    experts: Sequence[Tensor], target: Tensor, group: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """The label that the expert of each pixel's true group gives it, (B, H, W) int64.

    experts: K logits (B, C, H, W);  target: (B, H, W) integer;  group: (C,), see `class_groups`
    allowed: (K, C) bool, the classes expert i may choose; None for all (the paper's text). label_sets(group, "overlap")
        restricts it to S_i, label_sets(group, "disjoint") to its own group
    Ignored pixels get the label of expert 1.
    """
    labels = torch.stack(
        [
            (z if allowed is None else z.masked_fill(~allowed[i].view(1, -1, 1, 1), -torch.inf)).max(1).indices
            for i, z in enumerate(experts)
        ]
    )
    return labels.gather(0, per_pixel(group, target.long()).unsqueeze(0))[0]


def restricted_prediction(logits: Tensor, target: Tensor, allowed: Tensor, group: Tensor) -> Tensor:
    """What a single network predicts if it may choose among the classes of each pixel's true group only.

    logits: (B, C, H, W);  target: (B, H, W);  allowed: (K, C) bool as above;  returns (B, H, W) int64
    What it gains over the plain arg max is knowledge of the label, not of the experts: the part of the oracle's gain
    that any network would have.
    """
    may = allowed[per_pixel(group, target.long())].movedim(-1, 1)  # (B, C, H, W)
    return logits.masked_fill(~may, -torch.inf).max(1).indices
