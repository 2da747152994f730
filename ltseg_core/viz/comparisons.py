"""Scores, differences, costs and correlations of methods."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ltseg_core.stats import GROUPS
from ltseg_core.viz.look import (
    _HUES,
    _INTERVAL,
    FREQUENCY_STYLES,
    GROUP_COLOURS,
    GROUP_MARKERS,
    HOLLOW,
    KIND_LABELS,
    METRIC_LABELS,
    _mixed,
    _styled,
    method_style,
    subplots,
)
from ltseg_core.viz.pieces import (
    _by_frequency,
    _class_axis,
    _columns,
    _dodged_dots,
    _legend_above,
    _mark_groups,
    _method_dots,
    _method_rows,
    _one_per_metric,
    _panels,
    _percent,
    _plural,
    _short,
    _single,
)

if TYPE_CHECKING:  # matplotlib waits for the first figure
    from matplotlib.axes import Axes


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
        faces = [look.colour if s else _mixed(look.colour, 255, 0.7) for s in sure]
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
    colours = LinearSegmentedColormap.from_list("change", [_mixed(_HUES[2], 0, 0.5), "#ffffff", _HUES[1]])
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
        _method_dots(ax, rows, "published", none=0)
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+g}" if value else "0")
        ax.set_title(f"Δ{' '.join(METRIC_LABELS.get(word, word) for word in metric.split())}")
        ax.set_xlabel("points")
        ax.grid(axis="x")
    _method_rows(axes[0], methods)
    axes[0].set_ylabel(f"against {method_style(baseline).label}")
    notes = ["× published"] if "published" in table and table["published"].notna().any() else []
    notes += [HOLLOW] if _single(table).any() else []
    if notes:
        axes[0].figure.supxlabel("; ".join(notes), fontsize=8)
    return axes


@_styled
def plot_parts(
    parts: pd.DataFrame, whole: pd.DataFrame, looks: Mapping[str, Mapping[str, Any]], ax: Axes | None = None
) -> Axes:
    """Parts of a change as bars, a row per method: what adds to the right of zero, what takes to the left, each part
    after the one before; the whole as a dot with its interval.

    parts: a column per part (fractions), indexed by method;  whole: value, low, high of their sum, with that index
    looks: colour, and hatch if wanted, of each part
    """
    _columns(whole, "value", "low", "high")
    ax = ax or subplots(height=0.9 + 0.24 * len(parts))[1][0, 0]
    y, edges = np.arange(len(parts)), {True: np.zeros(len(parts)), False: np.zeros(len(parts))}
    for name, look in looks.items():
        value = parts[name].to_numpy()
        start = np.where(value > 0, edges[True], edges[False])
        ax.barh(y, value, left=start, height=0.65, edgecolor="white", linewidth=0.5, label=name, **look)
        edges = {True: edges[True] + value.clip(min=0), False: edges[False] + value.clip(max=0)}
    of = whole.loc[parts.index]
    for colour, width in (("white", 3.0), ("0.15", 1.2)):  # an edge that shows on dark bars
        ax.hlines(y, of["low"], of["high"], color=colour, linewidth=width)
    ax.plot(of["value"], y, "o", color="0.15", markersize=4, markeredgecolor="white", label="whole change")
    ax.axvline(0, color="0.15", linewidth=0.8)
    ax.xaxis.set_major_formatter(_percent)
    ax.grid(axis="x")
    _method_rows(ax, list(parts.index))
    return ax


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
    one_seed = _single(table)
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
    seen = {k: v for ax in axes for v, k in zip(*ax.get_legend_handles_labels(), strict=True)}
    present = [group for group in GROUPS if group in seen]
    axes[0].figure.legend([seen[group] for group in present], present, loc="outside upper left", ncols=3)
    if one_seed.any():
        axes[0].figure.supxlabel(HOLLOW, fontsize=8)
    return axes


@_styled
def plot_levels(table: pd.DataFrame, usual: Mapping[str, float], axes: np.ndarray | None = None) -> np.ndarray:
    """What each method has as a dot with its interval, a row per method, a panel per metric that begins at 0.

    table: method, metric (the label of the panel, with its unit), value, low, high, in that unit
    usual: where a line stands for comparison, by metric. Returns the axes, (metrics,).
    """
    _columns(table, "method", "metric", "value", "low", "high")
    methods, metrics = (list(dict.fromkeys(table[c])) for c in ("method", "metric"))
    axes = _one_per_metric(axes, metrics, height=1.1 + 0.24 * len(methods), share_y=True)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].set_index("method").reindex(methods)
        _method_dots(ax, rows, "reference", none=usual[metric])
        ax.set(xlabel=metric, xlim=(0, None))
        ax.grid(axis="x")
    _method_rows(axes[0], methods)
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
        _method_dots(ax, rows, "reference", none=1, size=5)
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

    table: a numeric column named `parameter`, metric, value, low, high (fractions), optionally seeds (a hollow dot
    where there is one) and published (a fraction, dashed). Returns the axes, (metrics,).
    """
    _columns(table, parameter, "metric", "value", "low", "high")
    metrics = list(dict.fromkeys(table["metric"]))
    axes = _one_per_metric(axes, metrics, height=3.0)
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].sort_values(parameter)
        x, colour = rows[parameter].to_numpy(), _HUES[0]
        ax.vlines(x, rows["low"], rows["high"], color=colour, linewidth=1.4)
        ax.plot(x, rows["value"], marker="o", color=colour, label="here")
        single = _single(rows).to_numpy()
        ax.plot(x[single], rows["value"][single], "o", color=colour, markerfacecolor="white")
        if "published" in rows and rows["published"].notna().any():
            shown = rows.dropna(subset="published")
            ax.plot(shown[parameter], shown["published"], "x--", color="0.15", label="published")
            ax.legend()
        ax.yaxis.set_major_formatter(_percent)
        ax.set(xlabel=parameter, ylabel=f"{' '.join(METRIC_LABELS.get(w, w) for w in metric.split())} (%)")
        ax.grid()
    if _single(table).any():
        axes[0].figure.supxlabel(HOLLOW, fontsize=8)
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
