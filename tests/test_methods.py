"""What every method keeps, whatever it does."""

import contextlib

import pytest
import torch

from ltseg_core.config import UserError
from ltseg_core.methods import METHODS, build_method
from ltseg_core.models import build_model
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner

C = 4
COUNTS = ClassCounts(torch.tensor([90_000, 9_000, 400, 20]), torch.tensor([40, 30, 8, 2]))
CASES = [(name, {}) for name in METHODS] + [
    *(("region_rebalance", o) for o in ({"region_scope": "batch"}, {"resolution": "labels"}, {"head": "hidden"})),
    *(("medoe", {"share": share}) for share in ("decoder", "nothing")),
    *(("medoe", {"ensemble": rule}) for rule in ("moe_weighted", "moe_logits", "moe_gate", "group_average")),
    ("medoe", {"order": "head_first"}),
    ("medoe", {"l2": "class", "l2_pixels": "own", "kl": "pixel"}),
    ("medoe", {"softmax": "own"}),
    ("disalign", {"confidence": "conv_bn_relu", "frozen": "code"}),
    ("crt", {"balance": "weights"}),
    ("ldam", {"drw": 0.0}),
    ("seesaw", {"online": True}),
    ("blv", {"pseudo": True, "temporal": True}),
]
NOTHING_TO_TRAIN = {"tau_norm", "posthoc_logit_adjustment", "ncm"}


@pytest.fixture(autouse=True)
def _autocast_on_meta(monkeypatch):
    """It knows no type for that device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def steps(name, options):
    """The loss of one training step of each stage of the method, on a device without data."""
    network = build_model("DeepLabV3Plus", "tu-mobilenetv3_small_050", C, auxiliary=True)
    for stage in build_method(name, network, COUNTS, options):
        learner = Learner(stage).to("meta").train()
        for module in stage.frozen:
            module.requires_grad_(False).eval()
        image = torch.rand(2, 3, 32, 48, device="meta")
        target = torch.zeros(2, 32, 48, dtype=torch.long, device="meta")
        yield learner, learner(image, target)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_training_step_never_waits_for_the_device(name, options):
    """On `meta` tensors, which have a shape and no values, reading a value or a shape that depends on one fails."""
    stages = 0
    for learner, loss in steps(name, options):
        stages += 1
        trainable = [p for p in learner.parameters() if p.requires_grad]
        assert bool(trainable) is (name not in NOTHING_TO_TRAIN)
        if trainable:
            loss.backward()
            assert any(p.grad is not None for p in trainable)
    assert stages > 0


def test_what_waits_for_the_device_would_be_found():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        list(steps("region_rebalance", {"components": True}))


def test_a_network_of_other_classes_is_refused():
    network = build_model("Linknet", "tu-mobilenetv3_small_050", 3)
    with pytest.raises(UserError, match="the network has 3 classes, the counts 4"):
        build_method("ce", network, COUNTS, {})
