"""Every loss against a slow reference written here with plain loops, then reductions, gradients, edge cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ltseg_core import losses
from ltseg_core.config import IGNORE_INDEX, UserError
from ltseg_core.losses import (
    LOSSES,
    add_variation,
    class_sizes,
    cross_entropy,
    mean_over_valid,
    mean_variation,
    per_pixel,
    pixel_nll,
    variation_amplitude,
)
from ltseg_core.stats import ClassCounts

PIXELS, IMAGES = [90_000, 4_000, 350, 1, 0], [40, 25, 7, 1, 0]  # the last class never occurs in training
COUNTS = ClassCounts(torch.tensor(PIXELS), torch.tensor(IMAGES))
UNIFORM = ClassCounts(torch.tensor([300] * 5), torch.tensor([20] * 5))
C = 5
NOISY = {"blv", "gcl"}


def build_loss(name, counts, **hyper):
    """The package's, but seesaw has given counts: those it collects make it a function of earlier batches, too."""
    return losses.build_loss(name, counts, **({"online": False} | hyper if name == "seesaw" else hyper))


def batch(seed=0, dtype=torch.float64, scale=2.0):
    """Logits (3, 5, 4, 6) and labels; class 4 is absent, class 3 has one pixel, image 2 is ignored altogether."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(3, C, 4, 6, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (3, 4, 6), generator=g)
    y[0, 1, 2] = 3
    y[0, 0, :3] = y[1, 2:, 4] = IGNORE_INDEX
    y[2] = IGNORE_INDEX
    return z.to(dtype), y


# --- the slow references ---------------------------------------------------------------------------------


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def pixels(z, y):
    """(image, logits of the pixel as a list, its label) for every valid pixel."""
    for b, i, j in np.ndindex(*y.shape):
        if y[b, i, j] != IGNORE_INDEX:
            yield b, z[b, :, i, j].tolist(), int(y[b, i, j])


def average(term):
    """A reference that averages term(z, y, **hyper) over the valid pixels."""

    def reference(z, y, noise=None, **hyper):
        if noise is not None:
            terms = [
                term(z[b, :, i, j].tolist(), int(y[b, i, j]), noise=noise[b, :, i, j].tolist(), **hyper)
                for b, i, j in np.ndindex(*y.shape)
                if y[b, i, j] != IGNORE_INDEX
            ]
        else:
            terms = [term(v, k, **hyper) for _, v, k in pixels(z, y)]
        return sum(terms) / len(terms)

    return reference


def floored(prior):
    return [max(n, 1) for n in (PIXELS if prior == "pixel" else IMAGES)]


def ce(z, y):
    return -math.log(softmax(z)[y])


def inverse_weights(power, normalisation, prior):
    w = [k**-power for k in floored(prior)]
    total = {"class": sum(w) / C, "sum": sum(w)}
    pix = floored("pixel")
    total["pixel"] = sum(a * b for a, b in zip(w, pix, strict=True)) / sum(pix)
    return [v / total[normalisation] for v in w]


def weighted(z, y, power=1.0, normalisation="class", prior="pixel"):
    return inverse_weights(power, normalisation, prior)[y] * ce(z, y)


def weighted_batch(z, y, power=1.0, normalisation="batch", prior="pixel"):
    w = [k**-power for k in floored(prior)]
    return sum(w[k] * ce(v, k) for _, v, k in pixels(z, y)) / sum(w[k] for _, _, k in pixels(z, y))


def effective(beta, prior):
    e = [1 / sum(beta**i for i in range(n)) for n in floored(prior)]  # the geometric series itself
    return [v * C / sum(e) for v in e]


def focal(z, y, gamma=2.0):
    return (1 - softmax(z)[y]) ** gamma * ce(z, y)


def cb(z, y, beta=0.9999, prior="region"):
    return effective(beta, prior)[y] * ce(z, y)


def balanced(z, y, tau=1.0, prior="pixel"):
    n = floored(prior)
    e = [n[k] ** tau * math.exp(z[k]) for k in range(C)]
    return -math.log(e[y] / sum(e))


def vector_scaling(z, y, gamma=0.15, tau=1.0, prior="pixel"):
    n = floored(prior)
    return balanced([v * (n[k] / max(n)) ** gamma for k, v in enumerate(z)], y, tau, prior)


def ldam(z, y, mu=0.5, scale=1.0, prior="pixel", weight=None):
    n = floored(prior)
    z = [scale * (v - (mu * (min(n) / n[y]) ** 0.25 if k == y else 0)) for k, v in enumerate(z)]
    return (weight[y] if weight else 1) * ce(z, y)


def seesaw(z, y, p=0.8, q=2.0, prior="pixel"):
    n, prob = floored(prior), softmax(z)
    below = 0.0
    for k in range(C):
        m = (n[k] / n[y]) ** p if n[y] > n[k] else 1
        c = (prob[k] / prob[y]) ** q if prob[k] > prob[y] else 1
        below += math.exp(z[k]) * (1 if k == y else m * c)
    return -math.log(math.exp(z[y]) / below)


def blv(z, y, noise, sign=1, balance=True, reference="sum", prior="pixel"):
    q = floored(prior)
    c = [math.log((sum(q) if reference == "sum" else max(q)) / k) for k in q]
    a = [v / max(c) if balance else 1 for v in c]
    return ce([z[k] + sign * a[k] * noise[k] for k in range(C)], y)


def gcl(z, y, noise, margin=0.0, scale=1.0, prior="pixel"):
    q = floored(prior)
    z = [z[k] - noise[k] * math.log(max(q) / q[k]) / math.log(max(q) / min(q)) for k in range(C)]
    z[y] -= margin
    return ce([scale * v for v in z], y)


def pat(z, y, temperature=20.0, epsilon=0.0, mask_size=True, confidence=True, mean_over_classes=False, channels="true"):
    def beta(p):
        return 1 / math.exp((p - 1 + epsilon) / temperature) if confidence else 1  # Eq. 5 as printed

    def term(v, k):
        if channels == "all":
            weighted = [beta(p) * p for p in softmax(v)]
            return -math.log(weighted[k] / sum(weighted))
        return beta(softmax(v)[k]) * ce(v, k)

    if not mask_size:
        return average(term)(z, y)
    images = []
    for b in range(len(y)):
        classes = sorted(set(y[b].flatten().tolist()) - {IGNORE_INDEX})
        means = [
            sum(term(v, k) for image, v, k in pixels(z, y) if (image, k) == (b, label)) / int((y[b] == label).sum())
            for label in classes
        ]
        if means:
            images.append(sum(means) / (len(means) if mean_over_classes else 1))
    return sum(images) / len(images)


def jaccard_loss(truth, wrong):
    """1 - IoU of a class when exactly the pixels in `wrong` are misclassified."""
    miss, alarm = sum(truth[i] for i in wrong), sum(not truth[i] for i in wrong)
    return 1 - (sum(truth) - miss) / (sum(truth) + alarm) if sum(truth) + alarm else 0.0


def lovasz(z, y, ce_weight=0.0):
    points = [(softmax(v), k) for _, v, k in pixels(z, y)]
    losses = []
    for c in sorted({k for _, k in points}):
        truth = [k == c for _, k in points]
        error = [1 - p[c] if k == c else p[c] for p, k in points]
        order = sorted(range(len(points)), key=lambda i: -error[i])
        steps = [jaccard_loss(truth, order[: i + 1]) - jaccard_loss(truth, order[:i]) for i in range(len(order))]
        losses.append(sum(error[i] * step for i, step in zip(order, steps, strict=True)))
    return sum(losses) / len(losses) + ce_weight * average(ce)(z, y)


def dice(z, y, eps=1.0, present_only=False, ce_weight=0.0):
    points = [(softmax(v), k) for _, v, k in pixels(z, y)]
    losses = []
    for c in range(C):
        overlap = sum(p[c] for p, k in points if k == c)
        total = sum(p[c] ** 2 + (k == c) for p, k in points)
        if not present_only or any(k == c for _, k in points):
            losses.append(1 - (2 * overlap + eps) / (total + eps))
    return sum(losses) / len(losses) + ce_weight * average(ce)(z, y)


def drw_weights():
    return effective(0.99, "region")


CASES = [
    ("ce", {}, average(ce)),
    ("weighted_ce", {}, average(weighted)),
    ("weighted_ce", {"power": 0.5, "normalisation": "pixel"}, average(weighted)),
    ("weighted_ce", {"power": 0.3, "normalisation": "sum", "prior": "region"}, average(weighted)),
    ("weighted_ce", {"power": 0.7, "normalisation": "batch"}, weighted_batch),
    ("grw_ce", {}, average(lambda z, y: weighted(z, y, 0.2))),
    ("grw_ce", {"rho": 1.2, "normalisation": "sum"}, average(lambda z, y, **_: weighted(z, y, 1.2, "sum"))),
    ("focal", {}, average(focal)),
    ("focal", {"gamma": 0.5}, average(focal)),
    ("cb", {}, average(cb)),
    ("cb", {"beta": 0.99}, average(cb)),
    ("cb", {"beta": 0.9999, "prior": "pixel"}, average(cb)),
    ("cb_focal", {"gamma": 1.0}, average(lambda z, y, gamma: effective(0.9999, "region")[y] * focal(z, y, gamma))),
    ("balanced_softmax", {}, average(balanced)),
    ("balanced_softmax", {"prior": "region"}, average(balanced)),
    ("logit_adjustment", {"tau": 0.6}, average(balanced)),
    ("logit_adjustment", {"tau": -1.5, "prior": "region"}, average(balanced)),
    ("vs", {}, average(vector_scaling)),
    ("vs", {"gamma": 0.3, "tau": 0.5, "prior": "region"}, average(vector_scaling)),
    ("ldam", {}, average(ldam)),
    ("ldam", {"mu": 0.3, "scale": 20.0, "prior": "region"}, average(ldam)),
    ("ldam", {"drw": 0.0, "drw_beta": 0.99}, average(lambda z, y, **_: ldam(z, y, weight=drw_weights()))),
    ("seesaw", {}, average(seesaw)),
    ("seesaw", {"p": 0.5, "q": 1.0, "prior": "region"}, average(seesaw)),
    ("lovasz", {}, lovasz),
    ("lovasz", {"ce_weight": 0.5}, lovasz),
    ("dice", {}, dice),
    ("dice", {"eps": 0.01, "present_only": True}, dice),
    ("dice_ce", {}, lambda z, y: dice(z, y, ce_weight=1.0)),
    ("pat", {}, pat),
    ("pat", {"temperature": 5.0, "epsilon": 0.3, "mean_over_classes": True}, pat),
    ("pat", {"mask_size": False, "temperature": 5.0}, pat),
    ("pat", {"confidence": False}, pat),
    ("pat", {"channels": "all"}, pat),
    ("pat", {"channels": "all", "temperature": 0.5, "epsilon": 0.7, "mean_over_classes": True}, pat),
    ("pat", {"channels": "all", "temperature": 2.0, "mask_size": False}, pat),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hyper", "reference"), CASES, ids=[f"{n}{h}" for n, h, _ in CASES])
def test_reference(name, hyper, reference):
    z, y = batch()
    loss = build_loss(name, COUNTS, **hyper)
    assert loss(z, y).item() == pytest.approx(reference(z, y, **hyper), rel=1e-9)
    assert loss(z.float(), y).item() == pytest.approx(reference(z, y, **hyper), rel=2e-5)


NOISES = {
    "code": lambda e: min(abs(e), 1),
    "printed": lambda e: abs(max(0, min(e, 1))),
    "none": abs,
}


@pytest.mark.parametrize("clamp", NOISES)
@pytest.mark.parametrize(
    "hyper", [{}, {"sign": -1}, {"balance": False}, {"reference": "max", "prior": "region"}], ids=str
)
def test_reference_blv(clamp, hyper):
    z, y = batch()
    loss = build_loss("blv", COUNTS, sigma=0.8, clamp=clamp, **hyper)
    torch.manual_seed(7)
    actual = loss(z, y).item()
    torch.manual_seed(7)
    noise = np.vectorize(NOISES[clamp])(torch.empty_like(z).normal_(0, 0.8).numpy())
    assert actual == pytest.approx(average(blv)(z, y, noise=noise, **hyper), rel=1e-9)


@pytest.mark.parametrize("hyper", [{}, {"margin": 0.2, "scale": 3.0}, {"prior": "region"}], ids=str)
def test_reference_gcl(hyper):
    z, y = batch()
    torch.manual_seed(7)
    actual = build_loss("gcl", COUNTS, sigma=0.7, **hyper)(z, y).item()
    torch.manual_seed(7)
    noise = torch.empty_like(z).normal_(0, 0.7).abs().clamp(max=1)
    assert actual == pytest.approx(average(gcl)(z, y, noise=noise, **hyper), rel=1e-9)


@pytest.mark.parametrize("form", ["uniform", "beta", "exponential", "bernoulli", "constant"])
def test_reference_other_forms(form):
    z, y = batch()
    torch.manual_seed(7)
    actual = build_loss("blv", COUNTS, form=form)(z, y).item()
    torch.manual_seed(7)
    u = torch.empty_like(z).uniform_().numpy()
    noise = {
        "uniform": lambda u: u,
        "beta": lambda u: math.sin(math.pi * u / 2) ** 2,
        "exponential": lambda u: min(1.0, -math.log(u)),
        "bernoulli": lambda u: float(u > 0.5),
        "constant": lambda u: 1.0,
    }[form]
    assert actual == pytest.approx(average(blv)(z, y, noise=np.vectorize(noise)(u)), rel=1e-9)


def test_every_loss_has_a_slow_reference():
    drawn = {name for name in NOISY if f"test_reference_{name}" in globals()}
    assert {name for name, _, _ in CASES} | drawn == set(LOSSES)


# --- reductions to plain cross-entropy, closed forms -----------------------------------------------------


PLAIN = [
    ("weighted_ce", {"power": 0}),
    ("weighted_ce", {"power": 0, "normalisation": "pixel"}),
    ("weighted_ce", {"power": 0, "normalisation": "batch"}),
    ("grw_ce", {"rho": 0}),
    ("focal", {"gamma": 0}),
    ("cb", {"beta": 0}),
    ("cb_focal", {"beta": 0, "gamma": 0}),
    ("logit_adjustment", {"tau": 0}),
    ("vs", {"gamma": 0, "tau": 0}),
    ("ldam", {"mu": 0}),
    ("seesaw", {"p": 0, "q": 0}),
    ("blv", {"sigma": 0}),
    ("blv", {"form": "constant", "balance": False}),
    ("gcl", {"sigma": 0}),
    ("pat", {"mask_size": False, "confidence": False}),
]


@pytest.mark.parametrize(("name", "hyper"), PLAIN, ids=str)
def test_plain_cross_entropy(name, hyper):
    z, y = batch()
    assert build_loss(name, COUNTS, **hyper)(z, y).item() == pytest.approx(cross_entropy(z, y).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [(n, {}) for n in ("weighted_ce", "grw_ce", "cb", "balanced_softmax", "logit_adjustment", "vs", "gcl")]
    + [("cb_focal", {"gamma": 0}), ("seesaw", {"q": 0}), ("blv", {"form": "constant"})],
    ids=str,
)
def test_uniform_counts_are_plain_cross_entropy(name, hyper):
    z, y = batch()
    assert build_loss(name, UNIFORM, **hyper)(z, y).item() == pytest.approx(cross_entropy(z, y).item(), rel=1e-12)


def test_what_uniform_counts_leave():
    """LDAM keeps one margin, BLV its noise (amplitude 1), PAT does not use counts."""
    assert torch.equal(build_loss("ldam", UNIFORM).margin, torch.full((C,), 0.5, dtype=torch.float64))
    assert torch.equal(build_loss("blv", UNIFORM).amplitude, torch.ones(C, dtype=torch.float64))
    z, y = batch()
    assert build_loss("pat", UNIFORM)(z, y) == build_loss("pat", COUNTS)(z, y)


def test_cross_entropy_is_pytorchs():
    z, y = batch()
    assert torch.allclose(cross_entropy(z, y), F.cross_entropy(z, y, ignore_index=IGNORE_INDEX), rtol=1e-12)
    assert torch.equal(build_loss("ce", COUNTS)(z, y), cross_entropy(z, y))


def test_batch_normalisation_is_pytorchs_weight():
    z, y = batch()
    weight = torch.tensor(floored("pixel")).double().reciprocal()
    expected = F.cross_entropy(z, y, weight=weight, ignore_index=IGNORE_INDEX)
    actual = build_loss("weighted_ce", COUNTS, normalisation="batch")(z, y)
    assert torch.allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("prior", ["pixel", "region"])
def test_balanced_softmax_of_zero_logits_is_minus_log_prior(prior):
    n = torch.tensor(floored(prior)).double()
    y = torch.arange(C).view(1, 1, C)
    nll = -(n / n.sum()).log()
    loss = build_loss("balanced_softmax", COUNTS, prior=prior)
    for k in range(C):
        one = torch.where(y == k, y, IGNORE_INDEX)
        assert loss(torch.zeros(1, C, 1, C, dtype=torch.float64), one).item() == pytest.approx(nll[k].item())


def test_balanced_softmax_is_logit_adjustment_at_one():
    z, y = batch()
    assert build_loss("balanced_softmax", COUNTS)(z, y) == build_loss("logit_adjustment", COUNTS, tau=1.0)(z, y)


def test_weights():
    pixels = torch.tensor(floored("pixel")).double()
    for power in (0.3, 1.0, 1.7):
        weight = {k: build_loss("weighted_ce", COUNTS, power=power, normalisation=k).weight
                  for k in ("class", "pixel", "sum")}  # fmt: skip
        assert weight["class"].mean().item() == pytest.approx(1)
        assert weight["sum"].sum().item() == pytest.approx(1)
        assert (weight["pixel"] * pixels).sum().item() == pytest.approx(pixels.sum().item())
        ratio = weight["class"][2] / weight["class"][0]
        assert ratio.item() == pytest.approx((90_000 / 350) ** power)


def test_effective_numbers():
    """Weights between equal (beta 0) and inverse to the counts (beta -> 1), of sum C."""
    images = torch.tensor(floored("region")).double()
    inverse = images.reciprocal() / images.reciprocal().mean()
    assert torch.allclose(build_loss("cb", COUNTS, beta=1 - 1e-9).weight, inverse, rtol=1e-6)
    for beta in (0.0, 0.9, 0.999, 0.9999):
        assert build_loss("cb", COUNTS, beta=beta).weight.sum().item() == pytest.approx(C)


def test_effective_numbers_of_pixels_degenerate():
    """Pixel counts far above 1 / (1 - beta) have equal effective numbers: plain CE, and a warning that says so."""
    large = ClassCounts(torch.tensor([10**9, 10**7, 10**6]), torch.tensor([900, 300, 20]))
    with pytest.warns(UserWarning, match=r"weights are all equal.*10000.*prior='region'"):
        weight = build_loss("cb", large, prior="pixel").weight
    assert torch.allclose(weight, torch.ones(3, dtype=weight.dtype))
    assert build_loss("cb", large).weight[2] > 10 * build_loss("cb", large).weight[0]
    fine = build_loss("cb", large, prior="pixel", beta=1 - 1e-8).weight
    assert fine[2] > 90 * fine[0]


def test_generalised_reweighting_ratio_of_the_paper_code():
    """ADE20K's frequencies span a factor of 788: the weights then span 3.8 at rho 0.2 and 7.4 at rho 0.3."""
    counts = ClassCounts(torch.tensor([788, 1]), torch.tensor([1, 1]))
    for rho, ratio in ((0.2, 3.8), (0.3, 7.4), (1.0, 788)):
        weight = build_loss("grw_ce", counts, rho=rho).weight
        assert (weight[1] / weight[0]).item() == pytest.approx(ratio, abs=0.05)


