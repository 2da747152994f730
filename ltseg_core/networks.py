"""Networks that the papers use and segmentation_models_pytorch lacks, in the same parts as its own.

Each builder of NETWORKS takes an encoder of that library and returns Parts: an encoder (image -> maps, from the
image itself down to stride 32), a decoder (maps -> features) and a head whose first layer is the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Parts(NamedTuple):
    """What SegmentationNetwork takes a model apart into."""

    encoder: Any
    decoder: nn.Module
    segmentation_head: nn.Sequential


def conv_norm_relu(inside: int, outside: int, kernel: int, *, norm: bool = True) -> nn.Sequential:
    """Convolution that keeps the size, batch norm unless `norm` is False, ReLU."""
    convolution = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside) if norm else nn.Identity(), nn.ReLU(inplace=True))


def resized(x: Tensor, like: Tensor) -> Tensor:
    """x at the height and width of `like`, bilinear."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def auxiliary_head(inside: int, classes: int) -> nn.Sequential:
    """FCN head on one map of the encoder (Zhao et al. 2017, Section 3.3; the `FCNHead` of mmsegmentation).

    (B, inside, h, w) -> logits (B, classes, h, w). A quarter of the map's channels inside: 256 for a ResNet-50.
    """
    width = max(inside // 4, 32)
    head = nn.Sequential(conv_norm_relu(inside, width, 3), nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1))
    _initialise(head[0], head[2])
    return head


# --- SegNet ---


def unpool(x: Tensor, index: Tensor) -> Tensor:
    """Undo a 2x2 max-pooling: each value returns to where it was the maximum, the other places are 0.

    x: (B, D, h, w);  index: (B, D, h, w) int64, flat position in the 2h x 2w plane -> (B, D, 2h, 2w)
    Equals F.max_unpool2d, which has no deterministic implementation.
    """
    batch, channels, height, width = x.shape
    flat = x.new_zeros(batch, channels, 4 * height * width)
    return flat.scatter(2, index.flatten(2), x.flatten(2)).view(batch, channels, 2 * height, 2 * width)


class SegNetDecoder(nn.Module):
    """The mirrored VGG: at each stage unpool, then as many convolutions as the encoder has there.

    stages: the widths of the encoder's convolutions by stage, from the image inwards
    maps:   one before each of the encoder's poolings, and what the last pooling left
    The pooling positions are found again from the map before the pooling: they need not leave the encoder.
    """

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for i in reversed(range(len(stages))):
            width = stages[i][0]
            # the stage at full resolution ends in the classifier, which takes the place of its last convolution
            widths = [width] * len(stages[i]) + ([stages[i - 1][-1]] if i else [])
            self.stages.append(nn.Sequential(*(conv_norm_relu(a, b, 3) for a, b in pairwise(widths))))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for stage, before_pooling in zip(self.stages, maps[-2::-1], strict=True):
            _, index = F.max_pool2d(before_pooling.detach(), 2, return_indices=True)
            x = stage(unpool(x, index))
        return x  # (B, 64, H, W)


def segnet(encoder: str, *, encoder_weights: Any, classes: int) -> Parts:
    """SegNet (Badrinarayanan, Kendall and Cipolla 2017): max-unpooling with the encoder's pooling positions.

    The paper's network has encoder `vgg16_bn`; the other VGGs are mirrored in the same way. The 3x3 classifier is the
    last convolution of the mirror.
    """
    if not encoder.startswith("vgg"):
        raise ValueError("SegNet undoes the poolings of a VGG; choose vgg16_bn (the paper's), vgg11, ... or vgg19_bn")
    vgg = _encoder(encoder, encoder_weights)
    stages: list[list[int]] = [[]]
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            stages[-1].append(layer.out_channels)
        elif isinstance(layer, nn.MaxPool2d):
            stages.append([])
    return _parts(vgg, SegNetDecoder(stages[:-1]), nn.Conv2d(stages[0][0], classes, 3, padding=1))


# --- Attention U-Net ---


