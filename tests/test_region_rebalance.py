"""Region Rebalance against slow loops; the branch that leaves no trace at inference."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from ltseg_core.config import IGNORE_INDEX, Experiment, UserError
from ltseg_core.losses import cross_entropy
from ltseg_core.methods.region_rebalance import (
    RegionCriterion,
    build,
    connected_regions,
    log_prior,
    nearest,
    region_masks,
)
from ltseg_core.models import Output, SegmentationNetwork
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner, build_optimizer

C, D = 4, 5
COUNTS = ClassCounts(torch.tensor([9000, 800, 70, 0]), torch.tensor([40, 20, 3, 0]))


class Encoder(nn.Module):
    output_stride = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 4, 1)

    def forward(self, x):
        return [x, self.conv(x)]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(6, D, 1), nn.Dropout(0.2)

    def forward(self, maps):
        return self.drop(self.conv(maps[-1]).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = Encoder(), Decoder(), nn.Sequential(nn.Conv2d(D, C, 1))


def network(seed=0):
    torch.manual_seed(seed)
    return SegmentationNetwork(Model())


def batch(seed=0, size=(12, 16), scale=4):
    """Features (3, D, h, w), logits and labels in float64; class 3 has one pixel, image 2 is ignored altogether."""
    g = torch.Generator().manual_seed(seed)
    h, w = size[0] // scale, size[1] // scale
    x = torch.randn(3, D, h, w, generator=g, dtype=torch.float64)
    z = torch.randn(3, C, *size, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (3, h, w), generator=g).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    y[0, :scale, :scale] = IGNORE_INDEX
    y[1, 0, 0] = 3
    y[2] = IGNORE_INDEX
    return x, z, y


def criterion(counts=COUNTS, stride=4, **options):
    torch.manual_seed(1)
    net = network()
    net.stride = stride
    return build(net, counts, **options)[0].criterion.double()


def region_loss(x, y, **options):
    return criterion(**options).region_loss(x, y)


def slow(x, y, model, log_f, *, scope="image", average="batch", smoothing=0.0):
    """Per pixel: collect, average, classify. y at the resolution of x."""
    terms = {}
    images = range(len(x)) if scope == "image" else [slice(None)]
    for b in images:
        for k in range(C):
            pixels = [x[i, :, u, v] for i in np.atleast_1d(np.arange(len(x))[b]) for u, v in np.ndindex(*y.shape[1:])
                      if y[i, u, v] == k]  # fmt: skip
            if pixels:
                g = (model(torch.stack(pixels).mean(0)) + log_f).tolist()
                log_z = max(g) + math.log(sum(math.exp(v - max(g)) for v in g))
                wrong = [log_z - v for j, v in enumerate(g) if j != k]
                term = (1 - smoothing) * (log_z - g[k]) + smoothing * sum(wrong) / len(wrong)
                terms.setdefault(str(b), []).append(term)
    if average == "image":
        return np.mean([np.mean(t) for t in terms.values()])
    return np.mean([t for regions in terms.values() for t in regions])


# --- the loss ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"region_scope": "batch"},
        {"average": "image"},
        {"prior": "none"},
        {"prior": "pixels"},
        {"smoothing": 0.5},
        {"head": "hidden"},
    ],
)
def test_region_loss_equals_a_loop_over_pixels(options):
    x, _, y = batch(size=(5, 6), scale=1)
    module = criterion(stride=1, **options).eval()
    sizes = {"images": [40, 20, 3, 1], "pixels": [9000, 800, 70, 1], "none": [1] * 4}[options.get("prior", "images")]
    expected = slow(
        x, y, module.head, torch.tensor(sizes, dtype=torch.float64).log(),
        scope=options.get("region_scope", "image"), average=options.get("average", "batch"),
        smoothing=options.get("smoothing", 0.0),
    )  # fmt: skip
    assert module.region_loss(x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize(("h", "w", "height", "width"), [(3, 4, 12, 16), (3, 5, 10, 13), (4, 4, 4, 4), (6, 7, 48, 56)])
def test_label_resolution_equals_explicit_upsampling(h, w, height, width, scope):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, D, h, w, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, C, (2, height, width), generator=g)
    y[0, :3] = IGNORE_INDEX
    module = criterion(stride=1, resolution="labels", region_scope=scope)
    up = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    explicit = slow(up, y, module.head, module.log_prior, scope=scope)
    loss = module.region_loss(x, y)
    assert loss.item() == pytest.approx(explicit, rel=1e-6)
    at_features = criterion(stride=1, region_scope=scope)  # whose masks are 0/1
    torch.testing.assert_close(
        torch.autograd.grad(loss, x)[0],
        torch.autograd.grad(at_features.region_loss(up, y), x)[0],
        rtol=1e-5,
        atol=1e-9,
    )


def test_masks_are_the_adjoint_of_the_upsampling_and_exact_for_powers_of_two():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, C + 1, (2, 16, 24), generator=g)
    masks = region_masks(y, C, (4, 6), "labels")
    cell = torch.zeros(2, C, 4, 6, requires_grad=True)
    one_hot = F.one_hot(y, C + 1).movedim(3, 1)[:, :C].float()
    (F.interpolate(cell, (16, 24), mode="bilinear", align_corners=False) * one_hot).sum().backward()
    torch.testing.assert_close(masks, cell.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(masks.sum((2, 3)), one_hot.sum((2, 3)))
    assert torch.equal(masks, region_masks(y.flip(0), C, (4, 6), "labels").flip(0))


def test_nearest_is_torch_nearest():
    y = torch.randint(0, 9, (2, 37, 50))
    for size in [(37, 50), (9, 13), (10, 25), (5, 5)]:
        assert torch.equal(nearest(y, size), F.interpolate(y[:, None].float(), size, mode="nearest")[:, 0].long())


def test_padding_of_the_network_is_in_no_region():
    x, _, y = batch()
    cut = y[:, :10, :15]
    padded = F.pad(cut, (0, 1, 0, 2), value=IGNORE_INDEX)
    for resolution in ("features", "labels"):
        module = criterion(resolution=resolution)
        assert module.region_loss(x, cut) == module.region_loss(x, padded)


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("resolution", ["features", "labels"])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradcheck(resolution, scope, components):
    if scope == "batch" and components:
        return
    x, _, y = batch(size=(8, 8))
    module = criterion(resolution=resolution, region_scope=scope, components=components)
    inputs = (x.requires_grad_(), *module.head.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module.region_loss(x, y), inputs)


# --- reductions ---


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), resolution=st.sampled_from(["features", "labels"]))
def test_weight_0_is_exactly_cross_entropy(seed, resolution):
    x, z, y = batch(seed)
    z.requires_grad_()
    module = criterion(weight=0.0, resolution=resolution)
    loss = module(Output(x.requires_grad_(), z), y)
    plain = cross_entropy(z, y)
    assert loss.item() == plain.item()
    gradients = torch.autograd.grad(loss, (z, x, *module.head.parameters()))
    assert torch.equal(gradients[0], torch.autograd.grad(plain, z)[0])
    assert not any(g.any() for g in gradients[1:])  # all are there (several processes need them), and 0


def test_loss_is_the_pixel_loss_plus_weight_times_the_region_loss():
    x, z, y = batch()
    for name in ("ce", "dice"):
        module = criterion(weight=0.7, pixel_loss=name)
        expected = module.pixel.loss(z, y) + 0.7 * module.region_loss(x, y)
        assert module(Output(x, z), y).item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_counts_give_the_loss_without_prior_and_zero_scores_minus_log_prior():
    x, _, y = batch()
    equal = ClassCounts(torch.tensor([7] * C), torch.tensor([3] * C))
    assert torch.allclose(region_loss(x, y, counts=equal), region_loss(x, y, prior="none"), rtol=1e-12)
    module = criterion()
    for p in module.head.parameters():
        nn.init.zeros_(p)
    small = nearest(y, x.shape[2:])
    present = [k for b in range(3) for k in range(C) if (small[b] == k).any()]
    share = torch.tensor([40, 20, 3, 1], dtype=torch.float64) / 64  # class 3 never occurs and counts as 1
    assert module.region_loss(x, y).item() == pytest.approx(-share[present].log().mean().item(), rel=1e-12)


def test_batch_of_one_image_has_the_same_regions_in_every_scope():
    x, _, y = batch()
    losses = [region_loss(x[:1], y[:1], **o) for o in ({}, {"region_scope": "batch"}, {"average": "image"})]
    assert torch.allclose(losses[0], losses[1], rtol=1e-12)
    assert torch.allclose(losses[0], losses[2], rtol=1e-12)


def test_permuting_the_classes_changes_nothing():
    x, _, y = batch()
    order = torch.tensor([2, 0, 3, 1])  # new class i is old class order[i]
    module, other = criterion(), criterion(ClassCounts(COUNTS.pixels[order], COUNTS.images[order]))
    with torch.no_grad():
        other.head[0].weight.copy_(module.head[0].weight[order])
        other.head[0].bias.copy_(module.head[0].bias[order])
    moved = torch.where(y == IGNORE_INDEX, y, order.argsort()[y.clamp(max=C - 1)])
    assert torch.allclose(module.region_loss(x, y), other.region_loss(x, moved), rtol=1e-12)


# --- pixels without labels ---


@pytest.mark.parametrize("options", [{}, {"region_scope": "batch"}, {"average": "image"}, {"components": True}])
def test_ignored_pixels_and_images_do_not_matter(options):
    x, _, y = batch()
    module = criterion(**options)
    loss = module.region_loss(x.requires_grad_(), y)
    gradient = torch.autograd.grad(loss, x)[0]
    ignored = nearest(y, x.shape[2:]) == IGNORE_INDEX
    assert not gradient.movedim(1, 3)[ignored].any()
    assert gradient.movedim(1, 3)[~ignored].any(1).all()
    changed = torch.where(ignored[:, None], x + 100, x)
    assert module.region_loss(changed, y) == loss
    assert torch.allclose(module.region_loss(x[:2], y[:2]), loss, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"region_scope": "batch"}, {"average": "image"}, {"components": True}])
def test_nothing_labelled_gives_0_with_zero_gradients(options):
    x, z, y = batch()
    module = criterion(**options)
    loss = module(Output(x.requires_grad_(), z.requires_grad_()), torch.full_like(y, IGNORE_INDEX))
    assert loss == 0
    gradients = torch.autograd.grad(loss, (x, z, *module.head.parameters()))
    assert not any(g.any() or g.isnan().any() for g in gradients)


def test_low_precision_and_large_features_stay_finite():
    x, z, y = batch()
    module = criterion().float()
    loss = module(Output((x * 1e4).bfloat16(), (z * 1e4).bfloat16()), y)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    plain = module(Output(x.bfloat16().float(), z.bfloat16().float()), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(Output(x.bfloat16(), z.bfloat16()), y) == plain


def test_a_shared_head_is_the_pixel_classifier():
    net = network()
    (stage,) = build(net, COUNTS, head="shared", prior="none")
    assert not list(stage.criterion.parameters())
    features = torch.randn(1, net.feature_channels, 4, 6)
    target = torch.arange(4).repeat_interleave(6).view(1, 4, 6)  # class k is row k: its mean feature is that of the row
    means = features.mean(3, keepdim=True).movedim(2, 0).flatten(1)
    expected = F.cross_entropy(net.classifier(means[:, :, None, None])[:, :, 0, 0], torch.arange(4))
    stage.criterion.stride = 1
    torch.testing.assert_close(stage.criterion.region_loss(features, target), expected)
    before = net.classifier.weight.clone()
    train(build(net, COUNTS, head="shared")[0])
    assert not torch.equal(net.classifier.weight, before)
    for options in ({"frozen_branch": True}, {"head_lr": 2.0}):
        with pytest.raises(
            UserError, match="head='shared' is the pixel classifier: leave out frozen_branch and head_lr"
        ):
            build(net, COUNTS, head="shared", **options)


def test_the_branch_may_have_a_learning_rate_of_its_own():
    e = Experiment(lr=0.1, encoder_lr_factor=0.5)
    for factor in (1.0, 3.0):
        learner = Learner(build(network(), COUNTS, head="hidden", head_lr=factor)[0])
        peaks = {id(p): g["peak"] for g in build_optimizer(learner, e).param_groups for p in g["params"]}
        assert len(peaks) == len(list(learner.parameters())), "every parameter once"
        for name, parameter in learner.named_parameters():
            own = factor if name.startswith("criterion.head") else 0.5 if ".encoder." in name else 1
            assert peaks[id(parameter)] == pytest.approx(0.1 * own), name
    with pytest.raises(UserError, match="head_lr must be > 0, got 0"):
        build(network(), COUNTS, head_lr=0.0)


# --- components ---


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 7), width=st.integers(1, 7))
def test_components_are_those_of_scipy(seed, height, width):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (2, height, width), generator=g)
    y[torch.rand(y.shape, generator=g) < 0.1] = IGNORE_INDEX
    slots, classes = connected_regions(y)
    most = 0
    for b in range(2):
        found = {frozenset(map(tuple, (slots[b] == s).nonzero().tolist())): int(classes[b, s])
                 for s in slots[b].unique().tolist() if s < classes.shape[1]}  # fmt: skip
        expected = {}
        for k in range(3):
            components, number = ndimage.label(y[b].numpy() == k, np.ones((3, 3)))
            expected |= {frozenset(map(tuple, np.argwhere(components == i + 1).tolist())): k for i in range(number)}
        assert found == expected
        most = max(most, len(expected))
        assert torch.equal(slots[b] == classes.shape[1], y[b] == IGNORE_INDEX)
    assert classes.shape == (2, max(most, 1))


@pytest.mark.parametrize("resolution", ["features", "labels"])
def test_one_component_per_class_equals_one_region_per_class(resolution):
    x, _, _ = batch()
    y = torch.tensor([0, 0, 1, 2]).repeat_interleave(4).expand(3, 12, 16)
    options = {"resolution": resolution}
    assert torch.allclose(region_loss(x, y, **options), region_loss(x, y, components=True, **options), rtol=1e-12)


def test_two_components_of_a_class_are_two_regions():
    x, _, _ = batch(size=(3, 4), scale=1)
    y = torch.tensor([0, 1, 0, 0]).expand(1, 3, 4)
    module = criterion(stride=1, components=True)
    means = [x[0, :, :, 0].mean(1), x[0, :, :, 1].mean(1), x[0, :, :, 2:].mean((1, 2))]
    logits = module.head(torch.stack(means)) + module.log_prior
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 0]))
    assert torch.allclose(module.region_loss(x[:1], y), expected, rtol=1e-12)


# --- the method ---


def train(stage, steps=2, lr=0.1):
    for module in stage.frozen:
        module.requires_grad_(False)
    parameters = [p for m in (stage.network, stage.criterion) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    stage.network.train()
    stage.criterion.train()
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        torch.manual_seed(step)
        image = torch.rand(2, 3, 14, 18, generator=g)
        target = torch.randint(0, C, (2, 14, 18), generator=g)
        optimizer.zero_grad()
        stage.criterion(stage.network(image), target).backward()
        assert all(p.grad is not None for p in parameters)  # several processes need every gradient
        optimizer.step()
    return stage.network


def test_nothing_of_the_branch_is_left_at_inference():
    plain, net = network(), network()
    (stage,) = build(net, COUNTS)
    assert stage.network is net
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))
    trained = train(stage).eval()
    plain.load_state_dict(trained.state_dict())
    image = torch.rand(1, 3, 14, 18)
    assert torch.equal(plain.eval()(image).logits, trained(image).logits)


def test_weight_0_trains_the_network_of_plain_cross_entropy_bit_for_bit():
    from ltseg_core.methods import METHODS, build_method

    assert "ce" in METHODS
    plain = train(build_method("ce", network(), COUNTS, {})[0])
    for head in ("linear", "hidden"):
        zero = train(build(network(), COUNTS, weight=0.0, head=head)[0])
        some = train(build(network(), COUNTS, weight=0.3, head=head)[0])
        pairs = list(zip(plain.state_dict().values(), zero.state_dict().values(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(plain.encoder.conv.weight, some.encoder.conv.weight)
        assert torch.equal(plain.classifier.weight, some.classifier.weight) is False


def test_frozen_branch_keeps_its_weights_but_teaches_the_features():
    (stage,) = build(network(), COUNTS, frozen_branch=True)
    before = copy.deepcopy(stage.criterion.head.state_dict())
    taught = train(stage)
    assert all(torch.equal(v, before[k]) for k, v in stage.criterion.head.state_dict().items())
    plain = train(build(network(), COUNTS, weight=0.0)[0])
    assert not torch.equal(taught.encoder.conv.weight, plain.encoder.conv.weight)


def test_log_prior():
    assert torch.allclose(log_prior(COUNTS, "images").exp(), torch.tensor([40, 20, 3, 1]).double() / 64)
    assert log_prior(COUNTS, "pixels")[0] == pytest.approx(math.log(9000 / 9871))
    assert not log_prior(COUNTS, "none").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, "weight must be >= 0, got -0.1"),
        ({"weight": math.nan}, "weight must be float, got nan"),
        ({"weight": math.inf}, "weight must be >= 0, got inf"),
        ({"lambda": 0.3}, "unknown hyper-parameter 'lambda'"),
        ({"smoothing": 0.8}, r"smoothing must be in \[0, 1 - 1/4\], got 0.8"),
        ({"prior": "image"}, "prior must be 'images' or 'pixels' or 'none', got 'image'"),
        ({"region_scope": "pixel"}, "region_scope must be 'image' or 'batch', got 'pixel'"),
        ({"resolution": "label"}, "resolution must be 'features' or 'labels', got 'label'"),
        ({"head": "liner"}, "head must be 'linear' or 'hidden' or 'shared', got 'liner'"),
        ({"average": "pixels"}, "average must be 'batch' or 'image', got 'pixels'"),
        ({"pixel_loss": "dise"}, "did you mean 'dice'"),
        ({"region_scope": "batch", "components": True}, "components=true splits the classes of one image"),
        ({"region_scope": "batch", "average": "image"}, "average='image' needs regions that belong to an image"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        build(network(), COUNTS, **options)


def test_criterion_moves_its_prior_with_its_buffers():
    module = criterion()
    assert isinstance(module, RegionCriterion)
    assert "log_prior" in module.state_dict()
