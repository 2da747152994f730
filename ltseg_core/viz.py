"""Every figure of the collection as a function of a table, in one style; `save_figure` writes it.

Shares and scores are fractions in every table; the axes show percent, and percentage points for differences.
Each `plot_*` draws on the axes given, else on new ones, and returns them.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from ltseg_core.config import IGNORE_INDEX, UserError
from ltseg_core.data.folders import distinct_colours
from ltseg_core.metrics import error_map
from ltseg_core.results import write_atomically
from ltseg_core.stats import GROUPS, HEAD_SHARE, TAIL_SHARE, ClassCounts, groups

if TYPE_CHECKING:  # matplotlib waits for the first figure
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

WIDTH = 9.0
"""Width of every figure in inches."""
DPI = 100
LABEL_PX = 11  # a class name, written upwards at 8 pt, needs this much of the axis
RC: dict[Any, Any] = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "errorbar.capsize": 0,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "ltseg",  # ids that do not change from call to call
    "pdf.fonttype": 42,
}

GROUP_COLOURS = {"head": "#2b3f77", "body": "#3a9d8f", "tail": "#f2a93b"}
"""Dark to light, so that the order reads in grey too."""
GROUP_MARKERS = {"head": "o", "body": "s", "tail": "^"}
ERROR_COLOURS = {"TP": "#0072b2", "FP": "#f2a93b", "FN": "#1a1a1a"}
"""Of one class's pixels: found, wrongly called so, missed. They differ in grey too, also from the faded image."""
ERROR_LABELS = {"TP": "{} found (TP)", "FP": "wrongly called {} (FP)", "FN": "{} missed (FN)"}

HOLLOW = "hollow: one seed, the interval covers images only"
METHOD_LABELS = {
    "ce": "cross-entropy",
    "balanced_softmax": "balanced softmax",
    "blv": "BLV",
    "region_rebalance": "region rebalance",
    "pat": "PAT",
    "medoe": "MEDOE",
    "disalign": "DisAlign",
    "weighted_ce": "weighted CE",
    "focal": "focal",
    "cb": "class-balanced",
    "cb_focal": "class-balanced focal",
    "ldam": "LDAM",
    "seesaw": "seesaw",
    "logit_adjustment": "logit adjustment",
    "lovasz": "Lovász",
    "dice": "Dice",
    "dice_ce": "Dice + CE",
    "gcl": "GCL",
    "grw_ce": "reweighted CE",
    "crt": "cRT",
    "lws": "LWS",
    "tau_norm": "tau-norm",
    "posthoc_logit_adjustment": "post-hoc adjustment",
    "ncm": "NCM",
    "undersampling": "under-sampling",
    "balanced_bound": "balanced bound",
    "repeat_factor": "repeat-factor sampling",
    "vs": "vector scaling",
}
"""Append only: the place of a method in this list is its colour, marker, line and hatch in every notebook."""
KIND_LABELS = {"pearson": "raw counts", "pearson log": "log counts", "spearman": "ranks (Spearman)"}
METRIC_LABELS = {"iou": "IoU", "acc": "Acc", "miou": "mIoU", "macc": "mAcc", "pixel_acc": "pixel Acc"}

_HUES = ("#333333", "#e69f00", "#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#9a7d5a")  # Okabe-Ito
_MARKERS = "osD^vPXphd*<>8"
_INTERVAL = ["value", "low", "high"]
_LINES = ((0, ()), (0, (5, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "|||")


FREQUENCY_STYLES = {"pixels": (_HUES[2], "o"), "images": (_HUES[0], "D"), "components": (_HUES[1], "^")}
"""Colour and marker of each way to count classes."""


class MethodStyle(NamedTuple):
    """How a method looks in every figure: it can be told apart by colour, by marker and by line."""

    colour: str
    marker: str
    line: Any
    hatch: str
    label: str


def method_style(name: str) -> MethodStyle:
    """The one look of a method in every notebook.

    `blv sigma=1`, an arm of a method, has the method's colour, and marker, line and hatch from its letters. A name
    without a place in the list has everything from its letters.
    """
    known = list(METHOD_LABELS)
    method, *hyper = name.split(" ")
    place = known.index(name) if name in known else len(known) + zlib.crc32(name.encode()) % 840
    colour = known.index(method) if method in known else place
    hue, shade = colour % len(_HUES), colour // len(_HUES)
    return MethodStyle(
        _shaded(_HUES[hue], (0.0, 0.45, -0.4, 0.68)[shade % 4]),
        _MARKERS[place % len(_MARKERS)],
        _LINES[place % len(_LINES)],
        _HATCHES[place % len(_HATCHES)],
        " ".join([METHOD_LABELS.get(method, method), *hyper]),
    )


def method_colour(name: str) -> str:
    """The one colour of a method, "#rrggbb"."""
    return method_style(name).colour


def _shaded(colour: str, amount: float) -> str:
    """`colour` mixed with white (amount > 0) or black (amount < 0)."""
    target = 255 if amount > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + abs(amount) * (target - c)):02x}" for c in channels)


