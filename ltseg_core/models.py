"""Segmentation networks behind one interface that returns decoder features and logits."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ltseg_core.config import UserError, choose, data_root

ARCHITECTURES = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
    "Segformer", "DPT",
)  # fmt: skip

Scaling = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, std) of each colour channel, for RGB in [0, 1]."""
IMAGENET: Scaling = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class LocalWeights:
    """A weight file `<data root>/weights/<name>.safetensors`: the encoder it fits and its input scaling."""

    encoder: str
    scaling: Scaling


LOCAL_WEIGHTS = {"mobilenet_v2_imagenet": LocalWeights("mobilenet_v2", ((0.5,) * 3, (0.5,) * 3))}


class Output(NamedTuple):
    """features: (B, D, h, w), what the classifier sees;  logits: (B, C, H, W) at the size of the image."""

    features: Tensor
    logits: Tensor


class SegmentationNetwork(nn.Module):
    """A segmentation_models_pytorch model cut into encoder, decoder and classifier.

    forward: images (B, 3, H, W), float in [0, 1], of any size -> Output. Colours are scaled as the encoder expects,
    the image is padded at the right and bottom to the multiple the encoder needs, and the logits are
    brought bilinearly (align_corners=False) from the decoder's resolution to H x W.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, scaling: Scaling = IMAGENET) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self.decoder: Any = model.decoder
        head = model.segmentation_head
        self.classifier: Any
        self.stride: int
        self.is_dpt = not isinstance(head, nn.Sequential)
        if self.is_dpt:  # its head is conv, norm, ReLU, dropout, Conv2d; it halves the encoder's last map once more
            self.neck, self.classifier, self.stride = (
                head.head[:-1],
                head.head[-1],
                2 * self.encoder.output_stride,
            )
        else:  # Conv2d, upsampling, activation
            self.neck, self.classifier, self.stride = nn.Identity(), head[0], self.encoder.output_stride
        self.register_buffer("mean", torch.tensor(scaling[0]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(scaling[1]).view(1, 3, 1, 1))

    @property
    def feature_channels(self) -> int:
        return self.classifier.in_channels

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D, h, w); h, w belong to the padded image."""
        bottom, right = (-side % self.stride for side in image.shape[-2:])
        x = F.pad((image - self.mean) / self.std, (0, right, 0, bottom))
        maps = self.encoder(x)
        return self.neck(self.decoder(*maps) if self.is_dpt else self.decoder(maps))

    def resize(self, logits: Tensor, image: Tensor) -> Tensor:
        """Low-resolution logits (B, C, h, w) of the padded image -> (B, C, H, W) of the image."""
        height, width = image.shape[-2:]
        padded = (height + -height % self.stride, width + -width % self.stride)
        if logits.shape[-2:] != padded:
            logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def forward(self, image: Tensor) -> Output:
        features = self.features(image)
        return Output(features, self.resize(self.classifier(features), image))


def build_model(
    architecture: str,
    encoder: str,
    classes: int,
    *,
    weights: str | None = None,
    root: str | os.PathLike[str] | None = None,
    **options: Any,
) -> SegmentationNetwork:
    """A network of segmentation_models_pytorch with `classes` output channels.

    architecture: one of ARCHITECTURES (any case)
    encoder:      one of the library's, or `tu-<name>` for one of timm
    weights:      None for random weights; a key of LOCAL_WEIGHTS (found under the data root) or the path of a
                  safetensors file with the encoder's parameters; else a name of the hub, e.g. `imagenet`
    options:      further keyword arguments of the architecture
    Raises UserError for unknown names or options, combinations the library refuses, and unusable weights.
    """
    import segmentation_models_pytorch as smp
    import timm

    architecture = choose("architecture", architecture, ARCHITECTURES)
    if encoder.startswith("tu-"):
        if not timm.is_model(encoder[3:]):
            choose("encoder", encoder, [f"tu-{name}" for name in timm.list_models()])
    else:
        encoder = choose("encoder", encoder, smp.encoders.get_encoder_names())
    builder = getattr(smp, architecture)
    fixed = {
        "self",
        "encoder_name",
        "encoder_weights",
        "in_channels",
        "classes",
        "activation",
        "aux_params",
        "kwargs",
    }
    for name in options:
        choose(f"option of {architecture}", name, set(inspect.signature(builder).parameters) - fixed)
    file, scaling = _weight_file(weights, encoder, root)
    hub = weights if file is None else None
    if architecture == "DPT" and "vit" in encoder:
        options.setdefault("dynamic_img_size", True)  # the encoder's own image size would be the only one allowed
    try:
        # timm's encoders carry the name of their weights in their own name; True asks for them
        pretrained = True if hub and encoder.startswith("tu-") else hub
        model = builder(encoder, encoder_weights=pretrained, classes=classes, **options)
    except OSError as error:
        raise UserError(
            f"cannot fetch the weights {weights!r} of {encoder} ({type(error).__name__}): without a network use a local"
            f" file ({', '.join(LOCAL_WEIGHTS)} or a path), or null for random weights"
        ) from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{architecture} cannot be built with encoder {encoder!r}, {options}: {error}") from error
    if hub:
        found = smp.encoders.get_preprocessing_params(encoder, hub)
        scaling = (tuple(found["mean"]), tuple(found["std"]))
    if file is not None:
        load_encoder(model.encoder, file)
    return SegmentationNetwork(model, scaling)


def _weight_file(weights: str | None, encoder: str, root: str | os.PathLike[str] | None) -> tuple[Path | None, Scaling]:
    """The local file `weights` means, None if it means the hub or nothing; and the input scaling."""
    if weights in LOCAL_WEIGHTS:
        known = LOCAL_WEIGHTS[weights]
        if encoder != known.encoder:
            raise UserError(f"the weights {weights!r} belong to encoder {known.encoder!r}, not to {encoder!r}")
        file, scaling = data_root(root) / "weights" / f"{weights}.safetensors", known.scaling
    elif weights is not None and weights.endswith(".safetensors"):
        file, scaling = Path(weights).expanduser(), IMAGENET
    else:
        return None, IMAGENET
    if not file.is_file():
        raise UserError(
            f"no weight file at {file}: put it there, point --data-root or LTSEG_DATA to the folder that holds it,"
            " or set encoder_weights to null"
        )
    return file, scaling


def load_encoder(encoder: nn.Module, file: Path) -> None:
    """Load a safetensors file into an encoder; half precision becomes float32, classifier weights are left out.

    Raises UserError if the file is broken, or lacks or mis-shapes one of the encoder's tensors.
    """
    try:
        loaded = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no readable safetensors file ({error}): fetch it again") from None
    state = encoder.state_dict()
    for name, tensor in state.items():
        if name not in loaded or loaded[name].shape != tensor.shape:
            what = f"has shape {tuple(loaded[name].shape)}" if name in loaded else "is missing"
            raise UserError(f"{file} does not fit this encoder: {name} {tuple(tensor.shape)} {what}")
    encoder.load_state_dict({name: loaded[name].to(tensor.dtype) for name, tensor in state.items()})
