"""Training methods: what learns, from which loss, for what share of the steps, and what is left at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ltseg_core.config import choose
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


def pixel_loss(name: str) -> Callable[..., list[Stage]]:
    """A method that trains the whole network with one pixel loss in one stage."""

    def build(network: nn.Module, counts: ClassCounts, **hyper: Any) -> list[Stage]:
        return [Stage(name, network, PixelCriterion(build_loss(name, counts, **hyper)))]

    return build


METHODS: dict[str, Callable[..., list[Stage]]] = {name: pixel_loss(name) for name in LOSSES}


def build_method(name: str, network: nn.Module, counts: ClassCounts, hyper: Mapping[str, Any]) -> list[Stage]:
    """The stages of a method. Raises UserError for an unknown method or hyper-parameter, or one out of range."""
    return METHODS[choose("method", name, METHODS)](network, counts, **hyper)
