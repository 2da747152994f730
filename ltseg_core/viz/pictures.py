"""Images, label maps, predictions and errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ltseg_core.config import IGNORE_INDEX
from ltseg_core.data.folders import distinct_colours
from ltseg_core.metrics import error_map
from ltseg_core.viz.look import ERROR_COLOURS, ERROR_LABELS, METRIC_LABELS, WIDTH, _styled, method_style, subplots
from ltseg_core.viz.pieces import _columns, _dodged_dots, _short

if TYPE_CHECKING:  # matplotlib waits for the first figure
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def colourise(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Label map (H, W) in the colours of palette (C, 3): (H, W, 3) uint8, white where a pixel has no class."""
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(palette)] = palette
    return table[label]


@_styled
def plot_samples(
    images: Sequence[np.ndarray] | None,
    labels: Sequence[np.ndarray],
    palette: np.ndarray,
    classes: Sequence[str],
    *,
    instances: Sequence[np.ndarray] | None = None,
    titles: Sequence[str] = (),
) -> np.ndarray:
    """One column per sample: image, label map, instance mask, above a legend of the classes shown.

    images: (H, W, 3) uint8 each, or None to show no photographs;  labels: (H, W) uint8 each
    instances: (H, W) integers each, 0 on stuff. Returns the axes, (rows, samples).
    """
    rows: dict[str, list[np.ndarray]] = {"image": [*images]} if images is not None else {}
    rows["label map"] = [colourise(label, palette) for label in labels]
    if instances is not None:
        rows["instances"] = [_instance_colours(mask) for mask in instances]
    axes = _picture_grid(rows)
    for ax, title in zip(axes[0], titles, strict=bool(titles)):
        ax.set_title(title)
    plot_label_legend(axes[0, 0].figure, palette, classes, labels)
    return axes


@_styled
def plot_predictions(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    palette: np.ndarray,
    classes: Sequence[str],
) -> np.ndarray:
    """One row per image: image, ground truth, then the prediction of each method; returns the axes.

    predictions: method -> one (H, W) uint8 label map per image. Pixels without a label are white in the ground
    truth; predictions are shown everywhere.
    """
    columns = {"image": list(images), "ground truth": [colourise(label, palette) for label in labels]}
    for method, maps in predictions.items():
        columns[method_style(method).label] = [colourise(m, palette) for m in maps]
    axes = _picture_grid(dict(enumerate(zip(*columns.values(), strict=True))))
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title)
    plot_label_legend(axes[0, 0].figure, palette, classes, [*labels, *chain(*predictions.values())])
    return axes


def error_colours(errors: np.ndarray) -> np.ndarray:
    """A map of `metrics.error_map` (H, W) in ERROR_COLOURS, (H, W, 4) uint8 RGBA.

    Transparent where nothing is said of the class, white where a pixel has no label (it counts nowhere).
    """
    table = np.full((256, 4), 255, dtype=np.uint8)
    table[0] = 0
    table[1 : 1 + len(ERROR_COLOURS), :3] = [[*bytes.fromhex(colour[1:])] for colour in ERROR_COLOURS.values()]
    return table[errors]


