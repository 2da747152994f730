"""DisAlign: calibrate the logits of a finished, frozen network (Zhang et al., Distribution Alignment, CVPR 2021).

Symbols: x features (B, D, h, w), z = classifier(x) logits (B, C, h, w) at the decoder's resolution, before
they are brought to the size of the image, as in the authors' code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ltseg_core.config import UserError, choose
from ltseg_core.losses import Prior, build_loss
from ltseg_core.methods.base import PixelCriterion, Stage, checked
from ltseg_core.models import Output, SegmentationNetwork
from ltseg_core.stats import ClassCounts

Form = Literal["eq5", "eq6", "eq6_code"]
Confidence = Literal["linear", "conv_bn_relu", "scalar", "constant"]
INITIAL_ALPHA = {"eq5": 1.0, "eq6": 0.0, "eq6_code": 1.0}


class ScalarConfidence(nn.Module):
    """sigma = sigmoid(b): one learned number for all positions, 1/2 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        return self.bias.sigmoid().view(1, 1, 1, 1)


class CalibratedNetwork(nn.Module):
    """image -> Output with the calibrated logits sigma(x) (alpha z + beta) + (1 - sigma(x)) z  (DisAlign, Eq. 3-5).

    That is (1 + sigma (alpha - 1)) z + sigma beta. Options as in `disalign`. alpha and beta are (C,); a part that
    is switched off has no parameter (None). Learned beside the network: 2C + D + 1 numbers with the defaults.
    Raises UserError for an unknown form or confidence.
    """

    alpha: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        form: Form = "eq5",
        magnitude: bool = True,
        margin: bool = True,
        confidence: Confidence = "linear",
    ) -> None:
        super().__init__()
        self.network, self.form = network, choose("form", form, INITIAL_ALPHA)
        choose("confidence", confidence, get_args(Confidence))
        width, classes = network.feature_channels, network.classifier.out_channels
        self.alpha = nn.Parameter(torch.full((classes,), INITIAL_ALPHA[self.form])) if magnitude else None
        self.beta = nn.Parameter(torch.zeros(classes)) if margin else None
        self.confidence: nn.Module | None
        if confidence == "linear":
            self.confidence = nn.Sequential(nn.Conv2d(width, 1, 1), nn.Sigmoid())
        elif confidence == "conv_bn_relu":
            block = nn.Conv2d(width, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()
            self.confidence = nn.Sequential(*block, nn.Sigmoid())
        else:
            self.confidence = ScalarConfidence() if confidence == "scalar" else None

    def calibrate(self, logits: Tensor, features: Tensor) -> Tensor:
        """z (B, C, h, w) and x (B, D, h, w) -> calibrated logits (B, C, h, w)."""
        change: Tensor | float = 0.0  # zero, so that Eq. 5 is the identity to the last bit, until something is learnt
        if self.alpha is not None:
            gain = self.alpha - 1 if self.form == "eq5" else self.alpha
            change = gain.view(-1, 1, 1) * logits
        if self.beta is not None:
            change = change + self.beta.view(-1, 1, 1)
        return logits + (change if self.confidence is None else self.confidence(features) * change)

    def forward(self, image: Tensor) -> Output:
        features = self.network.features(image)
        logits = self.calibrate(self.network.classify(features), features)
        return Output(features, self.network.resize(logits, image))


@checked
def disalign(
    network: SegmentationNetwork,
    counts: ClassCounts,
    *,
    rho: float = 0.2,
    form: Form = "eq5",
    magnitude: bool = True,
    margin: bool = True,
    confidence: Confidence = "linear",
    frozen: Literal["strict", "code"] = "strict",
    normalisation: Literal["class", "sum"] = "class",
    prior: Prior = "pixel",
) -> list[Stage]:
    """Stage 2 of DisAlign on a network that holds the weights of a finished run; only the calibration learns.

    rho, normalisation, prior: of the loss `grw_ce`; the authors' configuration for ADE20K has rho 0.2, their loss 0.3
    form: "eq5" (1 + sigma (alpha - 1)) z + sigma beta, alpha = 1 at the start, the identity; the authors' code.
        "eq6", as printed: (1 + sigma alpha) z + sigma beta, alpha = 0 at the start, the identity too.
        "eq6_code": the same from alpha = 1, found in copies of the classification code; starts at (1 + sigma) z.
        Eq. 6 is Eq. 5 with alpha shifted by 1, but weight decay, which acts on alpha and beta, pulls towards 0:
        to the identity under "eq6", to logits suppressed by 1 - sigma under "eq5".
    magnitude, margin: whether alpha and beta exist. Without magnitude the form makes no difference.
    confidence: "linear", sigma(x) = sigmoid(v.x + b) as in the paper; "conv_bn_relu", the segmentation code, whose
        batch norm and ReLU before the sigmoid keep sigma in [0.5, 1): calibration is never switched off;
        "scalar", one learned number; "constant", 1. The last two do not depend on the input.
    frozen: "strict", the network in evaluation mode, so that the features are those of stage 1; "code", only
        without gradients: its batch norms use and update batch statistics and its dropout stays active.
    Raises UserError for another name, rho < 0, and when magnitude and margin are both off: nothing would learn.
    """
    if not (magnitude or margin):
        raise UserError("magnitude and margin are both false, so nothing is calibrated: switch one on")
    criterion = PixelCriterion(build_loss("grw_ce", counts, rho=rho, normalisation=normalisation, prior=prior))
    calibrated = CalibratedNetwork(network, form=form, magnitude=magnitude, margin=margin, confidence=confidence)
    network.requires_grad_(False)
    return [Stage("disalign", calibrated, criterion, frozen=(network,) if frozen == "strict" else ())]
