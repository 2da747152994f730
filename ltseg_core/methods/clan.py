"""CLAN: category-level adversaries for domain adaptation (Luo et al., CVPR 2019), a system that BLV compares with.

Two classifiers read the same features; the prediction is the softmax of the sum of their logits, p = softmax(z_1 +
z_2). A discriminator D sees p and learns whether the image had labels; the network learns to make images without labels
look to D as if they had some, most where the classifiers disagree, which the cosine of their weights keeps apart:

    L       = CE(z_1) + CE(z_2) + d (lambda_weight cos(w_1, w_2) + lambda_adv L_adv)
    L_adv   = -1/|U| sum_u (eps + lambda_local M_u) log(1 - D_u),  M_u = 1 - cos(softmax(z_1u), softmax(z_2u))
    L_D     = -1/|S| sum_s log(1 - D_s) - 1/|U| sum_u (eps + lambda_local M_u) log D_u

S, U: pixels of the images with and without labels; D_u in (0, 1): how sure D is that there were none. L_D leaves the
network as it is and L_adv the discriminator; that pixels agree more, so that M_u falls, is part of L_adv.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ltseg_core.config import UserError
from ltseg_core.losses import _require, _wide
from ltseg_core.methods.base import Alignment, Stage, checked
from ltseg_core.methods.medoe import ExpertCriterion, ExpertOutput
from ltseg_core.models import SegmentationNetwork, reinitialise
from ltseg_core.stats import ClassCounts


@checked
def build(
    network: SegmentationNetwork,
    counts: ClassCounts,
    *,
    lambda_weight: float = 0.01,
    lambda_adv: float = 0.001,
    lambda_local: float = 40.0,
    epsilon: float = 0.4,
    preheat: float = 0.05,
    damping: bool = True,
    discriminator_lr: float = 0.1,
) -> list[Stage]:
    """Training of the network, its second classifier and the discriminator, in one stage.

    lambda_weight: weight of the cosine of the two classifiers' weights, which the code doubles
    lambda_adv: weight of the adversarial loss
    lambda_local, epsilon: how a pixel's disagreement weighs in it; in the code 40 for GTA5, 10 for SYNTHIA
    preheat: share of the steps in which every pixel weighs 1 in it, of the code
    damping: d falls from 1 to 0 over the steps, as in the code; else it is 1
    discriminator_lr: learning rate of the discriminator over that of the decoder; in the code 0.04 of the classifiers'
        and 0.4 of the encoder's, with Adam for it and SGD for the network. Differs: the experiment's optimiser for all
    The images without labels are the experiment's, of its `target` or those beyond `labelled_images`. The EMA teacher
    is what is evaluated, as of every method; `unlabelled_weight` 0 leaves out its pseudo-labels, which CLAN lacks.
    Differs: two linear classifiers on one decoder (the code: two whole ASPP modules), which see the same dropout;
    cross-entropy with pixels of equal weight (the code: focal), so that the base is that of the others; what the
    augmentation leaves black around an image counts as part of it.
    Raises UserError for a value out of range.
    """
    for name, value in {
        "lambda_weight": lambda_weight,
        "lambda_adv": lambda_adv,
        "lambda_local": lambda_local,
        "epsilon": epsilon,
        "discriminator_lr": discriminator_lr,
    }.items():
        _require(name, value, value >= 0, ">= 0")
    _require("preheat", preheat, 0 <= preheat <= 1, "in [0, 1]")
    learner = TwoClassifiers(network)
    align = CategoryAlignment(
        (network.classifier, learner.second),
        counts.num_classes,
        lambda_weight=lambda_weight,
        lambda_adv=lambda_adv,
        lambda_local=lambda_local,
        epsilon=epsilon,
        preheat=preheat,
        damping=damping,
    )
    align.lr_factor = discriminator_lr
    every = torch.ones(2, counts.num_classes, dtype=torch.bool)  # both learn all classes
    criterion = ExpertCriterion(every, counts, alpha=0.0, auxiliary_weight=network.auxiliary_weight)
    return [Stage("clan", learner, criterion, align=align)]


class TwoClassifiers(nn.Module):
    """A network with a second classifier: images (B, 3, H, W) -> ExpertOutput whose logits are the sum of both's."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network, self.second = network, copy.deepcopy(network.classifier)
        reinitialise(self.second)

    def forward(self, image: Tensor) -> ExpertOutput:
        network = self.network
        features, auxiliary = network.decode_with_auxiliary(network.encode(image), image)
        seen = network.dropout(features)
        first, second = (network.resize(classifier(seen), image) for classifier in (network.classifier, self.second))
        return ExpertOutput(features, first + second, (first, second), auxiliary)


class CategoryAlignment(Alignment):
    """d (lambda_weight cos(w_1, w_2) + lambda_adv L_adv) + L_D, where no gradient of L_adv reaches D, and none of L_D
    the network, so that one backward pass does the two steps of the authors' code.

    classifiers: the two, whose weights w (and biases) are compared; the others as in `build`
    """

    def __init__(
        self,
        classifiers: tuple[nn.Module, nn.Module],
        num_classes: int,
        *,
        lambda_weight: float,
        lambda_adv: float,
        lambda_local: float,
        epsilon: float,
        preheat: float,
        damping: bool,
    ) -> None:
        super().__init__()
        self.classifiers = classifiers  # in a tuple, as they belong to the network
        self.lambda_weight, self.lambda_adv = lambda_weight, lambda_adv
        self.lambda_local, self.epsilon = lambda_local, epsilon
        self.preheat, self.damping = preheat, damping
        self.discriminator = discriminator(num_classes)

    def forward(self, labelled: ExpertOutput, unlabelled: ExpertOutput) -> Tensor:
        source, target = (_wide(output.logits).softmax(1) for output in (labelled, unlabelled))
        first, second = (_wide(z).softmax(1) for z in unlabelled.experts)
        weight = self.epsilon + self.lambda_local * (1 - F.cosine_similarity(first, second, dim=1))
        if self.progress < self.preheat:
            weight = torch.ones_like(weight)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = (weight * F.softplus(self._judge(target, frozen))).mean()
        told_apart = (
            F.softplus(self._judge(source.detach())).mean()
            + (weight.detach() * F.softplus(-self._judge(target.detach()))).mean()
        )
        w1, w2 = (_flat(classifier) for classifier in self.classifiers)
        damping = 1 - self.progress if self.damping else 1.0
        pulled = self.lambda_weight * F.cosine_similarity(w1, w2, dim=0) + self.lambda_adv * fooled
        return damping * pulled + told_apart

    def _judge(self, p: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """log D / (1 - D) of each pixel, (B, H, W), of probabilities (B, C, H, W)."""
        if min(p.shape[-2:]) < 32:
            raise UserError(
                f"clan needs images of at least 32x32 pixels, got {p.shape[-2]}x{p.shape[-1]}: its discriminator halves"
                " them five times"
            )
        judged = self.discriminator(p) if parameters is None else functional_call(self.discriminator, parameters, p)
        return F.interpolate(_wide(judged), p.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


def discriminator(num_classes: int, width: int = 64) -> nn.Sequential:
    """(B, C, H, W) -> (B, 1, h, w): five convolutions of 4x4 that halve the map, with leaky ReLUs (0.2) between."""
    channels = [num_classes, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for into, out in pairwise(channels):
        layers += [nn.Conv2d(into, out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, stride=2, padding=1))


def _flat(classifier: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in classifier.parameters() if p.ndim])