def test_ldam_margins_and_deferred_weights():
    loss = build_loss("ldam", COUNTS, mu=0.4, drw=0.8)
    assert loss.margin.max().item() == loss.margin[3].item() == pytest.approx(0.4)
    assert (loss.margin[0] / loss.margin[2]).item() == pytest.approx((350 / 90_000) ** 0.25)
    z, y = batch()
    plain = build_loss("ldam", COUNTS, mu=0.4)(z, y)
    loss.progress = 0.79
    assert loss(z, y) == plain
    loss.progress = 0.8
    assert loss(z, y) != plain


def test_seesaw_spares_rarer_classes_and_punishes_confusion():
    z, y = batch()
    spared = build_loss("seesaw", COUNTS, q=0)(z, y)
    punished = build_loss("seesaw", COUNTS, p=0)(z, y)
    assert spared < cross_entropy(z, y) < punished


@pytest.mark.parametrize("prior", ["pixel", "region"])
def test_seesaw_online_counts_what_it_has_seen_while_training(prior):
    loss = losses.build_loss("seesaw", COUNTS, prior=prior)
    pixels, images = torch.zeros(2, COUNTS.num_classes, dtype=torch.long)
    for seed in (0, 1):
        z, y = batch(seed)
        there = torch.stack([(y == k).sum((1, 2)) for k in range(COUNTS.num_classes)])  # (C, B)
        pixels, images = pixels + there.sum(1), images + (there > 0).sum(1)
        whole_set = build_loss("seesaw", ClassCounts(pixels, images), prior=prior)
        assert loss(z, y) == pytest.approx(whole_set(z, y).item(), rel=1e-12)
    loss.eval()
    assert loss(z, y) == loss(z, y) == pytest.approx(whole_set(z, y).item(), rel=1e-12), "evaluation counts nothing"
    again = losses.build_loss("seesaw", COUNTS, prior=prior)
    again.load_state_dict(loss.state_dict())
    assert again.eval()(z, y) == loss(z, y), "a resumed training goes on counting where it stopped"


