"""Class counts and mask sizes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ltseg_core.stats import GROUPS, HEAD_SHARE, TAIL_SHARE, ClassCounts, groups
from ltseg_core.viz.look import _HUES, _LINES, _MARKERS, GROUP_COLOURS, GROUP_MARKERS, _styled, subplots
from ltseg_core.viz.pieces import _class_ticks, _columns, _legend_above, _number, _percent, _same_length

if TYPE_CHECKING:  # matplotlib waits for the first figure
    from matplotlib.axes import Axes


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
