"""What several figures are made of: axes of classes, rows of methods, ticks, legends, checks of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ltseg_core.viz.look import DPI, LABEL_PX, method_style, subplots

if TYPE_CHECKING:  # matplotlib waits for the first figure
    from matplotlib.axes import Axes


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


def _method_dots(ax: Axes, rows: pd.DataFrame, beside: str, *, none: float, size: float = 6) -> None:
    """Value and interval of each method, one below the other, hollow with one seed; a cross for the column `beside`.

    none: where a method would stand that changes nothing
    """
    ax.axvline(none, color="0.15", linewidth=0.8)
    for y, (method, row) in enumerate(rows.iterrows()):
        look = method_style(str(method))
        fill = "none" if row.get("seeds", 2) == 1 else look.colour
        dot: dict[str, Any] = {"marker": look.marker, "markersize": size, "markerfacecolor": fill}
        ax.hlines(y, row["low"], row["high"], color=look.colour, linewidth=1.4)
        ax.plot(row["value"], y, color=look.colour, linestyle="", **dot)
        ax.plot(row.get(beside, np.nan), y, "x", color="0.15", markersize=size - 1, zorder=3)


def _single(table: pd.DataFrame) -> pd.Series:
    """Which rows rest on one seed, by the column seeds; none without it."""
    return table.get("seeds", pd.Series(2, table.index)) == 1


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
