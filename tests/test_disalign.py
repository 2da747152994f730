"""Calibrated logits against plain loops, their identities, what is frozen, and the baselines they contain."""

import math

import pytest
import torch
from tiny import COUNTS, C, D, batch, same, snapshot, tiny_network, train_steps
from torch import nn

from ltseg_core.config import UserError
from ltseg_core.losses import cross_entropy
from ltseg_core.methods.disalign import CalibratedNetwork, disalign
from ltseg_core.models import CosineClassifier, Output

CONFIDENCES = ("linear", "conv_bn_relu", "scalar", "constant")


def calibrated(kernel=1, *, random=True, **options) -> CalibratedNetwork:
    """A double-precision calibration with random alpha, beta (unless random=False) in evaluation mode."""
    network = CalibratedNetwork(tiny_network(kernel=kernel), **options).double().eval()
    if random:
        g = torch.Generator().manual_seed(5)
        for parameter in (network.alpha, network.beta):
            if parameter is not None:
                parameter.data = torch.randn(C, generator=g, dtype=torch.float64)
    return network


def inputs(seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, C, 3, 5, generator=g).double(), torch.randn(2, D, 3, 5, generator=g).double()


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("form", ["eq5", "eq6"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_at_the_start_the_calibration_is_the_identity_to_the_last_bit(form, confidence, kernel):
    network = CalibratedNetwork(tiny_network(kernel=kernel), form=form, confidence=confidence).eval()
    image, _ = batch()
    plain, ours = network.network(image), network(image)
    assert torch.equal(ours.logits, plain.logits)
    assert torch.equal(ours.features, plain.features)


def test_the_codes_form_starts_at_one_plus_sigma_times_the_logits():
    network = calibrated(random=False, form="eq6_code")
    z, x = inputs()
    ours = network.calibrate(z, x)
    torch.testing.assert_close(ours, (1 + network.confidence(x)) * z)
    assert torch.equal(ours.argmax(1), z.argmax(1))
    assert (ours.softmax(1).amax(1) >= z.softmax(1).amax(1)).all()


def test_calibration_agrees_with_a_loop_over_positions():
    network = calibrated()
    z, x = inputs()
    ours = network.calibrate(z, x)
    conv = network.confidence[0]
    v, b = conv.weight.flatten().tolist(), conv.bias.item()
    alpha, beta = network.alpha.tolist(), network.beta.tolist()
    for i in range(2):
        for r in range(3):
            for c in range(5):
                sigma = 1 / (1 + math.exp(-b - sum(vd * xd for vd, xd in zip(v, x[i, :, r, c].tolist(), strict=True))))
                for k in range(C):
                    score = z[i, k, r, c].item()
                    expected = sigma * (alpha[k] * score + beta[k]) + (1 - sigma) * score
                    assert ours[i, k, r, c].item() == pytest.approx(expected, rel=1e-12)


def test_equation_6_is_equation_5_with_alpha_shifted_by_one():
    five, six = calibrated(form="eq5"), calibrated(form="eq6")
    six.load_state_dict(five.state_dict())
    six.alpha.data -= 1
    z, x = inputs()
    assert torch.equal(five.calibrate(z, x), six.calibrate(z, x))


def test_parts_switched_off_leave_the_other_alone():
    z, x = inputs()
    both = calibrated()
    magnitude, margin = calibrated(margin=False), calibrated(magnitude=False)
    for part in (magnitude, margin):
        part.confidence.load_state_dict(both.confidence.state_dict())
    magnitude.alpha.data, margin.beta.data = both.alpha.data, both.beta.data
    sigma = both.confidence(x)
    torch.testing.assert_close(magnitude.calibrate(z, x), (1 + sigma * (both.alpha.view(-1, 1, 1) - 1)) * z)
    torch.testing.assert_close(margin.calibrate(z, x), z + sigma * both.beta.view(-1, 1, 1))
    total = magnitude.calibrate(z, x) + margin.calibrate(z, x) - z
    torch.testing.assert_close(both.calibrate(z, x), total)
    assert magnitude.beta is None
    assert margin.alpha is None


def test_confidence_is_what_its_name_says():
    z, x = inputs()
    constant, scalar, block = (calibrated(confidence=name) for name in ("constant", "scalar", "conv_bn_relu"))
    alpha, beta = constant.alpha.view(-1, 1, 1), constant.beta.view(-1, 1, 1)
    torch.testing.assert_close(constant.calibrate(z, x), alpha * z + beta)
    scalar.confidence.bias.data.fill_(math.log(3.0))  # sigmoid 3/4
    torch.testing.assert_close(scalar.calibrate(z, x), 0.75 * (alpha * z + beta) + 0.25 * z)
    sigma = block.confidence.train()(torch.randn(8, D, 20, 20).double())
    assert sigma.min() == 0.5
    assert sigma.max() < 1
    assert 0.3 < (sigma == 0.5).double().mean() < 0.7  # half of the normalised values are negative


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2 * C + D + 1),
        ({"margin": False}, C + D + 1),
        ({"magnitude": False}, C + D + 1),
        ({"confidence": "constant"}, 2 * C),
        ({"confidence": "scalar"}, 2 * C + 1),
        ({"confidence": "conv_bn_relu"}, 2 * C + D + 2),
    ],
)
@pytest.mark.parametrize("frozen", ["strict", "code"])
def test_only_the_calibration_learns(options, expected, frozen):
    (stage,) = disalign(tiny_network(), COUNTS, frozen=frozen, **options)
    assert sum(p.numel() for p in stage.network.parameters() if p.requires_grad) == expected
    assert stage.share == 1.0


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_gradients_of_the_calibration(confidence):
    network = calibrated(confidence=confidence)
    z, x = inputs()
    names = [n for n, _ in network.named_parameters() if not n.startswith("network.")]
    values = [network.get_parameter(n).detach().requires_grad_() for n in names]

    class Calibrate(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self):
            return self.inner.calibrate(z, x)

    module = Calibrate()
    assert torch.autograd.gradcheck(
        lambda *v: torch.func.functional_call(module, {f"inner.{n}": t for n, t in zip(names, v, strict=True)}, ()),
        values,
    )


