"""What the notebooks compute from finished runs: scores and differences with intervals, and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from ltseg_core import metrics, stats
from ltseg_core.config import UserError
from ltseg_core.results import Run

Verdict = Literal["supported", "contradicted", "open"]
MAY_DIFFER = {"method", "hyper", "seed", "checkpoint_every", "eval_every"}
"""Fields in which compared experiments may differ."""
PER_CLASS = {"iou": metrics.iou, "acc": metrics.acc}


def label(run: Run) -> str:
    """The method and the hyper-parameters given to it, e.g. `blv sigma=4`."""
    e = run.experiment
    return " ".join([e.method, *(f"{k}={v}" for k, v in sorted(e.hyper.items()))])


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each method in order of seed.

    Raises UserError if there are none, if two share method and seed, if the methods differ in seeds, or if any two
    differ in anything but method, hyper-parameters and seed: they could not be compared.
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
        for run in group:
            own, other = (r.experiment.to_dict() for r in (run, reference[0]))
            for what in own.keys() - MAY_DIFFER:
                if own[what] != other[what]:
                    raise UserError(
                        f"{name} (seed {run.experiment.seed}) and {first} differ in {what}: {own[what]!r} and"
                        f" {other[what]!r}; they cannot be compared"
                    )
            if run.classes != reference[0].classes:
                raise UserError(f"{name} and {first} differ in their class lists; they cannot be compared")
    return table


def counts_of(runs: Sequence[Run], split: str = "test") -> np.ndarray:
    """Confusion counts (S, N, C, C) of runs that differ in the seed only."""
    return np.stack([run.confusion(split) for run in runs])


def group_score(score: Callable[..., Any], groups: Sequence[str], group: str) -> Callable[[Any], Any]:
    """A metric that is the mean of a per-class metric over the classes of one group ("all" takes every class)."""
    chosen = np.flatnonzero([group in ("all", g) for g in groups])

    def mean(counts: Any) -> Any:
        values = score(counts)[..., chosen]
        present = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return np.where(present, values, 0).sum(-1) / present.sum(-1)

    return mean


def _scores(groups: Sequence[str]) -> dict[str, Callable[[Any], Any]]:
    """The means of the tables: mIoU and mAcc over all classes and by group, pixel accuracy."""
    table: dict[str, Callable[[Any], Any]] = {}
    for name, score in PER_CLASS.items():
        table[f"m{name}"] = group_score(score, groups, "all")
        table |= {f"{g} {name}": group_score(score, groups, g) for g in stats.GROUPS if g in groups}
    return table | {"pixel_acc": metrics.pixel_acc}


def means(runs: Iterable[Run], *, split: str = "test", replicates: int = 2000) -> pd.DataFrame:
    """Scores of every method: method, metric, value, low, high (95 %, images and seeds resampled), seeds."""
    rows = []
    for method, group in by_method(runs).items():
        counts = metrics.marginals(counts_of(group, split))
        for name, score in _scores(stats.groups(group[0].counts())).items():
            rows.append((method, name, *metrics.interval(counts, score, replicates=replicates), len(group)))
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "seeds"])


def mean_differences(
    runs: Iterable[Run], *, baseline: str = "ce", split: str = "test", replicates: int = 2000
) -> pd.DataFrame:
    """Paired differences of every method to the baseline: method, metric, difference, low, high, seeds."""
    table = by_method(runs)
    reference = metrics.marginals(counts_of(_baseline(table, baseline), split))
    rows = []
    for method, group in table.items():
        if method == baseline:
            continue
        counts = metrics.marginals(counts_of(group, split))
        for name, score in _scores(stats.groups(group[0].counts())).items():
            found = metrics.paired_interval(counts, reference, score, replicates=replicates)
            rows.append((method, name, *found, len(group)))
    return pd.DataFrame(rows, columns=["method", "metric", "difference", "low", "high", "seeds"])


def per_class(runs: Iterable[Run], *, split: str = "test", replicates: int = 2000) -> pd.DataFrame:
    """IoU and Acc of every class: method, class_id, class, group, train_pixels, metric, value, low, high."""
    frames = []
    for method, group in by_method(runs).items():
        counts = metrics.marginals(counts_of(group, split))
        for name, score in PER_CLASS.items():
            value, low, high = metrics.interval(counts, score, replicates=replicates)
            frames.append(_class_columns(group[0], method, name).assign(value=value, low=low, high=high))
    return pd.concat(frames, ignore_index=True)


def class_differences(
    runs: Iterable[Run], *, baseline: str = "ce", split: str = "test", replicates: int = 2000
) -> pd.DataFrame:
    """Paired differences to the baseline of every class: as `per_class`, with difference, low, high."""
    table = by_method(runs)
    reference = metrics.marginals(counts_of(_baseline(table, baseline), split))
    frames = []
    for method, group in table.items():
        if method == baseline:
            continue
        counts = metrics.marginals(counts_of(group, split))
        for name, score in PER_CLASS.items():
            value, low, high = metrics.paired_interval(counts, reference, score, replicates=replicates)
            frames.append(_class_columns(group[0], method, name).assign(difference=value, low=low, high=high))
    if not frames:
        raise UserError(f"only {baseline!r} was run: there is nothing to compare it with")
    return pd.concat(frames, ignore_index=True)


def _baseline(table: dict[str, list[Run]], baseline: str) -> list[Run]:
    if baseline not in table:
        raise UserError(f"no runs of the baseline {baseline!r} among {', '.join(table)}")
    return table[baseline]


def _class_columns(run: Run, method: str, metric: str) -> pd.DataFrame:
    counts = run.counts()
    return pd.DataFrame(
        {
            "method": method,
            "class_id": range(len(run.classes)),
            "class": run.classes,
            "group": stats.groups(counts),
            "train_pixels": counts.pixels.numpy(),
            "metric": metric,
        }
    )


def histories(runs: Iterable[Run], metric: str = "loss") -> pd.DataFrame:
    """One quantity of the training histories: method, seed, step, value."""
    frames = []
    for run in runs:
        rows = run.history[run.history["metric"] == metric]
        frames.append(rows[["step", "value"]].assign(method=label(run), seed=run.experiment.seed))
    return pd.concat(frames, ignore_index=True)


def run_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Integer counts of runs for `results/`: run, method, seed, split, class_id, class, train_pixels, intersection,
    target_pixels, predicted_pixels. Any IoU, Acc or precision can be computed from it.
    """
    names = ["intersection", "target_pixels", "predicted_pixels"]
    frames = []
    for run in runs:
        rows = run.metrics[run.metrics["metric"].isin(names)]
        wide = rows.pivot(index=["split", "class_id", "class"], columns="metric", values="value").reset_index()
        wide["train_pixels"] = run.counts().pixels.numpy()[wide["class_id"]]
        frames.append(wide.assign(run=run.experiment.key(), method=label(run), seed=run.experiment.seed))
    columns = ["run", "method", "seed", "split", "class_id", "class", "train_pixels", *names]
    return pd.concat(frames, ignore_index=True)[columns].astype(dict.fromkeys(names, "int64"))


def verdict(low: float, high: float, expected: Literal["positive", "negative"], *, margin: float = 0.0) -> Verdict:
    """Whether a 95 % interval of a difference supports a claimed direction.

    `supported` if the whole interval lies beyond `margin` on the claimed side, `contradicted` if it lies beyond 0 on
    the other side, else `open`; NaN limits (a single seed and image) are open.
    Raises ValueError for limits in the wrong order, another direction or a negative margin.
    """
    if low > high or margin < 0:
        raise ValueError(f"expected low <= high and margin >= 0, got [{low}, {high}] and {margin}")
    if expected not in ("positive", "negative"):
        raise ValueError(f"expected must be 'positive' or 'negative', got {expected!r}")
    if expected == "negative":
        low, high = -high, -low
    if low > margin:
        return "supported"
    return "contradicted" if high < 0 else "open"
