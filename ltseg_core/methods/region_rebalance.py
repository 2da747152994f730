"""Region Rebalance (Cui et al., Region Rebalance for Long-Tailed Semantic Segmentation, 2022).

Training adds a branch that classifies the mean decoder feature of each region with a balanced softmax:

    r_bk  = 1/S_bk sum_{u: y_bu = k} X_bu                     for every class k present in image b
    L_reg = -1/|R| sum_{(b,k) in R} log( F_k e^{g_k} / sum_j F_j e^{g_j} ),   g = W r_bk + beta
    L     = L_pixel + lambda L_reg

X (B, D, h, w) is what the pixel classifier sees, before dropout, y (B, H, W) the labels, S_bk the pixels of class k in
image b, F_k the training images that contain class k (Eq. 7), at least 1. Ignored pixels are in no region. The branch
belongs to the criterion, so what is evaluated and stored is the plain network.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core.config import IGNORE_INDEX, UserError
from ltseg_core.losses import _require, _wide, build_loss, check_labels, class_sizes
from ltseg_core.methods.base import PixelCriterion, Stage, checked
from ltseg_core.models import Output, SegmentationNetwork, padding
from ltseg_core.stats import ClassCounts

DROPOUT = 0.1  # of the hidden-layer head


@checked
def build(
    network: SegmentationNetwork,
    counts: ClassCounts,
    *,
    weight: float = 0.3,
    prior: Literal["images", "pixels", "none"] = "images",
    region_scope: Literal["image", "batch"] = "image",
    resolution: Literal["features", "labels"] = "features",
    head: Literal["linear", "hidden", "shared"] = "linear",
    head_lr: float = 1.0,
    average: Literal["batch", "image"] = "batch",
    components: bool = False,
    smoothing: float = 0.0,
    frozen_branch: bool = False,
    pixel_loss: str = "ce",
) -> list[Stage]:
    """One stage: the network, with the criterion L_pixel + lambda L_reg.

    weight:        lambda, >= 0; 0.3 in the paper, 1 in the released configurations; 0 is the pixel loss alone
    prior:         F. "images" is the paper's (component II); "none" is plain cross-entropy over regions
                   (component I); "pixels" counts labelled pixels
    region_scope:  a region is a class in an "image" (Eq. 7 counts images) or in the "batch" of one device, as in
                   the released code
    resolution:    "features" takes the labels to h x w by nearest neighbour (released code; loses small regions);
                   "labels" averages the features upsampled bilinearly to H x W, exactly, without storing them
    head:          "linear", or "hidden": D -> D, ReLU, dropout 0.1, D -> C. Differs: the released code has
                   an output C + 1 for ignored and absent regions, and no such region is ever a target here;
                   "shared" is the pixel classifier itself, for which the paper can be read, though its figure shows two
    head_lr:       learning rate of the branch over that of the decoder, > 0; the paper does not say
    average:       over all regions of the "batch", or over those of each "image" and then over images
    components:    every 8-connected component of a class in an image is a region of its own. They are found on
                   the host: the device is waited for in each step, and memory grows with their largest number in
                   an image. With resolution="features" they are components of the labels at h x w
    smoothing:     share of the target that is spread evenly over the other classes, in [0, 1 - 1/C]; 0 in the
                   paper, 0.5 in the released code
    frozen_branch: the branch keeps its random weights, only the features learn (one of the released heads)
    pixel_loss:    name of any pixel loss, with its own default hyper-parameters; "ce" in the paper
    Raises UserError for a value out of range and for options that contradict each other.
    """
    _require("head_lr", head_lr, head_lr > 0, "> 0")
    if head == "shared" and (frozen_branch or head_lr != 1):
        raise UserError("head='shared' is the pixel classifier: leave out frozen_branch and head_lr")
    classes = counts.num_classes
    _require("weight", weight, weight >= 0, ">= 0")
    _require("smoothing", smoothing, 0 <= smoothing <= 1 - 1 / classes, f"in [0, 1 - 1/{classes}]")
    if region_scope == "batch" and components:
        raise UserError("components=true splits the classes of one image: use region_scope='image'")
    if region_scope == "batch" and average == "image":
        raise UserError("average='image' needs regions that belong to an image: use region_scope='image'")
    depth = network.feature_channels
    layers: list[nn.Module] = [nn.Linear(depth, classes)]
    if head == "hidden":
        layers = [nn.Linear(depth, depth), nn.ReLU(), nn.Dropout(DROPOUT), *layers]
    criterion = RegionCriterion(
        build_loss(pixel_loss, counts),
        SharedHead(network.classifier) if head == "shared" else nn.Sequential(*layers),
        log_prior(counts, prior),
        weight=weight,
        stride=network.stride,
        scope=region_scope,
        resolution=resolution,
        average=average,
        components=components,
        smoothing=smoothing,
        auxiliary_weight=network.auxiliary_weight,
    )
    frozen = (criterion.head,) if frozen_branch else ()
    return [Stage("region_rebalance", network, criterion, frozen=frozen, criterion_lr=head_lr)]


def log_prior(counts: ClassCounts, prior: str) -> Tensor:
    """log( max(F_k, 1) / sum_j max(F_j, 1) ) of "images" or "pixels", or 0 for "none"; (C,) on the CPU."""
    sizes = class_sizes(counts, "pixel" if prior == "pixels" else "region")
    return torch.zeros_like(sizes) if prior == "none" else (sizes / sizes.sum()).log()


class SharedHead(nn.Module):
    """The pixel classifier, (N, D, h, w) -> (N, C, h, w), on means of features (..., D) -> (..., C)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.of_network = (classifier,)  # a tuple: no part of the criterion

    def forward(self, means: Tensor) -> Tensor:
        logits: Tensor = self.of_network[0](means.flatten(0, -2)[:, :, None, None])
        return logits.view(*means.shape[:-1], -1)


