"""Every architecture behind one interface; local weights; what is refused."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ltseg_core.config import UserError
from ltseg_core.models import ARCHITECTURES, IMAGENET, CosineClassifier, build_model, reinitialise

SMALL = "tu-mobilenetv3_small_050"


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "SegNet" else []) for name in ARCHITECTURES],
)
def test_every_architecture_gives_features_and_logits_at_any_size(architecture):
    encoder = {"DPT": "tu-vit_tiny_patch16_224", "SegNet": "vgg11_bn"}.get(architecture, SMALL)
    network = build_model(architecture, encoder, 5).eval()
    image = torch.rand(2, 3, 130, 150)
    with torch.no_grad():
        features, logits, auxiliary = network(image)
    assert auxiliary is None
    assert logits.shape == (2, 5, 130, 150)
    assert features.shape[:2] == (2, network.classifier.in_channels)
    with torch.no_grad():
        low = network.classifier(features)
    stride = network.stride
    padded = (130 + -130 % stride, 150 + -150 % stride)
    assert torch.equal(logits, F.interpolate(low, padded, mode="bilinear", align_corners=False)[..., :130, :150])


@pytest.mark.parametrize("architecture", ["Unet", "UnetPlusPlus", "MAnet", "Linknet"])
def test_full_resolution_architectures_equal_the_library(architecture):
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    reference = getattr(smp, architecture)(SMALL, encoder_weights=None, classes=4).eval()
    torch.manual_seed(0)
    ours = build_model(architecture, SMALL, 4).eval()
    image = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
    with torch.no_grad():
        assert torch.allclose(ours(image).logits, reference((image - mean) / std), atol=1e-6)


def test_low_resolution_logits_equal_the_library_before_upsampling():
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    reference = smp.DeepLabV3Plus(SMALL, encoder_weights=None, classes=4).eval()
    torch.manual_seed(0)
    ours = build_model("DeepLabV3Plus", SMALL, 4).eval()
    image = torch.rand(1, 3, 64, 96)
    x = (image - ours.mean) / ours.std
    with torch.no_grad():
        expected = reference.segmentation_head[0](reference.decoder(reference.encoder(x)))
        assert torch.equal(ours.classifier(ours.features(image)), expected)


def test_padding_does_not_reach_valid_logits_of_a_padded_input():
    network = build_model("Unet", SMALL, 3).eval()
    image = torch.rand(1, 3, 50, 70)
    padded = F.pad(image, (0, 26, 0, 14))  # 64 x 96
    padded[..., 50:, :] = network.mean  # what the network's own padding with 0 after scaling means
    padded[..., :, 70:] = network.mean
    with torch.no_grad():
        assert torch.allclose(network(image).logits, network(padded).logits[..., :50, :70], atol=1e-5)


@pytest.mark.parametrize("architecture", ["UPerNet", "Segformer"])
@pytest.mark.parametrize(
    "encoder", ["mit_b0", "tu-convnext_atto", "tu-swin_tiny_patch4_window7_224", "tu-swinv2_tiny_window8_256"]
)
def test_papers_encoders_take_one_size_after_another(architecture, encoder):
    small = {"UPerNet": {"decoder_channels": 16}, "Segformer": {"decoder_segmentation_channels": 16}}[architecture]
    network = build_model(architecture, encoder, 3, **small).eval()
    for height, width in [(50, 70), (33, 32)]:
        with torch.no_grad():
            features, logits, _ = network(torch.rand(1, 3, height, width))
        assert logits.shape == (1, 3, height, width)
        assert features.shape == (1, 16, -(-height // 32) * 8, -(-width // 32) * 8)
        assert logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin_at_its_own_size_is_the_library_swin(encoder):
    from segmentation_models_pytorch.encoders import get_encoder

    free = build_model("UPerNet", f"tu-{encoder}", 3, decoder_channels=16).eval().encoder
    strict = get_encoder(f"tu-{encoder}", weights=None).eval()
    strict.load_state_dict(free.state_dict())
    image = torch.rand(1, 3, *[int(encoder[-3:])] * 2)
    with torch.no_grad():
        for own, reference in zip(free(image), strict(image), strict=True):
            assert torch.allclose(own, reference, atol=1e-5)


@pytest.mark.parametrize("architecture", ["FPN", "PSPNet", "PSPNetDilated", "OCR", "DPT"])
def test_last_dropout_comes_after_the_features(architecture):
    network = build_model(architecture, "tu-vit_tiny_patch16_224" if architecture == "DPT" else SMALL, 3).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = network(image)
        network.dropout.train().p = 0.5
        torch.manual_seed(0)
        features, logits, _ = network(image)
        torch.manual_seed(0)
        expected = network.classifier(network.dropout(plain.features))
        assert torch.equal(features, plain.features)
        assert torch.equal(logits, network.resize(expected, image))
        assert not torch.equal(logits, plain.logits)
    before = [*network.decoder.modules(), *network.neck.modules()]
    assert not [m for m in before if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d))]  # none is applied twice


def test_features_are_the_decoded_maps():
    network = build_model("FPN", SMALL, 3).eval()
    image = torch.rand(1, 3, 40, 60)
    with torch.no_grad():
        maps = network.encode(image)
        assert [tuple(m.shape[-2:]) for m in maps] == [(64 >> i, 64 >> i) for i in range(6)]
        assert torch.equal(network.decode(maps), network.features(image))


@pytest.mark.parametrize("architecture", ["FPN", "PSPNet", "PSPNetDilated", "UnetPlusPlus", "Segformer", "OCR"])
def test_auxiliary_logits_exist_in_training_only(architecture):
    network = build_model(architecture, SMALL, 5, auxiliary=0.25)
    assert network.auxiliary_weight == 0.25
    assert network.train()(torch.rand(2, 3, 50, 70)).auxiliary.shape == (2, 5, 50, 70)
    with torch.no_grad():
        assert network.eval()(torch.rand(2, 3, 50, 70)).auxiliary is None


def test_auxiliary_head_reads_stage_3():
    network = build_model("PSPNetDilated", "tu-resnet18", 3, auxiliary=True)
    assert network.auxiliary_weight == 0.4
    assert (network.auxiliary[0][0].in_channels, network.auxiliary[0][0].out_channels) == (256, 64)
    network.auxiliary.eval()  # no dropout; the rest stays in training mode
    image = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        got = network(image).auxiliary
        expected = network.auxiliary(network.encode(image)[4])
    assert expected.shape == (2, 3, 6, 8)
    resize = F.interpolate(expected, (48, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(got, resize, atol=1e-5)


def test_auxiliary_head_changes_nothing_at_inference(monkeypatch):
    networks = []
    for auxiliary in (False, True):
        torch.manual_seed(0)
        networks.append(build_model("FPN", SMALL, 3, auxiliary=auxiliary).eval())
    plain, other = networks
    state = {name: value for name, value in other.state_dict().items() if not name.startswith("auxiliary.")}
    assert state.keys() == plain.state_dict().keys()
    assert len(state) < len(other.state_dict())
    monkeypatch.setattr(other.auxiliary, "forward", None)  # calling it would fail
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        assert torch.equal(plain(image).logits, other(image).logits)
    with pytest.raises(TypeError):
        other.train()(image.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("architecture", "auxiliary", "weight"),
    [
        ("FPN", None, 0), ("FPN", False, 0), ("FPN", True, 0.4), ("FPN", 0, 0), ("FPN", 1, 1),
        ("OCR", None, 0.4), ("OCR", False, 0), ("OCR", 0.5, 0.5),
    ],
)  # fmt: skip
def test_auxiliary_weight(architecture, auxiliary, weight):
    network = build_model(architecture, SMALL, 3, auxiliary=auxiliary)
    assert network.auxiliary_weight == weight
    assert (network(torch.rand(2, 3, 32, 32)).auxiliary is None) == (weight == 0)


# --- classifiers ---


def test_cosine_classifier_is_the_cosine_of_each_position():
    torch.manual_seed(0)
    classifier, x = CosineClassifier(6, 4, scale=20.0).double(), torch.randn(2, 6, 3, 5).double()
    expected = 20 * F.cosine_similarity(x.unsqueeze(1), classifier.weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(classifier(x), expected)
    torch.testing.assert_close(classifier(7 * x), expected)
    assert torch.equal(classifier(torch.zeros_like(x)), torch.zeros_like(expected))
    with pytest.raises(UserError, match=r"scale must be > 0, got 0"):
        CosineClassifier(6, 4, scale=0.0)


@pytest.mark.parametrize(
    ("architecture", "encoder"), [("Unet", SMALL), ("OCR", SMALL), ("DPT", "tu-vit_tiny_patch16_224")]
)
def test_a_cosine_classifier_takes_the_place_of_the_linear_one(architecture, encoder):
    networks = []
    for classifier in ("linear", "cosine"):
        torch.manual_seed(0)
        networks.append(build_model(architecture, encoder, 5, classifier=classifier).eval())
    linear, cosine = networks
    assert (cosine.classifier.scale.item(), cosine.classifier.scale.requires_grad) == (16, False)
    assert cosine.feature_channels == linear.feature_channels
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        features, logits, _ = cosine(image)
        assert torch.equal(features, linear(image).features)  # all before it starts the same
        low = 16 * F.cosine_similarity(features.unsqueeze(1), cosine.classifier.weight.unsqueeze(0), dim=2)
        torch.testing.assert_close(logits, cosine.resize(low, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learn", [False, True])
def test_options_of_the_cosine_classifier(learn):
    network = build_model("FPN", SMALL, 3, auxiliary=True, Classifier="Cosine", scale=25, learn_scale=learn)
    assert network.classifier.scale.item() == 25
    output = network.train()(torch.rand(2, 3, 32, 32))
    assert output.auxiliary is not None
    output.logits.square().sum().backward()
    assert (network.classifier.scale.grad is not None) is learn


def test_new_weights_for_either_classifier():
    for classifier in (torch.nn.Conv2d(6, 4, 3), CosineClassifier(6, 4, scale=10.0, learn_scale=True)):
        for parameter in classifier.parameters():
            torch.nn.init.constant_(parameter, 99.0)
        torch.manual_seed(0)
        reinitialise(classifier)
        torch.manual_seed(0)
        assert torch.equal(classifier.weight, torch.nn.init.xavier_uniform_(torch.empty_like(classifier.weight)))
        rest = getattr(classifier, "bias", None), getattr(classifier, "scale", None)
        assert [x.unique().item() for x in rest if x is not None] == ([0] if rest[1] is None else [10])


def test_option_names_have_any_case():
    assert build_model("FPN", SMALL, 3, Decoder_Segmentation_Channels=64).feature_channels == 64


def test_local_weights_are_loaded_with_their_own_scaling(real_data):
    network = build_model("DeepLabV3Plus", "mobilenet_v2", 11, weights="mobilenet_v2_imagenet", root=real_data)
    stored = load_file(real_data / "weights/mobilenet_v2_imagenet.safetensors")
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    scaled = (torch.full((1, 3, 1, 1), 64 / 255) - network.mean) / network.std
    assert torch.allclose(scaled, torch.full((1, 3, 1, 1), 64 / 127.5 - 1))


def test_weights_from_any_safetensors_file(tmp_path):
    source = build_model("Unet", SMALL, 2)
    path = tmp_path / "encoder.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in source.encoder.state_dict().items()}, path)
    network = build_model("FPN", SMALL, 2, weights=str(path))
    for own, stored in zip(network.encoder.state_dict().values(), source.encoder.state_dict().values(), strict=True):
        assert own.dtype == stored.dtype
        assert torch.equal(own, stored.half().to(own.dtype) if own.is_floating_point() else stored)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="no readable safetensors file"):
        build_model("FPN", SMALL, 2, weights=str(path))
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="does not fit this encoder: .* is missing"):
        build_model("FPN", SMALL, 2, weights=str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "DeepLab"}, "did you mean 'DeepLabV3'"),
        ({"encoder": "mobilnet_v2"}, "did you mean 'mobilenet_v2'"),
        ({"encoder": "tu-resnet19"}, "did you mean 'tu-resnet18'"),
        ({"decoder_chanels": 3}, "did you mean 'decoder_channels'"),
        ({"architecture": "OCR", "ocr_chanels": 3}, "option of OCR .*did you mean 'ocr_channels'"),
        ({"architecture": "PSPNetDilated", "bins": 3}, "did you mean 'psp_bins'"),
        ({"architecture": "SegNet", "encoder_name": "vgg11"}, "unknown option of SegNet"),
        ({"auxilary": True}, "did you mean 'auxiliary'"),
        ({"classifier": "cosin"}, "unknown classifier 'cosin': did you mean 'cosine'"),
        ({"scale": 20}, "scale: an option of the cosine classifier only"),
        ({"classifier": "cosine", "scale": -1.0}, "scale must be > 0, got -1"),
        ({"classifier": "cosine", "scale": "large"}, "scale must be float, got 'large'"),
        ({"classifier": "cosine", "Scale": 2, "scale": 3}, "'scale' is given twice"),
        ({"auxiliary": -0.4}, "finite weight >= 0, not -0.4"),
        ({"auxiliary": float("nan")}, "finite weight >= 0, not nan"),
        ({"auxiliary": "yes"}, "finite weight >= 0, not 'yes'"),
        ({"architecture": "DPT", "encoder": "tu-vit_tiny_patch16_224", "auxiliary": True}, "DPT has no auxiliary"),
        ({"architecture": "SegNet"}, "choose vgg16_bn"),
        ({"architecture": "AttentionUnet", "decoder_channels": [16, 8]}, "AttentionUnet cannot be built .* 2 blocks"),
        ({"architecture": "PSPNetDilated", "encoder": "densenet121"}, "do not support dilated mode"),
        ({"architecture": "PSPNetDilated", "encoder": "tu-hrnet_w18_small"}, "the encoder refuses"),
        ({"architecture": "UnetPlusPlus", "encoder": "mit_b0"}, "UnetPlusPlus cannot be built with encoder 'mit_b0'"),
        ({"weights": "mobilenet_v2_imagenet"}, "belong to encoder 'mobilenet_v2'"),
        ({"weights": "nowhere.safetensors"}, "no weight file at nowhere.safetensors"),
        ({"weights": "mobilenet_v2_imagenet", "encoder": "mobilenet_v2"}, "no weight file at .*weights"),
    ],
)
def test_refusals(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_model(**{"architecture": "Unet", "encoder": SMALL, "classes": 3, "root": tmp_path} | arguments)


def test_hub_weights_without_a_network_say_so(monkeypatch):
    import segmentation_models_pytorch as smp

    def offline(*_args, **_kwargs):
        raise OSError("name resolution failed")

    monkeypatch.setattr(smp, "Unet", type("Unet", (smp.Unet,), {"__init__": offline}))
    with pytest.raises(UserError, match="without a network use a local file"):
        build_model("Unet", "resnet18", 3, weights="imagenet")
