"""What a method costs: the time of a step in terms of another's, and peak memory; on a CPU and on a GPU.

A step is a function without arguments; `train.optimise` and `loss_step` with their arguments bound, for example.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import quantile_test
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ltseg_core import evaluate
from ltseg_core.config import Experiment
from ltseg_core.methods import build_method
from ltseg_core.methods.base import Stage
from ltseg_core.models import Output, SegmentationNetwork
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner

Step = Callable[[], Any]


# --------------------------------------------------------------------------------------------------- what runs


def stages(
    network: SegmentationNetwork, counts: ClassCounts, methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Stage]:
    """Every stage of every method, each on a copy of the network of its own: one stage freezes what another trains.

    methods: hyper-parameters by name of the method.  Names of the result: that of the method; where it has several
    stages `medoe experts`, `medoe ensemble`.
    """
    table = {}
    for method, hyper in methods.items():
        every = build_method(method, copy.deepcopy(network), counts, hyper)
        for i, stage in enumerate(every):
            own = build_method(method, copy.deepcopy(network), counts, hyper)[i] if i else stage
            table[method if len(every) == 1 else f"{method} {stage.name}"] = own
    return table


def loss_step(learner: Learner, e: Experiment, image: Tensor, target: Tensor) -> Step:
    """Forward and backward pass of the criterion alone, on what the network gives for this batch once.

    image (B, 3, H, W) float in [0, 1], target (B, H, W) int64
    """
    with torch.no_grad(), evaluate.autocast(image.device, e.precision):
        output: Any = learner.network(image)
    leaves: Output = output._replace(**{name: _leaf(value) for name, value in output._asdict().items()})

    def step() -> None:
        with evaluate.autocast(image.device, e.precision):
            loss = learner.criterion(leaves, target)
        loss.backward()

    return step


def _leaf(value: Any) -> Any:
    """Tensors, possibly in a tuple, that gather gradients of their own."""
    if isinstance(value, tuple):
        return tuple(map(_leaf, value))
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


# -------------------------------------------------------------------------------------------------------- time


def seconds(step: Step, device: torch.device) -> float:
    """Time of one call. On a CPU the processor time of this process: what other programs take of the machine is not
    in it, so that with one thread it is the time on an idle machine, up to shared caches. On a GPU the time until the
    device has finished. (Processor time ticks in 16 ms on Windows.)
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    step()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes in one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def paired_times(
    steps: Mapping[str, Step],
    baseline: Step,
    *,
    rounds: int,
    device: torch.device,
    together: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of each step beside one of the baseline, in one thread: step, round, seconds, ratio.

    A round takes every step once, in an order drawn from the seed, `together` of them around a step of the baseline:
    two, the baseline, two; two, the baseline, two; ... So a slow moment of the machine slows both sides of a ratio.
    Every step is taken once before the first round.
    """
    draw, rows = random.Random(seed), []
    with one_thread():
        for step in (baseline, *steps.values()):
            step()
        for number in range(rounds):
            order = draw.sample(list(steps), len(steps))
            for start in range(0, len(order), together):
                group = order[start : start + together]
                half = len(group) // 2
                times = {name: seconds(steps[name], device) for name in group[:half]}
                unit = seconds(baseline, device)
                times |= {name: seconds(steps[name], device) for name in group[half:]}
                rows += [(name, number, t, t / unit) for name, t in times.items()]
    table = pd.DataFrame(rows, columns=["step", "round", "seconds", "ratio"])
    return table.astype({"step": pd.CategoricalDtype(list(steps), ordered=True)}).sort_values(
        ["step", "round"], ignore_index=True
    )


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median of independent values (N,) with a 95 % interval between two of them that supposes no distribution.

    With B ~ Binomial(N, 1/2) values below the true median, it lies between the k-th smallest and the k-th largest with
    probability 1 - 2 P(B < k); k is the largest with 95 %. Below 6 values there is none: NaN.
    """
    middle = float(np.median(values))
    low, high = quantile_test(values, q=middle, p=0.5).confidence_interval(0.95)
    return middle, float(low), float(high)


def ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Medians over the rounds of `paired_times`, indexed by step: value, low, high (`median_interval` of the ratio to
    the baseline), seconds.
    """
    table = times.pivot(index="step", columns="round", values="ratio")
    limits = [median_interval(row) for row in table.to_numpy()]
    found = pd.DataFrame(limits, index=table.index.astype(str), columns=["value", "low", "high"])
    return found.assign(seconds=times.groupby("step", observed=True)["seconds"].median().to_numpy())


# ------------------------------------------------------------------------------------------------------ memory


def peak_bytes(step: Step, device: torch.device) -> int:
    """Largest amount of memory that a call holds beyond what was there before it.

    On a GPU that of PyTorch's allocator; on a CPU, in one thread, every allocation and release that PyTorch's profiler
    records, so tensors and temporaries, but not what a library allocates by itself. The step must have been taken
    before, and must not release what was there: the profiler does not see the size of that.
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints two lines at each use
    with one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events: Any = recorded.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda c: c[0])
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def held_bytes(learner: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Memory of parameters, buffers and the optimiser's state: what training holds between two steps."""
    slots = (value for state in optimizer.state.values() for value in state.values())
    tensors = (*learner.parameters(), *learner.buffers(), *(s for s in slots if isinstance(s, Tensor)))
    return sum(t.nbytes for t in tensors)


def training_bytes(learner: nn.Module, optimizer: torch.optim.Optimizer, step: Step, device: torch.device) -> int:
    """Peak memory of training: what it holds between two steps, and the peak of one."""
    optimizer.zero_grad(set_to_none=True)
    return held_bytes(learner, optimizer) + peak_bytes(step, device)


def parameters(module: nn.Module, *, trained: bool = False) -> int:
    """How many numbers the parameters of a module hold: all, or those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
