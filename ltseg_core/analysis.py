"""What the notebooks compute from finished runs: scores and differences with intervals, and verdicts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch

from ltseg_core import evaluate, metrics, stats
from ltseg_core.config import Experiment, UserError, choose, data_root
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.results import Run, kept

Verdict = Literal["supported", "contradicted", "open"]
Direction = Literal["positive", "negative", "equal"]
MAY_DIFFER = {"method", "hyper", "seed", "checkpoint_every", "eval_every"}
"""Fields in which compared experiments may differ."""
PER_CLASS = {"iou": metrics.iou, "acc": metrics.acc}
CORRELATIONS: dict[str, tuple[Literal["pearson", "spearman"], Callable[[np.ndarray], np.ndarray]]] = {
    "pearson": ("pearson", np.asarray),
    "pearson log": ("pearson", np.log),
    "spearman": ("spearman", np.asarray),
}
PAPERS = {
    "RR": "Region Rebalance",
    "BLV": "BLV",
    "PAT": "PAT",
    "MED": "MEDOE",
    "DIS": "DisAlign",
    "X": "where papers disagree",
}
"""By the letters that the IDs of their claims begin with."""
PHOTOGRAPHS = {"camvid": "CamVid", "ccp": "CCP"}
"""Data sets of photographs with kept runs (`on_photographs`), and their titles."""
CHANGING = {**PER_CLASS, "precision": metrics.precision}
CLASS_SCORES: dict[str, Callable[[Any], Any]] = {**CHANGING, "fp_per_tp": partial(metrics.fp_per_tp, classes=[0])}
"""Of counts of a single class."""


def label(run: Run | Experiment) -> str:
    """The method and the hyper-parameters given to it, e.g. `blv sigma=4`."""
    e = run.experiment if isinstance(run, Run) else run
    return " ".join([e.method, *(f"{k}={v}" for k, v in sorted(e.hyper.items()))])


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each method in order of seed.

    Raises UserError if there are none, if two share method and seed, if the methods differ in seeds, or if any two
    differ in anything but method, hyper-parameters and seed, or in their training labels: they could not be compared.
    With `labelled_images` each seed has its own labels, the same for all methods.
    """
    table: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.experiment.seed):
        table.setdefault(label(run), []).append(run)
    if not table:
        raise UserError("no runs to compare: train some first, e.g. `ltseg train --method ce`")
    (first, reference), *others = table.items()
    for name, group in ((first, reference), *others):
        seeds = [run.experiment.seed for run in group]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{name} has several runs of one seed ({seeds}): compare runs of one setting at a time")
        if seeds != (expected := [run.experiment.seed for run in reference]):
            raise UserError(f"{name} has the seeds {seeds}, {first} {expected}: a paired comparison needs the same")
        for run, same_seed in zip(group, reference, strict=True):
            own, other = (r.experiment.to_dict() for r in (run, reference[0]))
            for what in own.keys() - MAY_DIFFER:
                if own[what] != other[what]:
                    raise UserError(
                        f"{name} (seed {run.experiment.seed}) and {first} differ in {what}: {own[what]!r} and"
                        f" {other[what]!r}; they cannot be compared"
                    )
            labelled = same_seed if run.experiment.labelled_images else reference[0]
            mine, theirs = run.counts(), labelled.counts()
            relabelled = not (mine.pixels.equal(theirs.pixels) and mine.images.equal(theirs.images))
            for what, differ in (("class lists", run.classes != reference[0].classes), ("training labels", relabelled)):
                if differ:
                    raise UserError(f"{name} and {first} differ in their {what}; they cannot be compared")
    return table


def counts_of(runs: Sequence[Run], split: str = "test") -> np.ndarray:
    """Confusion counts (S, N, C, C) of runs that differ in the seed only."""
    return np.stack([run.confusion(split) for run in runs])


def _groups(runs: Sequence[Run], given: Sequence[str] | None = None) -> list[str]:
    """The groups given, else those by share of the training pixels, where these are the same for all runs."""
    if given is not None:
        return list(given)
    if len({tuple(stats.groups(run.counts())) for run in runs}) > 1:
        raise UserError(
            "with few labels each seed has its own counts, and here other groups: pass groups=, e.g."
            " stats.groups(counts) of all training images"
        )
    return stats.groups(runs[0].counts())


