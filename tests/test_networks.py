"""SegNet, Attention U-Net, OCR and the dilated PSPNet: their parts against slow loops, then as whole networks."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ltseg_core.models import build_model
from ltseg_core.networks import (
    NETWORKS,
    AttentionGate,
    PyramidPooling,
    SegNetDecoder,
    object_context,
    region_features,
    unpool,
)

SMALL = "tu-mobilenetv3_small_050"
NARROW = {
    "AttentionUnet": {"decoder_channels": (32, 24, 16, 16, 8)},
    "ImageClassifier": {},
    "OCR": {"ocr_channels": 32, "ocr_key_channels": 16},
    "PSPNetDilated": {"psp_out_channels": 32},
    "SegNet": {},
}
CASES = [
    ("AttentionUnet", SMALL),
    ("AttentionUnet", "mit_b0"),
    ("ImageClassifier", SMALL),
    ("OCR", SMALL),
    ("OCR", "tu-hrnet_w18_small"),
    ("OCR", "tu-convnext_atto"),
    ("PSPNetDilated", SMALL),
    ("PSPNetDilated", "mobilenet_v2"),
    pytest.param(
        "SegNet", "vgg11_bn", marks=pytest.mark.slow
    ),  # the library's VGG builds its 120M-parameter classifier
]
FEATURES = {
    "AttentionUnet": (64, 96),
    "ImageClassifier": (1, 1),
    "OCR": (16, 24),
    "PSPNetDilated": (7, 9),
    "SegNet": (64, 96),
}


@pytest.mark.parametrize(("architecture", "encoder"), CASES)
def test_shapes_at_odd_sizes_and_gradients_of_every_parameter(architecture, encoder):
    torch.manual_seed(0)
    network = build_model(architecture, encoder, 5, auxiliary=True, **NARROW[architecture])
    output = network(torch.rand(2, 3, 50, 70))
    assert output.logits.shape == output.auxiliary.shape == (2, 5, 50, 70)
    assert output.features.shape == (2, network.classifier.in_channels, *FEATURES[architecture])
    target = torch.randint(5, (2, 50, 70))
    (F.cross_entropy(output.logits, target) + 0.4 * F.cross_entropy(output.auxiliary, target)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.startswith("encoder.") or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("architecture", sorted(set(NETWORKS) - {"SegNet"}))
def test_training_on_one_image(architecture):
    network = build_model(architecture, SMALL, 3, **NARROW[architecture])
    assert network(torch.rand(1, 3, 64, 64)).logits.isfinite().all()


# --- SegNet ---


def test_unpool_by_hand():
    x = torch.tensor([[5.0, 6.0]]).view(1, 1, 1, 2)
    index = torch.tensor([[4, 3]]).view(1, 1, 1, 2)  # row 1, column 0; row 0, column 3
    assert unpool(x, index).tolist() == [[[[0, 0, 0, 6], [5, 0, 0, 0]]]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_unpool_undoes_pooling(seed, height, width):
    x = torch.rand(2, 3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(seed)) + 0.1
    pooled, index = F.max_pool2d(x, 2, return_indices=True)
    back = unpool(pooled, index)
    assert torch.equal(back, F.max_unpool2d(pooled, index, 2))
    assert torch.equal(F.max_pool2d(back, 2), pooled)
    assert torch.equal(back, torch.where(back > 0, x, 0))  # the maxima, where they were
    assert (back > 0).sum() == pooled.numel()


def test_unpool_gradient():
    x = torch.rand(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    _, index = F.max_pool2d(torch.rand(1, 2, 4, 6), 2, return_indices=True)
    assert torch.autograd.gradcheck(lambda x: unpool(x, index), (x,))
    torch.use_deterministic_algorithms(True)
    try:
        unpool(x, index).sum().backward()  # F.max_unpool2d would raise
    finally:
        torch.use_deterministic_algorithms(False)


def test_segnet_decoder_unpools_at_the_encoders_positions():
    generator = torch.Generator().manual_seed(0)
    decoder = SegNetDecoder([[2, 2], [2, 2]])
    decoder.stages = nn.ModuleList([nn.Identity(), nn.Identity()])
    first = torch.rand(1, 2, 8, 8, generator=generator)  # before the first pooling
    second = torch.rand(1, 2, 4, 4, generator=generator)  # before the second
    values = torch.rand(1, 2, 2, 2, generator=generator)
    got = decoder([first, second, values])
    expected = torch.zeros(1, 2, 8, 8)
    for c, i, j in product(range(2), repeat=3):
        block = second[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        y, x = 2 * i + int(block.argmax()) // 2, 2 * j + int(block.argmax()) % 2
        block = first[0, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        expected[0, c, 2 * y + int(block.argmax()) // 2, 2 * x + int(block.argmax()) % 2] = values[0, c, i, j]
    assert torch.equal(got, expected)


def test_segnet_mirrors_the_widths_of_vgg16():
    decoder = SegNetDecoder([[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3])
    widths = [[(block[0].in_channels, block[0].out_channels) for block in stage] for stage in decoder.stages]
    assert widths == [
        [(512, 512)] * 3,
        [(512, 512)] * 2 + [(512, 256)],
        [(256, 256)] * 2 + [(256, 128)],
        [(128, 128), (128, 64)],
        [(64, 64)],  # and the classifier
    ]


@pytest.mark.slow
def test_segnet_finds_the_pooling_positions_of_the_library_encoder():
    encoder = build_model("SegNet", "vgg11_bn", 3).eval().encoder
    poolings = [layer for layer in encoder.features if isinstance(layer, nn.MaxPool2d)]
    seen = []
    for layer in poolings:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        maps = encoder(torch.rand(1, 3, 64, 64))
    assert len(seen) == 5  # VGG's
    for before, (entered, left) in zip(maps[:-1], seen, strict=True):
        assert torch.equal(before, entered)
        values, index = F.max_pool2d(before, 2, return_indices=True)
        assert torch.equal(values, left)
        assert torch.equal(F.max_pool2d(unpool(values, index), 2), left)


# --- Attention U-Net ---


def test_attention_gate_against_loops():
    torch.manual_seed(0)
    gate = AttentionGate(4, 3).double()
    skip, gating = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 3, 2, 3).double()
    alpha = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    for b, i, j in product(range(2), range(2), range(3)):
        score = gate.score.bias[0]
        for inner in range(2):
            q = gate.gating.bias[inner] + (gate.gating.weight[inner, :, 0, 0] * gating[b, :, i, j]).sum()
            q = q + (gate.skip.weight[inner] * skip[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]).sum()
            score = score + gate.score.weight[0, inner, 0, 0] * max(q, 0)
        alpha[b, 0, i, j] = 1 / (1 + torch.exp(-score))
    assert torch.allclose(gate.coefficients(skip, gating), alpha, rtol=1e-12)
    whole = F.interpolate(alpha, (4, 6), mode="bilinear", align_corners=False)
    assert torch.allclose(gate(skip, gating), skip * whole, rtol=1e-12)


@pytest.mark.parametrize("bias", [0.0, 1.5, -20.0])
def test_attention_gate_without_weights_scales_by_its_bias(bias):
    gate = AttentionGate(4, 3)
    nn.init.zeros_(gate.score.weight)
    nn.init.constant_(gate.score.bias, bias)
    skip = torch.randn(1, 4, 4, 4)
    assert torch.allclose(gate(skip, torch.randn(1, 3, 2, 2)), skip / (1 + math.exp(-bias)), atol=1e-7)


@pytest.mark.parametrize("encoder", [SMALL, "mit_b0"])
def test_open_gates_leave_the_library_unet(encoder):
    torch.manual_seed(0)
    plain = build_model("Unet", encoder, 3).eval()
    gated = build_model("AttentionUnet", encoder, 3).eval()
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    assert all(name.startswith("decoder.gates.") for name in missing)
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        assert not torch.allclose(gated(image).logits, plain(image).logits, atol=1e-3)
        for gate in filter(None, gated.decoder.gates):
            nn.init.zeros_(gate.score.weight)
            nn.init.constant_(gate.score.bias, 100.0)  # alpha = 1
        assert torch.allclose(gated(image).logits, plain(image).logits, atol=1e-5)


# --- OCR ---


def test_region_features_against_loops():
    torch.manual_seed(0)
    regions, pixels = torch.randn(2, 3, 2, 4).double(), torch.randn(2, 5, 2, 4).double()
    got = region_features(regions, pixels)
    assert got.shape == (2, 3, 5)
    for b, k in product(range(2), range(3)):
        weights = {p: math.exp(regions[b, k, p[0], p[1]]) for p in product(range(2), range(4))}
        mean = sum(w * pixels[b, :, i, j] for (i, j), w in weights.items()) / sum(weights.values())
        assert torch.allclose(got[b, k], mean, rtol=1e-10)


def test_region_features_of_hard_and_of_equal_regions():
    torch.manual_seed(0)
    pixels = torch.randn(1, 4, 2, 3)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    regions = torch.stack([torch.where(mask, 1e4, -1e4), torch.full((2, 3), 7.0)])[None]
    hard, equal = region_features(regions, pixels)[0]
    assert torch.allclose(hard, pixels[0, :, mask].mean(1))
    assert torch.allclose(equal, pixels.mean((0, 2, 3)), atol=1e-6)


def test_object_context_against_loops():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 2, 3).double()
    key, value = torch.randn(2, 2, 4, 3, 1).double()
    got = object_context(query, key, value)
    for b, i, j in product(range(2), range(2), range(3)):
        scores = [math.exp(float(query[b, :, i, j] @ key[b, :, k, 0]) / 2) for k in range(3)]  # sqrt(4) = 2
        expected = sum(s * value[b, :, k, 0] for k, s in enumerate(scores)) / sum(scores)
        assert torch.allclose(got[b, :, i, j], expected, rtol=1e-10)
    order = [2, 0, 1]
    assert torch.allclose(object_context(query, key[:, :, order], value[:, :, order]), got)


def test_object_context_gradient():
    torch.manual_seed(0)
    regions, pixels = (torch.randn(1, n, 2, 2, dtype=torch.float64, requires_grad=True) for n in (2, 3))

    def context(regions, pixels):
        objects = region_features(regions, pixels).transpose(1, 2)[..., None]
        return object_context(pixels, objects, objects)

    assert torch.autograd.gradcheck(context, (regions, pixels))


def test_ocr_features_and_regions():
    torch.manual_seed(0)
    network = build_model("OCR", "tu-hrnet_w18_small", 4, **NARROW["OCR"]).eval()
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features, regions = network.decoder.with_regions(network.encode(image))
        assert torch.equal(features, network.features(image))
    assert regions.shape == (2, 4, 16, 24)
    network.training = True  # of the network alone: normalisation and dropout stay as they are
    with torch.no_grad():
        assert torch.allclose(network(image).auxiliary, network.resize(regions, image), atol=1e-5)


def test_ocr_reads_the_four_branches_of_hrnet():
    for encoder, widths in [("tu-hrnet_w18", [18, 36, 72, 144]), ("tu-hrnet_w18_small", [16, 32, 64, 128])]:
        network = build_model("OCR", encoder, 4, **NARROW["OCR"])
        assert network.encoder.out_channels[2:] == widths
        assert network.decoder.pixels[0].in_channels == sum(widths)


# --- PSPNet ---


@pytest.mark.parametrize("size", [(6, 12), (7, 11), (5, 3)])
def test_pyramid_pooling_against_loops(size):
    torch.manual_seed(0)
    bins, x = (1, 2, 3, 6), torch.randn(2, 4, *size)
    pool = PyramidPooling(4, bins).eval()
    for branch in pool.branches:
        branch[1] = nn.Identity()
    got = pool(x)
    assert torch.equal(got[:, :4], x)
    for k, b in enumerate(bins):
        grid = torch.zeros(2, 4, b, b)
        for i, j in product(range(b), repeat=2):
            rows = slice(i * size[0] // b, -(-(i + 1) * size[0] // b))
            columns = slice(j * size[1] // b, -(-(j + 1) * size[1] // b))
            grid[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
        expected = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        assert torch.allclose(got[:, 4 * (k + 1) : 4 * (k + 2)], expected, atol=1e-6)


def test_pyramid_pooling_channels():
    pool = PyramidPooling(2048, (1, 2, 3, 6))
    assert [branch[1][0].out_channels for branch in pool.branches] == [512] * 4
    assert PyramidPooling(10, (1, 2, 4)).eval()(torch.rand(1, 10, 8, 8)).shape == (1, 19, 8, 8)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18", SMALL])
def test_dilation_keeps_stride_8_and_the_parameters(encoder):
    from segmentation_models_pytorch.encoders import get_encoder

    network = build_model("PSPNetDilated", encoder, 3, psp_out_channels=16).eval()
    plain = get_encoder(encoder, weights=None).eval()
    state = network.encoder.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in plain.state_dict().items()}
    plain.load_state_dict(state)
    with torch.no_grad():
        dilated, maps = network.encode(torch.rand(1, 3, 64, 96)), plain(torch.rand(1, 3, 64, 96))
    assert [m.shape[1] for m in dilated] == [m.shape[1] for m in maps]  # all stages, the last one too
    assert [tuple(m.shape[-2:]) for m in dilated[3:]] == [(8, 12)] * 3
    assert [tuple(m.shape[-2:]) for m in maps[3:]] == [(8, 12), (4, 6), (2, 3)]
    assert network.stride == 8
