"""Training methods by name: what learns, from which loss, for how long, and what is left at inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ltseg_core.config import UserError, canonical, choose, option_names
from ltseg_core.losses import LOSSES, build_loss, check_counts
from ltseg_core.methods import clan, disalign, medoe, region_rebalance, two_stage
from ltseg_core.methods.base import Method, PixelCriterion, Stage
from ltseg_core.models import SegmentationNetwork
from ltseg_core.stats import ClassCounts


def pixel_loss(name: str) -> Callable[..., list[Stage]]:
    """A method that trains the whole network with one pixel loss in one stage."""

    def build(network: SegmentationNetwork, counts: ClassCounts, **hyper: Any) -> list[Stage]:
        criterion = PixelCriterion(build_loss(name, counts, **hyper), network.auxiliary_weight)
        return [Stage(name, network, criterion)]

    return build


METHODS: dict[str, Method] = {
    **{name: Method(pixel_loss(name)) for name in LOSSES},
    "undersampling": Method(two_stage.undersampling),
    "repeat_factor": Method(two_stage.repeat_factor),
    "region_rebalance": Method(region_rebalance.build),
    "medoe": Method(medoe.build, plain=False),
    "clan": Method(clan.build, unlabelled=True, plain=False),
    # on the finished run of the same seed: of cross-entropy, or of the method that `first` names (`start_and_options`)
    "disalign": Method(disalign.disalign, first="ce", length=0.25),
    "crt": Method(two_stage.crt, first="ce", length=0.25),
    "lws": Method(two_stage.lws, first="ce", length=0.25),
    "balanced_bound": Method(two_stage.balanced_bound, first="ce", length=0.25),
    "tau_norm": Method(two_stage.tau_norm, first="ce", length=0),
    "posthoc_logit_adjustment": Method(two_stage.posthoc_logit_adjustment, first="ce", length=0),
    "ncm": Method(two_stage.ncm, first="ce", length=0),
    "tde": Method(two_stage.tde, first="ce", length=0),
}
SUPERVISED = {name: method for name, method in METHODS.items() if not method.unlabelled}
"""Those that learn from labelled images alone, which can be compared under one protocol."""


def start_and_options(name: str, hyper: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The method whose finished run this one starts from (None: from scratch), and the other hyper-parameters.

    Every method with a `first` takes another one as hyper-parameter `first`: a method that trains the whole network and
    leaves it as it was built, with its default hyper-parameters. Raises UserError for one that does not, and for
    unknown names beside it.
    """
    build, usual = METHODS[name].build, METHODS[name].first
    if usual is None:
        return None, dict(hyper)
    options = canonical(f"hyper-parameter of {name}", hyper, ["first", *option_names(build)])
    plain = [other for other, method in METHODS.items() if method.first is None and method.plain]
    return choose("first method", options.pop("first", usual), plain), options


def build_method(name: str, network: SegmentationNetwork, counts: ClassCounts, hyper: Mapping[str, Any]) -> list[Stage]:
    """The stages of a method for this network and these class counts.

    Raises UserError for an unknown method or hyper-parameter, one of the wrong type or out of range, for counts that
    are no ClassCounts or all zero, and for a network whose classes are not theirs.
    """
    name = choose("method", name, METHODS)
    check_counts(counts)
    if network.classifier.out_channels != counts.num_classes:
        raise UserError(f"the network has {network.classifier.out_channels} classes, the counts {counts.num_classes}")
    return METHODS[name].build(network, counts, **start_and_options(name, hyper)[1])