# ------------------------------------------------------------------------------------------ style and saving


@contextmanager
def style() -> Iterator[None]:
    """Everything made inside has the collection's style."""
    import matplotlib as mpl

    with mpl.rc_context(RC):
        yield
        interactive = mpl.is_interactive()  # set by a notebook's backend on its first figure; shows the figures
    mpl.interactive(interactive)


def _styled(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return function(*args, **kwargs)

    return inside


@_styled
def subplots(
    rows: int = 1, columns: int = 1, *, height: float = 3.0, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of the fixed width and `height` inches, and its axes as an array (rows, columns)."""
    import matplotlib.pyplot as plt

    size = (WIDTH, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=share_x, sharey=share_y, squeeze=False)
    return figure, axes


def save_figure(figure: Figure, name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write `name`.png, .pdf and .svg into `folder` (default: $LTSEG_FIGURES, else ./figures); return the PNG.

    The layout of the figure is settled for good. Equal figures give equal bytes; an interrupted call leaves old or
    new files, never half a file.
    Raises ValueError for a name that is not one word of letters, digits, "_", "-" and "."; UserError if the
    folder cannot be written.
    """
    unnamed = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it would move things a little at every drawing
        for kind, metadata in unnamed.items():
            _save(partial(figure.savefig, format=kind, metadata=metadata, dpi=DPI), name, kind, folder)
    return _folder(folder) / f"{name}.png"


def save_table(table: pd.DataFrame, name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write a table with its index as `name`.csv beside the figures; errors and safety as in `save_figure`."""
    return _save(table.to_csv, name, "csv", folder)


def saved_tables(
    pattern: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    columns: Sequence[str] = (),
    dtype: type | None = None,
) -> dict[str, pd.DataFrame]:
    """Tables that `save_table` wrote under names like `*_claims`, by name.

    dtype: of all values, e.g. str; None guesses. Raises UserError for a file that is no table or lacks a column.
    """
    tables = {}
    for path in sorted(_folder(folder).glob(f"{pattern}.csv")):
        try:
            tables[path.stem] = table = pd.read_csv(path, dtype=dtype)
        except ValueError as error:
            raise UserError(f"{path} is no table ({error}): run its notebook again") from None
        if missing := [column for column in columns if column not in table]:
            raise UserError(f"{path} lacks the column {', '.join(missing)}; expected {', '.join(columns)}")
    return tables


def _folder(folder: str | os.PathLike[str] | None) -> Path:
    return Path(folder or os.environ.get("LTSEG_FIGURES") or "figures").expanduser()


def _save(write: Callable[[Path], object], name: str, kind: str, folder: str | os.PathLike[str] | None) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a name must be letters, digits, '_', '-' and '.', got {name!r}")
    path = _folder(folder) / f"{name}.{kind}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"cannot write {path.name} to {path.parent}: {error.strerror}; set LTSEG_FIGURES") from None
    return path


# --------------------------------------------------------------------------------------------------- pictures


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


# ------------------------------------------------------------------------------------------------- statistics


@_styled
def plot_class_shares(
    counts: ClassCounts,
    classes: Sequence[str],
    ax: Axes | None = None,
    *,
    group: Sequence[str] | None = None,
    title: str = "",
) -> Axes:
    """Share of pixels (filled, in the colour of the group) and of regions (open) of each class, by falling pixels.

    A region is a class in an image (Region Rebalance), so both sets of shares sum to 1. Classes that never occur
    have no place on a logarithmic axis: they are counted below it. Dotted: the 1 % and 0.1 % that part the groups
    if `group` is not given (`stats.groups`).
    """
    ax = subplots()[1][0, 0] if ax is None else ax
    _same_length("classes", classes, counts.num_classes)
    pixels = counts.pixel_share().numpy()
    regions = counts.images.numpy() / counts.images.sum().item()
    names = np.array(groups(counts) if group is None else group)
    _same_length("group", names, counts.num_classes)
    order = np.argsort(-pixels, kind="stable")
    order = order[pixels[order] > 0]
    x, size = np.arange(len(order)), 25 if len(order) < 40 else 9
    ax.vlines(x, pixels[order], regions[order], color="0.8", linewidth=1, zorder=1)
    for name in GROUPS:
        if not (mine := names[order] == name).any():
            continue
        look: dict[str, Any] = {"color": GROUP_COLOURS[name], "marker": GROUP_MARKERS[name], "s": size}
        ax.scatter(x[mine], pixels[order][mine], label=f"pixels, {name}", zorder=3, linewidth=0, **look)
    edge: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.25", "linewidth": 0.8, "marker": "D"}
    ax.scatter(x, regions[order], s=size * 0.6, label="regions", zorder=2, **edge)
    if group is None:
        for share in (HEAD_SHARE, TAIL_SHARE):
            ax.axhline(share, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    absent = counts.num_classes - len(order)
    note = f" ({absent} of {counts.num_classes} never occur)" if absent else ""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    ax.set(ylabel="share (%)", xlabel=f"classes, by falling pixel count{note}", title=title)
    _class_ticks(ax, [classes[k] for k in order])
    ax.legend(loc="lower left", borderaxespad=0.2, handletextpad=0.2, labelspacing=0.25)
    return ax


@_styled
def plot_imbalance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Pixel and region imbalance factor of each data set, by falling pixel factor, and their ratio.

    table: dataset, pixel, region (factors >= 1)
    """
    _columns(table, "dataset", "pixel", "region")
    ax = subplots(height=1.1 + 0.33 * len(table))[1][0, 0] if ax is None else ax
    table = table.sort_values("pixel", kind="stable")
    y = np.arange(len(table))
    ax.hlines(y, table["region"], table["pixel"], color="0.75", linewidth=1.5, zorder=1)
    ax.scatter(table["pixel"], y, color=_HUES[2], s=40, label="pixels: largest / smallest class", zorder=3)
    open_look: dict[str, Any] = {"facecolor": "white", "edgecolor": _HUES[0], "marker": "D"}
    ax.scatter(table["region"], y, s=28, label="images with the class: most / fewest", zorder=3, **open_look)
    for at, pixel, region in zip(y, table["pixel"], table["region"], strict=True):
        note = f"{_number(pixel / region)} ×"
        ax.annotate(note, (np.sqrt(pixel * region), at), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: _number(value))
    ax.set(xlabel="imbalance factor", yticks=y, yticklabels=table["dataset"], ylim=(-0.6, len(table) - 0.3))
    ax.grid(axis="x")
    _legend_above(ax)
    return ax


@_styled
def plot_image_imbalance(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of images whose largest class has at least x times the pixels of their smallest, per data set.

    table: dataset, ratio (one row per image). Each line is labelled at its median.
    """
    _columns(table, "dataset", "ratio")
    ax = subplots()[1][0, 0] if ax is None else ax
    for place, (name, rows) in enumerate(table.groupby("dataset", sort=False)):
        ratio = np.sort(rows["ratio"].to_numpy())
        left = 1 - np.arange(len(ratio)) / len(ratio)
        look: dict[str, Any] = {
            "color": _HUES[(2, 1, 0, 4, 5, 3, 6, 7)[place % 8]],
            "linestyle": _LINES[place % len(_LINES)],
        }
        median = float(np.median(ratio))
        ax.step(ratio, left, where="pre", label=f"{name}: median {_number(median)}", **look)
        ax.plot(median, 0.5, marker=_MARKERS[place % len(_MARKERS)], color=look["color"], markersize=6)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: _number(value))
    ax.yaxis.set_major_formatter(_percent)
    ax.set(xlabel="pixels of the largest / of the smallest class in one image", ylabel="images with at least that (%)")
    ax.set(ylim=(0, 1.02))
    ax.grid()
    ax.legend(loc="upper right")
    return ax


@_styled
def plot_mask_sizes(
    sizes: pd.DataFrame, classes: Sequence[str], ax: Axes | None = None, *, group: Sequence[str], title: str = ""
) -> Axes:
    """Pixels that a class has in an image that shows it: median, quartiles (thick), 5 to 95 % (thin).

    sizes: table of `stats.mask_sizes`;  group: name of each class's group. Classes by falling pixels in all.
    """
    _columns(sizes, "class_id", "pixels")
    _same_length("group", group, len(classes))
    ax = subplots()[1][0, 0] if ax is None else ax
    by_class = sizes.groupby("class_id")["pixels"]
    order = by_class.sum().sort_values(ascending=False, kind="stable").index
    q = by_class.quantile(np.array([0.05, 0.25, 0.5, 0.75, 0.95])).unstack().loc[order]
    colours = [GROUP_COLOURS[group[k]] for k in order]
    x = np.arange(len(order))
    ax.vlines(x, q[0.05], q[0.95], color=colours, linewidth=1)
    ax.vlines(x, q[0.25], q[0.75], color=colours, linewidth=4 if len(order) < 40 else 2)
    for name in GROUPS:
        if not (mine := np.array([group[k] == name for k in order])).any():
            continue
        look: dict[str, Any] = {"marker": GROUP_MARKERS[name], "facecolor": "white", "edgecolor": GROUP_COLOURS[name]}
        ax.scatter(x[mine], q[0.5].to_numpy()[mine], s=22 if len(order) < 40 else 10, zorder=3, label=name, **look)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: _number(value))
    ax.set(ylabel="pixels in an image", xlabel="classes, by falling pixel count", title=title)
    ax.grid(axis="y")
    _class_ticks(ax, [classes[k] for k in order])
    ax.legend(loc="upper right", ncols=3, borderaxespad=0, handletextpad=0.2)
    return ax


# ------------------------------------------------------------------------------------------------ comparisons


@_styled
def plot_history(
    table: pd.DataFrame, ax: Axes | None = None, *, smooth: int | None = None, ylabel: str = "training loss"
) -> Axes:
    """A quantity over the steps: mean over seeds, the band from the lowest to the highest seed.

    table: method, seed, step, value.  smooth: rows in the centred running mean of each seed; None: a twentieth
    """
    _columns(table, "method", "seed", "step", "value")
    ax = subplots()[1][0, 0] if ax is None else ax
    for method, rows in table.groupby("method", sort=False):
        look = method_style(str(method))
        seeds = rows.pivot(index="step", columns="seed", values="value").dropna()
        window = smooth or max(1, len(seeds) // 20)
        seeds = seeds.rolling(window, min_periods=1, center=True).mean()
        label = f"{look.label}, {_plural(seeds.shape[1], 'seed')}"
        ax.plot(seeds.index, seeds.mean(axis=1), color=look.colour, linestyle=look.line, label=label)
        if seeds.shape[1] > 1:
            ax.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=look.colour, alpha=0.2, lw=0)
    ax.set(xlabel="optimiser step", ylabel=ylabel)
    ax.grid()
    ax.legend()
    return ax


@_styled
def plot_per_class(table: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Score of each class with its interval, a panel per metric, classes by falling training pixels.

    table: method, class_id, class, group, train_pixels, metric ("iou" or "acc"), value, low, high (fractions; NaN
    limits draw no interval, a NaN value no dot). Returns the axes, (metrics,).
    """
    _columns(table, "method", "class_id", "class", "group", "train_pixels", "metric", "value", "low", "high")
    shown = list(dict.fromkeys(table["metric"]))
    axes = _panels(axes, (len(shown), 1), height=2.6)[:, 0]
    classes = _by_frequency(table)
    for metric, ax in zip(shown, axes, strict=True):
        _dodged_dots(ax, table[table["metric"] == metric].set_index("class_id"), classes.index)
        ax.set(ylabel=f"{METRIC_LABELS.get(metric, metric)} (%)")
        _mark_groups(ax, classes["group"])
    _class_axis(axes, classes)
    _legend_above(axes[0])
    return axes


@_styled
def plot_means(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Means of the methods side by side with their intervals, one place on the axis per metric.

    table: method, metric ("miou", "macc", "head", ...), value, low, high (fractions)
    """
    _columns(table, "method", "metric", "value", "low", "high")
    ax = subplots()[1][0, 0] if ax is None else ax
    metrics = pd.Index(dict.fromkeys(table["metric"]))
    _dodged_dots(ax, table.set_index("metric"), metrics)
    ax.set(ylabel="score (%)", xticks=range(len(metrics)))
    ax.set_xticklabels([" ".join(METRIC_LABELS.get(word, word) for word in m.split()) for m in metrics])
    ax.set_xlim(-0.5, len(metrics) - 0.5)
    _legend_above(ax)
    return ax


@_styled
def plot_deltas(table: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Change of each class's score, bars by falling training pixels with intervals; a row per method, a column
    per metric. A bar is full where its interval leaves out 0, pale where it does not (or there is none).

    table: method, class_id, class, group, train_pixels, metric ("iou" or "acc"), value, low, high (fractions)
    Returns the axes, (methods, metrics).
    """
    _columns(table, "method", "class_id", "class", "group", "train_pixels", "metric", "value", "low", "high")
    methods, metrics = (list(dict.fromkeys(table[c])) for c in ("method", "metric"))
    axes = _panels(axes, (len(methods), len(metrics)), height=1.9)
    classes = _by_frequency(table)
    x = np.arange(len(classes))
    for (i, method), (j, metric) in product(enumerate(methods), enumerate(metrics)):
        ax, look = axes[i, j], method_style(method)
        rows = table[(table["method"] == method) & (table["metric"] == metric)].set_index("class_id")
        rows = rows.reindex(classes.index)
        sure = (rows["low"] > 0) | (rows["high"] < 0)
        faces = [look.colour if s else _shaded(look.colour, 0.7) for s in sure]
        many = len(x) > 40
        ax.bar(x, rows["value"], color=faces, edgecolor=look.colour, linewidth=0 if many else 0.6, width=0.8)
        ax.vlines(x, rows["low"], rows["high"], color="0.5" if many else "0.15", linewidth=0.5 if many else 0.9)
        ax.axhline(0, color="0.15", linewidth=0.8)
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+g}" if value else "0")
        ax.set_title(f"{look.label}: Δ{METRIC_LABELS.get(metric, metric)}", pad=14 if i == 0 else 6)
        ax.grid(axis="y")
        _mark_groups(ax, classes["group"], names=i == 0)
    for row in axes:
        row[0].set_ylabel("points")
    for column in axes.T:
        _class_axis(column, classes)
    return axes


@_styled
def plot_delta_map(table: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Change of each class's score as a map, a row per method, classes by falling training pixels, a panel per metric.

    Blue is loss, orange gain, on a square-root scale. Up to 20 classes a change of half a point or more stands in the
    cell in points, bold where its interval leaves out 0; with more classes only the sign of those. Methods with one
    seed come last, below a line. table: as for `plot_deltas`, optionally seeds. Returns the axes, (metrics,).
    """
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap

    _columns(table, "method", "class_id", "class", "group", "train_pixels", "metric", "value", "low", "high")
    seeds = table.drop_duplicates("method").set_index("method").get("seeds", pd.Series(dtype=int))
    methods = sorted(dict.fromkeys(table["method"]), key=lambda method: seeds.get(method, 2) == 1)
    metrics, classes = list(dict.fromkeys(table["metric"])), _by_frequency(table)
    axes = _panels(axes, (1, len(metrics)), height=0.6 + 0.21 * len(methods))[0]
    limit = 100 * max(table["value"].abs().max(), 1e-3)
    scale = FuncNorm((lambda v: np.sign(v) * np.abs(v) ** 0.5, lambda v: np.sign(v) * v**2), -limit, limit)
    colours = LinearSegmentedColormap.from_list("change", [_shaded(_HUES[2], -0.5), "#ffffff", _HUES[1]])
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].set_index(["method", "class_id"])
        value, low, high = (100 * rows[c].unstack().loc[methods, classes.index].to_numpy() for c in _INTERVAL)
        picture = ax.imshow(value, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
        for (y, x), v in np.ndenumerate(value):
            sure = low[y, x] > 0 or high[y, x] < 0
            text = f"{v:+.0f}" if len(classes) <= 20 else f"{v:+.0f}"[0]
            look = {"weight": "bold" if sure else "normal", "color": "white" if v < -limit / 4 else "0.1"}
            if abs(v) >= 0.5 if len(classes) <= 20 else sure:
                ax.text(x, y, text.replace("-", "−"), ha="center", va="center", fontsize=6.5, in_layout=False, **look)
        if single := sum(bool(seeds.get(method, 2) == 1) for method in methods):
            ax.axhline(len(methods) - single - 0.5, color="0.15", linewidth=1)
        ax.set_title(f"Δ{METRIC_LABELS.get(metric, metric)}", pad=14)
        ax.set_yticks(range(len(methods)), [method_style(m).label for m in methods])
        _mark_groups(ax, classes["group"])
        _class_axis(np.array([ax]), classes)
        ax.set_xlim(-0.5, len(classes) - 0.5)
    axes[0].figure.colorbar(picture, ax=list(axes), label="points", pad=0.01, aspect=40)
    return axes


@_styled
def plot_differences(table: pd.DataFrame, axes: np.ndarray | None = None, *, baseline: str = "ce") -> np.ndarray:
    """Difference of each method to the baseline as a dot with its interval, a row per method, a panel per metric.

    table: method, metric, value, low, high (fractions, e.g. `analysis.means(runs, baseline="ce")`), optionally seeds
    (a hollow dot where there is one) and published (the paper's difference, a fraction, drawn as a cross; NaN none).
    Returns the axes, (metrics,).
    """
    _columns(table, "method", "metric", "value", "low", "high")
    methods, metrics = (list(dict.fromkeys(table[c])) for c in ("method", "metric"))
    axes = _one_per_metric(axes, metrics, height=1.1 + 0.24 * len(methods), share_y=True)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("method").reindex(methods)
        ax.axvline(0, color="0.15", linewidth=0.8)
        for y, (method, row) in enumerate(rows.iterrows()):
            look = method_style(str(method))
            fill = "none" if row.get("seeds", 2) == 1 else look.colour
            ax.hlines(y, row["low"], row["high"], color=look.colour, linewidth=1.4)
            ax.plot(row["value"], y, marker=look.marker, color=look.colour, markerfacecolor=fill, linestyle="")
            if not np.isnan(row.get("published", np.nan)):
                ax.plot(row["published"], y, marker="x", color="0.15", markersize=5, linestyle="")
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+g}" if value else "0")
        ax.set_title(f"Δ{' '.join(METRIC_LABELS.get(word, word) for word in metric.split())}")
        ax.set_xlabel("points")
        ax.grid(axis="x")
    _method_rows(axes[0], methods)
    axes[0].set_ylabel(f"against {method_style(baseline).label}")
    notes = ["× published"] if "published" in table and table["published"].notna().any() else []
    notes += [HOLLOW] if (table.get("seeds", pd.Series([2])) == 1).any() else []
    if notes:
        axes[0].figure.supxlabel("; ".join(notes), fontsize=8)
    return axes


@_styled
def plot_by_group(table: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Score of head, body and tail classes with its interval, a row per method, a panel per metric.

    table: method, group, metric (the title of its panel), value, low, high (fractions; NaN limits draw no interval),
    optionally seeds (a hollow dot where there is one). Zero is marked. Returns the axes, (metrics,).
    """
    _columns(table, "method", "group", "metric", "value", "low", "high")
    methods, metrics = (list(dict.fromkeys(table[c])) for c in ("method", "metric"))
    axes = _one_per_metric(axes, metrics, height=1.1 + 0.3 * len(methods), share_y=True)
    place = table["method"].map(methods.index)
    one_seed = table.get("seeds", pd.Series(2, table.index)) == 1
    for (ax, metric), (i, group) in product(zip(axes, metrics, strict=True), enumerate(GROUPS)):
        mine = (table["metric"] == metric) & (table["group"] == group)
        rows, y = table[mine], place[mine] + 0.25 * (i - 1)
        look: dict[str, Any] = {"color": GROUP_COLOURS[group], "marker": GROUP_MARKERS[group], "linestyle": ""}
        ax.hlines(y, rows["low"], rows["high"], color=look["color"], linewidth=1.4)
        for single, face in ((False, look["color"]), (True, "white")):
            seen = (one_seed[mine] == single).to_numpy()
            label = group if seen.any() and group not in ax.get_legend_handles_labels()[1] else None
            ax.plot(rows["value"][seen], y[seen], markerfacecolor=face, markersize=5, label=label, **look)
        ax.set_title(metric)
    for ax in axes:
        ax.axvline(0, color="0.15", linewidth=0.8, zorder=0)
        for y in range(0, len(methods), 2):  # bands tie the dots of a row together
            ax.axhspan(y - 0.5, y + 0.5, color="0.96", linewidth=0, zorder=-1)
        ax.xaxis.set_major_formatter(_percent)
        ax.grid(axis="x")
    _method_rows(axes[0], methods)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper left", ncols=3)
    if one_seed.any():
        axes[0].figure.supxlabel(HOLLOW, fontsize=8)
    return axes


@_styled
def plot_costs(table: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Costs in units of cross-entropy's as dots with intervals, a row per method, a panel per metric, logarithmic.

    table: method, metric (the panel's title), value, low, high (> 0; NaN limits draw no interval, a NaN value no dot),
    optionally reference (another measurement, drawn as a cross; NaN none). Returns the axes, (metrics,).
    """
    from matplotlib.ticker import LogLocator

    _columns(table, "method", "metric", "value", "low", "high")
    methods, metrics = (list(dict.fromkeys(table[c])) for c in ("method", "metric"))
    axes = _one_per_metric(axes, metrics, height=0.9 + 0.2 * len(methods), share_y=True)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("method").reindex(methods)
        ax.axvline(1, color="0.15", linewidth=0.8)
        for y, (method, row) in enumerate(rows.iterrows()):
            look = method_style(str(method))
            ax.hlines(y, row["low"], row["high"], color=look.colour, linewidth=1.4)
            ax.plot(row["value"], y, marker=look.marker, color=look.colour, markersize=5, linestyle="")
            ax.plot(row.get("reference", np.nan), y, marker="x", color="0.15", markersize=4, linestyle="", zorder=3)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.minorticks_off()
        ax.set(title=metric, xlabel="cross-entropy = 1")
        ax.grid(axis="x")
    _method_rows(axes[0], methods)
    return axes


@_styled
def plot_sweep(table: pd.DataFrame, parameter: str, axes: np.ndarray | None = None) -> np.ndarray:
    """Scores over the values of one hyper-parameter, with intervals, a panel per metric.

    table: a numeric column named `parameter`, metric, value, low, high (fractions), optionally published (a fraction,
    dashed). Returns the axes, (metrics,).
    """
    _columns(table, parameter, "metric", "value", "low", "high")
    metrics = list(dict.fromkeys(table["metric"]))
    axes = _one_per_metric(axes, metrics, height=3.0)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].sort_values(parameter)
        x = rows[parameter].to_numpy()
        ax.plot(x, rows["value"], marker="o", color=_HUES[0], label="here")
        ax.vlines(x, rows["low"], rows["high"], color=_HUES[0], linewidth=1.4)
        if "published" in rows and rows["published"].notna().any():
            shown = rows.dropna(subset="published")
            ax.plot(shown[parameter], shown["published"], "x--", color="0.15", label="published")
            ax.legend()
        ax.yaxis.set_major_formatter(_percent)
        ax.set(xlabel=parameter, ylabel=f"{' '.join(METRIC_LABELS.get(w, w) for w in metric.split())} (%)")
        ax.grid()
    return axes


@_styled
def plot_against_frequency(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    frequency: str = "pixels",
    score: str = "acc",
    log: bool = False,
    title: str = "",
) -> Axes:
    """Score of each class over its share of all pixels, images, ...: what a correlation coefficient sums up.

    table: class, group, columns named as `frequency` (counts) and `score` (fractions). The largest class is named.
    """
    _columns(table, "class", "group", frequency, score)
    ax = subplots()[1][0, 0] if ax is None else ax
    share = (table[frequency] / table[frequency].sum()).to_numpy()
    for name in GROUPS:
        mine = (table["group"] == name).to_numpy()
        look: dict[str, Any] = {"color": GROUP_COLOURS[name], "marker": GROUP_MARKERS[name]}
        ax.scatter(share[mine], table[score][mine], s=14, linewidth=0, label=name, **look)
    k = int(share.argmax())
    below: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 7}
    ax.annotate(_short(table["class"].iloc[k]), (share[k], table[score].iloc[k]), (3, -4), **below)
    if log:
        from matplotlib.ticker import LogLocator, NullLocator

        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(_percent)
    ax.yaxis.set_major_formatter(_percent)
    ax.set(xlabel=f"share of {frequency} (%)", ylabel=f"{METRIC_LABELS.get(score, score)} (%)", title=title)
    ax.grid()
    return ax


@_styled
def plot_correlations(table: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Correlation with class frequency as dots with intervals: a panel per data set and kind, a row per score.

    table: data and the columns of `analysis.frequency_correlations`. A dot is full where its interval leaves out 0,
    hollow where it does not (or there is none). Returns the axes, (data sets, kinds).
    """
    _columns(table, "data", "score", "kind", "frequency", "value", "low", "high")
    kinds, ways = (list(dict.fromkeys(table[c])) for c in ("kind", "frequency"))
    rows = {name: list(dict.fromkeys(own["score"])) for name, own in table.groupby("data", sort=False)}
    if axes is None:
        lengths = [len(scores) for scores in rows.values()]
        height = 0.6 + 0.5 * len(rows) + (0.1 + 0.05 * len(ways)) * sum(lengths)
        axes = subplots(len(rows), len(kinds), height=height)[1]
        axes[0, 0].get_gridspec().set_height_ratios(lengths)
    axes = np.asarray(axes).reshape(len(rows), len(kinds))
    for ax, ((name, scores), kind) in zip(axes.flat, product(rows.items(), kinds), strict=True):
        y = np.arange(len(scores))
        ax.axvline(0, color="0.15", linewidth=0.8)
        for i, way in enumerate(ways):
            own = table[(table["data"] == name) & (table["kind"] == kind) & (table["frequency"] == way)]
            own = own.set_index("score").reindex(scores)
            colour, marker = FREQUENCY_STYLES[way.split(" - ")[0]]
            at = y + 0.6 * ((i + 0.5) / len(ways) - 0.5)
            ax.hlines(at, own["low"], own["high"], color=colour, linewidth=1.2)
            faces = [colour if sure else "white" for sure in (own["low"] > 0) | (own["high"] < 0)]
            dots: dict[str, Any] = {"marker": marker, "edgecolor": colour, "linewidth": 0.9, "zorder": 3}
            ax.scatter(own["value"], at, s=20, c=faces, **dots)
        ax.set(yticks=[], ylim=(len(y) - 0.5, -0.5), title=KIND_LABELS.get(kind, kind))
        ax.grid(axis="x")
    for line, (name, scores) in zip(axes, rows.items(), strict=True):
        line[0].set_yticks(range(len(scores)), scores)
        line[0].set_ylabel(name)
        limits = [ax.get_xlim() for ax in line]
        for ax in line:
            ax.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    axes[0, 0].figure.align_ylabels(axes[:, 0])
    axes[-1, len(kinds) // 2].set_xlabel("difference of correlations" if " - " in ways[0] else "correlation")
    from matplotlib.lines import Line2D

    handles = []
    for way in ways:
        colour, marker = FREQUENCY_STYLES[way.split(" - ")[0]]
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1.2, label=way))
    axes[0, 0].figure.legend(handles=handles, loc="outside lower center", ncols=len(ways))
    return axes


# ----------------------------------------------------------------------------------------------------- pieces


def _dodged_dots(ax: Axes, table: pd.DataFrame, index: pd.Index) -> None:
    """Dot and interval of each method at the places of `index`, side by side; a percent axis.

    table: method, value, low, high, indexed like `index`
    """
    methods = list(dict.fromkeys(table["method"]))
    step = 0.7 / len(methods)
    x = np.arange(len(index))
    for i, method in enumerate(methods):
        look, rows = method_style(method), table[table["method"] == method].reindex(index)
        at = x + step * (i - (len(methods) - 1) / 2)
        ax.vlines(at, rows["low"], rows["high"], color=look.colour, linewidth=1.2 if len(index) < 40 else 0.6)
        size = 5 if len(index) < 40 else 2.5
        dots: dict[str, Any] = {"marker": look.marker, "linestyle": "", "markersize": size, "markeredgewidth": 0}
        ax.plot(at, rows["value"], color=look.colour, label=look.label, **dots)
    ax.yaxis.set_major_formatter(_percent)
    ax.grid(axis="y")


def _by_frequency(table: pd.DataFrame) -> pd.DataFrame:
    """One row per class, indexed by class_id, by falling training pixels."""
    one = table.drop_duplicates("class_id").set_index("class_id")
    return one.sort_values("train_pixels", ascending=False, kind="stable")


def _panels(axes: np.ndarray | None, shape: tuple[int, int], *, height: float) -> np.ndarray:
    """`axes` in the shape asked for, or new ones; `height` inches per row."""
    if axes is None:
        return subplots(*shape, height=height * shape[0] + 0.9, share_x=True, share_y=True)[1]
    axes = np.asarray(axes)
    if axes.size != shape[0] * shape[1]:
        raise ValueError(f"expected {shape[0]} x {shape[1]} axes, got {axes.size}")
    return axes.reshape(shape)


def _one_per_metric(
    axes: np.ndarray | None, metrics: Sequence[str], *, height: float, share_y: bool = False
) -> np.ndarray:
    """`axes`, one for each metric, or new ones side by side, `height` inches tall."""
    if axes is None:
        axes = subplots(1, len(metrics), height=height, share_y=share_y)[1]
    axes = np.asarray(axes).reshape(-1)
    if len(axes) != len(metrics):
        raise ValueError(f"expected {len(metrics)} axes, one per metric, got {len(axes)}")
    return axes


def _method_rows(ax: Axes, methods: Sequence[str]) -> None:
    """Names of the methods at the vertical places 0, 1, ..., from the top."""
    ax.set_yticks(range(len(methods)), [method_style(m).label for m in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)


def _class_axis(column: np.ndarray, classes: pd.DataFrame) -> None:
    """Class names under the last panel of a column only."""
    for ax in column:
        _class_ticks(ax, list(classes["class"]))
        ax.tick_params(labelbottom=ax is column[-1])
    column[-1].set_xlabel("classes, by falling training pixels")


def _class_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Names of the classes under the axis: all where they fit, else every second, third, ..."""
    spec, figure = ax.get_subplotspec(), ax.figure
    columns = spec.get_gridspec().ncols if spec else 1 / ax.get_position().width
    room = figure.get_figwidth() * DPI / columns - 60  # type: ignore[union-attr]  # labels of the other axis
    every = max(1, int(np.ceil(LABEL_PX * len(names) / room)))
    ax.set_xticks(range(0, len(names), every), [_short(name) for name in names[::every]], rotation=90)
    ax.set_xlim(-0.8, len(names) - 0.2)


def _mark_groups(ax: Axes, group: pd.Series, *, names: bool = True) -> None:
    """Where head, body and tail end, for classes sorted by frequency, and their names above the panel."""
    values = group.to_numpy()
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1)]
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        if start:
            ax.axvline(start - 0.5, color="0.5", linewidth=0.8, linestyle=":")
        if names:
            place = ((start + end - 1) / 2, 1.01)
            ax.text(*place, values[start], transform=ax.get_xaxis_transform(), ha="center", color="0.35", fontsize=8)


def _legend_above(ax: Axes) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.07), borderaxespad=0, ncols=6, handletextpad=0.2)


def _percent(value: float, _: Any) -> str:
    return f"{100 * value:g}"


def _number(value: float) -> str:
    """Three digits at most where they suffice: 2.1, 25, 384,895."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def _short(name: str) -> str:
    """The first synonym of a class name, at most 16 letters."""
    first = name.split(";")[0].split(",")[0].strip()
    return first if len(first) <= 16 else first[:15] + "…"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _columns(table: pd.DataFrame, *names: str) -> None:
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"the table lacks the column {missing[0]!r}: expected {', '.join(names)}")


def _same_length(what: str, values: Sequence[Any] | np.ndarray, expected: int) -> None:
    if len(values) != expected:
        raise ValueError(f"{what} must have {expected} entries, one per class, got {len(values)}")
