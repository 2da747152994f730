"""Segmentation networks behind one interface that returns decoder features and logits."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ltseg_core.config import UserError, canonical, check_options, choose, data_root
from ltseg_core.losses import _require
from ltseg_core.networks import NETWORKS, OCRDecoder, any_image_size, auxiliary_head

ARCHITECTURES = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
    "Segformer", "DPT", *NETWORKS,
)  # fmt: skip
AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary loss in the papers."""
COSINE_OPTIONS = ("scale", "learn_scale")

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
    """features: (B, D, h, w), what the classifier sees, before dropout;  logits: (B, C, H, W) at the size of the image;
    auxiliary: logits (B, C, H, W) of the auxiliary head, in training mode only."""

    features: Tensor
    logits: Tensor
    auxiliary: Tensor | None = None


class CosineClassifier(nn.Module):
    """z_k = s w_k.x / (|w_k| |x|), a 1x1 convolution (Gidaris & Komodakis, CVPR 2018). (B, D, h, w) -> (B, C, h, w)

    scale: s, fixed, or the start of a learned one; 16 to 30 are usual. A zero feature has the logits 0.
    Raises UserError for a scale <= 0.
    """

    def __init__(self, in_channels: int, out_channels: int, *, scale: float = 16.0, learn_scale: bool = False) -> None:
        super().__init__()
        _require("scale", scale, scale > 0, "> 0")
        self.in_channels, self.out_channels, self.initial_scale = in_channels, out_channels, scale
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.scale = nn.Parameter(torch.empty(()), requires_grad=learn_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.classify_direction(F.normalize(features, dim=1))

    def classify_direction(self, direction: Tensor) -> Tensor:
        """s w_k.v / |w_k| for v = x / |x|, (B, D, h, w)."""
        return self.scale * F.conv2d(direction, F.normalize(self.weight, dim=1))


def reinitialise(classifier: Any) -> None:
    """Draw new weights in place: those of a convolution as segmentation_models_pytorch draws its heads'."""
    if isinstance(classifier, nn.Conv2d):
        nn.init.xavier_uniform_(classifier.weight)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)
    else:
        classifier.reset_parameters()


class SegmentationNetwork(nn.Module):
    """A segmentation_models_pytorch model, or one of NETWORKS, cut into encoder, decoder and classifier.

    forward: images (B, 3, H, W), float in [0, 1], of any size -> Output. Colours are scaled as the encoder expects,
    the image is padded at the right and bottom to the multiple the encoder needs, and the logits are
    brought bilinearly (align_corners=False) from the decoder's resolution to H x W.

    auxiliary_weight: what the criterion should multiply the cross-entropy of Output.auxiliary with; 0 for none. They
    are the logits of an FCN head on the encoder's last map but one (stage 3 of a whole ResNet; the library's PSPNet
    cuts it shorter), or the soft object regions of OCR. Nothing of the head is computed in evaluation mode.
    classifier: (D, C) -> the module to use in place of the model's own classifier
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        scaling: Scaling = IMAGENET,
        auxiliary_weight: float = 0.0,
        classifier: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self.decoder: Any = model.decoder
        head = model.segmentation_head
        self.classifier: Any
        self.dropout: Any
        self.neck: nn.Module
        self.stride: int
        self.is_dpt = not isinstance(head, nn.Sequential)
        if self.is_dpt:  # its head is conv, norm, ReLU, dropout, Conv2d; it halves the encoder's last map once more
            *neck, self.dropout, self.classifier = head.head
            self.neck, self.stride = nn.Sequential(*neck), 2 * self.encoder.output_stride
        else:  # Conv2d, upsampling, activation
            self.neck, self.classifier, self.stride = nn.Identity(), head[0], self.encoder.output_stride
            self.dropout = getattr(self.decoder, "dropout", nn.Identity())
            if hasattr(self.decoder, "dropout"):  # its last step, which `classify` takes
                self.decoder.dropout, self.dropout.inplace = nn.Identity(), False
        if classifier is not None:
            self.classifier = classifier(self.classifier.in_channels, self.classifier.out_channels)
        self.register_buffer("mean", torch.tensor(scaling[0]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(scaling[1]).view(1, 3, 1, 1))
        self.auxiliary_weight = auxiliary_weight
        self.auxiliary: nn.Module | None = None
        if auxiliary_weight and not isinstance(self.decoder, OCRDecoder):
            self.auxiliary = auxiliary_head(self.encoder.out_channels[-2], self.classifier.out_channels)

    @property
    def feature_channels(self) -> int:
        return self.classifier.in_channels

    def encode(self, image: Tensor) -> Any:
        """(B, 3, H, W) in [0, 1] -> the encoder's maps of the scaled and padded image, finest first."""
        bottom, right = padding(image.shape, self.stride)
        return self.encoder(F.pad((image - self.mean) / self.std, (0, right, 0, bottom)))

    def decode(self, maps: Any) -> Tensor:
        """The encoder's maps -> (B, D, h, w)."""
        return self.neck(self.decoder(*maps) if self.is_dpt else self.decoder(maps))

    def decode_with_auxiliary(self, maps: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """`decode`, and the auxiliary logits (B, C, H, W) of the image: None without a head and in evaluation mode."""
        if not self.training or not self.auxiliary_weight:
            return self.decode(maps), None
        if self.auxiliary is None:
            features, auxiliary = self.decoder.with_regions(maps)
        else:
            features, auxiliary = self.decode(maps), self.auxiliary(maps[-2])
        return features, self.resize(auxiliary, image)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D, h, w); h, w belong to the padded image."""
        return self.decode(self.encode(image))

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> logits (B, C, h, w). Dropout comes first in the architectures that end with it."""
        return self.classifier(self.dropout(features))

    def resize(self, logits: Tensor, image: Tensor) -> Tensor:
        """Low-resolution logits (B, C, h, w) of the padded image -> (B, C, H, W) of the image."""
        height, width = image.shape[-2:]
        bottom, right = padding(image.shape, self.stride)
        padded = (height + bottom, width + right)
        if logits.shape[-2:] != padded:
            logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def forward(self, image: Tensor) -> Output:
        features, auxiliary = self.decode_with_auxiliary(self.encode(image), image)
        return Output(features, self.resize(self.classify(features), image), auxiliary)


