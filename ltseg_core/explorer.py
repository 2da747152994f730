"""One image under two methods (notebook 16): what can be picked, what the networks see and say, the controls.

A table of runs is {setting: {method: {seed: Run}}}, see `settings`.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from ltseg_core import analysis, evaluate, metrics, stats, train, viz
from ltseg_core.config import PROFILES, Experiment, UserError, choose
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.models import padding, stride_of
from ltseg_core.results import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALONE = "ground truth alone"
"""In place of the second method."""
MENUS = {"setting": "data set", "first": "method", "second": "against", "class_name": "class"}
COLUMNS = {"iou": "IoU (%)", "acc": "Acc (%)", "precision": "precision (%)", "fp_per_tp": "FP/TP"}
NUMBERS_STYLE = "white-space: nowrap; text-align: right; width: max-content"

Table = Mapping[str, Mapping[str, Mapping[int, Run]]]


class Pick(NamedTuple):
    """What is shown; None where `choices` shall choose."""

    setting: str | None = None
    first: str | None = None
    second: str | None = None
    split: str | None = None
    class_name: str | None = None
    image: str | None = None


# ---------------------------------------------------------------------------------------------- what there is


def settings(runs: Iterable[Run]) -> dict[str, dict[str, dict[int, Run]]]:
    """Runs by setting, method (`analysis.label`) and seed; within a setting they may be compared.

    A setting is all that an experiment says beside `analysis.MAY_DIFFER`. Its name is the data set, followed by the
    profile, or by the fields in which it differs from others of that data set. Methods come in the order of figures.
    Raises UserError if there are no runs.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_setting(run.experiment), []).append(run)
    if not found:
        raise UserError(
            "there are no finished runs to explore: make some with `ltseg run 02 --profile quick` (minutes on a"
            " laptop), or name their folder in LTSEG_RUNS"
        )
    profiles = {_setting(profile.experiment()): name for name, profile in PROFILES.items()}
    fields = {setting: json.loads(setting) for setting in found}
    table = {}
    for setting, group in found.items():
        own = fields[setting]
        others = [other for other in fields.values() if other["dataset"] == own["dataset"]]
        differing = [f"{k}={v}" for k, v in own.items() if any(other[k] != v for other in others)]
        beside = [profiles[setting]] if setting in profiles else differing
        name = own["dataset"] + (f" ({', '.join(beside)})" if beside else "")
        methods: dict[str, dict[int, Run]] = {}
        for run in sorted(group, key=lambda run: (*_place(run), run.experiment.seed)):
            methods.setdefault(analysis.label(run), {})[run.experiment.seed] = run
        table[name] = methods
    return dict(sorted(table.items()))


def setting_of(experiment: Experiment, table: Table) -> str | None:
    """The name of the setting that the experiment belongs to; None if nothing was run in it."""
    wanted = _setting(experiment)
    return next((name for name, methods in table.items() if _setting(_any(methods).experiment) == wanted), None)