def group_score(score: Callable[..., Any], groups: Sequence[str], group: str) -> Callable[[Any], Any]:
    """A metric that is the mean of a per-class metric over the classes of one group ("all" takes every class).

    Classes without a labelled pixel are left out, so that all methods are averaged over the same classes; in
    `metrics.miou` such a class counts as 0 for a method that predicts it.
    """
    chosen = np.flatnonzero([group in ("all", g) for g in groups])

    def mean(counts: Any) -> Any:
        m = metrics.Marginals(*(x[..., chosen] for x in metrics.marginals(counts)))
        return metrics.nanmean(np.where(m.tp + m.fn > 0, score(m), np.nan))

    return mean


def _scores(groups: Sequence[str]) -> dict[str, Callable[[Any], Any]]:
    """The means of the tables: mIoU and mAcc over all classes and by group, pixel accuracy."""
    table: dict[str, Callable[[Any], Any]] = {}
    for name, score in PER_CLASS.items():
        table[f"m{name}"] = group_score(score, groups, "all")
        table |= {f"{g} {name}": group_score(score, groups, g) for g in stats.GROUPS if g in groups}
    return table | {"pixel_acc": metrics.pixel_acc}


def _together(scores: Iterable[Callable[[Any], Any]]) -> Callable[[Any], np.ndarray]:
    """K scores of counts (..., C, C), each (...), as one function that gives (..., K)."""
    return lambda counts: np.stack([score(counts) for score in scores], -1)


def means(
    runs: Iterable[Run],
    *,
    baseline: str | None = None,
    groups: Sequence[str] | None = None,
    split: str = "test",
    replicates: int = 2000,
) -> pd.DataFrame:
    """Means of every method, or their paired differences to `baseline`: method, metric, value, low, high, seeds.

    metric: miou, macc, the same by group (`tail iou`), pixel_acc, over the classes with labelled pixels
    (`group_score`); 95 % intervals as in `metrics.interval`, those of a score itself cut off at 0 and 1.
    groups: C names; None takes `stats.groups` by share of the pixels
    Raises UserError for runs that cannot be compared (`by_method`), and if there is nothing beside the baseline.
    """
    rows = []
    for method, group, interval in _compared(runs, baseline, split, replicates):
        scores = _scores(_groups(group, groups))
        limits = zip(scores, *interval(_together(scores.values())), strict=True)
        rows += [(method, name, value, low, high, len(group)) for name, value, low, high in limits]
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "seeds"])


def per_class(
    runs: Iterable[Run], *, baseline: str | None = None, split: str = "test", replicates: int = 2000
) -> pd.DataFrame:
    """IoU and Acc of every class, or their paired differences to `baseline`: method, class_id, class, group,
    train_pixels, metric, value, low, high. Errors as in `means`.
    """
    frames = []
    for method, group, interval in _compared(runs, baseline, split, replicates):
        for name, score in PER_CLASS.items():
            value, low, high = interval(score)
            frames.append(_class_columns(group, method, name).assign(value=value, low=low, high=high))
    return pd.concat(frames, ignore_index=True)


def class_scores(runs: Iterable[Run], class_id: int, *, split: str = "test", replicates: int = 2000) -> pd.DataFrame:
    """What one class scores with each method over a whole split: method, metric, value, low, high, seeds.

    metric: iou, acc, precision, fp_per_tp; NaN where 0/0, and fp_per_tp also where no pixel of the class is found.
    seeds: those that have the score, over which it is a mean
    Intervals as in `means`. Raises UserError for runs that cannot be compared (`by_method`).
    """
    rows = []
    for method, group in by_method(runs).items():
        of_class = (m[..., [class_id]] for m in metrics.marginals(counts_of(group, split)))
        drawn = metrics.resample(metrics.Marginals(*of_class), replicates=replicates)
        for name, score in CLASS_SCORES.items():
            within = (0, np.inf if name == "fp_per_tp" else 1)
            limits = np.ravel(metrics.interval(drawn, score, within=within))
            rows.append((method, name, *limits.tolist(), int(np.isfinite(score(drawn.seeds)).sum())))
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "seeds"])


Interval = Callable[[Callable[..., Any]], tuple[Any, Any, Any]]


def _compared(
    runs: Iterable[Run], baseline: str | None, split: str, replicates: int
) -> Iterator[tuple[str, list[Run], Interval]]:
    """Each method with its runs and the function that takes a metric to its value, or difference, and interval."""
    table = by_method(runs)
    if baseline is None:
        for method, group in table.items():
            yield method, group, partial(metrics.interval, _resampled(group, split, replicates), within=(0, 1))
        return
    reference = _resampled(_reference(table, baseline), split, replicates)
    for method, group in table.items():
        own = _resampled(group, split, replicates)
        _check_labels(method, own.seeds, baseline, reference.seeds)
        yield method, group, partial(metrics.paired_interval, own, reference)


