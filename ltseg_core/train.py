"""The one training loop: stages, schedule, EMA teacher, checkpoints, evaluation, several processes."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ltseg_core import __version__, config, data, evaluate, metrics, parallel, results, stats
from ltseg_core.config import Experiment, UserError, check_options, choose
from ltseg_core.data.base import Resized, SegmentationDataset, Subset
from ltseg_core.data.batches import (
    Batch,
    BatchOrder,
    Draw,
    augment,
    collate,
    draw,
    generator,
    in_memory_if_small,
    loader,
    recolour,
    unlabelled,
)
from ltseg_core.losses import LOSSES, PixelLoss
from ltseg_core.methods import METHODS, build_method, start_and_options
from ltseg_core.methods.base import Alignment, Stage
from ltseg_core.models import build_model
from ltseg_core.results import Run
from ltseg_core.self_training import class_mix, most_confident, pseudo_labels, update_teacher

CHECK_EVERY = 20  # steps between two looks at the loss: each costs one synchronisation with the device
CHECKPOINT = "checkpoint.safetensors"
TRACKERS = ("tensorboard", "mlflow", "wandb")


def fit(
    experiment: Experiment,
    *,
    data_root: str | os.PathLike[str] | None = None,
    runs: str | os.PathLike[str] | None = None,
    tracker: str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Run:
    """Train `experiment`, or return its finished run.

    runs:    folder of the run directories (default: $LTSEG_RUNS, else ./runs)
    tracker: also log to `tensorboard`, `mlflow` or `wandb`, through Accelerate
    workers: processes that decode images, for data sets that do not fit into memory
    A run that was interrupted, however hard, continues from its last checkpoint; on a CPU the weights are then
    bit for bit those of an undisturbed run. Several processes asking for one run train it once.
    A method of two stages starts from the finished run of its first stage, which is trained before it if it is
    missing; with $LTSEG_TRAIN "0", which forbids training, that is an error.
    Raises UserError for everything a user can mend, e.g. missing data, an unknown method, a loss that diverges.
    """
    experiment = _named(experiment)
    final = results.runs_folder(runs) / experiment.key()
    if run := results.find(experiment, runs):
        return run
    _check_options(experiment)
    _refuse_wrong_images(experiment)
    tracker = _check_tracker(tracker)
    _refuse_where_forbidden(experiment, runs)

    place: dict[str, Any] = {
        "data_root": data_root,
        "runs": runs,
        "tracker": tracker,
        "workers": workers,
        "progress": progress,
    }
    start_from = None
    if first := _first(experiment):
        if results.find(first, runs) is None:
            _refuse_bad_options(experiment, data_root)
        start_from = fit(first, **place)

    with results.writing(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock: AbstractContextManager[object] = (
            nullcontext() if _launched() else FileLock(final.with_suffix(".lock")).acquire()
        )
    with lock:
        if results.find(experiment, runs) is None:
            training = Training(experiment, final.with_suffix(".partial"), data_root, tracker, workers, progress)
            with closing(training.bar):  # before an error is shown
                training.run(start_from)
    return Run(final, experiment)


def _launched() -> bool:
    """Whether several processes train each run together, as `accelerate launch` starts them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def fit_all(
    experiments: Sequence[Experiment], *, kept: Sequence[Experiment] = (), jobs: int | None = None, **place: Any
) -> list[Run]:
    """`fit` every experiment and return the runs in order. All that are missing are checked before one is trained.

    kept: further experiments, whose runs come after the others. Their networks are not needed, so that a run without
    weights will do that a study under `results/` keeps. $LTSEG_TRAIN "all" trains them, too
    jobs: processes that train side by side (default: one on a GPU, else one per core: small networks train faster
    next to each other than on several threads each). Notebooks that run at the same time share the cores: together
    their trainings have no more threads than there are cores. Processes of one `accelerate launch` train each run
    together, so one after the other. place: keyword arguments of `fit`
    Raises UserError as `fit` does, and if a process was killed.
    """
    experiments, kept, runs = [_named(e) for e in experiments], [_named(e) for e in kept], place.get("runs")
    missing = [e for e in dict.fromkeys([*experiments, *kept]) if results.find(e, runs) is None]
    found: dict[Experiment, Run] = {}
    if os.environ.get("LTSEG_TRAIN") != "all":
        unneeded = set(kept).difference(experiments)
        found = {e: run for e in missing if e in unneeded and (run := results.find_kept(e))}
        missing = [e for e in missing if e not in found]
    for e in missing:
        _check_options(e)
        _refuse_wrong_images(e)
        _refuse_where_forbidden(e, runs)
    settings = _settings(missing)
    if _launched():
        missing = []  # trained together, by the last line
    jobs = min(len(missing), jobs or (1 if torch.cuda.is_available() else config.cores()))
    if jobs > 1:
        bar = tqdm(total=len(missing), unit="run", disable=_quiet(place.get("progress", True)))
        with parallel.pool(jobs, max(1, config.cores() // jobs)) as pool, bar:
            try:
                list(pool.map(partial(_refuse_bad_options, data_root=place.get("data_root")), settings))
                fits = [pool.submit(_fit_on_free_cores, e, place | {"progress": False}) for e in missing]
                for done in as_completed(fits):
                    done.result()
                    bar.update()
            except BrokenProcessPool:
                raise UserError(
                    "a process that trains ended without a word: was it killed for its memory (take fewer jobs)? A"
                    " script must call fit_all below `if __name__ == '__main__':`, as the processes import it, too"
                ) from None
    else:
        for e in settings:
            _refuse_bad_options(e, place.get("data_root"))
        for e in missing:
            _fit_on_free_cores(e, place)
    return [found.get(e) or fit(e, **place) for e in [*experiments, *kept]]


def _fit_on_free_cores(experiment: Experiment, place: dict[str, Any]) -> None:
    """`fit` on as many cores as it has threads; on a GPU one is enough to drive it."""
    threads = 1 if torch.cuda.is_available() else min(torch.get_num_threads(), config.cores())
    with parallel.take_cores(results.runs_folder(place.get("runs")), threads):
        fit(experiment, **place)


def _quiet(progress: bool) -> bool:
    return not progress or "LTSEG_HEADLESS" in os.environ


class Learner(nn.Module):
    """A stage's network and criterion as one module, so that one forward pass computes the loss."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.network, self.criterion, self.align = stage.network, stage.criterion, stage.align
        self.loss, self.criterion_lr = stage.loss, stage.criterion_lr
        self.pixel_losses = [m for m in stage.criterion.modules() if isinstance(m, PixelLoss)]

    def forward(self, image: Tensor, target: Tensor, pseudo: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
        """Loss of the labelled images, plus weight x loss of `pseudo` = (image, pseudo-labels, weight), plus that of
        the stage's alignment of both.
        """
        output, loss = self._output_and_loss(image, target, pseudo_labelled=False)
        if pseudo is not None:
            image, target, weight = pseudo
            other, further = self._output_and_loss(image, target, pseudo_labelled=True)
            loss = loss + weight * further
            if self.align is not None:
                loss = loss + self.align(output, other)
        return loss

    def _output_and_loss(self, image: Tensor, target: Tensor, *, pseudo_labelled: bool) -> tuple[Any, Tensor]:
        for part in self.pixel_losses:
            part.pseudo_labelled = pseudo_labelled
        if self.loss is not None:
            return None, self.loss(self.network, self.criterion, image, target)
        output = self.network(image)
        return output, self.criterion(output, target)


@dataclass
class State:
    """All that one stage changes: saved after any step, loaded before the next."""

    stage: int
    learner: Learner
    optimizer: torch.optim.Optimizer
    teacher: nn.Module | None
    loss: Tensor
    """(steps,) float32 on the device: the loss of every step so far, NaN for steps to come."""
    evaluations: list[dict[str, float]]
    step: int
    seconds: float = 0.0
    """Spent on the run, by all sessions, when the state was saved."""

    def save(self, path: Path) -> None:
        """Write a safetensors file in one step; nothing in it is pickled."""
        tensors = {f"learner.{k}": v for k, v in self.learner.state_dict().items()} | {"loss": self.loss}
        if self.teacher is not None:
            tensors |= {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if v is not None}
        stored = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        meta = {"format": results.FORMAT} | {k: getattr(self, k) for k in ("stage", "step", "evaluations", "seconds")}
        text = {k: json.dumps(v) for k, v in meta.items()}
        results.write_atomically(path, lambda temporary: save_file(stored, temporary, text))

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Raises UserError if the file is damaged or does not fit."""
        with _readable(path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            meta = {k: json.loads(v) for k, v in file.metadata().items()}
            self.step, self.evaluations = meta["step"], meta["evaluations"]
            self.seconds = meta.get("seconds", 0.0)  # older checkpoints lack it
            self.learner.load_state_dict(_below("learner.", tensors))
            if self.teacher is not None:
                self.teacher.load_state_dict(_below("teacher.", tensors))
            slots: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _below("optimizer.", tensors).items():
                index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = tensor
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
            self.loss.copy_(tensors["loss"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint {path} is truncated or from another version ({error}): delete it and run again, this run"
            " then starts from its first step; finished runs are not touched"
        ) from None


def _stored_stage(path: Path) -> int:
    with _readable(path), safe_open(path, framework="pt") as file:
        meta = {k: json.loads(v) for k, v in file.metadata().items()}
        if meta["format"] != results.FORMAT:
            raise ValueError(f"format {meta['format']}, expected {results.FORMAT}")
        return meta["stage"]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


class Labelled(NamedTuple):
    """What a stage learns from."""

    images: SegmentationDataset
    """A split at the size of the network."""
    indices: list[int]
    """Which of them have labels."""
    own_size: SegmentationDataset
    """These alone, label maps at their own size: there classes are counted."""


class Training:
    """One run, from its experiment to its run directory."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        data_root: str | os.PathLike[str] | None,
        tracker: str | None,
        workers: int,
        progress: bool,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self.e, self.folder, self.data_root, self.workers = experiment, folder, data_root, workers
        self.steps = math.ceil(experiment.steps * METHODS[experiment.method].length)
        self.accelerator = Accelerator(
            mixed_precision="no",  # the experiment decides, not the machine's configuration
            log_with=tracker,
            project_dir=folder.parent / "tracking" / experiment.key(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if experiment.batch_size % self.world:
            raise UserError(
                f"batch_size {experiment.batch_size} cannot be shared by {self.world} processes: choose a multiple"
            )
        with self.writing():
            folder.mkdir(exist_ok=True)
        if tracker:
            settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in experiment.to_dict().items()}
            self.accelerator.init_trackers("ltseg", settings)
        self.bar = tqdm(
            total=self.steps,
            desc=f"{experiment.method} {Path(experiment.dataset).name} seed {experiment.seed}",
            unit="step",
            leave=False,
            disable=_quiet(progress) or not self.main,
        )

    def writing(self) -> AbstractContextManager[None]:
        return results.writing(self.folder.parent)

    def log(self, text: str) -> None:
        if self.main:
            with self.writing(), (self.folder / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def run(self, start_from: Run | None) -> None:
        """Train all stages, evaluate, and publish the run directory. start_from: the run whose weights to take."""
        self.started, e = time.monotonic(), self.e
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.log(f"experiment {e.key()} {json.dumps(e.to_dict())}")
        whole = data.load(e.dataset, "train", self.data_root, **e.data_options)
        labelled, self.unlabelled = _shares(e, len(whole))
        self.labelled = {"train": _labelled(whole, e, labelled if self.unlabelled else None)}
        self.others = self.labelled["train"].images
        if e.target is not None:
            self.others = _at_size(_elsewhere(e, whole.classes, self.data_root), e)
            self.unlabelled = list(range(len(self.others)))
        counts = stats.count_classes(self.labelled["train"].own_size)
        if not counts.pixels.any():
            raise UserError(f"the training labels of {e.dataset} are all ignored: there is nothing to learn from")
        self.prior = counts.pixel_share().to(self.device, torch.float32)
        self.test_sets = {
            split: _test_set(e, split, self.data_root)
            for split in data.splits(e.evaluated_on[0], self.data_root)
            if split != "train"
        }
        if not self.test_sets:
            raise UserError(f"{e.evaluated_on[0]} has neither a val nor a test split: there is nothing to evaluate on")
        self.log(f"{len(labelled)} labelled, {len(self.unlabelled)} unlabelled images; {self.world} process(es)")

        torch.manual_seed(e.seed)
        network = build_model(
            e.architecture, e.encoder, len(whole.classes), weights=e.encoder_weights, root=self.data_root,
            **e.model_options,
        )  # fmt: skip
        if start_from is not None:
            _check_same_data(start_from, whole.classes, counts)
            network.load_state_dict(start_from.weights())
            self.log(f"starts from the run {start_from.experiment.key()} ({start_from.experiment.method})")
        stages = build_method(e.method, network, counts, e.hyper)
        for split in {stage.split for stage in stages} - self.labelled.keys():
            self.labelled[split] = _labelled(_held_out(e, split, self.data_root), e)
        checkpoint = self.folder / CHECKPOINT
        loss = torch.full((self.steps,), torch.nan, device=self.device)
        evaluations: list[dict[str, float]] = []
        first = _stored_stage(checkpoint) if checkpoint.exists() else 0
        for number, (start, stop) in enumerate(_spans([stage.share for stage in stages], self.steps)):
            if number < first:
                continue
            stage = stages[number]
            resumed = number == first and checkpoint.exists()
            if stage.prepare is not None and not resumed:
                stage.network.to(self.device)
                stage.prepare(self._plain_batches(self.labelled[stage.split]))
            state = self._begin(stage, number, start, loss, evaluations)
            if resumed:
                state.load(checkpoint)
                self.started -= state.seconds
                self.log(f"resumed at step {state.step}")
            self._train(state, stage, start, stop)
            loss, evaluations = state.loss, state.evaluations
            if state.teacher is not None:  # what is evaluated is what the next stage starts from
                state.learner.network.load_state_dict(state.teacher.state_dict())
        final = stages[-1].network.to(self.device)
        confusion = {split: self._confusion(final, test_set) for split, test_set in self.test_sets.items()}
        if self.main:
            with self.writing():
                self._store(final, loss, evaluations, confusion, whole.classes, counts)
        self.accelerator.wait_for_everyone()

    def _begin(self, stage: Stage, number: int, start: int, loss: Tensor, evaluations: list[dict[str, float]]) -> State:
        learner, optimizer = ready(stage, self.e, self.device)
        teacher = copy.deepcopy(learner.network).requires_grad_(False).eval() if self.e.ema_decay else None
        return State(number, learner, optimizer, teacher, loss, evaluations, start)

    def _train(self, state: State, stage: Stage, start: int, stop: int) -> None:
        e, learner = self.e, state.learner
        ddp = self.accelerator.prepare(learner) if self.world > 1 else learner
        span = {"start": state.step, "stop": stop, "rank": self.rank, "world": self.world}
        labelled = self.labelled[stage.split]
        weights = stage.sampling(stats.class_presence(labelled.own_size)) if stage.sampling is not None else None
        order = BatchOrder(labelled.indices, e.batch_size, e.seed, weights=weights, **span)
        batches = iter(loader(labelled.images, order, workers=self.workers))
        others = None
        if self.unlabelled:
            order = BatchOrder(self.unlabelled, e.batch_size, e.seed + 1, **span)
            others = iter(loader(self.others, order, workers=self.workers))
        self.bar.update(state.step - self.bar.n)
        scheduled = [m for m in learner.modules() if isinstance(m, (PixelLoss, Alignment))]
        for step in range(state.step, stop):
            for part in scheduled:
                part.progress = (step - start) / max(1, stop - start - 1)
            torch.manual_seed(_mix(e.seed, 5, step, self.rank))  # dropout, noise: a function of the step alone
            for group in state.optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate_factor(e, step - start, stop - start)
            image, target = augment(self._to_device(next(batches)), self._draw(step, 2, e.colour), e.crop)
            pseudo = None
            if others is not None and state.teacher is not None:
                plain, labels, colour = self._pseudo(state.teacher, next(others), step, (step - start) / (stop - start))
                for loss_module in learner.pixel_losses:
                    loss_module.observe(labels)
                    if (step + 1) * e.batch_size // len(self.unlabelled) > step * e.batch_size // len(self.unlabelled):
                        loss_module.end_epoch()
                if e.class_mix:
                    plain, labels = class_mix(image, target, plain, labels, self._scores(step))
                pseudo = recolour(plain, colour), labels, e.unlabelled_weight
            state.loss[step] = optimise(ddp, state.optimizer, e, image, target, pseudo)
            state.step = step + 1
            if state.teacher is not None and e.ema_decay is not None:
                self._share_buffers(learner.network)
                update_teacher(state.teacher, learner.network, min(e.ema_decay, state.step / (state.step + 1)))
            self._after_step(state, start, stop)

    def _after_step(self, state: State, start: int, stop: int) -> None:
        e, step = self.e, state.step
        self.bar.update()
        save = step % e.checkpoint_every == 0 or step == stop
        look = e.eval_every is not None and step % e.eval_every == 0 and "val" in self.test_sets
        if not (save or look or step % CHECK_EVERY == 0):
            return
        _check_finite(state.loss[start:step], start, e)
        values = {"loss": state.loss[step - 1].item(), "lr": state.optimizer.param_groups[0]["lr"]}
        self.bar.set_postfix(loss=f"{values['loss']:.3f}")
        if look:
            total = self._confusion(state.teacher or state.learner.network, self.test_sets["val"]).sum(0)
            values |= {"val miou": float(metrics.miou(total)), "val macc": float(metrics.macc(total))}
            state.evaluations.append({"step": step, **{k: v for k, v in values.items() if k.startswith("val")}})
        self.log(f"step {step} " + " ".join(f"{k} {v:.5g}" for k, v in values.items()))
        self.accelerator.log(values, step=step)
        if save and self.main:
            state.seconds = time.monotonic() - self.started
            with self.writing():
                state.save(self.folder / CHECKPOINT)

    def _share_buffers(self, network: nn.Module) -> None:
        """Give every process the first one's batch-norm statistics: each has seen its own slice of the batches."""
        if self.world > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _plain_batches(self, labelled: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
        """The labelled images, once, in order, as they are."""
        for first in range(0, len(labelled.indices), self.e.batch_size):
            chosen = labelled.indices[first : first + self.e.batch_size]
            batch = self._to_device(collate([labelled.images[i] for i in chosen]))
            yield batch.image.float() / 255, batch.label.long()

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(t.to(self.device, non_blocking=True) for t in batch))

    def _draw(self, step: int, stream: int, colour: float) -> Draw:
        e = self.e
        whole = draw(
            e.batch_size,
            generator(e.seed, stream, step),
            scale_range=e.scale_range,
            flip=e.flip,
            colour=colour,
        )
        return Draw(*map(self._own, whole))

    def _scores(self, step: int) -> Tensor:
        """A random number for each labelled image of a batch and each class."""
        scores = torch.rand(self.e.batch_size, len(self.others.classes), generator=generator(self.e.seed, 6, step))
        return self._own(scores).to(self.device, non_blocking=True)

    def _own(self, batch: Tensor) -> Tensor:
        """This process's share of what belongs to a batch."""
        share = self.e.batch_size // self.world
        return batch[self.rank * share : (self.rank + 1) * share]

    @torch.no_grad()
    def _pseudo(self, teacher: nn.Module, batch: Batch, step: int, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """Unlabelled images as they are, the teacher's labels for them, and the student's factors for `recolour`."""
        e, chosen = self.e, self._draw(step, 3, self.e.colour)
        plain = chosen._replace(colour=torch.ones_like(chosen.colour))
        image, target = augment(self._to_device(unlabelled(batch)), plain, e.crop)
        with evaluate.autocast(self.device, e.precision):
            logits = teacher(image).logits
        confidence, target = pseudo_labels(logits.float(), target, e.pseudo_threshold)
        if e.pseudo_selection != "all":
            ties = generator(e.seed, 7, step, self.rank, device=self.device)
            order = torch.randperm(target.numel(), generator=ties, device=self.device)
            share = e.pseudo_share * (0.4 + 0.6 * progress)
            prior = self.prior if e.pseudo_selection == "dars" else None
            target = most_confident(confidence, target, logits.shape[1], share, prior, order)
        return image, target, chosen.colour.to(self.device, non_blocking=True)

    def _confusion(self, network: nn.Module, dataset: SegmentationDataset) -> np.ndarray:
        self._share_buffers(network)
        counts = evaluate.confusion(
            network,
            dataset,
            batch_size=self.e.batch_size,
            precision=self.e.precision,
            rank=self.rank,
            world=self.world,
        )
        if self.world > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts.cpu().numpy().astype(np.int32)

    def _store(
        self,
        network: nn.Module,
        loss: Tensor,
        evaluations: list[dict[str, float]],
        confusion: dict[str, np.ndarray],
        classes: Sequence[str],
        counts: stats.ClassCounts,
    ) -> None:
        e, folder = self.e, self.folder
        steps = np.arange(1, self.steps + 1)
        history = [pd.DataFrame({"step": steps, "metric": "loss", "value": loss.cpu().numpy().astype(np.float64)})]
        if evaluations:
            history.append(pd.DataFrame(evaluations).melt("step", var_name="metric"))
        tables = {
            "history": pd.concat(history, ignore_index=True),
            "metrics": results.tidy_metrics(confusion, classes, counts),
        }
        stats.write_counts(folder / "classes.csv", counts, classes)
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        np.savez_compressed(folder / "confusion.npz", allow_pickle=False, **confusion)
        state = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in network.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        environment = describe_environment(self.device) | {
            "processes": self.world,
            "wall_s": time.monotonic() - self.started,
        }
        (folder / "environment.json").write_text(json.dumps(environment, indent=1))
        stored = {"format": results.FORMAT, "experiment": e.to_dict()}
        (folder / "experiment.json").write_text(json.dumps(stored, indent=1))
        self.log("finished: " + ", ".join(f"{s} mIoU {metrics.miou(c.sum(0)):.4f}" for s, c in confusion.items()))
        results.publish(folder, folder.with_suffix(""))
        (folder.with_suffix("") / CHECKPOINT).unlink(missing_ok=True)


def _check_tracker(tracker: str | None) -> str | None:
    if tracker is None:
        return None
    tracker = choose("tracker", tracker, TRACKERS)
    if importlib.util.find_spec(tracker) is None:
        raise UserError(f"tracker {tracker!r} is not installed: `pip install {tracker}`, or leave the option out")
    return tracker


def evaluation_set(
    experiment: Experiment, split: str, data_root: str | os.PathLike[str] | None = None
) -> SegmentationDataset:
    """A split as a run is evaluated on it, of the target if it has one: images at the network's size, labels at their
    own.
    """
    e, dataset = experiment, _held_out(experiment, split, data_root)
    if e.eval_images is not None and e.eval_images < len(dataset):
        dataset = dataset.evenly_spaced(e.eval_images)
    return Resized(dataset, e.size, resize_labels=False) if e.size else dataset


def _test_set(e: Experiment, split: str, data_root: str | os.PathLike[str] | None) -> SegmentationDataset:
    """`evaluation_set`, held in memory if it is small. Raises UserError for a label that is no class."""
    dataset = evaluation_set(e, split, data_root)
    held = in_memory_if_small(dataset)
    if held is dataset:  # too large: not read as a whole yet
        stats.count_classes(dataset.dataset if isinstance(dataset, Resized) else dataset)
    return held


def _held_out(e: Experiment, split: str, data_root: str | os.PathLike[str] | None) -> SegmentationDataset:
    training_only = ("images", "border_noise")  # fewer images and noisy labels are for training
    name, options = e.evaluated_on
    return data.load(name, split, data_root, **{k: v for k, v in options.items() if k not in training_only})


def _elsewhere(e: Experiment, classes: Sequence[str], data_root: str | os.PathLike[str] | None) -> SegmentationDataset:
    """The training images of the target. Raises UserError if its classes are others."""
    name, options = e.evaluated_on
    found = data.load(name, "train", data_root, **options)
    pairs = enumerate(zip_longest(classes, found.classes, fillvalue="missing"))
    if apart := next((f"class {i} is {a} and {b}" for i, (a, b) in pairs if a != b), None):
        raise UserError(f"{e.dataset} and its target {name} must have the same classes: {apart}")
    return found


def _at_size(split: SegmentationDataset, e: Experiment) -> SegmentationDataset:
    """Images and labels at the size of the network, held in memory if they are small."""
    return in_memory_if_small(Resized(split, e.size, resize_labels=True) if e.size else split)


def _labelled(split: SegmentationDataset, e: Experiment, indices: list[int] | None = None) -> Labelled:
    """indices: of the images that have labels; None: all"""
    images = _at_size(split, e)
    own_size = split if e.size else images
    if indices is None:
        return Labelled(images, list(range(len(split))), own_size)
    return Labelled(images, indices, Subset(own_size, indices))


def _shares(e: Experiment, images: int) -> tuple[list[int], list[int]]:
    """Indices of the labelled and the unlabelled training images, drawn by the seed."""
    if e.labelled_images is None:
        return list(range(images)), []
    if e.labelled_images >= images:
        raise UserError(f"labelled_images must be below the {images} training images, got {e.labelled_images}")
    order = torch.randperm(images, generator=generator(e.seed, 4)).tolist()
    return sorted(order[: e.labelled_images]), sorted(order[e.labelled_images :])


def _spans(shares: Sequence[float], steps: int) -> list[tuple[int, int]]:
    """First and last-plus-one step of each stage."""
    whole = sum(shares) or 1.0  # a stage without steps only replaces the network
    ends = [round(steps * total / whole) for total in np.cumsum(shares)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _mix(*key: int) -> int:
    return generator(*key).initial_seed()


def build_optimizer(learner: Learner, e: Experiment) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters; those of the encoder, of an alignment and, where the stage says so,
    of the criterion with their own learning rates.
    """
    factors = {"decoder": 1.0, "encoder": e.encoder_lr_factor}
    if learner.align is not None:
        factors["align"] = learner.align.lr_factor
    if learner.criterion_lr != 1:
        factors["criterion"] = learner.criterion_lr
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in factors}
    for name, parameter in learner.named_parameters():
        owner = name.partition(".")[0]
        part = owner if owner in factors else "encoder" if ".encoder." in f".{name}" else "decoder"
        if parameter.requires_grad:
            parts[part].append(parameter)
    groups = [{"params": own, "peak": e.lr * factors[part], "part": part} for part, own in parts.items()]
    if e.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=e.lr, momentum=e.momentum, weight_decay=e.weight_decay, fused=True)
    return torch.optim.AdamW(groups, lr=e.lr, weight_decay=e.weight_decay, fused=True)


def learning_rate_factor(e: Experiment, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of a stage of `steps`.

    Linear warm-up, (step + 1) / warmup_steps, times (1 - step / steps)^poly_power for `poly`.
    """
    warm = min(1.0, (step + 1) / e.warmup_steps) if e.warmup_steps else 1.0
    return warm * ((1 - step / steps) ** e.poly_power if e.schedule == "poly" else 1.0)


def ready(stage: Stage, e: Experiment, device: torch.device) -> tuple[Learner, torch.optim.Optimizer]:
    """A stage's network and criterion on the device, in training mode but for what is frozen, and their optimiser."""
    learner = Learner(stage).to(device).train()
    for module in (*stage.frozen, *(_batch_norms(learner) if e.freeze_batch_norm else ())):
        module.requires_grad_(False).eval()
    return learner, build_optimizer(learner, e)


def optimise(
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    e: Experiment,
    image: Tensor,
    target: Tensor,
    pseudo: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """One optimiser step of a `Learner` on a batch, arguments as there; returns its loss, detached."""
    optimizer.zero_grad(set_to_none=True)  # first, so that the forward pass does not keep old gradients
    with evaluate.autocast(image.device, e.precision):
        loss = learner(image, target, pseudo)
    loss.backward()
    if e.clip_norm is not None:
        for apart in (False, True):  # an alignment has a norm of its own
            own = [group["params"] for group in optimizer.param_groups if (group["part"] == "align") is apart]
            nn.utils.clip_grad_norm_([p for params in own for p in params], e.clip_norm)
    optimizer.step()
    return loss.detach()


def _named(e: Experiment) -> Experiment:
    """The experiment with its method, and the one that it starts from, in the one way to write them."""
    name = choose("method", e.method, METHODS)
    first, options = start_and_options(name, e.hyper)
    other = {"first": first} if first != METHODS[name].first else {}
    named = options | other
    return e if (name, named) == (e.method, e.hyper) else replace(e, method=name, hyper=named)


def _first(e: Experiment) -> Experiment | None:
    """The experiment from whose run this one starts."""
    first, _ = start_and_options(e.method, e.hyper)
    return replace(e, method=first, hyper={}) if first else None


def _check_options(e: Experiment) -> dict[str, Any]:
    """The hyper-parameters but `first`, of known names and types."""
    _, options = start_and_options(e.method, e.hyper)
    return check_options(f"hyper-parameter of {e.method}", options, LOSSES.get(e.method) or METHODS[e.method].build)


def _refuse_wrong_images(e: Experiment) -> None:
    """A method that learns from images without labels needs some, and no labelled pixels in them."""
    if not METHODS[e.method].unlabelled:
        return
    if e.target is None and e.labelled_images is None:
        raise UserError(f"{e.method} learns from images without labels, too: set target or labelled_images")
    if e.class_mix:
        raise UserError(f"class_mix would paste labelled pixels into what {e.method} takes for images without labels")


def _refuse_where_forbidden(e: Experiment, runs: str | os.PathLike[str] | None) -> None:
    if os.environ.get("LTSEG_TRAIN") == "0":
        first, also = _first(e), ""
        if first and results.find(first, runs) is None:
            also = f" (it starts from a run of {first.method}, which is missing, too)"
        raise UserError(
            f"no finished run of {e.method} on {e.dataset} (seed {e.seed}) in {results.runs_folder(runs)}{also}, and"
            " LTSEG_TRAIN=0 forbids training: run the notebooks first, `ltseg run`"
        )


def _settings(experiments: Iterable[Experiment]) -> list[Experiment]:
    """One experiment for all that share what `_refuse_bad_options` looks at."""
    data_of = ("dataset", "data_options", "target", "labelled_images", "ema_decay")
    decisive = ("architecture", "encoder", "model_options", "method", "hyper", *data_of)

    def setting(e: Experiment) -> Experiment:
        own = {name: getattr(e, name) for name in decisive}
        return Experiment(**own, seed=0 if e.labelled_images is None else e.seed)  # it draws the labelled images

    return [*dict.fromkeys(map(setting, experiments))]


def _refuse_bad_options(e: Experiment, data_root: str | os.PathLike[str] | None) -> None:
    """Build the method: what it refuses, or the data lack, should not wait until something is trained.

    For made-up classes, as many as a data set may have, as some values need many; but MEDOE, whose groups depend on
    the data, for theirs.
    """
    options, sizes = _check_options(e), torch.arange(254, 0, -1)
    counts = stats.ClassCounts(sizes, sizes)
    if e.method == "medoe":
        whole = data.load(e.dataset, "train", data_root, **e.data_options)
        counts = stats.count_classes(Subset(whole, _shares(e, len(whole))[0]))
    with torch.random.fork_rng(devices=()):
        network = build_model(e.architecture, e.encoder, counts.num_classes, **e.model_options)
        stages = build_method(e.method, network, counts, options)
    for split in {stage.split for stage in stages} - {"train"}:
        if e.target is not None:
            raise UserError(f"{e.method} learns from labels of the split {split!r}, and a target has none to give")
        if split not in (found := data.splits(e.dataset, data_root)):
            raise UserError(f"{e.method} learns from labels of the split {split!r}; {e.dataset} has {', '.join(found)}")


def _check_same_data(first: Run, classes: Sequence[str], counts: stats.ClassCounts) -> None:
    known = first.counts()
    changed = [
        name
        for name, same in (
            ("class list", list(first.classes) == list(classes)),
            ("labelled pixels of the classes", known.pixels.equal(counts.pixels)),
            ("images of the classes", known.images.equal(counts.images)),
        )
        if not same
    ]
    if changed:
        raise UserError(
            f"the run {first.path} ({first.experiment.method}), from which this method starts, was trained on other"
            f" data: {changed[0]} of {first.experiment.dataset} changed since. Delete that folder and run again"
        )


def _check_finite(loss: Tensor, first: int, e: Experiment) -> None:
    """Refuse a stage whose losses are not all finite."""
    bad = (~torch.isfinite(loss)).nonzero()
    if len(bad):
        raise UserError(
            f"the loss of {e.method} (seed {e.seed}) is {loss[bad[0, 0]].item()} at step {first + int(bad[0, 0]) + 1}:"
            f" try a lower lr (now {e.lr:g}), a warm-up (warmup_steps), clip_norm: 1"
            + (", or precision: fp32" if e.precision == "bf16" else "")
        )


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and commit, for environment.json."""
    packages = ("torch", "torchvision", "segmentation-models-pytorch", "timm", "accelerate", "numpy")
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no clone
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.check_output(
            command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages} | {"ltseg": __version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "commit": commit,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