def test_strictly_frozen_means_features_and_classifier_unchanged():
    network = tiny_network()
    image, _ = batch(seed=9)
    features = network.eval()(image).features
    (stage,) = disalign(network, COUNTS)
    before = snapshot(stage.network)
    train_steps(stage)
    unchanged = same(before, stage.network)
    assert all(equal for name, equal in unchanged.items() if name.startswith("network."))
    assert not any(equal for name, equal in unchanged.items() if not name.startswith("network."))
    assert torch.equal(stage.network(image).features, features)


def test_frozen_as_in_the_code_updates_batch_norm_statistics_and_keeps_dropout():
    (stage,) = disalign(tiny_network(), COUNTS, frozen="code")
    before = snapshot(stage.network)
    learner = train_steps(stage)
    changed = {name for name, equal in same(before, stage.network).items() if not equal}
    assert {name for name in changed if name.startswith("network.")} == {
        f"network.{part}.1.{name}"
        for part in ("encoder", "decoder")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    image, _ = batch()
    first, second = (learner.network(image).features for _ in range(2))
    assert not torch.equal(first, second)  # dropout


def test_weight_decay_pulls_to_the_identity_in_equation_6_only():
    ends = {}
    for form in ("eq5", "eq6"):
        (stage,) = disalign(tiny_network(), COUNTS, form=form, confidence="constant")
        train_steps(stage, steps=400, lr=0.1, decay=100.0 / 11)  # decay far above the gradient
        image, _ = batch()
        ends[form] = stage.network.eval()(image).logits, stage.network.network(image).logits
    ours, plain = ends["eq6"]
    assert (ours - plain).abs().max() < 0.2 * plain.abs().max()
    ours, plain = ends["eq5"]
    assert ours.abs().max() < 0.2 * plain.abs().max()


@pytest.mark.parametrize("normalisation", ["class", "sum"])
def test_rho_zero_is_cross_entropy(normalisation):
    (stage,) = disalign(tiny_network(), COUNTS, rho=0.0, normalisation=normalisation)
    image, target = batch()
    output = stage.network.eval()(image)
    scale = C if normalisation == "sum" else 1
    torch.testing.assert_close(scale * stage.criterion(output, target), cross_entropy(output.logits, target))


def test_generalised_reweighting_by_hand():
    (stage,) = disalign(tiny_network(), COUNTS, rho=0.5)
    weight = COUNTS.pixels.double().pow(-0.5)
    weight = weight / weight.mean()
    target = torch.tensor([[[0, 3, 255]]])
    loss = stage.criterion(Output(torch.zeros(1, D, 1, 3), torch.zeros(1, C, 1, 3).double()), target)
    assert loss.item() == pytest.approx(((weight[0] + weight[3]) * math.log(C) / 2).item(), rel=1e-12)


def test_rebalanced_calibration_favours_rare_classes():
    (stage,) = disalign(tiny_network(), COUNTS, rho=1.0)
    train_steps(stage, steps=20, lr=0.05)
    beta = stage.network.beta
    assert beta[2] > beta[1] > beta[0]  # equally frequent in these batches, so only the weights differ


# --- the baselines it contains (DisAlign, Table 2): sigma = 1, then alpha or beta --------------------------


def dyadic(seed, *shape):
    """Multiples of 1/8: their sums and products here are exact in double precision."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)).double() / 8


def linear_base(weight, bias) -> CalibratedNetwork:
    network = calibrated(random=False, confidence="constant")
    network.network.classifier.weight.data, network.network.classifier.bias.data = weight[..., None, None], bias
    return network


def test_lws_is_a_special_case():
    f, w, x = dyadic(0, C), dyadic(1, C, D), dyadic(2, 2, D, 3, 5)
    network = linear_base(w, torch.zeros(C).double())
    network.alpha.data = f
    expected = torch.einsum("cd,bdhw->bchw", f[:, None] * w, x)
    assert torch.equal(network.calibrate(network.network.classifier(x), x), expected)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_tau_normalisation_is_a_special_case(tau):
    norms = torch.tensor([1.0, 2.0, 4.0, 8.0]).double()
    directions = torch.zeros(C, D).double()
    directions[:, 0] = 1.0
    directions[1, :4] = torch.tensor([0.5, -0.5, 0.5, 0.5])
    directions[3] = -directions[3]
    w, x = norms[:, None] * directions, dyadic(3, 2, D, 3, 5)
    network = linear_base(w, torch.zeros(C).double())
    network.alpha.data = norms**-tau
    expected = torch.einsum("cd,bdhw->bchw", w / w.norm(dim=1, keepdim=True) ** tau, x)
    assert torch.equal(network.calibrate(network.network.classifier(x), x), expected)


def test_posthoc_logit_adjustment_is_a_special_case():
    network = linear_base(dyadic(1, C, D), dyadic(4, C))
    x = dyadic(2, 2, D, 3, 5)
    z = network.network.classifier(x)
    network.beta.data = -1.5 * (COUNTS.pixel_share()).log()
    assert torch.equal(network.calibrate(z, x), z - 1.5 * COUNTS.pixel_share().log().view(-1, 1, 1))


def test_a_cosine_classifier_serves_as_base():
    network = tiny_network(kernel=3)
    network.classifier = CosineClassifier(D, C, scale=10.0)
    image, _ = batch()
    plain = network.eval()(image).logits
    (stage,) = disalign(network, COUNTS)
    assert torch.equal(stage.network.eval()(image).logits, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho must be >= 0, got -0.1"),
        ({"rho": math.nan}, "rho"),
        ({"form": "eq7"}, "form must be 'eq5' or 'eq6' or 'eq6_code', got 'eq7'"),
        ({"confidence": "liner"}, "confidence must be 'linear' or .*, got 'liner'"),
        ({"frozen": "STRICT"}, "frozen must be 'strict' or 'code', got 'STRICT'"),
        ({"froze": "strict"}, "did you mean 'frozen'"),
        ({"magnitude": False, "margin": False}, "magnitude and margin are both false"),
        ({"normalisation": "mean"}, "normalisation"),
        ({"prior": "pixels"}, "prior"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        disalign(tiny_network(), COUNTS, **options)


def test_the_calibrated_network_refuses_unknown_names():
    for options, message in (
        ({"form": "eq7"}, "unknown form 'eq7'"),
        ({"confidence": "liner"}, "did you mean 'linear'"),
    ):
        with pytest.raises(UserError, match=message):
            CalibratedNetwork(tiny_network(), **options)