def test_seesaw_gradient_takes_the_compensation_as_constant():
    z, y = batch()
    z.requires_grad_()
    loss = build_loss("seesaw", COUNTS)
    (actual,) = torch.autograd.grad(loss(z, y), z)
    constant = (loss.adjust(z, y) - z).detach()
    (expected,) = torch.autograd.grad(cross_entropy(z + constant, y), z)
    assert torch.allclose(actual, expected, atol=1e-15)


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    _, y = batch()
    pred = torch.randint(0, C, y.shape, generator=torch.Generator().manual_seed(1))
    z = 1e4 * F.one_hot(pred, C).permute(0, 3, 1, 2).double()
    valid, iou = y != IGNORE_INDEX, []
    for k in y[valid].unique():
        t, p = (y == k) & valid, (pred == k) & valid
        iou.append((t & p).sum().item() / (t | p).sum().item())
    assert build_loss("lovasz", COUNTS)(z, y).item() == pytest.approx(1 - np.mean(iou), rel=1e-12)


def test_perfect_and_worst_dice():
    y = torch.arange(C).repeat(4).view(1, 4, C)
    right = 1e4 * F.one_hot(y, C).permute(0, 3, 1, 2).double()
    loss = build_loss("dice", COUNTS)
    assert loss(right, y).item() == pytest.approx(0, abs=1e-12)
    assert loss(right.roll(1, 1), y).item() == pytest.approx(1 - 1 / (4 + 4 + 1))  # eps 1, 4 pixels a class