def padding(shape: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows below and columns to the right that make the last two sides of a shape multiples of the stride."""
    return -shape[-2] % stride, -shape[-1] % stride


def stride_of(network: nn.Module) -> int:
    """The stride of the (first) SegmentationNetwork in a method's network."""
    return next(module.stride for module in network.modules() if isinstance(module, SegmentationNetwork))


def build_model(
    architecture: str,
    encoder: str,
    classes: int,
    *,
    weights: str | None = None,
    root: str | os.PathLike[str] | None = None,
    auxiliary: bool | float | None = None,
    classifier: str = "linear",
    **options: Any,
) -> SegmentationNetwork:
    """A network of segmentation_models_pytorch, or one of NETWORKS, with `classes` output channels.

    architecture: one of ARCHITECTURES (any case)
    encoder:      one of the library's, or `tu-<name>` for one of timm
    weights:      None for random weights; a key of LOCAL_WEIGHTS (found under the data root) or the path of a
                  safetensors file with the encoder's parameters; else a name of the hub, e.g. `imagenet`
    auxiliary:    weight of the auxiliary head (see SegmentationNetwork), True for AUXILIARY_WEIGHT; by default only
                  OCR has one, as its regions are meaningless unsupervised. The other parameters start the same with
                  and without it.
    classifier:   "linear", the architecture's last convolution, or "cosine", a CosineClassifier in its place, which
                  takes the further options `scale` and `learn_scale`
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
    builder = NETWORKS[architecture] if architecture in NETWORKS else getattr(smp, architecture)
    fixed = {
        "self",
        "encoder",
        "encoder_name",
        "encoder_weights",
        "in_channels",
        "classes",
        "activation",
        "aux_params",
        "kwargs",
    }
    valid = {*inspect.signature(builder).parameters, "auxiliary", "classifier", *COSINE_OPTIONS} - fixed
    options = canonical(f"option of {architecture}", options, valid)
    own_classifier = _classifier(options.pop("classifier", classifier), options)
    auxiliary_weight = _auxiliary_weight(architecture, options.pop("auxiliary", auxiliary))
    file, scaling = _weight_file(weights, encoder, root)
    hub = weights if file is None else None
    if architecture == "DPT" and "vit" in encoder:
        options["dynamic_img_size"] = True  # the encoder's own image size would be the only one allowed
    elif architecture not in NETWORKS:
        options |= any_image_size(encoder)
    try:
        # timm's encoders carry the name of their weights in their own name; True asks for them
        pretrained = True if hub and encoder.startswith("tu-") else hub
        model = builder(encoder, encoder_weights=pretrained, classes=classes, **options)
    except OSError as error:
        raise UserError(
            f"cannot fetch the weights {weights!r} of {encoder} ({type(error).__name__}): without a network use a local"
            f" file ({', '.join(LOCAL_WEIGHTS)} or a path), or null for random weights"
        ) from error
    except (KeyError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        why = str(error) or "the encoder refuses what the architecture asks of it"
        raise UserError(f"{architecture} cannot be built with encoder {encoder!r}, {options}: {why}") from error
    if hub:
        found = smp.encoders.get_preprocessing_params(encoder, hub)
        scaling = (tuple(found["mean"]), tuple(found["std"]))
    if file is not None:
        load_encoder(model.encoder, file)
    return SegmentationNetwork(model, scaling, auxiliary_weight, own_classifier)


def _classifier(kind: str, options: dict[str, Any]) -> Callable[[int, int], nn.Module] | None:
    """What makes a classifier of this kind, None for the architecture's own; takes its options out of `options`."""
    own = {name: options.pop(name) for name in COSINE_OPTIONS if name in options}
    if choose("classifier", kind, ("linear", "cosine")) == "cosine":
        return partial(CosineClassifier, **check_options("option of the classifier", own, CosineClassifier))
    if own:
        raise UserError(f"{', '.join(own)}: an option of the cosine classifier only, so add classifier: cosine")
    return None


def _auxiliary_weight(architecture: str, auxiliary: bool | float | None) -> float:
    """The weight that `auxiliary` means. Raises UserError if it is no weight or the architecture has no such head."""
    if auxiliary is None or isinstance(auxiliary, bool):
        weight = AUXILIARY_WEIGHT if auxiliary or (auxiliary is None and architecture == "OCR") else 0.0
    elif isinstance(auxiliary, (int, float)) and 0 <= auxiliary < math.inf:
        weight = float(auxiliary)
    else:
        raise UserError(f"auxiliary must be true, false or a finite weight >= 0, not {auxiliary!r}")
    if weight and architecture == "DPT":
        raise UserError("DPT has no auxiliary head, its encoder has no stages: leave out `auxiliary`")
    return weight


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
