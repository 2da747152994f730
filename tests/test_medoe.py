"""MEDOE: label sets, who teaches the encoder, the auxiliary loss, the ensembles and the oracle."""

import copy
import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ltseg_core import stats
from ltseg_core.config import IGNORE_INDEX, UserError
from ltseg_core.cost import peak_bytes
from ltseg_core.losses import cross_entropy
from ltseg_core.methods import build_method
from ltseg_core.methods.medoe import (
    LEARNED,
    RULES,
    ExpertCriterion,
    ExpertOutput,
    Experts,
    ExpertSelection,
    LearnedEnsemble,
    SimpleEnsemble,
    SoftmaxSums,
    build,
    class_groups,
    expert_target,
    label_sets,
    oracle_prediction,
    outside_norm,
    prior_divergence,
    restricted_prediction,
)
from ltseg_core.models import SegmentationNetwork, build_model
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner

C = 6
PIXELS = [900, 90_000, 60, 300, 50_000, 0]  # by falling count: 1 4 | 0 3 | 2 5
COUNTS = ClassCounts(torch.tensor(PIXELS), torch.tensor([30, 40, 9, 20, 35, 0]))
GROUP = torch.tensor([1, 0, 2, 1, 0, 2])


class Encoder(nn.Module):
    output_stride, out_channels = 4, (3, 6, 6)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, 4, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv(x)
        return [x, y, self.norm(y)]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)

    def forward(self, maps):
        return self.norm(self.conv(maps[-1])).relu()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = Encoder(), Decoder(), nn.Sequential(nn.Conv2d(5, C, 1))


def network(seed=0):
    torch.manual_seed(seed)
    return SegmentationNetwork(Model())


def images(seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, C - 1, (2, 14, 18), generator=g)
    target[0, :3] = IGNORE_INDEX
    return torch.rand(2, 3, 14, 18, generator=g), target


def logits(seed=0, k=3):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, C, (2, 3, 4), generator=g)
    y[0, 0, :2] = IGNORE_INDEX
    return [2 * torch.randn(2, C, 3, 4, generator=g, dtype=torch.float64) for _ in range(k)], y


def start(stage):
    """What the training loop does before the first step."""
    for module in stage.frozen:
        module.requires_grad_(False)
    stage.network.train()
    stage.criterion.train()
    for module in stage.frozen:
        module.eval()
    return [p for m in (stage.network, stage.criterion) for p in m.parameters() if p.requires_grad]


def train(stage, steps=2, lr=0.05):
    parameters = start(stage)
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        Learner(stage)(*images(step)).backward()
        assert all(p.grad is not None for p in parameters)  # several processes need every gradient
        optimizer.step()
    return stage


# --- label sets ---


def test_groups_are_those_of_the_statistics():
    assert torch.equal(class_groups(COUNTS), GROUP)
    names = [stats.GROUPS[i] for i in class_groups(COUNTS)]
    assert names == stats.groups(COUNTS)
    assert torch.equal(class_groups(COUNTS, cuts=(2, 4)), GROUP)
    assert torch.equal(class_groups(COUNTS, cuts=(1,)), torch.tensor([1, 0, 1, 1, 1, 1]))
    assert not class_groups(COUNTS, shares=()).any()


@given(st.permutations(range(8)), st.integers(1, 7))
def test_cuts_count_the_most_frequent_classes(order, cut):
    counts = ClassCounts(torch.tensor([2**i for i in order]), torch.ones(8, dtype=torch.int64))
    expected = torch.tensor([0 if 7 - i < cut else 1 for i in order])
    assert torch.equal(class_groups(counts, cuts=[cut]), expected)


def test_label_sets():
    overlap, disjoint, disjoint_all, everything = (
        label_sets(GROUP, kind) for kind in ("overlap", "disjoint", "disjoint_all", "all")
    )
    members = [[s.nonzero().flatten().tolist() for s in sets] for sets in (overlap, disjoint, disjoint_all)]
    assert members[0] == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [2, 5]]
    assert members[1] == [[1, 4], [0, 3], [2, 5]]
    assert members[2] == [[0, 1, 2, 3, 4, 5], [0, 3], [2, 5]]
    assert everything.shape == (3, C)
    assert everything.all()
    assert torch.equal(disjoint.sum(0), torch.ones(C, dtype=torch.int64))
    assert torch.equal(disjoint[:2], overlap[:2] & ~overlap[1:])  # S_n without S_n+1


def test_expert_target_masks_the_labels_of_others():
    y = torch.tensor([[[0, 1, 2], [5, IGNORE_INDEX, 4]]])
    expected = torch.tensor([[[255, 255, 2], [5, 255, 255]]])
    assert torch.equal(expert_target(y, label_sets(GROUP)[2]), expected)


# --- stage 1 ---


@pytest.mark.parametrize("softmax", ["all", "own"])
@pytest.mark.parametrize("sets", ["overlap", "disjoint", "disjoint_all", "all"])
def test_alpha_0_is_the_sum_of_the_experts_cross_entropies(sets, softmax):
    z, y = logits()
    labels = label_sets(GROUP, sets)
    loss = ExpertCriterion(labels, COUNTS, alpha=0.0, softmax=softmax)(ExpertOutput(z[0], z[0], tuple(z)), y)
    expected = 0.0
    for i in range(3):
        terms = [
            (among.exp().sum().log() - z[i][b, y[b, u, v], u, v]).item()
            for b, u, v in np.ndindex(*y.shape)
            if y[b, u, v] != IGNORE_INDEX and labels[i, y[b, u, v]]
            for among in [z[i][b, labels[i] if softmax == "own" else slice(None), u, v]]
        ]
        expected += np.mean(terms)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def mean_p(z, own):
    """Log of the mean softmax of the valid pixels, as logits of one pixel."""
    return z.softmax(1).movedim(1, 3)[own != IGNORE_INDEX].mean(0).log().view(1, C, 1, 1)