# --- PAT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "largest"), [(5, 1.221), (10, 1.105), (20, 1.051), (50, 1.020)])
def test_pat_confidence_bounds(temperature, largest):
    """beta lies in [1, e^(1/T)]: sure pixels get 1, hopeless ones e^(1/T)."""
    loss = build_loss("pat", COUNTS, temperature=temperature, mask_size=False)
    y = torch.zeros(1, 1, 1, dtype=torch.long)
    for gap, expected in ((-60.0, 1.0), (60.0, largest)):
        z = torch.tensor([0.0, gap, -90, -90, -90], dtype=torch.float64).view(1, C, 1, 1)
        if expected > 1:
            assert (loss(z, y) / cross_entropy(z, y)).item() == pytest.approx(expected, abs=5e-4)
        else:
            z[0, 1] = -12.0
            assert (loss(z, y) / cross_entropy(z, y)).item() == pytest.approx(1.0, abs=1e-4)


def test_pat_epsilon_only_rescales_and_mean_divides_by_present_classes():
    z, y = batch()
    plain = build_loss("pat", COUNTS, temperature=10.0)(z, y)
    scaled = build_loss("pat", COUNTS, temperature=10.0, epsilon=3.0)(z, y)
    assert (scaled / plain).item() == pytest.approx(math.exp(-0.3))
    four, three = build_loss("pat", COUNTS)(z[:1], y[:1]), build_loss("pat", COUNTS)(z[1:2], y[1:2])
    mean = build_loss("pat", COUNTS, mean_over_classes=True)(z, y)
    assert mean.item() == pytest.approx((four / 4 + three / 3).item() / 2)


def test_pat_epsilon_one_divides_the_weight_by_its_largest_value():
    """beta = e^((1 - p) / T), at most e^(1/T) at p = 0, becomes e^(-p/T), in [e^(-1/T), 1]."""
    y = torch.zeros(1, 1, 1, dtype=torch.long)
    for temperature in (0.5, 20.0):
        weights = []
        for own in (-40.0, 0.0, 0.3, 12.0):
            z = torch.tensor([own, 0, 0, 0, 0], dtype=torch.float64).view(1, C, 1, 1)
            printed, one = (
                build_loss("pat", COUNTS, temperature=temperature, epsilon=e)(z, y) / cross_entropy(z, y)
                for e in (0.0, 1.0)
            )
            assert one.item() == pytest.approx(printed.item() / math.exp(1 / temperature), rel=1e-9)
            assert one.item() == pytest.approx(math.exp(-math.exp(-cross_entropy(z, y)) / temperature), rel=1e-9)
            weights.append(one.item())
        assert weights[0] == pytest.approx(1)
        assert weights[-1] == pytest.approx(math.exp(-1 / temperature), rel=1e-3)