def _check_labels(a: str, x: metrics.Marginals, b: str, y: metrics.Marginals) -> None:
    """Refuse scores on different labels, by the methods' names."""
    if not metrics.same_labels(x, y):
        raise UserError(f"{a} and {b} were evaluated on different labels: other images, or labels that changed since")


def _resampled(group: Sequence[Run], split: str, replicates: int) -> metrics.Resampled:
    return _resampled_once(tuple((run, run.written()) for run in group), split, replicates)


@lru_cache(maxsize=128)
def _resampled_once(group: tuple[tuple[Run, int], ...], split: str, replicates: int) -> metrics.Resampled:
    """Kept for the next table of the same runs."""
    return metrics.resample(counts_of([run for run, _ in group], split), replicates=replicates)


def _class_columns(runs: Sequence[Run], method: str, metric: str) -> pd.DataFrame:
    run, counts = runs[0], runs[0].counts()
    return pd.DataFrame(
        {
            "method": method,
            "class_id": range(len(run.classes)),
            "class": run.classes,
            "group": _groups(runs),
            "train_pixels": counts.pixels.numpy(),
            "metric": metric,
        }
    )


def class_changes(runs: Iterable[Run], *, baseline: str = "ce", split: str = "test") -> pd.DataFrame:
    """What each method does to each class, against the baseline of the same seed; one row per method, seed and class.

    Columns: method, seed, class_id, class, group, train_pixels, target_pixels;  iou, acc, precision and their values
    `before` (fractions; NaN where 0/0);  fp_per_tp, fp_per_tp_before;  iou_by_recall: IoU at the new Acc, had FP/TP
    stayed (`metrics.iou_at`; NaN for a class not found before);  more_fp: false positives gained (pixels);
    afforded_fp: gain of false positives at which IoU stays the same, p (n + FP) with Acc' = (1 + p) Acc (MEDOE,
    Eq. 16; NaN for a class not found before);  remark1: whether Region Rebalance's Remark 1 is met.
    Raises UserError for runs that cannot be compared (`by_method`), and if there is nothing beside the baseline.
    """
    table = by_method(runs)
    reference = _reference(table, baseline)
    frames = []
    for method, group in table.items():
        plain = _class_columns(group, method, "").drop(columns="metric")
        for run, other in zip(group, reference, strict=True):
            old, new = (metrics.marginals(r.confusion(split).sum(0, dtype=np.int64)) for r in (other, run))
            _check_labels(method, new, baseline, old)
            with np.errstate(divide="ignore", invalid="ignore"):
                columns = {
                    **{name: score(new) for name, score in CHANGING.items()},
                    **{f"{name}_before": score(old) for name, score in CHANGING.items()},
                    "fp_per_tp": new.fp / new.tp,
                    "fp_per_tp_before": old.fp / old.tp,
                    "more_fp": new.fp - old.fp,
                    "iou_by_recall": np.where(old.tp > 0, metrics.iou_at(metrics.acc(new), old.fp / old.tp), np.nan),
                    "afforded_fp": np.where(old.tp > 0, (new.tp / old.tp - 1) * (old.tp + old.fn + old.fp), np.nan),
                    "remark1": metrics.remark1(old, new),
                }
            frames.append(plain.assign(seed=run.experiment.seed, target_pixels=new.tp + new.fn, **columns))
    return pd.concat(frames, ignore_index=True)


def _reference(table: dict[str, list[Run]], baseline: str) -> list[Run]:
    """The baseline's runs, taken out of `table`. Raises UserError if they, or any others, are missing."""
    if baseline not in table:
        raise UserError(f"no runs of the baseline {baseline!r} among {', '.join(table)}")
    if len(table) == 1:
        raise UserError(f"only {baseline!r} was run: there is nothing to compare it with")
    return table.pop(baseline)