def choices(table: Table, wanted: Pick, *, strict: bool = False) -> tuple[dict[str, dict[str, str]], Pick]:
    """What may be picked, {field of Pick: {value: how it reads}}, and the pick made of what is wanted.

    What is wanted but not to be had gives way to the default (`strict`: UserError with the nearest name): the first
    two methods, the split `test`, the class whose Acc differs most between them on that split (alone: with the lowest
    Acc), the image with most of its pixels. Only methods that share a seed are compared.
    """
    options: dict[str, dict[str, str]] = {}
    chosen: dict[str, str] = {}

    def add(field: str, values: dict[str, str], default: str) -> str:
        options[field], asked = values, getattr(wanted, field)
        if strict and asked is not None:
            asked = choose(MENUS.get(field, field), asked, values)
        chosen[field] = asked if asked in values else default
        return chosen[field]

    methods = table[add("setting", {name: name for name in table}, next(iter(table)))]
    labels = {method: viz.method_style(method).label for method in methods}
    first = add("first", labels, next(iter(labels)))
    others = {m: text for m, text in labels.items() if m != first and methods[m].keys() & methods[first].keys()}
    if strict and wanted.second in methods and wanted.second not in others:
        raise UserError(f"{wanted.second} cannot be compared with {first}: it is the same, or was run with other seeds")
    add("second", {**others, ALONE: ALONE}, next(iter(others), ALONE))
    groups = compared(table, Pick(**chosen))
    run = groups[first][0]
    splits = [str(split) for split in run.metrics["split"].unique()]
    split = add("split", {name: name for name in splits}, "test" if "test" in splits else splits[0])
    counts = [analysis.counts_of(group, split) for group in groups.values()]  # (S, N, C, C) each
    acc = [metrics.acc(c.sum((0, 1), dtype=np.int64)) for c in counts]
    apart = np.nan_to_num(np.abs(acc[0] - (acc[1] if len(acc) > 1 else 1)), nan=-1)
    group, by_frequency = stats.groups(run.counts()), run.counts().pixels.numpy().argsort(kind="stable")[::-1]
    names = {run.classes[k]: f"{run.classes[k]} ({group[k]})" for k in by_frequency}
    class_name = add("class_name", names, run.classes[int(apart.argmax())])
    pixels = counts[0][0, :, run.classes.index(class_name)].sum(-1)
    stems = _dataset(run.experiment, split).names
    if len(stems) != len(pixels):
        raise UserError(
            f"{run.experiment.evaluated_on[0]} has {len(stems)} images in split {split!r}, {run.path} was evaluated on"
            f" {len(pixels)}: the data changed since, delete the runs made from it and run again"
        )
    order = np.argsort(-pixels, kind="stable")
    add("image", {stems[i]: f"{stems[i]}: {pixels[i]:,} px" for i in order}, stems[order[0]])
    return options, Pick(**chosen)


def compared(table: Table, pick: Pick) -> dict[str, list[Run]]:
    """The runs of the methods picked on the seeds that they share, in order of seed, {method: runs}."""
    methods = [table[str(pick.setting)][m] for m in (pick.first, pick.second) if m is not None and m != ALONE]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in methods)))
    return {analysis.label(by_seed[seeds[0]]): [by_seed[seed] for seed in seeds] for by_seed in methods}


def _setting(experiment: Experiment) -> str:
    """As JSON."""
    fields = {k: v for k, v in experiment.to_dict().items() if k not in analysis.MAY_DIFFER}
    return json.dumps(fields, sort_keys=True)


def _any(methods: Mapping[str, Mapping[int, Run]]) -> Run:
    return next(iter(next(iter(methods.values())).values()))


def _place(run: Run) -> tuple[int, str]:
    """Where a method stands among the methods: as in the figures, arms behind their method."""
    known, method = list(viz.METHOD_LABELS), run.experiment.method
    return known.index(method) if method in known else len(known), analysis.label(run)


# ------------------------------------------------------------------------------------- what the networks see


class View(NamedTuple):
    """What the network of one run makes of one image."""

    predicted: np.ndarray
    """(H, W) uint8 at the label's own size."""
    features: np.ndarray
    """(h, w, D) float32, what the classifier sees; cells that lie in the padding alone are cut off."""
    cell: tuple[float, float]
    """Height and width of a feature cell in pixels of the label."""


@lru_cache(maxsize=16)
def look(run: Run, split: str, index: int) -> View:
    """Prediction and features of image `index` of a split, as the run is evaluated on it; kept for the next call."""
    network, dataset, precision = _network(run), _dataset(run.experiment, split), run.experiment.precision
    ((output, (label,)),) = evaluate.outputs(network, dataset, [index], precision=precision)
    predicted = evaluate.predicted_labels(evaluate.at_size(output.logits[0], label.shape)).cpu().numpy()
    features = output.features[0].float().permute(1, 2, 0).cpu().numpy()
    size = output.logits.shape[-2:]
    sides = zip(features.shape[:2], size, padding(size, stride_of(network)), label.shape, strict=True)
    cell = [(seen + padded) / cells * own / seen for cells, seen, padded, own in sides]
    rows, columns = (int(np.ceil(own / side - 1e-9)) for own, side in zip(label.shape, cell, strict=True))
    return View(predicted, features[:rows, :columns], (cell[0], cell[1]))