def test_auxiliary_loss_is_added_with_its_weight():
    z, y = logits()
    labels = label_sets(GROUP)
    output = ExpertOutput(z[0], z[0], tuple(z))
    prior = COUNTS.pixels.clamp(min=1).double().log()
    for l2, kl, pixels in [("pixel", "batch", "valid"), ("class", "none", "own"), ("none", "pixel", "valid")]:
        criterion = ExpertCriterion(labels, COUNTS, alpha=0.3, l2=l2, kl=kl, l2_pixels=pixels)
        plain = ExpertCriterion(labels, COUNTS, alpha=0.0)(output, y)
        extra = 0.0
        for i in range(3):
            own = expert_target(y, labels[i])
            if l2 != "none":
                extra += outside_norm(z[i][:, ~labels[i]], own if pixels == "own" else y, l2).item()
            if kl != "none":
                seen = own if kl == "pixel" else torch.zeros(1, 1, 1).long()
                extra += prior_divergence(z[i] if kl == "pixel" else mean_p(z[i], own), seen, labels[i], prior).item()
        assert criterion(output, y).item() == pytest.approx(plain.item() + 0.3 * extra, rel=1e-12)
        assert extra > 0


def test_outside_norm_equals_loops():
    (z, *_), y = logits()
    outside = [0, 1, 3, 4]
    valid = [(b, u, v) for b, u, v in np.ndindex(*y.shape) if y[b, u, v] != IGNORE_INDEX]
    by_pixel = [math.sqrt(sum(z[b, k, u, v].item() ** 2 for k in outside)) for b, u, v in valid]
    assert outside_norm(z[:, outside], y, "pixel").item() == pytest.approx(np.mean(by_pixel), rel=1e-12)
    by_class = [math.sqrt(np.mean([z[b, k, u, v].item() ** 2 for b, u, v in valid])) for k in outside]
    assert outside_norm(z[:, outside], y, "class").item() == pytest.approx(sum(by_class), rel=1e-12)
    for form in ("pixel", "class"):
        assert outside_norm(z[:, []], y, form) == 0


def test_prior_divergence_equals_loops():
    (z, *_), y = logits()
    labels = label_sets(GROUP)[1:2]
    inside = [0, 2, 3, 5]
    own = expert_target(y, labels[0])
    q = np.maximum(np.array(PIXELS, dtype=float)[inside], 1)
    q /= q.sum()
    p = z.softmax(1)
    rows = np.array([p[b, inside, u, v].tolist() for b, u, v in np.ndindex(*y.shape) if own[b, u, v] != IGNORE_INDEX])

    def divergence(row):
        row = row / row.sum()
        return float((row * np.log(row / q)).sum())

    def loss(**options):
        criterion = ExpertCriterion(labels, COUNTS, l2="none", **options)
        return criterion(ExpertOutput(z, z, (z,)), y).item()

    batch, pixel = (loss(alpha=1.0, kl=form) - loss(alpha=0.0) for form in ("batch", "pixel"))
    assert batch == pytest.approx(divergence(rows.mean(0)), rel=1e-10)
    assert pixel == pytest.approx(np.mean([divergence(row) for row in rows]), rel=1e-10)


def test_prior_divergence_is_0_for_the_prior_itself():
    labels = label_sets(GROUP)[1]
    prior = COUNTS.pixels.clamp(min=1).double().log()
    z = prior.view(1, -1, 1, 1).expand(1, -1, 2, 2) + 3 * ~labels.view(1, -1, 1, 1)  # mass elsewhere does not matter
    assert prior_divergence(z, torch.zeros(1, 2, 2).long(), labels, prior).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_two_sums_of_a_softmax_and_their_gradient(dtype, exact):
    (z, *_), y = logits()
    z = z.to(dtype).requires_grad_()
    weight = torch.randn(C, generator=torch.Generator().manual_seed(4)).to(dtype)

    def plain(z):
        log_p = z.log_softmax(1)
        nll = F.nll_loss(log_p, y, ignore_index=IGNORE_INDEX, reduction="sum")
        return nll, (log_p.exp() * (y != IGNORE_INDEX).unsqueeze(1)).sum((0, 2, 3))

    found, expected = SoftmaxSums.apply(z, y), plain(z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=0)
    for combine in (lambda nll, mass: nll, lambda nll, mass: weight @ mass.log(), lambda nll, mass: nll * mass[1]):
        (a,), (b,) = (torch.autograd.grad(combine(*sums), z, retain_graph=True) for sums in (found, expected))
        assert (a - b).abs().max() <= exact * b.abs().max()
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda v: SoftmaxSums.apply(v, y), z)
    (gradient,) = torch.autograd.grad(weight @ found[1].log(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, {"l2": "class"}, {"kl": "pixel", "softmax": "own"}])
