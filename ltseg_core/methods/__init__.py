"""Training methods: what learns, from which loss, for what share of the steps, and what is left at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ltseg_core.config import check_options, choose
from ltseg_core.losses import LOSSES, build_loss
from ltseg_core.models import Output
from ltseg_core.stats import ClassCounts


@dataclass(frozen=True)
class Stage:
    """One leg of training.

    network:   image -> Output; the network of the last stage is what is evaluated and stored
    criterion: (Output, target) -> scalar; its own parameters are trained too and dropped after the stage
    share:     of the step budget; the shares of a method's stages sum to 1
    frozen:    modules kept fixed and in evaluation mode
    prepare:   called once before the first step with the labelled training batches, unaugmented, each image
               (B, 3, H, W) float in [0, 1] and target (B, H, W) int64, on the training device
    """

    name: str
    network: nn.Module
    criterion: nn.Module
    share: float = 1.0
    frozen: tuple[nn.Module, ...] = ()
    prepare: Callable[[Iterable[tuple[Tensor, Tensor]]], None] | None = None


class PixelCriterion(nn.Module):
    """A pixel loss on the logits of an Output."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Output, target: Tensor) -> Tensor:
        return self.loss(output.logits, target)


@dataclass(frozen=True)
class Method:
    """How to build a method's stages, and where it starts.

    build:  (network, counts, *, keyword-only hyper-parameters) -> stages
    first:  a method whose finished run of the same experiment gives the weights to start from; None: from scratch
    length: steps of the method's own stages, as a share of the experiment's
    """

    build: Callable[..., list[Stage]]
    first: str | None = None
    length: float = 1.0


def pixel_loss(name: str) -> Callable[..., list[Stage]]:
    """A method that trains the whole network with one pixel loss in one stage."""

    def build(network: nn.Module, counts: ClassCounts, **hyper: Any) -> list[Stage]:
        return [Stage(name, network, PixelCriterion(build_loss(name, counts, **hyper)))]

    return build


METHODS: dict[str, Method] = {name: Method(pixel_loss(name)) for name in LOSSES}


def build_method(name: str, network: nn.Module, counts: ClassCounts, hyper: Mapping[str, Any]) -> list[Stage]:
    """The stages of a method. Raises UserError for an unknown method or hyper-parameter, or one out of range."""
    name = choose("method", name, METHODS)
    if name not in LOSSES:  # build_loss checks its own
        check_options(f"hyper-parameter of {name}", hyper, METHODS[name].build)
    return METHODS[name].build(network, counts, **hyper)