def test_pat_detach_changes_the_gradient_by_the_stated_factor():
    """Without detach the gradient of one pixel grows by 1 - p ln(p) / T."""
    z = torch.randn(1, C, 1, 1, dtype=torch.float64, requires_grad=True)
    y = torch.ones(1, 1, 1, dtype=torch.long)
    p = z.softmax(1)[0, 1, 0, 0]
    gradient = [
        torch.autograd.grad(build_loss("pat", COUNTS, temperature=5.0, detach=detach)(z, y), z)[0]
        for detach in (True, False)
    ]
    factor = 1 - p * p.log() / 5
    assert torch.allclose(gradient[1], gradient[0] * factor)
    assert 1 <= factor <= 1 + 0.368 / 5


def test_pat_of_all_channels_has_no_limit_but_the_plain_one_and_no_gradient_through_the_weights():
    """z_k - p_k / T is z at T -> infinity; with detach the gradient is that of logits shifted by a constant."""
    z, y = batch()
    z.requires_grad_()
    off = build_loss("pat", COUNTS, confidence=False)
    assert build_loss("pat", COUNTS, channels="all", temperature=1e9)(z, y).item() == pytest.approx(off(z, y).item())
    shift = -z.detach().softmax(1) / 0.5
    found, expected = (
        torch.autograd.grad(value, z)[0]
        for value in (build_loss("pat", COUNTS, channels="all", temperature=0.5)(z, y), off(z + shift, y))
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="channels='all' is about the confidence weight"):
        build_loss("pat", COUNTS, channels="all", confidence=False)


def test_pat_class_weight_does_not_depend_on_its_size():
    """Making a mask larger by copies of its pixel leaves the loss as it is."""
    z, y = batch()
    row, label = z[:1, :, :1, 4:5], y[0, 0, 4]
    wide = torch.cat([z[:1], row.expand(1, C, 4, 9)], 3), torch.cat([y[:1], label.expand(1, 4, 9)], 2)
    lonely = y[:1].clone()
    lonely[(lonely == label)] = IGNORE_INDEX
    lonely[0, 0, 4] = label
    many = torch.cat([lonely, label.expand(1, 4, 9)], 2)
    loss = build_loss("pat", COUNTS)
    assert loss(wide[0], many).item() == pytest.approx(loss(z[:1], lonely).item())


# --- BLV --------------------------------------------------------------------------------------------------

# sigma, then for the authors' code and for the printed algorithm: P(delta = 1), mean, sd
MOMENTS = [
    (0.5, 0.046, 0.390, 0.279, 0.023, 0.195, 0.277),
    (1.0, 0.317, 0.631, 0.343, 0.159, 0.316, 0.398),
    (2.0, 0.617, 0.805, 0.305, 0.309, 0.402, 0.457),
    (4.0, 0.803, 0.901, 0.238, 0.401, 0.450, 0.481),
    (6.0, 0.868, 0.934, 0.200, 0.434, 0.467, 0.488),
]


def draw(form="gaussian", sigma=1.0, clamp="code", n=400_000):
    torch.manual_seed(0)
    return add_variation(torch.zeros(1, 1, n, 1), torch.ones(1), form, sigma, clamp)


@pytest.mark.parametrize("row", MOMENTS, ids=lambda row: f"sigma={row[0]}")
def test_variation_moments(row):
    """Closed forms of the clamped gaussian, by sampling: the standard error of 400,000 draws is 0.0008."""
    sigma, code, printed = row[0], row[1:4], row[4:]
    for clamp, (saturated, mean, sd) in (("code", code), ("printed", printed)):
        delta = draw(sigma=sigma, clamp=clamp)
        assert (delta == 1).double().mean().item() == pytest.approx(saturated, abs=0.004)
        assert delta.mean().item() == pytest.approx(mean, abs=0.004)
        assert delta.std().item() == pytest.approx(sd, abs=0.004)
        assert mean_variation(sigma, clamp) == pytest.approx(mean, abs=6e-4)
    assert (delta == 0).double().mean().item() == pytest.approx(0.5, abs=0.004)
    free = draw(sigma=sigma, clamp="none").mean().item()
    assert free == pytest.approx(mean_variation(sigma, "none"), rel=0.006)
    assert mean_variation(sigma, "none") == pytest.approx(sigma * math.sqrt(2 / math.pi))


@pytest.mark.parametrize(
    ("form", "mean", "sd"),
    [
        ("uniform", 0.5, math.sqrt(1 / 12)),
        ("beta", 0.5, math.sqrt(1 / 8)),
        ("exponential", 1 - math.exp(-1), math.sqrt(2 - 4 / math.e - (1 - 1 / math.e) ** 2)),
        ("bernoulli", 0.5, 0.5),
        ("constant", 1.0, 0.0),
    ],
)
def test_other_forms_moments(form, mean, sd):
    delta = draw(form)
    assert 0 <= delta.min() <= delta.max() <= 1
    assert delta.mean().item() == pytest.approx(mean, abs=0.003)
    assert delta.std().item() == pytest.approx(sd, abs=0.003)


@pytest.mark.parametrize(("hyper", "gap"), [
    ({"clamp": "code"}, 0.85), ({"clamp": "printed"}, 0.42), ({"form": "constant"}, 0.90),
])  # fmt: skip
@pytest.mark.parametrize("sign", [1, -1])
def test_blv_lowers_the_rare_logit(hyper, gap, sign):
    """With a posterior of 50/50 and a = (0.1, 1) the plus sign makes the test-time logit
    of the rare class the smaller one, z_head - z_tail = 0.85 / 0.42 / 0.90; the minus sign the larger one."""
    loss = build_loss("blv", ClassCounts(torch.tensor([1, 1]), torch.tensor([1, 1])), sign=sign, **hyper)
    loss.amplitude.copy_(sign * torch.tensor([0.1, 1.0]))
    y = torch.arange(2).repeat(30_000).view(1, 1, -1)
    gaps = [0.0, 2.0 * sign]  # bisection on z_head - z_tail for a zero of the gradient, with common noise
    for _ in range(12):
        d = torch.tensor(sum(gaps) / 2, requires_grad=True)
        torch.manual_seed(1)
        z = torch.stack([d, torch.zeros(())]).view(1, 2, 1, 1).expand(1, 2, 1, y.shape[2])
        (slope,) = torch.autograd.grad(loss(z, y), d)
        gaps = [d.item(), gaps[1]] if slope.item() * sign < 0 else [gaps[0], d.item()]
    assert sum(gaps) / 2 == pytest.approx(sign * gap, abs=0.012)


