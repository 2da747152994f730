"""Every architecture behind one interface; local weights; what is refused."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ltseg_core.config import UserError
from ltseg_core.models import ARCHITECTURES, IMAGENET, build_model

SMALL = "tu-mobilenetv3_small_050"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_features_and_logits_at_any_size(architecture):
    encoder = "tu-vit_tiny_patch16_224" if architecture == "DPT" else SMALL
    network = build_model(architecture, encoder, 5).eval()
    image = torch.rand(2, 3, 130, 150)
    with torch.no_grad():
        features, logits = network(image)
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