def test_mixed_precision_does_not_reach_the_loss(options):
    z, y = logits()
    z = [v.bfloat16().requires_grad_() for v in z]
    criterion, output = (
        ExpertCriterion(label_sets(GROUP), COUNTS, alpha=0.3, **options),
        ExpertOutput(z[0], z[0], (*z,)),
    )
    wide = criterion(output, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = criterion(output, y)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, wide)


@pytest.mark.parametrize("options", [{}, {"softmax": "own"}, {"l2": "class", "kl": "pixel", "l2_pixels": "own"}])
def test_gradcheck_and_pixels_without_labels(options):
    z, y = logits()
    criterion = ExpertCriterion(label_sets(GROUP), COUNTS, alpha=0.5, **options).double()
    inputs = tuple(v.requires_grad_() for v in z)

    def loss(*experts, target=y):
        return criterion(ExpertOutput(experts[0], experts[0], experts), target)

    first = tuple(v[:1].detach().requires_grad_() for v in z)
    assert torch.autograd.gradcheck(lambda *v: loss(*v, target=y[:1]), first)
    for gradient in torch.autograd.grad(loss(*inputs), inputs):
        assert not gradient.movedim(1, 3)[y == IGNORE_INDEX].any()
    nothing = loss(*inputs, target=torch.full_like(y, IGNORE_INDEX))
    assert nothing == 0
    assert all(g.isfinite().all() and not g.any() for g in torch.autograd.grad(nothing, inputs))
    only_head = loss(*inputs, target=torch.ones_like(y))  # experts 2 and 3 have no pixel of their own
    assert all(g.isfinite().all() for g in torch.autograd.grad(only_head, inputs))
    extreme = [(1e4 * v.detach().sign()).float().requires_grad_() for v in z]
    large = criterion.float()(ExpertOutput(extreme[0], extreme[0], tuple(extreme)), y)
    assert large.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(large, extreme))


def test_permuting_the_classes_changes_nothing():
    z, y = logits()
    order = torch.randperm(C, generator=torch.Generator().manual_seed(3))
    moved = torch.where(y == IGNORE_INDEX, y, order.argsort()[y.clamp(max=C - 1)])
    losses = []
    for counts, experts, target in [
        (COUNTS, z, y),
        (ClassCounts(COUNTS.pixels[order], COUNTS.images[order]), [v[:, order] for v in z], moved),
    ]:
        criterion = ExpertCriterion(label_sets(class_groups(counts)), counts, alpha=0.2)
        losses.append(criterion(ExpertOutput(z[0], z[0], tuple(experts)), target))
    assert torch.allclose(*losses, rtol=1e-12)


# --- who learns from what ---


def gradients(stage):
    image, target = images()
    start(stage)
    Learner(stage)(image, target).backward()
    return {name: p.grad for name, p in stage.network.named_parameters()}


@pytest.mark.parametrize("share", ["encoder", "decoder"])
def test_the_shared_part_has_the_gradient_of_expert_1_alone(share):
    stage = build(network(), COUNTS, share=share)[0]
    alone = copy.deepcopy(stage)
    image, target = images()
    start(alone)
    output = alone.network(image)
    criterion = alone.criterion
    criterion.expert_loss(output.experts[0], target, criterion.labels[0], torch.tensor([]).long()).backward()
    expected = {name: p.grad for name, p in alone.network.named_parameters() if name.startswith("base.")}
    found = gradients(stage)
    everyone = gradients(build(network(), COUNTS, share=share, shared_gradient="all")[0])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    others = [g for name, g in found.items() if name.startswith("others")]
    assert others
    assert all(g is not None and g.any() for g in others)
    shared = ("base.encoder", "base.decoder") if share == "decoder" else "base.encoder"
    assert all(torch.allclose(everyone[name], g) for name, g in expected.items() if not name.startswith(shared))
    for part in ("encoder", "decoder"):
        name = f"base.{part}.conv.weight"
        assert torch.allclose(everyone[name], expected[name]) is (not name.startswith(shared))


def test_what_experts_own():
    for share, own in [("encoder", {"decoder", "classifier"}), ("decoder", {"classifier"}),
                       ("nothing", {"encoder", "decoder", "classifier"})]:  # fmt: skip
        experts = Experts(network(), 3, share=share)
        names = {name.split(".")[2] for name, _ in experts.named_parameters() if name.startswith("others.1")}
        assert names == own
        base = dict(experts.base.named_parameters())
        assert all(torch.equal(p, base[name]) for name, p in network().named_parameters())  # expert 1 is as it was
        assert not torch.equal(experts.others[0].classifier.weight, experts.others[1].classifier.weight)
        assert not torch.equal(experts.others[0].classifier.weight, base["classifier.weight"])
        output = experts.eval()(images()[0])
        assert len(output.experts) == 3
        assert torch.equal(output.logits, network().eval()(images()[0]).logits)
        if share != "nothing":  # each expert is a network with its own parts in place of expert 1's
            single = network().eval()
            second = experts.others[0]
            single.classifier = second.classifier
            if share == "encoder":
                single.decoder = second.decoder
            assert torch.equal(output.experts[1], single(images()[0]).logits)


@pytest.mark.parametrize("architecture", ["Linknet", "FPN", "DeepLabV3Plus"])
def test_every_kernel_of_a_decoder_of_its_own_is_drawn_anew(architecture):
    base = build_model(architecture, "tu-mobilenetv3_small_050", C)
    experts = Experts(base, 3)
    kernels = {name for name, p in base.decoder.named_parameters() if p.ndim == 4}
    own = [dict(network.decoder.named_parameters()) for network in (base, *experts.others)]
    assert kernels
    assert len(own) == 3
    for name in kernels:
        assert not any(torch.equal(a[name], b[name]) for a, b in itertools.combinations(own, 2)), name