class RegionCriterion(nn.Module):
    """pixel_loss(z, y) + weight L_reg(X, y); see `build` for the options.

    head:      (..., D) -> (..., C), the region branch
    log_prior: (C,)
    stride:    the images were padded at the right and bottom to a multiple of it, and the features are of these
    """

    log_prior: Tensor

    def __init__(
        self,
        pixel_loss: nn.Module,
        head: nn.Module,
        log_prior: Tensor,
        *,
        weight: float,
        stride: int,
        scope: str = "image",
        resolution: str = "features",
        average: str = "batch",
        components: bool = False,
        smoothing: float = 0.0,
        auxiliary_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.pixel, self.head = PixelCriterion(pixel_loss, auxiliary_weight), head
        self.register_buffer("log_prior", log_prior)
        self.weight, self.stride, self.scope, self.resolution = weight, stride, scope, resolution
        self.average, self.components = average, components
        # PyTorch spreads the share over all classes, the true one included
        self.label_smoothing = smoothing * len(log_prior) / max(len(log_prior) - 1, 1)

    def forward(self, output: Output, target: Tensor) -> Tensor:
        """Features (B, D, h, w), logits (B, C, H, W) and labels (B, H, W) -> scalar."""
        check_labels(target, len(self.log_prior))
        with torch.autocast(target.device.type, enabled=False):  # sums over a region need float32
            region_loss = self.region_loss(_wide(output.features), target.long())
        return self.pixel(output, target) + self.weight * region_loss

    def region_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """L_reg; 0 if there is no region."""
        bottom, right = padding(target.shape, self.stride)
        target = F.pad(target, (0, right, 0, bottom), value=IGNORE_INDEX)
        if self.resolution == "features":
            target = nearest(target, features.shape[-2:])
        if self.components:
            slots, classes = connected_regions(target)
        else:
            number = len(self.log_prior)
            slots = target.masked_fill(target == IGNORE_INDEX, number)
            classes = torch.arange(number, device=target.device).expand(len(target), -1)
        masks = region_masks(slots, classes.shape[1], features.shape[-2:], self.resolution).to(features.dtype)
        sums = torch.einsum("bnhw,bdhw->bnd", masks, features)
        sizes = masks.sum((2, 3))
        if self.scope == "batch":
            sums, sizes, classes = sums.sum(0, keepdim=True), sizes.sum(0, keepdim=True), classes[:1]
        present = sizes > 0
        means = sums / sizes.masked_fill(~present, 1).unsqueeze(2)
        logits = self.head(means) + self.log_prior.to(means.dtype)  # (B, N, C)
        nll = F.cross_entropy(
            logits.flatten(0, 1), classes.flatten(), reduction="none", label_smoothing=self.label_smoothing
        ).view_as(present)
        nll = nll * present
        if self.average == "image":
            regions = present.sum(1)
            return (nll.sum(1) / regions.clamp(min=1)).sum() / (regions > 0).sum().clamp(min=1)
        return nll.sum() / present.sum().clamp(min=1)


def nearest(labels: Tensor, size: Any) -> Tensor:
    """Labels (B, H, W) at size (h, w): pixel floor(i H / h), as F.interpolate(mode="nearest")."""
    rows, columns = (
        torch.arange(n, device=labels.device) * full // n for n, full in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def region_masks(slots: Tensor, number: int, size: Any, resolution: str) -> Tensor:
    """Weight of each feature in the sum over each region, (B, N, h, w) float32.

    slots:  (B, H, W) int64, the region of each pixel in its image, 0..N-1, or N for no region
    size:   (h, w) of the features; resolution "features" wants H x W = h x w and gives 0/1 masks
    "labels": sum_{u in region} (A X)_u = sum_v (A^T M)_v X_v, where A upsamples bilinearly (align_corners=False)
    and M is the region's mask, so averaging upsampled features needs A^T M only. Every pixel u adds its four
    bilinear weights, which sum to 1. For a scale that is a power of two they add up without rounding, in any order.
    """
    (batch, height, width), (h, w) = slots.shape, size
    masks = torch.zeros(batch * (number + 1) * h * w, device=slots.device)
    image = torch.arange(batch, device=slots.device).view(-1, 1, 1)
    region = (image * (number + 1) + slots) * (h * w)  # first cell of the mask of each pixel's region
    rows, row_weights = _bilinear(height, h, slots.device)
    columns, column_weights = _bilinear(width, w, slots.device)
    corners = ((0, 0),) if resolution == "features" else ((0, 0), (0, 1), (1, 0), (1, 1))
    for i, j in corners:
        cell = region + (rows[i] * w).unsqueeze(1) + columns[j]
        weight = row_weights[i].unsqueeze(1) * column_weights[j]
        masks.scatter_add_(0, cell.flatten(), weight.expand(batch, -1, -1).flatten())
    return masks.view(batch, number + 1, h, w)[:, :number]


def _bilinear(full: int, small: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two cells each of `full` output pixels reads out of `small`, and their weights, each (2, full)."""
    position = ((torch.arange(full, device=device) + 0.5) * (small / full) - 0.5).clamp(min=0)
    low = position.long()
    share = position - low
    return torch.stack([low, (low + 1).clamp(max=small - 1)]), torch.stack([1 - share, share])


def connected_regions(target: Tensor) -> tuple[Tensor, Tensor]:
    """8-connected components of the labels: (slots, classes), found on the host.

    slots:   (B, H, W) int64, the component of each pixel, counted from 0 in each image; N at ignored pixels
    classes: (B, N) int64, the class of each component, 0 where an image has fewer; N >= 1
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    label = target.cpu().numpy()
    pixel = np.arange(label.size).reshape(label.shape)
    ends = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        first = np.s_[:, : label.shape[1] - down, max(0, -right) : label.shape[2] - max(0, right)]
        second = np.s_[:, down:, max(0, right) : label.shape[2] - max(0, -right)]
        same = label[first] == label[second]
        ends.append((pixel[first][same], pixel[second][same]))
    rows, columns = (np.concatenate(side) for side in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(label.size, label.size))
    _, component = connected_components(graph, directed=False)
    valid = label.ravel() != IGNORE_INDEX
    _, first_pixel, component = np.unique(component[valid], return_index=True, return_inverse=True)
    first_pixel = np.flatnonzero(valid)[first_pixel]
    image = first_pixel // label[0].size
    order = image.argsort(kind="stable")
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order)) - np.searchsorted(image[order], image[order])
    number = int(slot.max(initial=0)) + 1
    slots = np.full(label.size, number)
    slots[valid] = slot[component]
    classes = np.zeros((len(label), number), dtype=np.int64)
    classes[image, slot] = label.ravel()[first_pixel]
    return torch.from_numpy(slots).view_as(target).to(target.device), torch.from_numpy(classes).to(target.device)
