"""What a method consists of: stages, each a network and the criterion that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

from torch import Tensor, nn

from ltseg_core.config import check_options
from ltseg_core.losses import cross_entropy
from ltseg_core.models import Output

P = ParamSpec("P")


class Alignment(nn.Module):
    """A loss of the outputs for labelled images and for others: (Output, Output) -> scalar.

    progress:  share of the stage's steps done, in [0, 1]
    lr_factor: learning rate of its parameters over that of the decoder
    """

    progress: float = 0.0
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One leg of training.

    network:   image -> Output; the network of the last stage is what is evaluated and stored
    criterion: (Output, target) -> scalar; its own parameters are trained too and dropped after the stage
    share:     of the step budget, relative to the other stages'; 0 trains nothing
    frozen:    modules kept fixed and in evaluation mode
    prepare:   called once before the first step with the labelled training batches, unaugmented, each image
               (B, 3, H, W) float in [0, 1] and target (B, H, W) int64, on the training device
    sampling:  which classes each labelled image contains, (N, C) bool, -> weights (N,) in proportion to which images
               are drawn with replacement; None: every image once per epoch
    split:     of the data set, whose labelled images it learns from
    loss:      (network, criterion, image, target) -> scalar, a cheaper way to criterion(network(image), target); not
               together with `align`, which needs the outputs
    criterion_lr: learning rate of the criterion's parameters over that of the decoder
    align:     what it learns from images without labels beside their pseudo-labels; its parameters are trained and
               dropped as the criterion's
    """

    name: str
    network: nn.Module
    criterion: nn.Module
    share: float = 1.0
    frozen: tuple[nn.Module, ...] = ()
    prepare: Callable[[Iterable[tuple[Tensor, Tensor]]], None] | None = None
    sampling: Callable[[Tensor], Tensor] | None = None
    split: str = "train"
    loss: Callable[[Any, Any, Tensor, Tensor], Tensor] | None = None
    criterion_lr: float = 1.0
    align: Alignment | None = None


@dataclass(frozen=True)
class Method:
    """How to build a method's stages, and where it starts.

    build:  (network, counts, *, keyword-only hyper-parameters) -> stages
    first:  the method whose finished run of the same experiment gives the weights to start from, unless a
            hyper-parameter `first` names another (which has its default hyper-parameters); None: from scratch
    length: steps of the method's own stages, as a share of the experiment's
    unlabelled: whether it needs images without labels
    plain:  whether it leaves the network as it was built, so that others can start from its run
    """

    build: Callable[..., list[Stage]]
    first: str | None = None
    length: float = 1.0
    unlabelled: bool = False
    plain: bool = True


def checked(build: Callable[P, list[Stage]]) -> Callable[P, list[Stage]]:
    """`build`, refusing unknown options and values that their annotations do not allow (see `check_options`)."""

    @wraps(build)
    def build_checked(*args: P.args, **options: P.kwargs) -> list[Stage]:
        return build(*args, **check_options("hyper-parameter", options, build))

    return build_checked


class PixelCriterion(nn.Module):
    """A pixel loss on the logits, plus `auxiliary_weight` x cross-entropy where the network has an auxiliary head."""

    def __init__(self, loss: nn.Module, auxiliary_weight: float = 0.0) -> None:
        super().__init__()
        self.loss, self.auxiliary_weight = loss, auxiliary_weight

    def forward(self, output: Output, target: Tensor) -> Tensor:
        loss = self.loss(output.logits, target)
        if output.auxiliary is None or not self.auxiliary_weight:
            return loss
        return loss + self.auxiliary_weight * cross_entropy(output.auxiliary, target)