def test_blv_amplitudes_of_cityscapes():
    """Eq. 3 on the pixel counts of the Cityscapes training set."""
    counts = [2036416525, 336090793, 1260636120, 36199498, 48454166, 67789506, 11477088, 30448193, 879783988,
              63949536, 221979646, 67326424, 7463162, 386328286, 14772328, 12990290, 12863955, 5449152,
              22861233]  # fmt: skip
    expected = [.144, .404, .213, .726, .684, .636, .892, .751, .265, .644, .464, .637, .955, .384, .856, .874,
                .876, 1.0, .793]  # fmt: skip
    a = variation_amplitude(torch.tensor(counts).double(), "sum")
    assert a.tolist() == pytest.approx(expected, abs=6e-4)


def test_blv_temporal_sigma():
    loss = build_loss("blv", COUNTS, form="mean", sigma=6.0, clamp="none", temporal=True)
    z, y = torch.zeros(1, C, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    for progress, share in ((0, 0), (0.375, 0.5), (0.75, 1), (0.875, 0.5), (1, 0)):
        loss.progress = progress
        offset = loss.adjust(z, y)[0, :, 0, 0].double()
        assert torch.allclose(offset, share * loss.amplitude * mean_variation(6.0, "none"), rtol=1e-6)
    with pytest.raises(UserError, match="temporal changes sigma"):
        build_loss("blv", COUNTS, form="uniform", temporal=True)


def test_blv_mean_form_and_unsaturated_limits():
    for clamp in ("code", "printed", "none"):
        assert mean_variation(0.0, clamp) == 0
    assert mean_variation(1e6, "code") == pytest.approx(1, abs=1e-5)
    assert mean_variation(1e6, "printed") == pytest.approx(0.5, abs=1e-5)


def test_blv_noise_is_new_for_every_image_class_pixel_and_step():
    loss = build_loss("blv", COUNTS, sigma=0.1)
    z = torch.zeros(2, C, 8, 8)
    first, second = loss.adjust(z, z), loss.adjust(z, z)
    assert not torch.equal(first, second)
    assert len(first.unique()) > 0.95 * first.numel()
    torch.manual_seed(0)
    a = loss.adjust(z, z)
    torch.manual_seed(0)
    assert torch.equal(a, loss.adjust(z, z))


@pytest.mark.parametrize(("terms", "noisy"), [("all", {0, 1}), ("labels", {0}), ("pseudo_labels", {1})])
def test_blv_terms_of_self_training(terms, noisy):
    loss, (z, y) = build_loss("blv", COUNTS, terms=terms), batch()
    assert not loss.pseudo_labelled
    for pseudo_labelled in (False, True):
        loss.pseudo_labelled = pseudo_labelled
        assert (loss(z, y) != cross_entropy(z, y)) == (pseudo_labelled in noisy)


def test_blv_permuted_and_replaced_counts():
    plain, control = build_loss("blv", COUNTS), build_loss("blv", COUNTS, permute=3)
    assert not torch.equal(plain.amplitude, control.amplitude)
    assert torch.equal(plain.amplitude.sort().values, control.amplitude.sort().values)
    assert torch.equal(control.amplitude, build_loss("blv", COUNTS, permute=3).amplitude)
    plain.set_counts(UNIFORM)
    assert torch.equal(plain.amplitude, torch.ones(C, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected counts of 5 classes, got 2"):
        plain.set_counts(ClassCounts(torch.tensor([1, 2]), torch.tensor([1, 2])))


def test_blv_counts_pseudo_labels():
    """An epoch's counts are those of all its label maps; one without any changes nothing."""
    loss = build_loss("blv", COUNTS, pseudo=True)
    first, (_, y) = loss.amplitude.clone(), batch()
    loss.observe(y[:2])
    loss.observe(y[2:])
    assert torch.equal(loss.amplitude, first)
    loss.end_epoch()
    images = torch.stack([(y == k).flatten(1).any(1).sum() for k in range(C)])
    counts = ClassCounts(torch.stack([(y == k).sum() for k in range(C)]), images)
    assert torch.equal(loss.amplitude, build_loss("blv", counts).amplitude)
    assert not torch.equal(loss.amplitude, first)
    loss.observe(torch.full_like(y, IGNORE_INDEX))
    loss.end_epoch()
    assert torch.equal(loss.amplitude, build_loss("blv", counts).amplitude)
    with pytest.raises(UserError, match="balance=False takes no counts"):
        build_loss("blv", COUNTS, balance=False, permute=1)


def test_first_commit_gives_no_noise_to_the_head():
    assert build_loss("blv", COUNTS, reference="max").amplitude[0] == 0
    assert build_loss("gcl", COUNTS).amplitude[0] == 0
    assert build_loss("gcl", COUNTS).amplitude.min() == -1


# --- what every loss keeps --------------------------------------------------------------------------------


def seeded(loss, z, y):
    torch.manual_seed(11)
    return loss(z, y)


SMOOTH = [(name, {"detach": False} if name == "pat" else {}) for name in LOSSES if name != "seesaw"] + [
    ("seesaw", {"q": 0}),
    ("focal", {"gamma": 0.5}),
    ("ldam", {"scale": 5.0, "drw": 0.0}),
    ("gcl", {"margin": 0.3, "scale": 2.0}),
    ("pat", {"detach": False, "mean_over_classes": True, "temperature": 2.0}),
    ("pat", {"detach": False, "channels": "all", "temperature": 0.7}),
    ("blv", {"sigma": 0.5, "sign": -1, "clamp": "none"}),
]


@pytest.mark.parametrize(("name", "hyper"), SMOOTH, ids=str)
def test_gradcheck(name, hyper):
    z, y = batch()
    z, y = z[:2, :, :3, 1:4].clone().requires_grad_(), y[:2, :3, 1:4]
    loss = build_loss(name, COUNTS, **hyper)
    assert torch.autograd.gradcheck(lambda z: seeded(loss, z, y), (z,))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels(name):
    """Gradient exactly 0; other logits there, or more such pixels, change nothing."""
    z, y = batch()
    z.requires_grad_()
    loss = build_loss(name, COUNTS)
    value = seeded(loss, z, y)
    (gradient,) = torch.autograd.grad(value, z)
    ignored = (y == IGNORE_INDEX).unsqueeze(1).expand_as(z)
    assert torch.all(gradient[ignored] == 0)
    assert torch.all(gradient[:2].abs().sum(1)[y[:2] != IGNORE_INDEX] > 0)
    assert seeded(loss, torch.where(ignored, torch.full_like(z, 1e4), z), y).item() == value.item()

    if name in NOISY:  # further pixels shift the noise: compare without it
        loss.sigma = 0.0
        value = loss(z, y)
    more = F.pad(z, (0, 2, 0, 1), value=3.0), F.pad(y, (0, 2, 0, 1), value=IGNORE_INDEX)
    assert loss(*more).item() == pytest.approx(value.item(), rel=1e-12)
    image = torch.cat([more[0], more[0][:1]]), torch.cat([more[1], torch.full_like(more[1][:1], IGNORE_INDEX)])
    assert loss(*image).item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_all_ignored_is_zero(name, dtype):
    z = batch(dtype=dtype)[0].requires_grad_()
    value = build_loss(name, COUNTS)(z, torch.full((3, 4, 6), IGNORE_INDEX))
    value.backward()
    assert value.item() == 0
    assert value.dtype == torch.float32
    assert torch.count_nonzero(z.grad) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_are_finite(name):
    """Logits of +-1e4: right, wrong, undecided; float16 too, where they still fit."""
    g = torch.Generator().manual_seed(0)
    _, y = batch()
    signs = 1e4 * torch.randint(-1, 2, (3, C, 4, 6), generator=g)
    for z in (signs.float(), signs.double(), signs.half(), torch.full((3, C, 4, 6), -1e4), 1e4 * one_hot(y)):
        z = z.clone().requires_grad_()
        value = build_loss(name, COUNTS)(z, y)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(z.grad).all()


def one_hot(y):
    return F.one_hot(y.where(y != IGNORE_INDEX, 0), C).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_focal_gradient_at_certainty_is_finite(gamma):
    z = torch.tensor([200.0, 0, 0, 0, 0]).view(1, C, 1, 1).requires_grad_()
    build_loss("focal", COUNTS, gamma=gamma)(z, torch.zeros(1, 1, 1, dtype=torch.long)).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_computed_in_float32(name):
    z, y = batch(dtype=torch.bfloat16)
    loss = build_loss(name, COUNTS)
    assert seeded(loss, z, y).item() == seeded(loss, z.float(), y).item()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_integer_types_of_the_target(kind):
    z, y = batch()
    for name in LOSSES:
        loss = build_loss(name, COUNTS)
        assert seeded(loss, z, y.to(kind)) == seeded(loss, z, y)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(C)),
    sizes=st.lists(st.integers(0, 10**8), min_size=C, max_size=C).filter(any),
    seed=st.integers(0, 1000),
)
def test_class_permutation_invariance(order, sizes, seed):
    """Renaming the classes in counts, logits and labels changes nothing (noise aside)."""
    z, y = batch(seed)
    pixels = torch.tensor(sizes)
    images = pixels.clamp(max=37)
    order = torch.tensor(order)
    renamed = torch.where(y == IGNORE_INDEX, y, order.argsort()[y.clamp(max=C - 1)])
    for name in LOSSES:
        loss = build_loss(name, ClassCounts(pixels, images))
        other = build_loss(name, ClassCounts(pixels[order], images[order]))
        if name in NOISY:
            loss.sigma = other.sigma = 0.0
            assert torch.equal(loss.amplitude[order], other.amplitude)
        assert other(z[:, order], renamed).item() == pytest.approx(loss(z, y).item(), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0, 50),
    shift=st.floats(-100, 100),
    sizes=st.lists(st.integers(0, 10**9), min_size=C, max_size=C).filter(any),
)
def test_properties(seed, scale, shift, sizes):
    """Finite and >= 0, unchanged by the order of the images and by a constant added to all logits.

    Not by a constant for `vs`: it multiplies the logits, each class with its own factor.
    """
    z, y = batch(seed, scale=scale)
    counts = ClassCounts(torch.tensor(sizes), torch.tensor(sizes).clamp(max=500))
    for name in LOSSES:
        loss = build_loss(name, counts)
        value = seeded(loss, z, y).item()
        assert math.isfinite(value)
        assert value >= -1e-12
        if name != "vs":
            assert seeded(loss, z + shift, y).item() == pytest.approx(value, rel=1e-6, abs=1e-9)
        if name not in NOISY:
            assert loss(z.flip(0), y.flip(0)).item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_one_class_and_one_pixel(name):
    one = ClassCounts(torch.tensor([5]), torch.tensor([1]))
    z = torch.randn(1, 1, 1, 1, requires_grad=True)
    value = build_loss(name, one)(z, torch.zeros(1, 1, 1, dtype=torch.long))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert z.grad.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_module_state_follows_device_and_type(name):
    """Tables are buffers, so `.to` moves them and a checkpoint holds them; nothing is learned."""
    loss = build_loss(name, COUNTS)
    assert not list(loss.parameters())
    z, y = batch(dtype=torch.float32)
    assert loss.to("meta")(z.to("meta"), y.to("meta")).device.type == "meta"  # a table left behind would be refused
    other = build_loss(name, UNIFORM).float()
    other.load_state_dict(build_loss(name, COUNTS).state_dict())
    assert seeded(other, z, y).item() == pytest.approx(seeded(build_loss(name, COUNTS), z, y).item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_cuda_without_synchronisation(name):
    z, y = batch()
    loss = build_loss(name, COUNTS)
    if name in NOISY:
        loss.sigma = 0.0
    expected = loss(z, y).item()
    z, y, loss = z.cuda().requires_grad_(), y.cuda(), loss.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(z, y)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)