class AttentionGate(nn.Module):
    """Additive attention gate (Oktay et al. 2018, Eq. 1-2): alpha = sigmoid(psi relu(W_x x + W_g g + b_g) + b_psi).

    skip:   x (B, S, 2h, 2w), a map of the encoder
    gating: g (B, G, h, w), the decoder's map one level below
    forward -> alpha * x. W_x is a 2x2 convolution of stride 2, so that alpha is computed at g's resolution; it is
    brought to x's bilinearly.
    """

    def __init__(self, skip: int, gating: int) -> None:
        super().__init__()
        inner = max(skip // 2, 1)
        self.skip = nn.Conv2d(skip, inner, 2, stride=2, bias=False)
        self.gating = nn.Conv2d(gating, inner, 1)
        self.score = nn.Conv2d(inner, 1, 1)

    def coefficients(self, skip: Tensor, gating: Tensor) -> Tensor:
        """alpha: (B, 1, h, w) in (0, 1)."""
        return torch.sigmoid(self.score(torch.relu(self.skip(skip) + self.gating(gating))))

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        return skip * resized(self.coefficients(skip, gating), skip)


class AttentionUnetDecoder(nn.Module):
    """The library's U-Net decoder with a gate on every skip connection; open gates (alpha = 1) leave the U-Net."""

    def __init__(self, unet: Any, skips: Sequence[int], gatings: Sequence[int]) -> None:
        super().__init__()
        self.center, self.blocks = unet.center, unet.blocks
        # a level that the encoder leaves out (stride 2 of transformers) is an empty map and needs no gate
        gates = (AttentionGate(s, g) if s else None for s, g in zip(skips, gatings, strict=True))
        self.gates = nn.ModuleList(gates)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.center(maps[-1])
        for block, gate, skip in zip(self.blocks[:-1], self.gates, maps[-2:0:-1], strict=True):
            x = block(x, *skip.shape[-2:], skip_connection=skip if gate is None else gate(skip, x))
        return self.blocks[-1](x, *maps[0].shape[-2:])  # (B, decoder_channels[-1], H, W)


def attention_unet(
    encoder: str, *, encoder_weights: Any, classes: int, decoder_channels: Sequence[int] = (256, 128, 64, 32, 16)
) -> Parts:
    """Attention U-Net (Oktay et al. 2018): U-Net whose skip connections pass an attention gate.

    Differs: two-dimensional, on any encoder; everything but the gates is the library's U-Net, so that a comparison
    of the two shows the gates; each gate reads the decoder's map below it; no deep supervision.
    """
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

    body = _encoder(encoder, encoder_weights)
    channels = body.out_channels
    unet = UnetDecoder(channels, decoder_channels, add_center_block=encoder.startswith("vgg"))
    decoder = AttentionUnetDecoder(unet, channels[-2:0:-1], [channels[-1], *decoder_channels[:3]])
    return _parts(body, decoder, nn.Conv2d(decoder_channels[-1], classes, 3, padding=1))


# --- Object-contextual representations ---


def region_features(regions: Tensor, pixels: Tensor) -> Tensor:
    """Object region representations: the mean of the pixels, weighted by the softmax over space of each region.

    regions: (B, K, h, w) logits;  pixels: (B, D, h, w) -> (B, K, D)
    """
    return regions.flatten(2).softmax(-1) @ pixels.flatten(2).transpose(1, 2)


def object_context(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each pixel's sum of region values, weighted by the softmax over the regions of query . key / sqrt(D).

    query: (B, D, h, w);  key, value: (B, D, K, 1) -> (B, D, h, w). The scaling is that of the authors' code.
    """
    query_rows = query.flatten(2).transpose(1, 2)  # (B, hw, D)
    weights = (query_rows @ key.flatten(2) / query.shape[1] ** 0.5).softmax(-1)  # (B, hw, K)
    return (weights @ value.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(query.shape)


class OCRDecoder(nn.Module):
    """Soft object regions, their representations, and every pixel's attention to them.

    The encoder's maps from stride 4 on are brought to the finest of them and concatenated, as HRNet does.
    """

    def __init__(self, inside: int, classes: int, channels: int, key_channels: int, dropout: float) -> None:
        super().__init__()
        self.regions = nn.Sequential(conv_norm_relu(inside, inside, 1), nn.Conv2d(inside, classes, 1))
        self.pixels = conv_norm_relu(inside, channels, 3)
        self.query, self.key = (
            nn.Sequential(conv_norm_relu(channels, key_channels, 1), conv_norm_relu(key_channels, key_channels, 1))
            for _ in range(2)
        )
        self.value = conv_norm_relu(channels, key_channels, 1)
        self.context = conv_norm_relu(key_channels, channels, 1)
        self.fuse = nn.Sequential(conv_norm_relu(2 * channels, channels, 1))  # parameters have kept their names
        self.dropout = nn.Dropout2d(dropout)

    def with_regions(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features (B, channels, h, w), and the logits (B, C, h, w) of the soft object regions."""
        x = torch.cat([maps[2], *(resized(m, maps[2]) for m in maps[3:])], dim=1)
        regions, pixels = self.regions(x), self.pixels(x)
        objects = region_features(regions, pixels).transpose(1, 2)[..., None]  # (B, D, C, 1)
        context = self.context(object_context(self.query(pixels), self.key(objects), self.value(objects)))
        return self.dropout(self.fuse(torch.cat([context, pixels], dim=1))), regions

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.with_regions(maps)[0]


def ocr(
    encoder: str,
    *,
    encoder_weights: Any,
    classes: int,
    ocr_channels: int = 512,
    ocr_key_channels: int = 256,
    ocr_dropout: float = 0.05,
) -> Parts:
    """Object-contextual representations (Yuan, Chen and Wang 2020), in the form of the authors' HRNet code.

    The papers' networks have encoder `tu-hrnet_w18`, `tu-hrnet_w48`: there the maps are the four branches of the
    last stage, without the classification stem that timm would put on them. One soft region per class; their logits
    are the auxiliary output of the network and supervised with weight 0.4.
    Differs: other encoders are used as HRNet is, by their concatenated maps, not dilated.
    """
    branches = {"feature_location": ""} if encoder.startswith("tu-hrnet") else {}
    body = _encoder(encoder, encoder_weights, **branches)
    decoder = OCRDecoder(sum(body.out_channels[2:]), classes, ocr_channels, ocr_key_channels, ocr_dropout)
    return _parts(body, decoder, nn.Conv2d(ocr_channels, classes, 1))


# --- PSPNet on a dilated encoder ---


class PyramidPooling(nn.Module):
    """Means over grids of bins x bins, each through a 1x1 convolution and resized, concatenated with the input.

    (B, D, h, w) -> (B, D + len(bins) * (D // len(bins)), h, w)
    """

    def __init__(self, inside: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            # batch normalisation over a single bin would fail on a batch of one image
            nn.Sequential(nn.AdaptiveAvgPool2d(b), conv_norm_relu(inside, inside // len(bins), 1, norm=b > 1))
            for b in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(resized(branch(x), x) for branch in self.branches)], dim=1)


class PyramidDecoder(nn.Module):
    """Pyramid pooling of the encoder's last map, a 3x3 convolution and dropout."""

    def __init__(self, inside: int, channels: int, bins: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.pool = PyramidPooling(inside, bins)
        self.fuse = conv_norm_relu(inside + len(bins) * (inside // len(bins)), channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.dropout(self.fuse(self.pool(maps[-1])))


def pspnet_dilated(
    encoder: str,
    *,
    encoder_weights: Any,
    classes: int,
    psp_out_channels: int = 512,
    psp_bins: Sequence[int] = (1, 2, 3, 6),
    psp_dropout: float = 0.1,
) -> Parts:
    """PSPNet as in the paper (Zhao et al. 2017) and in mmsegmentation: all stages, dilated to output stride 8.

    The library's own PSPNet cuts the encoder off at stride 8, and classifies with a 3x3 convolution after a 1x1.
    Differs: every convolution of a dilated stage has that stage's dilation, mmsegmentation's `contract_dilation`
    halves the first; the branch of one bin has a bias in place of batch normalisation.
    """
    body = _encoder(encoder, encoder_weights, output_stride=8)
    decoder = PyramidDecoder(body.out_channels[-1], psp_out_channels, psp_bins, psp_dropout)
    return _parts(body, decoder, nn.Conv2d(psp_out_channels, classes, 1))


# --- A classifier of whole images ---


class MeanOfLast(nn.Module):
    """The mean over space of the encoder's last map, (B, D, 1, 1)."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[-1].mean((2, 3), keepdim=True)


def image_classifier(encoder: str, *, encoder_weights: Any, classes: int) -> Parts:
    """Global average pooling and a linear classifier: one class for all pixels of an image, as in CIFAR-100."""
    body = _encoder(encoder, encoder_weights)
    return _parts(body, MeanOfLast(), nn.Conv2d(body.out_channels[-1], classes, 1))


NETWORKS: dict[str, Callable[..., Parts]] = {
    "SegNet": segnet,
    "AttentionUnet": attention_unet,
    "OCR": ocr,
    "PSPNetDilated": pspnet_dilated,
    "ImageClassifier": image_classifier,
}


def any_image_size(encoder: str) -> dict[str, bool]:
    """The options with which timm's encoder takes images of any size; Swin refuses all but one size without."""
    return {"strict_img_size": False} if encoder.startswith("tu-swin") else {}


def _encoder(name: str, weights: Any, **options: Any) -> Any:
    from segmentation_models_pytorch.encoders import get_encoder

    return get_encoder(name, weights=weights, **any_image_size(name), **options)


def _parts(encoder: Any, decoder: nn.Module, classifier: nn.Conv2d) -> Parts:
    _initialise(decoder, classifier)
    return Parts(encoder, decoder, nn.Sequential(classifier))


def _initialise(body: nn.Module, classifier: nn.Module) -> None:
    """The library's initialisation of decoders and heads."""
    from segmentation_models_pytorch.base import initialization

    initialization.initialize_decoder(body)
    initialization.initialize_head(classifier)