@_styled
def plot_errors(
    image: np.ndarray,
    label: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    features: Mapping[str, tuple[str, np.ndarray]],
    scores: pd.DataFrame,
    palette: np.ndarray,
    classes: Sequence[str],
    class_id: int,
    *,
    title: str = "image",
    over: str = "all images",
) -> np.ndarray:
    """One image and one class: image, ground truth and the class's scores, then a row per method.

    A row holds the prediction, where it is right and wrong about the class (over the faded image), and features.
    image: (h, w, 3) uint8 of the label's aspect;  label, predictions[method]: (H, W) uint8
    features[method]: a title and a picture (H, W, 3) uint8
    scores: method, metric ("iou", "acc", ...), value, low, high (fractions), see `plot_means`;  over: of what
    title: of the image. Returns the axes, (1 + methods, 3).
    """
    from matplotlib.patches import Patch

    _columns(scores, "method", "metric", "value", "low", "high")
    name, (height, width) = _short(classes[class_id]), label.shape
    row = min(2.7 * height / width, 3.2) + 0.25
    figure, axes = subplots(1 + len(predictions), 3, height=row * (1 + len(predictions)) + 0.8)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.04, wspace=0.01, hspace=0.02)

    def show(ax: Axes, picture: np.ndarray, text: str, **look: Any) -> None:
        ax.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", **look)
        ax.set(xticks=[], yticks=[], title=text)
        ax.spines[:].set_visible(False)

    show(axes[0, 0], image, title)
    show(axes[0, 1], colourise(label, palette), "ground truth")
    metrics = pd.Index(dict.fromkeys(scores["metric"]))
    _dodged_dots(axes[0, 2], scores.set_index("metric"), metrics)
    axes[0, 2].set_xticks(range(len(metrics)), [METRIC_LABELS.get(m, m) for m in metrics])
    top = max(np.nanmax(scores[["value", "high"]].to_numpy(), initial=0), 0.01)
    axes[0, 2].set(ylabel=f"{name}, {over} (%)", xlim=(-0.5, len(metrics) - 0.5), ylim=(-0.03 * top, 1.03 * top))
    axes[0, 2].yaxis.tick_right()  # at the edge of the figure it takes no room from the pictures
    axes[0, 2].yaxis.set_label_position("right")
    axes[0, 2].spines[:].set_visible(False)
    lines = 1 if sum(len(method_style(method).label) for method in predictions) <= 40 else len(predictions)
    axes[0, 2].set_title("\n" * (lines - 1) + " ", fontsize=9)  # room for the legend, which may be wider than its panel
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "handletextpad": 0.2}
    axes[0, 2].legend(ncols=len(predictions) // lines, columnspacing=1, **above).set_in_layout(False)
    for line, (method, predicted) in zip(axes[1:], predictions.items(), strict=True):
        show(line[0], colourise(predicted, palette), "prediction")
        line[0].set_ylabel(method_style(method).label, fontsize=10)
        errors = error_map(label, predicted, class_id)
        counted = np.bincount(errors.ravel(), minlength=4)[1:4]
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in zip(ERROR_COLOURS, counted, strict=True))
        show(line[1], 0.8 + 0.12 * image.mean(-1) / 255, "", cmap="gray", vmin=0, vmax=1)
        show(line[1], error_colours(errors), f"{kinds} px")
        text, picture = features[method]
        show(line[2], picture, text)
    handles = [Patch(facecolor=ERROR_COLOURS[kind], label=text.format(name)) for kind, text in ERROR_LABELS.items()]
    axes[-1, 1].set_xlabel(" ", labelpad=9)  # room for this one
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "handlelength": 1.2}
    axes[-1, 1].legend(handles=handles, ncols=3, columnspacing=1.2, **below).set_in_layout(False)
    plot_label_legend(figure, palette, classes, [label, *predictions.values()])
    return axes


@_styled
def plot_label_legend(
    figure: Figure, palette: np.ndarray, classes: Sequence[str], labels: Iterable[np.ndarray] | None = None
) -> None:
    """Legend of the class colours below the figure; with `labels`, only of the classes that occur in them."""
    from matplotlib.patches import Patch

    present = np.arange(len(classes)) if labels is None else np.unique(np.concatenate([x.ravel() for x in labels]))
    entries = [
        Patch(facecolor=palette[k] / 255, edgecolor="0.5", linewidth=0.5, label=_short(classes[k]))
        for k in present[present < len(classes)]
    ]
    if IGNORE_INDEX in present:
        entries.append(Patch(facecolor="white", edgecolor="0.5", linewidth=0.5, label="not labelled"))
    longest = max((len(str(e.get_label())) for e in entries), default=1)
    most = max(1, int(figure.get_figwidth() * 72 / (34 + 4.4 * longest)))  # columns that fit
    lines = max(1, -(-len(entries) // most))
    columns = max(1, -(-len(entries) // lines))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, handlelength=1.2, columnspacing=1.2)


def _picture_grid(rows: Mapping[Any, Sequence[np.ndarray]]) -> np.ndarray:
    """Pictures of the rows, all columns equally wide; a row's name, if it is text, stands at its left."""
    pictures = list(rows.values())
    ratio = [max(p.shape[0] / p.shape[1] for p in row) for row in pictures]
    height = sum(ratio) * (WIDTH - 0.4) / len(pictures[0]) + 0.5
    figure, axes = subplots(len(rows), len(pictures[0]), height=height)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for name, row, line in zip(rows, pictures, axes, strict=True):
        for picture, ax in zip(row, line, strict=True):
            ax.imshow(picture, interpolation="nearest" if name != "image" else "auto")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        if isinstance(name, str):
            line[0].set_ylabel(name)
    return axes


def _instance_colours(mask: np.ndarray) -> np.ndarray:
    colours = np.array(distinct_colours(int(mask.max()) + 1), dtype=np.uint8)
    colours[0] = 235  # stuff
    return colours[mask]