def test_one_expert_trains_the_network_of_plain_cross_entropy():
    plain = train(build_method("ce", network(), COUNTS, {})[0]).network
    stage = train(build(network(), COUNTS, shares=(), alpha=0.0, ensemble="head")[0])
    single = stage.network.experts.base
    pairs = zip(plain.state_dict().values(), single.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    image = images()[0]
    assert torch.equal(stage.network.eval()(image).logits.argmax(1), plain.eval()(image).logits.argmax(1))


def test_expert_1_is_not_disturbed_by_the_others():
    """Its set holds all classes and the others do not reach the encoder: it is the plain network."""
    plain = train(build_method("ce", network(), COUNTS, {})[0]).network
    base = train(build(network(), COUNTS, alpha=0.0)[0]).network.base
    assert torch.equal(plain.classifier.weight, base.classifier.weight)
    assert torch.equal(plain.encoder.conv.weight, base.encoder.conv.weight)


# --- expert 1 before the others ---


def stored(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def learns(module, prefix):
    """Its parameters, but for the biases before a BatchNorm, which have no gradient."""
    return {name for name, _ in module.named_parameters() if name.startswith(prefix) and "conv.bias" not in name}


@pytest.mark.parametrize("share", ["encoder", "decoder"])
@pytest.mark.parametrize("ensemble", ["moe_mean", "average"])
def test_head_first_trains_expert_1_and_then_the_others(share, ensemble):
    options = {"share": share, "ensemble": ensemble, "ensemble_share": 0.2, "head_share": 0.25}
    stages = build(with_auxiliary(), COUNTS, order="head_first", **options)
    assert [stage.name for stage in stages] == ["head", "others", "ensemble"][: len(stages)]
    shares = {"moe_mean": [0.2, 0.6, 0.2], "average": [0.25, 0.75]}[ensemble]
    assert [stage.share for stage in stages] == pytest.approx(shares)
    head, others = stages[:2]
    experts = others.network if ensemble == "moe_mean" else others.network.experts
    assert experts.base is head.network.base

    before, calls = stored(experts), []
    for expert in experts.others:
        expert.register_forward_pre_hook(lambda *_: calls.append("forward"))
        expert.decoder.register_forward_pre_hook(lambda *_: calls.append("decoder"))
        expert.classifier.register_forward_pre_hook(lambda *_: calls.append("classifier"))
    train(head)
    assert all(name.startswith("base.") for name in moved(experts, before))
    assert moved(experts, before) >= learns(experts, "base.")
    assert not calls

    before, first = stored(experts), []
    experts.base.classifier.register_forward_pre_hook(lambda *_: first.append("classifier"))
    experts.base.auxiliary.register_forward_pre_hook(lambda *_: first.append("auxiliary"))
    if share == "encoder":
        experts.base.decoder.register_forward_pre_hook(lambda *_: first.append("decoder"))
    train(others)
    assert not any(name.startswith("base.") for name in moved(experts, before))  # parameters and statistics
    assert moved(experts, before) >= learns(experts, "others.")
    assert set(calls) == {"classifier"} if share == "decoder" else {"classifier", "decoder"}
    assert not first
    with torch.no_grad():
        assert len(others.network.eval()(images()[0]).experts) == 3


@pytest.mark.parametrize("options", [{}, {"sets": "disjoint", "kl": "pixel"}, {"softmax": "own", "l2": "class"}])
def test_the_two_losses_of_head_first_are_the_parts_of_the_joint_loss(options):
    joint = build(network(), COUNTS, **options)[0].criterion
    head, others = (s.criterion for s in build(network(), COUNTS, order="head_first", **options)[:2])
    assert torch.equal(torch.cat([head.labels, others.labels]), joint.labels)
    z, y = logits()
    each = [ExpertCriterion(joint.labels[i : i + 1], COUNTS, alpha=0.2, **{k: v for k, v in options.items()
            if k != "sets"})(ExpertOutput(z[i], z[i], (z[i],)), y).item() for i in range(3)]  # fmt: skip
    assert head(ExpertOutput(z[0], z[0], (z[0],)), y).item() == pytest.approx(each[0], rel=1e-12)
    assert others(ExpertOutput(z[1], z[1], (*z[1:],)), y).item() == pytest.approx(each[1] + each[2], rel=1e-12)
    assert joint(ExpertOutput(z[0], z[0], (*z,)), y).item() == pytest.approx(sum(each), rel=1e-12)


@pytest.mark.parametrize("share", ["encoder", "decoder"])
def test_the_stages_of_head_first_have_the_gradients_of_joint_training(share):
    """At the same weights, and the same statistics of the batch norms."""

    def found(order, number=0):
        stage = build(network(), COUNTS, share=share, order=order)[number]
        image, target = images()
        start(stage)
        for module in stage.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        Learner(stage)(image, target).backward()
        return {name: p.grad for name, p in stage.network.named_parameters() if p.grad is not None}

    joint, head, others = found("joint"), found("head_first"), found("head_first", 1)
    assert joint.keys() == head.keys() | others.keys()
    assert not head.keys() & others.keys()
    for name, gradient in (head | others).items():
        torch.testing.assert_close(gradient, joint[name])


def test_one_expert_in_either_order_is_plain_cross_entropy():
    plain = train(build_method("ce", network(), COUNTS, {})[0]).network
    (stage,) = build(network(), COUNTS, shares=(), alpha=0.0, ensemble="head", order="head_first")
    pairs = zip(plain.state_dict().values(), train(stage).network.experts.base.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_head_stage_is_plain_cross_entropy_without_the_auxiliary_loss():
    plain = train(build_method("ce", network(), COUNTS, {})[0]).network
    head = train(build(network(), COUNTS, alpha=0.0, order="head_first")[0]).network.base
    pairs = zip(plain.state_dict().values(), head.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- auxiliary heads ---


def with_auxiliary(seed=0):
    torch.manual_seed(seed)
    return SegmentationNetwork(Model(), auxiliary_weight=0.4)


def gradients_of(build_network, options, method="medoe"):
    stage = build_method(method, build_network(), COUNTS, options)[0]
    torch.manual_seed(7)  # dropout of the auxiliary head
    return gradients(stage)


def base_of(found):
    return {name.removeprefix("experts.").removeprefix("base."): g for name, g in found.items() if "others" not in name}


def test_one_expert_with_auxiliary_head_is_plain_cross_entropy_with_it():
    plain = train(build_method("ce", with_auxiliary(), COUNTS, {})[0]).network
    single = train(build(with_auxiliary(), COUNTS, shares=(), alpha=0.0, ensemble="head")[0]).network.experts.base
    without = train(build_method("ce", network(), COUNTS, {})[0]).network
    pairs = zip(plain.state_dict().items(), single.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert not torch.equal(plain.encoder.conv.weight, without.encoder.conv.weight)


@pytest.mark.parametrize("auxiliary_weight", [0.0, 0.4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": "decoder"},
        {"share": "nothing"},
        {"order": "head_first"},
        {"order": "head_first", "share": "decoder", "ensemble": "average"},
        {"softmax": "own", "kl": "pixel", "ensemble": "argmax"},
    ],
)
def test_experts_in_turn_learn_what_they_learn_at_once(options, auxiliary_weight):
    """To the bit: losses, gradients and statistics of BatchNorm, also of twice the loss."""
    built = SegmentationNetwork(Model(), auxiliary_weight=auxiliary_weight)
    (stage,) = (stage for stage in build(built, COUNTS, **options) if stage.loss is not None)
    assert stage.name == ("others" if "order" in options else "experts")
    turned, at_once = learned(stage), learned(replace(stage, loss=None))
    assert turned.keys() == at_once.keys()
    assert sum(g is not None for g in turned.values()) > 10
    for name, expected in at_once.items():
        assert (turned[name] is None) if expected is None else torch.equal(turned[name], expected), name


def learned(stage, *pseudo, bf16=False):
    """The loss of a step, its gradients, and the buffers it leaves."""
    stage = copy.deepcopy(stage)
    start(stage)
    torch.manual_seed(7)  # dropout of the auxiliary head
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = Learner(stage)(*images(), *pseudo)
    (2 * loss).backward()
    gradients = {name: p.grad for name, p in stage.network.named_parameters()}
    return {"loss": loss} | gradients | dict(stage.network.named_buffers())


@pytest.mark.parametrize("bf16", [False, True])
def test_experts_in_turn_learn_from_pseudo_labels_too(bf16):
    stage = build(network(), COUNTS)[0]
    turned, at_once = (learned(s, (*images(1), 0.3), bf16=bf16) for s in (stage, replace(stage, loss=None)))
    largest = max(float(g.abs().max()) for name, g in at_once.items() if "weight" in name)
    relative, absolute = (0.02, 0.01 * largest) if bf16 else (1e-5, 1e-6 * largest)
    for name, expected in at_once.items():
        torch.testing.assert_close(turned[name], expected, rtol=relative, atol=absolute)
    assert not torch.equal(turned["loss"], learned(stage, bf16=bf16)["loss"])


def test_experts_with_a_common_gradient_do_not_take_turns():
    assert [stage.loss for stage in build(network(), COUNTS, shared_gradient="all")] == [None, None]


def test_the_maps_of_one_expert_are_in_memory_at_a_time():
    g = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, 3, 60, 72, generator=g), torch.randint(0, C - 1, (2, 60, 72), generator=g)
    peak = {}
    for cuts in [(2,), (1, 2, 3)]:
        stage = build(network(), COUNTS, cuts=cuts)[0]
        start(stage)
        steps = {
            "at once": lambda: stage.criterion(stage.network(image), target).backward(),  # noqa: B023
            "in turn": lambda: stage.loss(stage.network, stage.criterion, image, target).backward(),  # noqa: B023
        }
        for name, step in steps.items():
            stage.network.zero_grad()
            step()
            stage.network.zero_grad()
            peak[name, len(cuts) + 1] = peak_bytes(step, torch.device("cpu"))
    logits = 4 * C * target.numel()  # bytes at full size
    assert peak["at once", 4] - peak["at once", 2] > 4 * logits
    assert peak["in turn", 4] - peak["in turn", 2] < 0.2 * logits


@pytest.mark.parametrize("share", ["encoder", "decoder", "nothing"])
def test_nothing_of_an_expert_is_left_when_the_next_has_its_logits(share, monkeypatch):
    alive, seen, resize = [], [], SegmentationNetwork.resize

    def noted(network, logits, image):
        full = resize(network, logits, image)
        alive.append(sum(of() is not None for of in seen))
        seen.append(weakref.ref(full))
        return full

    monkeypatch.setattr(SegmentationNetwork, "resize", noted)
    stage = build(with_auxiliary(), COUNTS, share=share)[0]
    start(stage)
    stage.loss(stage.network, stage.criterion, *images())
    assert len(seen) == 4, "three experts and an auxiliary head"
    assert alive == [0, 1, 0, 0], "the auxiliary logits are there with those of expert 1"


@pytest.mark.parametrize("share", ["encoder", "decoder", "nothing"])
def test_the_auxiliary_loss_reaches_the_encoder_through_expert_1_only(share):
    options = {"share": share, "alpha": 0.0}
    found = gradients_of(with_auxiliary, options)
    plain = gradients_of(with_auxiliary, {}, "ce")
    without = gradients_of(network, {}, "ce")
    assert plain.keys() == base_of(found).keys()
    for name, gradient in base_of(found).items():  # expert 1 is plain cross-entropy with its auxiliary head
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7)
    assert plain["auxiliary.2.weight"].any()
    assert not torch.allclose(plain["encoder.conv.weight"], without["encoder.conv.weight"], rtol=1e-3)
    assert not any("auxiliary" in name for name in found if "others" in name)
    assert any("others" in name for name in found)


def test_the_auxiliary_loss_is_that_of_the_pixels_of_expert_1():
    z, y = logits()
    (auxiliary,), _ = logits(seed=5, k=1)
    for sets in ("overlap", "disjoint"):
        labels = label_sets(GROUP, sets)
        criterion = ExpertCriterion(labels, COUNTS, alpha=0.2, auxiliary_weight=0.3)
        plain = ExpertOutput(z[0], z[0], tuple(z))
        extra = criterion(plain._replace(auxiliary=auxiliary), y) - criterion(plain, y)
        expected = 0.3 * cross_entropy(auxiliary, expert_target(y, labels[0]))
        assert extra.item() == pytest.approx(expected.item(), rel=1e-9)


def test_experts_of_a_network_with_object_regions():
    from ltseg_core.models import build_model

    base = build_model("OCR", "tu-mobilenetv3_small_050", C, ocr_channels=16, ocr_key_channels=8)
    stages = build(base, COUNTS, cuts=(2,))
    image, target = images()
    start(stages[0])
    output = stages[0].network(image)
    assert output.auxiliary.shape == output.logits.shape
    regions = base.decoder.regions[1].weight
    (gradient,) = torch.autograd.grad(0.4 * cross_entropy(output.auxiliary, target), regions, retain_graph=True)
    (through_attention,) = torch.autograd.grad(cross_entropy(output.logits, target), regions, retain_graph=True)
    stages[0].criterion(output, target).backward()
    assert gradient.any()
    assert not torch.allclose(regions.grad, through_attention, rtol=1e-3)
    start(stages[1])
    assert stages[1].network(image).auxiliary is None
    with torch.no_grad():
        assert stages[1].network.eval()(image).logits.isfinite().all()


def test_experts_with_a_cosine_classifier_start_with_their_own_weights():
    from ltseg_core.models import CosineClassifier

    base = network()
    base.classifier = CosineClassifier(5, C)
    first, second = (expert.classifier.weight for expert in Experts(base, 3).others)
    assert not torch.equal(first, second)
    assert not torch.equal(first, base.classifier.weight)


@pytest.mark.parametrize("share", ["encoder", "decoder", "nothing"])
@pytest.mark.parametrize("ensemble", [*LEARNED, *RULES])
def test_stages_train_what_they_should(ensemble, share):
    stages = build(network(), COUNTS, ensemble=ensemble, share=share, ensemble_share=0.25)
    assert sum(stage.share for stage in stages) == 1
    train(stages[0])
    last = stages[-1].network
    if ensemble in LEARNED:
        before = copy.deepcopy(last.state_dict())
        assert {name for name, _ in last.named_parameters() if "ensemble" in name} == {
            "ensemble.weight", "ensemble.bias"
        }  # fmt: skip
        train(stages[1])
        for name, value in last.state_dict().items():
            assert torch.equal(value, before[name]) is name.startswith("experts."), name
    else:
        assert len(stages) == 1
    image, _ = images()
    output = last.eval()(image)
    assert output.logits.shape == (2, C, 14, 18)
    again = build(network(1), COUNTS, ensemble=ensemble, share=share)[-1].network.eval()
    again.load_state_dict(last.state_dict())
    assert torch.equal(again(image).logits, output.logits)
    assert torch.equal(again(image).experts[2], output.experts[2])


def test_number_of_ensemble_parameters():
    for classes, expected in [(19, 114), (150, 900)]:  # 2 K c; the paper's Cityscapes and ADE20K
        assert sum(p.numel() for p in LearnedEnsemble(3, classes, "moe_mean").parameters()) == expected


# --- ensembles ---


def test_learned_ensembles_at_their_initial_values():
    z, _ = logits()
    p = torch.stack([v.softmax(1) for v in z])
    hat = p.softmax(2)
    start = {name: LearnedEnsemble(3, C, name)(z).log_softmax(1).exp() for name in LEARNED}
    torch.testing.assert_close(start["moe_mean"], hat.mean(0))
    torch.testing.assert_close(start["moe_weighted"], hat.mean(0))
    torch.testing.assert_close(start["moe_logits"], torch.stack(z).mean(0).softmax(1))
    gate = (p.softmax(0) * p).sum(0)
    torch.testing.assert_close(start["moe_gate"], gate / gate.sum(1, keepdim=True))
    assert (hat.amax(2) / hat.amin(2)).max() < math.e
    assert torch.equal(hat.argmax(2), p.argmax(2))


@pytest.mark.parametrize("reading", LEARNED)
def test_learned_ensembles_with_any_weights(reading):
    z, y = logits()
    g = torch.Generator().manual_seed(5)
    module = LearnedEnsemble(3, C, reading).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    w, b = module.weight.detach(), module.bias.detach()
    found = module(z).softmax(1)
    for i, u, v in np.ndindex(*y.shape):
        p = [e[i, :, u, v].softmax(0) for e in z]
        if reading == "moe_logits":
            final = (sum(w[k] * z[k][i, :, u, v] for k in range(3)) + b).exp()
        elif reading == "moe_gate":
            gate = torch.stack([w[k] * p[k] + b[k] for k in range(3)]).softmax(0)
            final = sum(gate[k] * p[k] for k in range(3))
        else:
            hat = [(w[k] * p[k] + b[k]).softmax(0) for k in range(3)]
            size = w.abs() if reading == "moe_weighted" else torch.ones_like(w)
            final = sum(size[k] / size.sum(0) * hat[k] for k in range(3))
        torch.testing.assert_close(found[i, :, u, v], final / final.sum())
    loss = lambda *_: cross_entropy(module(z), y)  # noqa: E731
    assert torch.autograd.gradcheck(loss, tuple(module.parameters()))
    if reading == "moe_mean":  # already a distribution
        assert torch.allclose(module(z).exp().sum(1), torch.ones(2, 3, 4).double())


@pytest.mark.parametrize("reading", LEARNED)
def test_learned_ensembles_stay_finite(reading):
    z = [1e4 * torch.sign(v).float() for v in logits()[0]]
    module = LearnedEnsemble(3, C, reading)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    loss = cross_entropy(module(z), logits()[1])
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_selection_of_an_expert_equals_a_loop_and_its_optimum_is_each_class_own():
    z, y = logits()
    y[0, 0, :2] = IGNORE_INDEX
    g = torch.Generator().manual_seed(5)
    module = LearnedEnsemble(3, C, "moe_gate").double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    select = ExpertSelection(module, GROUP)
    assert not list(select.parameters()), "the weights are the network's"
    terms = []
    for i, u, v in np.ndindex(*y.shape):
        if (k := int(y[i, u, v])) != IGNORE_INDEX:
            p = torch.stack([e[i, :, u, v].softmax(0)[k] for e in z])
            gate = (module.weight[:, k] * p + module.bias[:, k]).softmax(0)
            terms.append(-gate[GROUP[k]].log())
    loss = select(ExpertOutput(z[0], z[0], tuple(z)), y)
    torch.testing.assert_close(loss, sum(terms) / len(terms))
    loss.backward()
    seen = y[y != IGNORE_INDEX].unique()
    assert (module.bias.grad.gather(0, GROUP[None])[0, seen] < 0).all(), "the own expert's weight grows"
    with pytest.raises(
        UserError, match="select='expert' trains weights of the experts: .*'moe_gate' has them, not 'moe_mean'"
    ):
        build(network(), COUNTS, select="expert")
    learned = build(network(), COUNTS, ensemble="moe_gate", select="expert")[-1]
    assert isinstance(learned.criterion, ExpertSelection)
    assert learned.criterion.of_network[0] is learned.network.ensemble


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0, 1))
def test_simple_rules_equal_loops(seed, threshold):
    z, y = logits(seed)
    labels = label_sets(GROUP, "overlap")
    found = {rule: SimpleEnsemble(labels, rule, threshold)(z) for rule in RULES}
    for i, u, v in np.ndindex(*y.shape):
        p = [e[i, :, u, v].softmax(0).tolist() for e in z]
        sure = [k for k in range(3) if max(p[k]) >= threshold]
        most = max(range(3), key=lambda k: max(p[k]))
        expected = {
            "average": [sum(q[k] for q in p) / 3 for k in range(C)],
            "group_average": [np.mean([p[e][k] for e in range(3) if labels[e, k]]) for k in range(C)],
            "threshold": p[sure[-1] if sure else 0],
            "head": p[0],
        }
        for rule, value in expected.items():
            assert found[rule][i, :, u, v].exp().tolist() == pytest.approx(value, rel=1e-9), rule
        assert found["argmax"][i, :, u, v].argmax() == np.argmax(p[most])


def test_equal_experts_are_their_own_ensemble():
    (z, *_), _ = logits()
    for rule in RULES:
        combined = SimpleEnsemble(label_sets(GROUP), rule)([z, z, z])
        assert torch.allclose(combined.exp(), z.softmax(1)), rule


def test_nothing_is_combined_while_a_rule_without_parameters_trains():
    stage = build(network(), COUNTS, ensemble="average")[0]
    output = stage.network.train()(images()[0])
    assert output.logits is output.experts[0]
    assert not torch.equal(stage.network.eval()(images()[0]).logits, stage.network.experts(images()[0]).logits)


# --- the oracle ---


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sets=st.sampled_from([None, "overlap", "disjoint"]))
def test_oracle_equals_a_loop(seed, sets):
    z, y = logits(seed)
    allowed = None if sets is None else label_sets(GROUP, sets)
    found = oracle_prediction(z, y, GROUP, allowed)
    restricted = restricted_prediction(z[0], y, label_sets(GROUP, sets or "all"), GROUP)
    for b, u, v in np.ndindex(*y.shape):
        if y[b, u, v] == IGNORE_INDEX:
            continue
        n = int(GROUP[y[b, u, v]])
        classes = [k for k in range(C) if allowed is None or allowed[n, k]]
        assert found[b, u, v] == max(classes, key=lambda k: z[n][b, k, u, v])
        assert restricted[b, u, v] == max(classes, key=lambda k: z[0][b, k, u, v])


