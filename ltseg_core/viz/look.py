"""The one look of every figure: colours, markers, lines and labels of methods and groups, and its size."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:  # matplotlib waits for the first figure
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
    "pdf.fonttype": 42,  # TrueType, as publishers ask
    "ps.fonttype": 42,  # by which matplotlib also decides whether a PDF has one font or several
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
    "grw_ce": "generalised re-weighting",
    "crt": "cRT",
    "lws": "LWS",
    "tau_norm": "tau-norm",
    "posthoc_logit_adjustment": "post-hoc adjustment",
    "ncm": "NCM",
    "undersampling": "under-sampling",
    "balanced_bound": "balanced bound",
    "repeat_factor": "repeat-factor sampling",
    "vs": "vector scaling",
    "tde": "TDE",
    "clan": "CLAN",
}
"""Append only: the place of a method in this list is its colour, marker, line and hatch in every notebook."""
KIND_LABELS = {"pearson": "raw counts", "pearson log": "log counts", "spearman": "ranks (Spearman)"}
METRIC_LABELS = {"iou": "IoU", "acc": "Acc", "miou": "mIoU", "macc": "mAcc", "pixel_acc": "pixel Acc"}

_HUES = ("#333333", "#e69f00", "#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#9a7d5a")  # Okabe-Ito
_SHADES = ((0, 0.0), (255, 0.35), (0, 0.4), (128, 0.55))  # a grey and its share: as it is, lighter, darker, duller
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
        _mixed(_HUES[hue], *_SHADES[shade % len(_SHADES)]),
        _MARKERS[place % len(_MARKERS)],
        _LINES[place % len(_LINES)],
        _HATCHES[place % len(_HATCHES)],
        " ".join([METHOD_LABELS.get(method, method), *hyper]),
    )


def method_colour(name: str) -> str:
    """The one colour of a method, "#rrggbb"."""
    return method_style(name).colour


def _mixed(colour: str, grey: int, amount: float) -> str:
    """`colour` with a share of a grey, 0 black to 255 white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + amount * (grey - c)):02x}" for c in channels)


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
