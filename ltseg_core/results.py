"""Run directories: written once, whole, under the key of their experiment; read back as tables."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ltseg_core import metrics, stats
from ltseg_core.config import STUDIES, Experiment, UserError, choose, data_root
from ltseg_core.methods import METHODS, build_method
from ltseg_core.models import build_model
from ltseg_core.notebook import package_hash

Remembered = TypeVar("Remembered", pd.DataFrame, dict[Any, np.ndarray])
FORMAT = 1  # of the run directory; raised when a reader of older runs would be wrong
FILES = (
    "classes.csv", "confusion.npz", "environment.json", "experiment.json", "history.parquet", "metrics.parquet",
    "model.safetensors",
)  # fmt: skip
KEPT = tuple(name for name in FILES if name not in ("environment.json", "model.safetensors"))
"""Of a run's files those that a study under `results/` has: all that scores, differences and intervals need."""


def runs_folder(runs: str | os.PathLike[str] | None = None) -> Path:
    """Where runs live: `runs`, else $LTSEG_RUNS, else ./runs."""
    return Path(runs or os.environ.get("LTSEG_RUNS") or "runs")


@dataclass(frozen=True)
class Run:
    """A finished run: `path` holds the files, `experiment` says what was run."""

    path: Path
    experiment: Experiment

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Tidy: split, class_id (-1 for means), class, group, metric, value."""
        return pd.read_parquet(self.path / "metrics.parquet")

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per step and quantity: step, metric (`loss`, `val miou`, `val macc`), value."""
        return pd.read_parquet(self.path / "history.parquet")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, device, seconds."""
        return json.loads((self.path / "environment.json").read_text())

    @cached_property
    def _classes(self) -> tuple[stats.ClassCounts, list[str]]:
        return stats.read_counts(self.path / "classes.csv")

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return self._classes[1]

    def counts(self) -> stats.ClassCounts:
        """Class counts of the labelled training images."""
        return self._classes[0]

    def written(self) -> int:
        """When the confusion counts were written, in nanoseconds; 0 without them."""
        path = self.path / "confusion.npz"
        return path.stat().st_mtime_ns if path.exists() else 0

    def confusion(self, split: str) -> np.ndarray:
        """Confusion counts per image, (N, C, C) int32, rows: label, columns: prediction.

        Raises UserError for a split without counts, and if their file is damaged.
        """
        path = self.path / "confusion.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                names, counts = list(file), file.get(split)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): delete {self.path} and run again") from None
        if counts is None:
            raise UserError(f"{self.path} has no confusion counts of split {split!r}, only {', '.join(names)}")
        return counts

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained network's parameters and buffers. Raises UserError if they are not kept, or damaged."""
        path = self.path / "model.safetensors"
        if not path.exists():
            raise UserError(
                f"{self.path} is kept without the network's weights: train it again to look inside (a run of your own:"
                " delete its folder first)"
            )
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): delete {self.path} and run again") from None

    def untrained(self) -> torch.nn.Module:
        """The network that is used at test time, with random weights: what a kept run can still show."""
        e = self.experiment
        plain = build_model(e.architecture, e.encoder, len(self.classes), **e.model_options)
        return build_method(e.method, plain, self.counts(), e.hyper)[-1].network

    def network(self) -> torch.nn.Module:
        """The trained network in evaluation mode, on the CPU."""
        network = self.untrained()
        network.load_state_dict(self.weights())
        return network.eval()

    def value(self, metric: str, split: str = "test", group: str = "all") -> float:
        """A mean over the classes of a group, e.g. `miou`; NaN for a group without classes."""
        table = self.metrics
        chosen = table[(table["split"] == split) & (table["group"] == group) & (table["metric"] == metric)]
        chosen = chosen[chosen["class_id"] == -1]
        if len(chosen) != 1:
            raise KeyError(f"{self.path} holds no single {metric!r} of group {group!r} on split {split!r}")
        return float(chosen["value"].iloc[0])


def find(experiment: Experiment, runs: str | os.PathLike[str] | None = None) -> Run | None:
    """The finished run of this experiment, or None.

    Raises UserError if its directory was written in another format or cannot be read.
    """
    path = runs_folder(runs) / experiment.key()
    return _read(path) if path.is_dir() else None


def find_kept(experiment: Experiment) -> Run | None:
    """The run of this experiment that a study under `results/` keeps without its weights, or None. Errors as `find`."""
    return next((run for study in sorted(STUDIES.glob("*/")) if (run := find(experiment, study))), None)


def finished(runs: str | os.PathLike[str] | None = None) -> list[Run]:
    """Every finished run in the runs folder, by key; none if there is no such folder.

    What is no run directory, or not finished, is passed over. A directory that cannot be read as the run it is named
    after, or lacks a file, is left out with a warning that says so.
    """
    return _runs_in(runs_folder(runs), FILES)


def kept(study: str) -> list[Run]:
    """The runs of a study that the repository keeps, e.g. "camvid_cpu", without their weights, in the order of METHODS.

    Raises UserError for another name, naming the nearest one, and where the package stands without `results/`.
    """
    if not (studies := sorted({path.parent.parent.name for path in STUDIES.glob("*/*/experiment.json")})):
        raise UserError(f"no kept studies in {STUDIES}: they come with the repository, not with the package alone")
    runs, order = _runs_in(STUDIES / choose("study", study, studies), KEPT), list(METHODS)
    return sorted(runs, key=lambda run: (order.index(run.experiment.method), run.experiment.seed))