def test_oracle_of_equal_experts_is_the_network_and_restriction_only_helps():
    z, y = logits(k=1)
    assert torch.equal(oracle_prediction(z * 3, y, GROUP), z[0].argmax(1))
    right = z[0].argmax(1) == y
    restricted = restricted_prediction(z[0], y, label_sets(GROUP, "disjoint"), GROUP)
    assert (restricted == y)[right].all()
    assert (restricted == y).sum() > right.sum()
    one_class_each = torch.arange(C)  # a class alone in its group: the label itself is given away
    leaked = restricted_prediction(z[0], y, label_sets(one_class_each, "disjoint"), one_class_each)
    assert torch.equal(leaked[y != IGNORE_INDEX], y[y != IGNORE_INDEX])


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.9, 0.001)}, r"expert 1 would have no classes: shares=\(0.9, 0.001\) put \[0, 4, 1\]"),
        ({"shares": (1e-5, 1e-6)}, r"expert 2 would have no classes: .* put \[5, 0, 0\] classes"),
        ({"cuts": (2, 5)}, r"expert 3 would have no classes: cuts=\(2, 5\) put \[2, 3, 0\]"),
        ({"shares": (0.001, 0.01)}, "shares must fall strictly"),
        ({"shares": (1.0,)}, "shares must fall strictly"),
        ({"shares": (math.nan,)}, "shares must be float, got nan"),
        ({"cuts": (4, 2)}, r"cuts must rise strictly between 0 and 6 classes, got \(4, 2\)"),
        ({"cuts": (0,)}, "cuts must rise strictly"),
        ({"cuts": (6,)}, "cuts must rise strictly"),
        ({"cuts": (1.5,)}, "cuts must be int, got 1.5"),
        ({"set": "overlap"}, "did you mean 'sets'"),
        ({"sets": "overlapp"}, "sets must be 'overlap' or .*, got 'overlapp'"),
        ({"share": "encoders"}, "share must be 'encoder' or .*, got 'encoders'"),
        ({"shared_gradient": "none"}, "shared_gradient must be 'head' or 'all', got 'none'"),
        ({"ensemble": "moe"}, "ensemble must be 'moe_mean' or .* or 'average' or .*, got 'moe'"),
        ({"l2": "sum"}, "l2 must be 'pixel' or 'class' or 'none', got 'sum'"),
        ({"l2_pixels": "all"}, "l2_pixels must be 'valid' or 'own', got 'all'"),
        ({"kl": "mean"}, "kl must be 'batch' or 'pixel' or 'none', got 'mean'"),
        ({"alpha": -1.0}, "alpha must be >= 0, got -1.0"),
        ({"alpha": math.inf}, "alpha must be >= 0, got inf"),
        ({"ensemble_share": 1.0}, r"ensemble_share must be in \(0, 1\), got 1.0"),
        ({"initial_weight": math.inf}, "initial_weight must be finite"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\]"),
        ({"share": "nothing", "shared_gradient": "all"}, "whole networks share no part"),
        ({"order": "tail_first"}, "order must be 'joint' or 'head_first', got 'tail_first'"),
        ({"order": "head_first", "share": "nothing"}, "order='head_first' has no meaning for share='nothing'"),
        ({"order": "head_first", "shared_gradient": "all"}, "contradicts shared_gradient='all'"),
        ({"head_share": 0.0}, r"head_share must be in \(0, 1\), got 0.0"),
        ({"head_share": 1.0}, r"head_share must be in \(0, 1\), got 1.0"),
        ({"l2": "none", "kl": "none"}, "leave nothing for alpha=0.2 to weigh"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        build(network(), COUNTS, **options)


def test_parts_refuse_unknown_names_and_numbers():
    with pytest.raises(UserError, match="did you mean 'overlap'"):
        label_sets(GROUP, "overlapp")
    with pytest.raises(UserError, match="unknown rule"):
        SimpleEnsemble(label_sets(GROUP), "mean")
    with pytest.raises(UserError, match="did you mean 'moe_mean'"):
        LearnedEnsemble(3, C, "moe_men")
    with pytest.raises(UserError, match="shares must fall strictly"):
        class_groups(COUNTS, shares=(math.nan,))
    with pytest.raises(UserError, match="cuts must rise strictly"):
        class_groups(COUNTS, cuts=(1.5,))


def test_a_network_of_the_library():
    from ltseg_core.models import build_model

    base = build_model("DeepLabV3Plus", "tu-mobilenetv3_small_050", C)
    stages = build(base, COUNTS)
    train(stages[0], steps=1)
    train(stages[1], steps=1)
    with torch.no_grad():
        assert stages[1].network.eval()(torch.rand(1, 3, 40, 50)).logits.shape == (1, C, 40, 50)
    assert F.softmax(stages[1].network(torch.rand(1, 3, 40, 50)).logits, 1).isfinite().all()