_network = lru_cache(maxsize=8)(Run.network)
_dataset: Any = lru_cache(maxsize=8)(train.evaluation_set)


def feature_colours(views: Sequence[View]) -> tuple[list[np.ndarray], list[float]]:
    """Feature maps as colours, (H, W, 3) uint8 RGB each, and the share of each map's variance that these show.

    The first three principal components of all maps together, each map taken from its own mean, are brightness,
    yellow to blue and green to red: the first can be read in grey, the first two by nearly everybody. Equal features
    have equal colours in all pictures; the range of colours spans the 1st to 99th percentile of each component, whose
    largest loading is positive. All maps must have the same D >= 3 (ValueError).
    """
    if len({view.features.shape[-1] for view in views}) != 1:
        raise ValueError(f"features differ in length: {[view.features.shape[-1] for view in views]}")
    flat = [view.features.reshape(-1, view.features.shape[-1]).astype(np.float64) for view in views]
    flat = [x - x.mean(0) for x in flat]
    together = np.concatenate(flat)
    axes = np.linalg.eigh(together.T @ together)[1][:, :-4:-1]  # (D, 3), largest first
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))
    shares = [float(np.square(x @ axes).sum() / max(np.square(x).sum(), 1e-300)) for x in flat]
    low, high = np.percentile(together @ axes, [1, 99], axis=0)
    pictures = []
    for x, view in zip(flat, views, strict=True):
        shade = np.clip((x @ axes - low) / np.maximum(high - low, 1e-12), 0, 1)
        encoded = ((60, 73, 73) + shade * (150, 110, 110)).round().astype(np.uint8).reshape(*view.features.shape[:2], 3)
        channels = [Image.fromarray(np.ascontiguousarray(encoded[..., i])) for i in range(3)]
        small = np.asarray(Image.merge("YCbCr", channels).convert("RGB"))
        rows, columns = (
            ((np.arange(side) + 0.5) / size).astype(int)
            for side, size in zip(view.predicted.shape, view.cell, strict=True)
        )
        pictures.append(small[rows[:, None], columns])
    return pictures, shares


# -------------------------------------------------------------------------------------------------- the page


class Shown(NamedTuple):
    """A pick with everything that is shown of it."""

    pick: Pick
    dataset: SegmentationDataset
    image: np.ndarray
    """(h, w, 3) uint8 as the networks see it."""
    label: np.ndarray
    """(H, W) uint8."""
    class_id: int
    views: dict[str, View]
    """By method: of the first seed that the methods share."""
    scores: pd.DataFrame
    """`analysis.class_scores` of the seeds that the methods share, on the whole split."""


def load(table: Table, pick: Pick) -> Shown:
    """What a complete pick shows. Raises UserError for damaged runs and missing data."""
    groups = compared(table, pick)
    run, split = groups[str(pick.first)][0], str(pick.split)
    dataset, class_id = _dataset(run.experiment, split), run.classes.index(str(pick.class_name))
    index = dataset.names.index(str(pick.image))
    views = {method: look(group[0], split, index) for method, group in groups.items()}
    scores = _scores(tuple(r for group in groups.values() for r in group), class_id, split)
    image, label = dataset.sample(index)
    return Shown(pick, dataset, image, label, class_id, views, scores)


def draw(shown: Shown) -> Figure:
    """The figure of a pick, see `viz.plot_errors`."""
    predictions = {method: view.predicted for method, view in shown.views.items()}
    scores = shown.scores[shown.scores["metric"] != "fp_per_tp"]  # no share
    data, title, over = shown.dataset, f"image {shown.pick.image}", f"whole {shown.pick.split} split"
    features = _feature_pictures(shown.views)
    axes = viz.plot_errors(
        shown.image, shown.label, predictions, features, scores, data.palette, data.classes, shown.class_id,
        title=title, over=over,
    )  # fmt: skip
    return axes[0, 0].figure