def keep(runs: Iterable[Run], study: str) -> None:
    """Copy finished runs to `results/<study>`, without their weights; those that are there already stay as they are."""
    for run in runs:
        final = STUDIES / study / run.path.name
        if final.exists():
            continue
        with writing(final.parent):
            partial = final.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in KEPT:
                shutil.copyfile(run.path / name, partial / name)
            publish(partial, final)


def _runs_in(folder: Path, files: Iterable[str]) -> list[Run]:
    """The runs in a folder that have all these files, by key; a warning for others that are named as a run."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (re.fullmatch("[0-9a-f]{16}", path.name) and path.is_dir()):
            continue
        try:
            run = _read(path)
            if missing := [name for name in files if not (path / name).is_file()]:
                raise UserError(f"{path} is damaged ({missing[0]} is missing): delete it and run again")
            if path.name != (key := run.experiment.key()):
                raise UserError(f"{path} holds the run {key}: give it that name, or delete it and run again")
            found.append(run)
        except UserError as error:
            warnings.warn(f"left out: {error}", stacklevel=3)
    return found


def _read(path: Path) -> Run:
    """The run in a directory. Raises UserError as `find`."""
    try:
        stored = json.loads((path / "experiment.json").read_text())
        version, fields = stored["format"], stored["experiment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it and run again") from None
    if version != FORMAT:
        raise UserError(
            f"{path} was written in run format {version}, this version reads format {FORMAT}: move it away or delete"
            " it, then run again"
        )
    try:
        return Run(path, Experiment.from_dict(fields))
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong while a run is written to the runs folder `folder` becomes a UserError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        raise UserError(
            f"cannot write the run to {folder} ({error}): free disk space, mend the permissions or choose another"
            " folder with --runs or LTSEG_RUNS; what was finished is kept"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then put the file in place in one step: readers see the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remembered(name: str, compute: Callable[[], Remembered], runs: Iterable[Run] = ()) -> Remembered:
    """What `compute()` returns; called again after the same cells, it is read from a file.

    compute() gives a table, or arrays under names that are texts, numbers or tuples of them. For what takes seconds
    and follows from finished runs alone, so that figures can be drawn again at once. The file lies in the folder of
    runs and may be deleted; its name is a hash of `name`, of every cell that this kernel ran so far, of the package,
    of the folders of runs and data, and of `runs`: which ones, and when they were written. Name those that may be
    kept ones here, as one's own run takes the place of a kept one. Outside IPython nothing is kept.
    """
    from IPython import get_ipython

    if (shell := get_ipython()) is None:
        return compute()
    folder = runs_folder()
    past = [name, shell.user_ns["In"], package_hash(), str(data_root().resolve()), str(folder.resolve())]
    past += [[str(run.path.resolve()), run.written()] for run in runs]
    stem = folder / "remembered" / hashlib.sha256(json.dumps(past).encode()).hexdigest()[:32]
    with (  # absent or damaged: computed again
        suppress(OSError, ValueError, BadZipFile),
        np.load(stem.with_suffix(".npz"), allow_pickle=False) as file,
    ):
        return cast(Remembered, {ast.literal_eval(key): array for key, array in file.items()})
    with suppress(OSError, ValueError):
        return cast(Remembered, pd.read_parquet(stem.with_suffix(".parquet")))
    value = compute()
    with writing(folder):
        stem.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, pd.DataFrame):
            write_atomically(stem.with_suffix(".parquet"), value.to_parquet)
        else:
            write_atomically(stem.with_suffix(".npz"), partial(_save_arrays, arrays=value))
    return value


def _save_arrays(path: Path, arrays: Mapping[Any, Any]) -> None:
    with path.open("wb") as file:  # given a path, NumPy would add a suffix
        np.savez_compressed(file, **{repr(key): array for key, array in arrays.items()})


def publish(partial: Path, final: Path) -> None:
    """Turn a complete working directory into the finished run, in one step."""
    for path in partial.iterdir():
        if path.suffix == ".tmp":
            path.unlink()
        else:
            _sync(path)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Bring a file or folder onto the disk, so that a power cut cannot undo what is said to be finished."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tidy_metrics(
    confusion: Mapping[str, np.ndarray], classes: Iterable[str], counts: stats.ClassCounts
) -> pd.DataFrame:
    """The metrics table of a run, from confusion counts per image of each split, {split: (N, C, C)}."""
    classes, group = list(classes), stats.groups(counts)
    tables = []
    for split, per_image in confusion.items():
        total = per_image.sum(0, dtype=np.int64)
        per_class = {
            "iou": metrics.iou(total),
            "acc": metrics.acc(total),
            "precision": metrics.precision(total),
            "intersection": np.diagonal(total),
            "target_pixels": total.sum(1),
            "predicted_pixels": total.sum(0),
        }
        frame = pd.DataFrame({"class_id": range(len(classes)), "class": classes, "group": group} | per_class)
        tables.append(frame.melt(["class_id", "class", "group"], var_name="metric").assign(split=split))
        iou, acc = per_class["iou"], per_class["acc"]
        means = [
            ("all", "miou", metrics.miou(total)),
            ("all", "macc", metrics.macc(total)),
            ("all", "pixel_acc", metrics.pixel_acc(total)),
            ("all", "dice_error", metrics.dice_error(total)),
            ("all", "classes_averaged", np.isfinite(iou).sum()),
        ]
        for name, values in (("miou", iou), ("macc", acc)):
            means += [(g, name, mean.value) for g, mean in metrics.group_means(values, group).items()]
        rows = [(-1, "mean", g, name, float(v), split) for g, name, v in means]
        tables.append(pd.DataFrame(rows, columns=["class_id", "class", "group", "metric", "value", "split"]))
    table = pd.concat(tables, ignore_index=True).astype({"value": "float64"})
    return table[["split", "class_id", "class", "group", "metric", "value"]]