# --- helpers and bad input --------------------------------------------------------------------------------


def test_helpers():
    z, y = batch()
    nll = pixel_nll(z, y)
    assert torch.all(nll[y == IGNORE_INDEX] == 0)
    assert torch.equal(mean_over_valid(nll, y), nll[y != IGNORE_INDEX].sum() / (y != IGNORE_INDEX).sum())
    table = torch.tensor([1.0, 2, 3, 4, 5])
    assert per_pixel(table, torch.tensor([[[0, 4, IGNORE_INDEX]]])).tolist() == [[[1, 5, 0]]]


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("balanced_sofmax", {}, "unknown loss 'balanced_sofmax'.*'balanced_softmax'"),
        ("blv", {"sgima": 3.0}, "'sgima'.*'sigma'"),
        ("ce", {"gamma": 2.0}, "there is no hyper-parameter of loss 'ce', got gamma"),
        ("focal", {"gamma": -1.0}, "gamma must be >= 0, got -1.0"),
        ("focal", {"gamma": "two"}, "gamma must be float, got 'two'"),
        ("focal", {"gamma": float("inf")}, "gamma must be >= 0, got inf"),
        ("cb_focal", {"gamma": -1}, "gamma must be >= 0"),
        ("cb", {"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ("cb", {"beta": -0.1}, "beta must be"),
        ("weighted_ce", {"power": -1}, "power must be >= 0, got -1"),
        ("weighted_ce", {"normalisation": "mean"}, "normalisation must be 'class' or .*, got 'mean'"),
        ("grw_ce", {"rho": -0.2}, "rho must be >= 0, got -0.2"),
        ("logit_adjustment", {"tau": float("inf")}, "tau must be finite, got inf"),
        ("vs", {"gamma": -0.1}, "gamma must be >= 0, got -0.1"),
        ("balanced_softmax", {"prior": "pixels"}, "prior must be 'pixel' or 'region', got 'pixels'"),
        ("ldam", {"mu": -1}, "mu must be >= 0"),
        ("ldam", {"scale": 0}, "scale must be > 0, got 0"),
        ("ldam", {"drw": 1.5}, r"drw must be in \[0, 1\] or null, got 1.5"),
        ("ldam", {"drw_beta": 1}, "drw_beta must be"),
        ("seesaw", {"p": -1}, "p must be >= 0"),
        ("seesaw", {"q": -1}, "q must be >= 0"),
        ("lovasz", {"ce_weight": -1}, "ce_weight must be >= 0"),
        ("dice", {"eps": 0}, "eps must be > 0, got 0"),
        ("dice_ce", {"ce_weight": -1}, "ce_weight must be >= 0"),
        ("blv", {"sigma": -6}, "sigma must be >= 0, got -6"),
        ("blv", {"form": "gauss"}, "form must be 'gaussian' or .*, got 'gauss'"),
        ("blv", {"sign": 2}, "sign must be 1 or -1, got 2"),
        ("blv", {"sign": True}, "sign must be 1 or -1, got True"),
        ("blv", {"permute": -1}, r"permute must be in \[0, 2\^63\) or null, got -1"),
        ("blv", {"permute": 2**63}, r"permute must be in .*, got 9223372036854775808"),
        ("gcl", {"sigma": -1}, "sigma must be >= 0"),
        ("gcl", {"margin": -1}, "margin must be >= 0"),
        ("gcl", {"scale": -1}, "scale must be > 0"),
        ("pat", {"temperature": 0}, "temperature must be > 0, got 0"),
        ("pat", {"epsilon": float("-inf")}, "epsilon must be finite"),
        ("pat", {"mask_size": False, "mean_over_classes": True}, "mean_over_classes averages"),
    ],
)
def test_bad_hyper_parameters(name, hyper, message):
    with pytest.raises(UserError, match=message):
        build_loss(name, COUNTS, **hyper)


