"""What every method keeps, whatever it does."""

import contextlib
import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltseg_core.config import UserError
from ltseg_core.losses import build_loss, cross_entropy
from ltseg_core.methods import METHODS, build_method
from ltseg_core.methods.base import Method, PixelCriterion, Stage
from ltseg_core.methods.medoe import ExpertOutput
from ltseg_core.models import Output, build_model
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner

C = 4
COUNTS = ClassCounts(torch.tensor([90_000, 9_000, 400, 20]), torch.tensor([40, 30, 8, 2]))
CASES = [(name, {}) for name in METHODS] + [
    *(("region_rebalance", o) for o in ({"region_scope": "batch"}, {"resolution": "labels"}, {"head": "hidden"})),
    ("region_rebalance", {"head": "shared"}),
    *(("medoe", {"share": share}) for share in ("decoder", "nothing")),
    *(("medoe", {"ensemble": rule}) for rule in ("moe_weighted", "moe_logits", "moe_gate", "group_average")),
    ("medoe", {"ensemble": "moe_gate", "select": "expert"}),
    ("medoe", {"order": "head_first"}),
    ("medoe", {"l2": "class", "l2_pixels": "own", "kl": "pixel"}),
    ("medoe", {"softmax": "own"}),
    ("disalign", {"confidence": "conv_bn_relu", "frozen": "code"}),
    ("crt", {"balance": "weights"}),
    ("ldam", {"drw": 0.0}),
    ("seesaw", {"online": False}),
    ("blv", {"pseudo": True, "temporal": True}),
]
NOTHING_TO_TRAIN = {"tau_norm", "posthoc_logit_adjustment", "ncm", "tde"}


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
        yield learner, learner(image, target, (image, target, 0.5) if METHODS[name].unlabelled else None)


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


class Operators(TorchDispatchMode):
    """Counts the operators that PyTorch runs."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += 1
        return operator(*args, **(kwargs or {}))


@cache
def network_of(classes):
    return build_model("Linknet", "tu-mobilenetv3_small_050", classes)


def operators(name, options, *, classes, images):
    """How many operators the criterion of each stage needs for its loss and the gradient, the outputs being given."""
    copies = classes // C  # of every class: each of MEDOE's groups keeps some
    counts = ClassCounts(COUNTS.pixels.repeat(copies), COUNTS.images.repeat(copies))
    network = copy.deepcopy(network_of(classes))
    features = torch.randn(images, network.feature_channels, 32, 32, requires_grad=True)
    experts = tuple(torch.randn(images, classes, 32, 32, requires_grad=True) for _ in range(3))
    target = torch.randint(0, classes, (images, 32, 32))
    target[:, :4] = 255
    numbers = []
    for stage in build_method(name, network, counts, options):
        stage.criterion.train()
        given = experts[: len(getattr(stage.criterion, "labels", experts))]  # MEDOE's experts may learn in turn
        output = ExpertOutput(features, experts[0], given)
        with Operators() as seen:
            loss = stage.criterion(output, target)
            (loss if stage.align is None else loss + stage.align(output, output)).backward()
        numbers.append(seen.number)
    return numbers


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_no_loop_over_classes_or_images(name, options):
    few = operators(name, options, classes=4, images=2)
    assert min(few) > 5
    assert operators(name, options, classes=40, images=2) == few
    assert operators(name, options, classes=4, images=5) == few


def test_a_loop_would_be_found(monkeypatch):
    class Loop(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dim = dim

        def forward(self, output, target):
            return sum(part.square().mean() for part in output.logits.unbind(self.dim))

    for dim, more in ((0, {"classes": 4, "images": 5}), (1, {"classes": 40, "images": 2})):
        looping = Method(lambda network, counts, dim=dim: [Stage("loop", network, Loop(dim))])
        monkeypatch.setitem(METHODS, "loop", looping)
        assert operators("loop", {}, **more) > operators("loop", {}, classes=4, images=2)


class Logits(nn.Module):
    """A network whose images are the logits."""

    def forward(self, image):
        return Output(image, image)


def test_the_variation_is_in_both_terms_of_the_student_and_not_in_the_auxiliary_one():
    """Of its own in each, as the random numbers are taken one after the other."""
    logits, auxiliary, pseudo = torch.randn(3, 2, C, 8, 8)
    target, labels = torch.randint(0, C, (2, 2, 8, 8))
    loss = build_loss("blv", COUNTS)

    class Given(nn.Module):
        def forward(self, image):
            return Output(image, image, auxiliary)

    torch.manual_seed(0)
    found = Learner(Stage("blv", Given(), PixelCriterion(loss, 0.4)))(logits, target, (pseudo, labels, 0.5))
    torch.manual_seed(0)
    first = loss(logits, target) + 0.4 * cross_entropy(auxiliary, target)
    expected = first + 0.5 * (loss(pseudo, labels) + 0.4 * cross_entropy(auxiliary, labels))
    torch.testing.assert_close(found, expected)
    assert loss(pseudo, labels) != cross_entropy(pseudo, labels)


@pytest.mark.parametrize("terms", ["labels", "pseudo_labels"])
def test_a_training_step_says_which_of_its_terms_has_pseudo_labels(terms):
    given, pseudo = torch.randn(2, 2, C, 8, 8)
    target, labels = torch.randint(0, C, (2, 2, 8, 8))
    loss = build_loss("blv", COUNTS, form="constant", terms=terms)  # the same at each call
    noisy = build_loss("blv", COUNTS, form="constant")
    learner = Learner(Stage("blv", Logits(), PixelCriterion(loss)))
    first, second = (noisy, cross_entropy) if terms == "labels" else (cross_entropy, noisy)
    for _ in range(2):  # the second step starts as the first did
        found = learner(given, target, (pseudo, labels, 0.5))
        torch.testing.assert_close(found, first(given, target) + 0.5 * second(pseudo, labels))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_label_that_is_no_class_is_named(name, options):
    if name in NOTHING_TO_TRAIN:
        return
    for stage in build_method(name, copy.deepcopy(network_of(4)), COUNTS, options):
        experts = tuple(torch.randn(2, 4, 32, 32) for _ in getattr(stage.criterion, "labels", "123"))
        output = ExpertOutput(torch.randn(2, network_of(4).feature_channels, 32, 32), experts[0], experts)
        with pytest.raises(ValueError, match="the target has the label 7: expected 0 to 3"):
            stage.criterion(output, torch.full((2, 32, 32), 7))


def test_counts_that_are_none_are_refused():
    empty = torch.zeros(C, dtype=torch.int64)
    for counts, message in (
        (COUNTS.pixels, "counts must be ClassCounts, .* got Tensor"),
        (ClassCounts(empty, empty), "of all 4 classes are 0"),
    ):
        for name in METHODS:
            with pytest.raises(UserError, match=message):
                build_method(name, network_of(4), counts, {})


def test_a_network_of_other_classes_is_refused():
    network = build_model("Linknet", "tu-mobilenetv3_small_050", 3)
    with pytest.raises(UserError, match="the network has 3 classes, the counts 4"):
        build_method("ce", network, COUNTS, {})