def numbers(shown: Shown) -> pd.DataFrame:
    """IoU, Acc, precision and FP/TP of the class as text for a reader, by method, in this image and the whole split.

    Percent but FP/TP; a dash stands for 0/0, and for FP/TP where no pixel of the class is found. Brackets are 95 %
    intervals over seeds and images, with one seed over images only.
    """
    rows = {}
    for method, view in shown.views.items():
        errors = metrics.error_map(shown.label, view.predicted, shown.class_id)
        counted = np.bincount(errors.ravel(), minlength=4)[1:4]
        image = metrics.Marginals(*counted.astype(np.float64)[:, None])
        here = {name: np.ravel(score(image))[0] for name, score in analysis.CLASS_SCORES.items()}
        mine = shown.scores[shown.scores["method"] == method].set_index("metric")
        seeds, style = int(mine["seeds"].iloc[0]), viz.method_style(method)
        over = f"{shown.pick.split} split, {seeds} seed{'s' if seeds > 1 else ''}"
        rows[style.label, "this image"] = {COLUMNS[name]: _readable(name, value) for name, value in here.items()}
        rows[style.label, over] = {
            COLUMNS[name]: _readable(name, *mine.loc[name, ["value", "low", "high"]]) for name in here
        }
    return pd.DataFrame(rows).T


def _readable(name: str, value: float, *limits: float) -> str:
    scale = 1 if name == "fp_per_tp" else 100
    if np.isnan(value):
        return "–"
    between = f" [{', '.join(f'{scale * limit:.1f}' for limit in limits)}]" if limits else ""
    return f"{scale * value:.1f}{between}"


def _feature_pictures(views: Mapping[str, View]) -> dict[str, tuple[str, np.ndarray]]:
    """Title and picture of each method's features: one projection for both where they have the same length."""
    lengths = {view.features.shape[-1] for view in views.values()}
    parts = [list(views)] if len(lengths) == 1 else [[method] for method in views]
    found = {}
    for part in parts:
        for method, picture, share in zip(part, *feature_colours([views[m] for m in part]), strict=True):
            length = views[method].features.shape[-1]
            own = "" if len(lengths) == 1 else ", own colours"
            found[method] = (f"features: 3 of {length}, {share:.0%} of variance{own}", picture)
    return found


@lru_cache(maxsize=64)
def _scores(runs: tuple[Run, ...], class_id: int, split: str) -> pd.DataFrame:
    return analysis.class_scores(runs, class_id, split=split)


# ---------------------------------------------------------------------------------------------- the controls


def controls(table: Table, pick: Pick) -> Any:
    """Menus for every field of a pick above the figure and the numbers, which follow them; an ipywidgets box.

    What a menu offers follows those before it. An error that a user can mend stands in place of the numbers.
    """
    import ipywidgets as widgets
    import matplotlib.pyplot as plt

    wide = widgets.Layout(width="19rem")
    menus = {field: widgets.Dropdown(description=MENUS.get(field, field), layout=wide) for field in Pick._fields}
    picture, below = widgets.Image(format="png", layout=widgets.Layout(max_width="100%")), widgets.HTML()
    filling = False

    def show(wanted: Pick) -> None:
        nonlocal filling
        filling = True  # new options change values, which are no choice of the user's
        try:
            options, chosen = choices(table, wanted)
            for field, menu in menus.items():
                menu.options = [(text, value) for value, text in options[field].items()]
                menu.value = getattr(chosen, field)
            shown = load(table, chosen)
            figure, png = draw(shown), io.BytesIO()
            figure.savefig(png, format="png", dpi=viz.DPI)
            plt.close(figure)
            picture.value, picture.layout.display = png.getvalue(), None
            below.value = f'<div style="{NUMBERS_STYLE}">{numbers(shown).to_html(border=0)}</div>'
        except UserError as error:
            picture.layout.display = "none"
            below.value = f"<b>{html.escape(str(error))}</b>"
        finally:
            filling = False

    def changed(_: Any) -> None:
        if not filling:
            show(Pick(**{field: menu.value for field, menu in menus.items()}))

    for menu in menus.values():
        menu.observe(changed, names="value")
    show(pick)
    row = widgets.Layout(display="flex", flex_flow="row wrap")
    return widgets.VBox([widgets.Box([*menus.values()], layout=row), picture, below])
