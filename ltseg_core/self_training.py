"""Self-training: what an EMA teacher says of images without labels, and what of it the student learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltseg_core.config import IGNORE_INDEX, UserError


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, counters copied (Tarvainen & Valpola 2017)."""
    own, new = list(teacher.state_dict().values()), list(student.state_dict().values())
    floats = [(t, s) for t, s in zip(own, new, strict=True) if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s for _, s in floats], 1 - decay)
    for t, s in zip(own, new, strict=True):
        if not t.is_floating_point():
            t.copy_(s)


def pseudo_labels(logits: Tensor, inside: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Largest softmax probability, and its class where that is at least `threshold`, else 255.

    logits: (B, C, H, W);  inside: (B, H, W), ignore_index where there is no image;  returns (B, H, W) float and int64
    """
    confidence, label = logits.softmax(1).max(1)
    return confidence, torch.where((confidence >= threshold) & (inside != IGNORE_INDEX), label, IGNORE_INDEX)


def most_confident(
    confidence: Tensor, label: Tensor, classes: int, share: float, prior: Tensor | None, order: Tensor
) -> Tensor:
    """Of each class the most confident pseudo-labels of a process's part of a batch, rounded up; the others become 255.

    prior None: `share` of those of each class, so that easy classes do not crowd out the others (CBST, Zou et al., ECCV
    2018). Else (C,): share * prior_k of all of the batch, as far as the class has so many (DARS, He et al., ICCV 2021).
    confidence, label: (B, H, W) float, int64 in [0, C) or 255;  order: permutation of all pixels, which decides ties
    Differs: both papers fix the pseudo-labels of all images in rounds; here a teacher gives them batch by batch. CBST's
    code gives a pixel the class of the largest p_k / threshold_k, here it keeps that of the largest p_k; DARS draws at
    random among all that pass a threshold, here only among equals.
    """
    flat = label.flatten().where(label.flatten() != IGNORE_INDEX, classes)
    order = order[confidence.flatten()[order].argsort(descending=True, stable=True)]
    order = order[flat[order].argsort(stable=True)]  # by class, in each by falling confidence
    ranked = flat[order]
    first = torch.searchsorted(ranked, torch.arange(classes + 1, device=flat.device))
    number = first.diff()
    wanted = share * (number if prior is None else prior * first[-1])
    rank = torch.arange(len(flat), device=flat.device) - first[ranked]
    kept = rank < F.pad(wanted, (0, 1))[ranked]
    return torch.full_like(flat, IGNORE_INDEX).scatter(0, order, ranked.where(kept, IGNORE_INDEX)).view_as(label)


def class_mix(image: Tensor, label: Tensor, onto: Tensor, onto_label: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Paste half of the classes of each image onto another one, labels with them (ClassMix, Olsson et al., WACV 2021;
    from labelled images, as DACS across domains, Tranheden et al., WACV 2021).

    image, onto (B, 3, H, W); label, onto_label (B, H, W) int64, [0, C) or 255, which stays behind; score (B, C): of n
    classes in an image, the (n + 1) // 2 with the lowest are pasted. Random scores draw them.
    Differs, as the training uses it: unsure pixels are left out where DACS lowers the weight of the loss, what is
    pasted was recoloured once already, and nothing is blurred. Raises UserError for images of two sizes.
    """
    if image.shape != onto.shape:
        sizes = " and ".join(f"{h}x{w}" for h, w in (image.shape[-2:], onto.shape[-2:]))
        raise UserError(f"class_mix needs images of one size, got {sizes}: set size or crop")
    valid = label != IGNORE_INDEX
    known = label.where(valid, 0).flatten(1)
    present = torch.zeros_like(score).scatter_reduce_(1, known, valid.flatten(1).to(score.dtype), "amax") > 0
    rank = score.masked_fill(~present, torch.inf).argsort(1).argsort(1)
    pasted = rank < (present.sum(1, keepdim=True) + 1) // 2
    here = valid & pasted.gather(1, known).view_as(label)
    return image.where(here[:, None], onto), label.where(here, onto_label)