@pytest.mark.parametrize(
    ("pixels", "images", "message"),
    [
        ([5, -3, 1], [1, 1, 1], "-3"),
        ([5.0, float("nan"), 1], [1, 1, 1], "nan"),
        ([0.7, 0.2, 0.1], [1, 1, 1], "integers"),  # shares would all be floored at one pixel
        ([5, 3, 1], [1, -2, 1], "-2"),
        ([5, 3, 1], [1, 1], "3 and 2"),
        ([], [], "0"),
    ],
)
def test_bad_counts(pixels, images, message):
    with pytest.raises(ValueError, match=message):
        build_loss("balanced_softmax", ClassCounts(torch.tensor(pixels), torch.tensor(images)))


@pytest.mark.parametrize("counts", [None, torch.tensor(PIXELS), PIXELS], ids=lambda c: type(c).__name__)
def test_counts_of_another_type_are_refused(counts):
    with pytest.raises(UserError, match=f"counts must be ClassCounts, .* got {type(counts).__name__}"):
        build_loss("ce", counts)


def test_counts_that_are_all_zero_are_refused():
    with pytest.raises(UserError, match="the counts of all 3 classes are 0"):
        build_loss("ce", ClassCounts(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)))


@pytest.mark.parametrize(("prior", "sizes"), [("pixel", [900, 40, 3]), ("region", [30, 20, 2])])
def test_sizes_of_classes_that_never_occur(prior, sizes):
    counts = ClassCounts(torch.tensor([900, 0, 40, 3]), torch.tensor([30, 0, 20, 2]))
    for absent, expected in (("one", 1), ("rarest", min(sizes)), ("most frequent", max(sizes))):
        assert class_sizes(counts, prior, absent).tolist() == [sizes[0], expected, *sizes[1:]]


@pytest.mark.parametrize("name", LOSSES)
def test_an_absent_class_counts_as_the_rarest_or_as_one_pixel(name):
    """In weights, margins and noise as the rarest class that occurs: it does not set the scale of the others."""

    def tables(pixels, images):
        counts = ClassCounts(torch.tensor([9_000_000, 400_000, 35_000, pixels]), torch.tensor([300, 200, 40, images]))
        return build_loss(name, counts).state_dict()

    found, rarest, one = tables(0, 0), tables(35_000, 40), tables(1, 1)
    scaled = name in ("weighted_ce", "grw_ce", "cb", "cb_focal", "ldam", "blv", "gcl")
    assert bool(found) is (scaled or name in ("balanced_softmax", "logit_adjustment", "vs", "seesaw"))
    for key, table in found.items():
        assert torch.equal(table, rarest[key]) is scaled
        assert torch.equal(table, one[key]) is not scaled
        if scaled:
            assert table.abs().max() >= 0.5  # LDAM's largest margin is mu = 0.5, all others reach 1


@pytest.mark.parametrize("name", LOSSES)
def test_bad_tensors(name):
    z, y = batch()
    loss = build_loss(name, COUNTS)
    with pytest.raises(ValueError, match=r"expected floating logits \(B, 5, H, W\) for counts of 5 classes, got.*4"):
        loss(z[:, :4], y)
    with pytest.raises(ValueError, match="expected floating logits"):
        loss(z[0], y)
    with pytest.raises(ValueError, match="expected floating logits"):
        loss(z.long(), y)
    with pytest.raises(ValueError, match=r"expected an integer target \(3, 4, 6\), got.*\(2, 4, 6\)"):
        loss(z, y[:2])
    with pytest.raises(ValueError, match="expected an integer target"):
        loss(z, y.double())
    for wrong in (C, 254, -1):
        with pytest.raises(ValueError, match=f"the target has the label {wrong}: expected 0 to 4, the classes, or 255"):
            loss(z, y.index_fill(2, torch.tensor(3), wrong))