def head_lead(sources: np.ndarray) -> tuple[float, float, float]:
    """Share of the head pixels among false positives less that of the next largest group, with its interval.

    sources: (S, N, 3) false positives per seed and image by true group, e.g. those of the tail classes summed from
    `metrics.false_positive_sources`. NaN without a false positive.
    """

    def lead(total: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (total[..., 0] - total[..., 1:].max(-1)) / total.sum(-1)

    return metrics.bootstrap(sources, lead, within=(-1, 1))


def tail_distances(
    runs: Iterable[Run],
    dataset: SegmentationDataset,
    groups: Sequence[str],
    *,
    baseline: str = "ce",
    device: str | torch.device = "cpu",
) -> dict[tuple[str, int], np.ndarray]:
    """Distance of head pixels to the nearest tail pixel of their image, in pixels of the label, by method and seed,
    (P,) float32 each.

    "all": every head pixel;  a method: its new errors, the head pixels that the baseline of the same seed gets right
    and this network calls a tail class (MEDOE, Appendix A.7). Images without a tail pixel have no distance and are left
    out.
    groups: C names, see `stats.groups`
    Raises UserError for runs that cannot be compared (`by_method`), or are kept without weights.
    """
    from scipy.ndimage import distance_transform_edt

    head, tail = (np.flatnonzero(np.asarray(groups) == name) for name in ("head", "tail"))
    near = [i for i in range(len(dataset)) if np.asarray(dataset.histogram(i))[tail].any()]
    table = by_method(runs)
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for of_seed in zip(_reference(table, baseline), *table.values(), strict=True):
        e = of_seed[0].experiment
        networks = [run.network().to(device) for run in of_seed]
        maps = [evaluate.predictions(network, dataset, near, precision=e.precision) for network in networks]
        errors = [found.setdefault((name, e.seed), []) for name in ("all", *table)]
        for pairs in zip(*maps, strict=True):
            label = pairs[0][1].cpu().numpy()
            old, *new = (predicted.cpu().numpy() for predicted, _ in pairs)
            away = distance_transform_edt(~np.isin(label, tail)).astype(np.float32)
            chosen = np.isin(label, head)
            fresh = [chosen & (old == label) & np.isin(predicted, tail) for predicted in new]
            for own, pixels in zip(errors, (chosen, *fresh), strict=True):
                own.append(away[pixels])
    return {name: np.concatenate([np.zeros(0, np.float32), *parts]) for name, parts in found.items()}


def alarms_beside_tail(
    runs: Sequence[Run], groups: Sequence[str], *, split: str = "test"
) -> tuple[float, float, float]:
    """Share of the head pixels called a tail class that lie in images with a tail pixel, of one method's runs, with its
    interval over test images and seeds: (value, low, high); NaN where no head pixel is called so.

    groups: C names, see `stats.groups`
    """
    counts = counts_of(runs, split)  # (S, N, C, C)
    head, tail = (np.flatnonzero(np.asarray(groups) == name) for name in ("head", "tail"))
    called, shows = counts[:, :, head][..., tail].sum((2, 3)), counts[:, :, tail].sum((2, 3)) > 0
    with np.errstate(invalid="ignore"):
        return metrics.bootstrap(np.stack([called * shows, called], -1), lambda n: n[..., 0] / n[..., 1], within=(0, 1))


def frequency_correlations(
    frequency: pd.DataFrame, scores: Mapping[str, np.ndarray], *, replicates: int = 2000
) -> pd.DataFrame:
    """How closely class scores follow class frequencies: score, kind, frequency, value, low, high, classes.

    frequency: one row per class, one column per way to count (pixels, images, ...)
    scores: (C,) each, or (M, C), the scores of M models: then the mean of their coefficients
    kind: a key of CORRELATIONS, `pearson` being that of the raw counts. 95 % bootstrap percentile intervals, classes
    resampled with replacement, alike for everything in the table.
    For every column after the first there is also its difference to the first, `images - pixels`.
    A class with a count of zero, or without one of the scores, is left out of all.
    """
    first, *others = frequency.columns
    stacked = [np.atleast_2d(score) for score in scores.values()]
    y, last = np.concatenate(stacked), np.cumsum([len(rows) for rows in stacked])
    used = (frequency > 0).all(axis=1).to_numpy() & ~np.isnan(y).any(0)
    rows = []
    for kind, (coefficient, scale) in CORRELATIONS.items():
        x = scale(frequency.to_numpy(dtype=float)[used].T)
        found = stats.resampled_correlations(x, y[:, used], kind=coefficient, replicates=replicates)
        for name, models in zip(scores, np.split(found, last[:-1], axis=2), strict=True):
            samples = dict(zip(frequency, models.mean(2).T, strict=True))
            samples |= {f"{column} - {first}": samples[column] - samples[first] for column in others}
            for column, values in samples.items():
                low, high = stats.percentile_interval(values[1:], 0.95)
                rows.append((name, kind, column, values[0], low, high, int(used.sum())))
    return pd.DataFrame(rows, columns=["score", "kind", "frequency", "value", "low", "high", "classes"])


def ranked(table: pd.DataFrame, metric: str = "miou") -> pd.DataFrame:
    """The rows of a table like that of `means`, its methods by falling value of one metric, which each must have."""
    metric = choose("metric", metric, table["metric"].unique())
    best = table[table["metric"] == metric].sort_values("value", ascending=False, kind="stable")["method"].unique()
    return table.sort_values("method", key=lambda methods: methods.map(list(best).index), kind="stable")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `means` as text for a reader, in percent or points: `12.3 [11.0, 13.5]`; a row per method."""
    text = [f"{100 * v:.1f} [{100 * a:.1f}, {100 * b:.1f}]" for v, a, b in table[["value", "low", "high"]].to_numpy()]
    wide = table.assign(text=text).pivot(index="method", columns="metric", values="text")
    return wide.loc[list(dict.fromkeys(table["method"])), list(dict.fromkeys(table["metric"]))]


def beside_paper(differences: pd.DataFrame, printed: pd.Series, metric: str = "miou") -> pd.DataFrame:
    """One metric of the differences of `means` as text in points, beside those that a paper prints.

    printed: fractions by method; a method that it lacks gets a dash. Columns: paper, here (with interval), seeds.
    """
    rows = differences[differences["metric"] == metric].set_index("method")
    paper = [f"{100 * v:+.2f}" if v == v else "–" for v in printed.reindex(rows.index)]
    here = [_signed(*row) for row in rows[["value", "low", "high"]].to_numpy()]
    return pd.DataFrame({"paper (points)": paper, "here (points)": here, "seeds": rows["seeds"]}, rows.index)


def _signed(value: float, low: float, high: float) -> str:
    """In points."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def histories(runs: Iterable[Run], metric: str = "loss") -> pd.DataFrame:
    """One quantity of the training histories: method, seed, step, value."""
    frames = []
    for run in runs:
        rows = run.history[run.history["metric"] == metric]
        frames.append(rows[["step", "value"]].assign(method=label(run), seed=run.experiment.seed))
    return pd.concat(frames, ignore_index=True)


def run_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Integer counts of runs for `results/`: run, method, seed, split, class_id, class, train_pixels, train_images,
    intersection, target_pixels, predicted_pixels. Any IoU, Acc or precision can be computed from it.
    """
    names = ["intersection", "target_pixels", "predicted_pixels"]
    frames = []
    for run in runs:
        rows = run.metrics[run.metrics["metric"].isin(names)]
        wide = rows.pivot(index=["split", "class_id", "class"], columns="metric", values="value").reset_index()
        counts = run.counts()
        wide["train_pixels"] = counts.pixels.numpy()[wide["class_id"]]
        wide["train_images"] = counts.images.numpy()[wide["class_id"]]
        frames.append(wide.assign(run=run.experiment.key(), method=label(run), seed=run.experiment.seed))
    columns = ["run", "method", "seed", "split", "class_id", "class", "train_pixels", "train_images", *names]
    table = pd.concat(frames, ignore_index=True)[columns].rename_axis(columns=None)
    return table.astype(dict.fromkeys(names, "int64"))


# ----------------------------------------------------------------------------------------------------- claims


def published(name: str) -> pd.DataFrame:
    """A table of one of the papers as printed, one value per row, e.g. `published("rr_table05_lambda")`.

    Raises UserError for another name, naming the nearest one.
    """
    folder = files("ltseg_core") / "published"
    tables = [path.name.removesuffix(".csv") for path in folder.iterdir() if path.name.endswith(".csv")]
    with (folder / f"{choose('published table', name, sorted(tables))}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def public_results(name: str, root: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """Published per-class results of real models on "ade20k" or "cityscapes", from the data root.

    Columns: model, method, protocol, class_id, class, iou, acc (fractions), pixels, images (of the training set).
    One run of each model: no interval over seeds. Raises UserError if they are not there.
    """
    name = choose("public results", name, ("ade20k", "cityscapes"))
    folder = data_root(root)
    table, counted = folder / f"{name}_stats" / "per_class_results.csv", folder / "class_stats" / f"{name}.csv"
    for path in (table, counted):
        if not path.is_file():
            raise UserError(f"{path} is missing: fetch it with `python -m data_prep {path.parent.name}`")
    rows = pd.read_csv(table)
    counts, classes = stats.read_counts(counted)
    class_id = rows["class_idx"] - rows["class_idx"].min()  # ADE20K counts from 1
    if sorted(set(class_id)) != list(range(len(classes))):
        raise UserError(f"{table} has results of {class_id.nunique()} classes, {counted} counts of {len(classes)}")
    return pd.DataFrame(
        {
            **{column: rows[column] for column in ("model", "method", "protocol")},
            "class_id": class_id,
            "class": np.asarray(classes)[class_id],
            **{score: rows[score] / 100 for score in PER_CLASS},
            "pixels": counts.pixels.numpy()[class_id],
            "images": counts.images.numpy()[class_id],
        }
    )


def claims() -> pd.DataFrame:
    """The papers' claims, by ID: statement (in our words), published (their numbers), measure, expected."""
    return published("claims").set_index("claim")


def verdict(low: float, high: float, expected: Direction, *, margin: float = 0.0) -> Verdict:
    """Whether a 95 % interval of a difference supports a claimed direction.

    positive, negative: `supported` if the whole interval lies beyond `margin` on the claimed side, `contradicted` if
           none of it does, that is, if it ends before `margin`
    equal: `supported` if it lies within -margin and margin, `contradicted` if it lies outside
    Otherwise `open`; so are NaN limits (a single seed and image).
    Raises ValueError for limits in the wrong order, another direction, a negative margin, and `equal` without one.
    """
    if low > high or margin < 0:
        raise ValueError(f"expected low <= high and margin >= 0, got [{low}, {high}] and {margin}")
    if expected not in get_args(Direction):
        raise ValueError(f"expected must be 'positive', 'negative' or 'equal', got {expected!r}")
    if expected == "equal":
        if not margin:
            raise ValueError("expected='equal' needs a margin > 0 within which a difference counts as none")
        if -margin < low and high < margin:
            return "supported"
        return "contradicted" if low > margin or high < -margin else "open"
    if expected == "negative":
        low, high = -high, -low
    if low > margin:
        return "supported"
    return "contradicted" if high < margin else "open"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Verdict on a claim with several parts: supported if all are, contradicted if one is, else open."""
    found = set(verdicts)
    return "contradicted" if "contradicted" in found else "supported" if found == {"supported"} else "open"


def agreed(verdicts: Iterable[Verdict]) -> Verdict:
    """Verdict of one claim on several data sets: what some of them say if none says the opposite, else open."""
    found = set(verdicts) - {"open"}
    return found.pop() if len(found) == 1 else "open"


class Comparison(NamedTuple):
    """One testable part of a claim: the paired difference of a mean between two methods has an expected sign.

    metric: one of `means`, or the difference of two, e.g. "tail iou - head iou";  margin: a fraction, see `verdict`
    """

    method: str
    baseline: str = "ce"
    metric: str = "miou"
    expected: Direction = "positive"
    margin: float = 0.0


class Measured(NamedTuple):
    """One testable part of a claim that is no difference of two means of `means`: any number with its interval.

    what: in words;  limits: value, low, high;  seeds: with a single one the claim stays open
    points: the limits are fractions, and read in percentage points; otherwise they read as they are, `what` says in
        which unit
    """

    what: str
    limits: tuple[float, float, float]
    seeds: int
    expected: Direction = "positive"
    margin: float = 0.0
    points: bool = True


class Exact(NamedTuple):
    """One testable part of a claim that has no interval: an identity, or what was counted; None: neither way."""

    what: str
    holds: bool | None


class Majority(NamedTuple):
    """One testable part of a claim, about most of `number` cases, of which `agree` are as claimed.

    The 95 % interval of the share (Wilson's) must leave out one half. It takes the cases as independent.
    """

    what: str
    agree: int
    number: int


def judge(
    runs: Iterable[Run],
    tests: Mapping[str, Sequence[Comparison | Measured | Exact | Majority] | str],
    *,
    groups: Sequence[str] | None = None,
    split: str = "test",
    replicates: int = 2000,
) -> pd.DataFrame:
    """The verdict on each claim, indexed by its ID: statement, published, found (points), verdict.

    tests: the comparisons, measurements, exact statements and majorities that a claim consists of, or a sentence that
    says what is missing to test it.
    Methods are compared on the seeds they share; groups as in `means`. A claim stays open where a method was not run,
    or with a single seed.
    Raises UserError for an unknown claim or metric.
    """
    runs, known, rows = list(runs), claims(), []
    for claim, parts in tests.items():
        claim = choose("claim", claim, known.index)
        results: list[tuple[str, Verdict]]
        if isinstance(parts, str):
            results = [(parts, "open")]
        else:
            results = [_judge_part(runs, part, groups, split, replicates) for part in parts]
        found = "; ".join(text for text, _ in results)
        rows.append((claim, *known.loc[claim, ["statement", "published"]], found, overall(v for _, v in results)))
    return pd.DataFrame(rows, columns=["claim", "statement", "published", "found", "verdict"]).set_index("claim")


def on_photographs(name: str) -> list[Run]:
    """Kept runs on a data set of PHOTOGRAPHS: each paper's method, and the second stages on the same cross-entropy."""
    return [*kept(f"{name}_cpu"), *(run for run in kept("second_stages") if run.experiment.dataset == name)]


def judge_on_photographs(
    tests: Mapping[str, Sequence[Comparison | Measured | Exact | Majority] | str], *, besides: str = ""
) -> pd.DataFrame:
    """`judge` on the kept runs on CamVid and CCP, for the claims that only compare methods run there; a column data.

    A method stands for the setting with which it was run there (on CamVid, MEDOE has two experts).
    besides: a data set to leave out, the one whose own runs are judged
    """
    tables = []
    for name in PHOTOGRAPHS:
        if name == besides:
            continue
        runs = on_photographs(name)
        setting = {key: label(run) for run in runs for key in (run.experiment.method, label(run))}
        own = {}
        for claim, parts in tests.items():
            there = [p for p in parts if isinstance(p, Comparison) and {p.method, p.baseline} <= setting.keys()]
            if there and len(there) == len(parts):
                own[claim] = [p._replace(method=setting[p.method], baseline=setting[p.baseline]) for p in there]
        tables.append(judge(runs, own).assign(data=name))
    return pd.concat(tables)


def in_networks() -> dict[str, list[Run]]:
    """Kept runs of each paper's method on the embedded scenes in other networks, by architecture and encoder."""
    networks: dict[str, list[Run]] = {}
    for run in kept("quick_networks"):
        networks.setdefault(f"{run.experiment.architecture} with {run.experiment.encoder}", []).append(run)
    return networks


def judge_in_networks(tests: Mapping[str, Sequence[Comparison]], networks: Sequence[str] | None = None) -> pd.DataFrame:
    """`judge` on the kept runs in other networks, where a claim must hold in each of them; a column data.

    networks: some of `in_networks`; None takes all. Raises UserError for another name, naming the nearest one.
    """
    found = in_networks()
    names = list(found) if networks is None else [choose("network", name, found) for name in networks]
    tables = {name: judge(found[name], tests) for name in names}
    together = pd.concat([table.assign(found=f"{name}: " + table["found"]) for name, table in tables.items()])
    rows = together.groupby(level="claim", sort=False)
    joined = rows.agg({"statement": "first", "published": "first", "found": "; ".join, "verdict": overall})
    return joined.assign(data="scenes in " + ("other networks" if networks is None else " and ".join(names)))


def gain_with_classes(method: str) -> list[Measured | Exact]:
    """The parts of the claim that a gain grows with the number of classes, from the kept runs on photographs: the gain
    of mIoU over cross-entropy on CCP (more classes) less that on CamVid; an undecided one, as the two differ in more.

    A method stands for its setting there, as in `judge_on_photographs`. Both sets of images are independent of each
    other (`stats.difference_of_independent`). Where one has a single seed, so has the difference.
    """
    gains, what, seeds = {}, [], []
    for name in PHOTOGRAPHS:
        runs = [run for run in kept(f"{name}_cpu") if run.experiment.method in ("ce", method)]
        gain = means(runs, baseline="ce").set_index("metric").loc["miou"]
        occur = int((runs[0].confusion("test").sum((0, 2)) > 0).sum())
        gains[name] = tuple(gain[["value", "low", "high"]])
        what.append(f"{name} ({occur} classes) {100 * gain['value']:+.1f}")
        seeds.append(int(gain["seeds"]))
    difference = stats.difference_of_independent(gains["ccp"], gains["camvid"])
    more = Measured(f"gain of mIoU on {' and '.join(what)}; ccp less camvid", difference, min(seeds))
    return [more, Exact("two data sets, which differ in more than their classes", None)]


def _judge_part(
    runs: Sequence[Run],
    part: Comparison | Measured | Exact | Majority,
    groups: Sequence[str] | None,
    split: str,
    replicates: int,
) -> tuple[str, Verdict]:
    """What a part of a claim finds, in words, and its verdict."""
    match part:
        case Exact(what, holds):
            return what, "open" if holds is None else "supported" if holds else "contradicted"
        case Majority():
            return _count(part)
        case Measured():
            return _decide(*part)
    return _test(runs, part, groups, split, replicates)


def _count(part: Majority) -> tuple[str, Verdict]:
    from scipy.stats import binomtest

    if part.number == 0:
        return f"{part.what}: there is none", "open"
    low, high = binomtest(part.agree, part.number).proportion_ci(method="wilson")
    share = f"{part.what}: {part.agree} of {part.number} [{low:.0%}, {high:.0%}]"
    return share, verdict(low - 0.5, high - 0.5, "positive")


def _test(
    runs: Sequence[Run], part: Comparison, groups: Sequence[str] | None, split: str, replicates: int
) -> tuple[str, Verdict]:
    both = [{run.experiment.seed: run for run in runs if label(run) == m} for m in (part.method, part.baseline)]
    what = f"{part.metric} of {part.method} against {part.baseline}"
    if seeds := sorted(both[0].keys() & both[1].keys()):
        table = by_method([group[seed] for group in both for seed in seeds])
    else:
        return f"{what}: not run here", "open"
    scores = _scores(_groups(table[part.method], groups)) | {"dice_error": metrics.dice_error}
    terms = [scores.get(term) for term in part.metric.split(" - ")]
    if missing := [term for term, score in zip(part.metric.split(" - "), terms, strict=True) if score is None]:
        if missing[0].split()[0] in stats.GROUPS:
            return f"{what}: no class of that group here", "open"
        choose("metric", missing[0], scores)
    first, *rest = [score for score in terms if score]

    def score(counts: Any) -> Any:
        return first(counts) - sum(term(counts) for term in rest)

    own, other = (_resampled(table[m], split, replicates) for m in (part.method, part.baseline))
    _check_labels(part.method, own.seeds, part.baseline, other.seeds)
    limits = metrics.paired_interval(own, other, score)
    return _decide(what, limits, len(seeds), part.expected, part.margin)


def _decide(
    what: str,
    limits: tuple[float, float, float],
    seeds: int,
    expected: Direction,
    margin: float,
    points: bool = True,
) -> tuple[str, Verdict]:
    numbers = _signed(*limits) if points else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*limits)
    text = f"{what}: " + (numbers if np.isfinite(limits).all() else numbers.partition(" ")[0])
    if seeds == 1:
        return f"{text} (one seed)", "open"
    return text, verdict(*limits[1:], expected, margin=margin)


def claims_board(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row for every claim of the papers, indexed by its ID: what all notebooks together say of it.

    tables: by name `NN_claims`, rows as those of `judge` with the columns claim, found, verdict, data
    Columns: paper, statement, published, found (a sentence for each notebook), data, measured, verdict, notebooks
    (numbers). A row is measured if it has a verdict or an interval. What the notebooks measure on the same data are
    parts of one claim (`overall`), what they find on several is one by `agreed`; a claim that none measures is open.
    A row that only points elsewhere ("see notebook 04") gives way to any other.
    Raises UserError for an unknown claim.
    """
    known = claims()
    empty = pd.DataFrame(columns=["claim", "found", "verdict", "data", "notebook"])
    rows = pd.concat([empty, *(table.assign(notebook=name.partition("_")[0]) for name, table in tables.items())])
    for claim in rows["claim"]:
        choose("claim", claim, known.index)
    pointer = rows["found"].str.startswith("see notebook")
    rows = rows[~pointer | ~rows["claim"].isin(rows.loc[~pointer, "claim"])]
    rows["measured"] = (rows["verdict"] != "open") | rows["found"].str.contains(r"\[[^\]]*\d", regex=True)
    on_data = rows[rows["measured"]].groupby(["claim", "data"])["verdict"].agg(overall)
    said = rows.assign(found=rows["notebook"] + " (" + rows["data"] + "): " + rows["found"]).groupby("claim")
    together = {
        "found": said["found"].agg("; ".join),
        "data": said["data"].unique().map(", ".join),
        "measured": said["measured"].any(),
        "verdict": on_data.groupby("claim").agg(agreed),
        "notebooks": said["notebook"].unique().map(", ".join),
    }
    paper = known.index.str.partition("-").get_level_values(0).map(PAPERS)
    board = known[["statement", "published"]].join(pd.DataFrame(together))
    board.insert(0, "paper", paper)
    nothing = {"found": "no notebook that judges it was run", "data": "", "verdict": "open", "notebooks": ""}
    return board.fillna(nothing | {"measured": False}).astype({"measured": bool})
