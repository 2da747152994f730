"""Measuring cost: pairs cancel drift, waiting is no work, and memory is what closed forms say."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom
from tiny import COUNTS, C, D, batch, tiny_network

from ltseg_core import cost, train
from ltseg_core.config import Experiment

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=NEEDS_CUDA)]
FLOATS = 2**15  # 128 KiB, which the allocator of a GPU neither rounds nor takes from a block it cannot split
SCALARS = 2048  # bytes: a GPU's allocator gives a number 512
METHODS = {name: {} for name in ("ce", "region_rebalance", "disalign", "crt", "lws")} | {"medoe": {"shares": [0.01]}}


def test_time_spent_waiting_is_not_processor_time():
    asleep, busy = cost.seconds(lambda: time.sleep(0.2), CPU), cost.seconds(lambda: sum(range(10_000_000)), CPU)
    assert asleep < 0.05 < busy


@NEEDS_CUDA
def test_time_on_a_gpu_is_that_of_the_work_alone_and_of_all_of_it():
    device, queued = torch.device("cuda"), []
    x = torch.randn(4096, 4096, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def step():
        start = time.perf_counter()
        begin.record()
        for _ in range(30):
            x @ x
        end.record()
        queued.append(time.perf_counter() - start)

    cost.seconds(step, device)  # loads the kernels
    found = cost.seconds(step, device)
    on_the_device = begin.elapsed_time(end) / 1000
    assert found > 0.99 * on_the_device
    assert on_the_device > 2 * queued[-1], "the step did not run ahead of the device"
    step()
    assert cost.seconds(lambda: None, device) < on_the_device / 2, "the work before belongs to another step"


@pytest.fixture
def clock(monkeypatch):
    """Steps are numbers, the seconds that they take; `clock.pace` is the machine's, `clock.log` what was timed."""

    fake = SimpleNamespace(log=[], pace=lambda call: 1.0)

    def seconds(step, device):
        assert torch.get_num_threads() == 1
        fake.log.append(step)
        return step() * fake.pace(len(fake.log))

    monkeypatch.setattr(cost, "seconds", seconds)
    return fake


def test_drift_of_the_machine_cancels_in_pairs(clock):
    clock.pace = lambda call: 1.02**call  # twice as slow after 35 steps
    true = {"a": 1.0, "b": 0.25, "c": 3.0, "d": 1.1, "e": 1.0}
    steps = {name: (lambda t=t: t) for name, t in true.items()}
    times = cost.paired_times(steps, steps["a"], rounds=9, device=CPU)
    found = cost.ratios(times)
    assert list(found.index) == list(true)
    assert found["value"].to_dict() == pytest.approx(true, rel=1.02**2 - 1)  # two steps away at most
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()
    unpaired = times.groupby("step", observed=True)["seconds"].agg(lambda t: t.max() / t.min())
    assert unpaired.min() > 2


@pytest.mark.parametrize(("number", "together"), [(1, 4), (4, 4), (7, 4), (7, 2), (7, 3)])
def test_every_round_takes_every_step_once_next_to_the_baseline(clock, number, together):
    steps = {str(i): (lambda i=i: 1.0) for i in range(number)}
    base = lambda: 1.0  # noqa: E731
    times = cost.paired_times(steps, base, rounds=3, device=CPU, together=together)
    assert times.groupby("step", observed=True)["round"].agg(list).tolist() == [[0, 1, 2]] * number
    groups = -(-number // together)
    assert len(clock.log) == 3 * (number + groups)
    at = [i for i, step in enumerate(clock.log) if step is base]
    assert max(min(abs(i - j) for j in at) for i in range(len(clock.log))) <= -(-together // 2)


def test_the_interval_of_a_median_is_made_of_order_statistics():
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        x = rng.normal(size=n)
        middle, low, high = cost.median_interval(x)
        assert middle == np.median(x)
        k = sum(2 * binom.cdf(j, n, 0.5) <= 0.05 for j in range(n // 2))  # as many are left out on each side
        if k == 0:
            assert n < 6
            assert np.isnan([low, high]).all()
        else:
            assert (low, high) == (np.sort(x)[k - 1], np.sort(x)[-k])


def test_the_interval_covers_the_median_of_skewed_times():
    x = np.random.default_rng(1).lognormal(sigma=0.7, size=(400, 9))  # median 1
    limits = np.array([cost.median_interval(row)[1:] for row in x])
    assert ((limits[:, 0] <= 1) & (limits[:, 1] >= 1)).mean() >= 0.93


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_peak_memory_of_known_allocations(device):
    def step():
        x = torch.ones(FLOATS, device=device)
        y = torch.cat([x, x])
        del x
        return torch.cat([y, y, y[:FLOATS]])

    kept = torch.ones(FLOATS, device=device)  # what was there before does not count
    assert 0 <= cost.peak_bytes(step, device) - 4 * 7 * FLOATS < SCALARS
    assert cost.peak_bytes(lambda: None, device) == 0
    assert kept.all()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("depth", [1, 4, 9])
def test_peak_memory_of_a_backward_pass(device, depth):
    """exp keeps its result for the backward pass; going back, one gradient more is there than results are gone."""
    x = torch.zeros(FLOATS, device=device, requires_grad=True)

    def chain():
        y = x
        for _ in range(depth):
            y = y.exp()
        return y.sum()

    peak = cost.peak_bytes(lambda: torch.autograd.grad(chain(), x), device)
    assert 0 <= peak - (depth + 1) * x.nbytes < SCALARS


def ready(names=METHODS):
    """(learner, optimiser) and step of every stage, after one step."""
    e = Experiment()
    table = {}
    for name, stage in cost.stages(tiny_network(), COUNTS, {n: METHODS[n] for n in names}).items():
        pair = train.ready(stage, e, CPU)
        train.optimise(*pair, e, *batch())
        table[name] = pair
    return e, table


def test_stages_are_named_and_do_not_freeze_each_other():
    _, table = ready()
    titles = ["ce", "region_rebalance", "disalign", "crt", "lws", "medoe experts", "medoe ensemble"]
    assert list(table) == titles
    trained = {name: cost.parameters(learner, trained=True) for name, (learner, _) in table.items()}
    whole = cost.parameters(tiny_network())
    other = cost.parameters(tiny_network().decoder) + cost.parameters(tiny_network().classifier)
    assert trained == {
        "ce": whole,
        "region_rebalance": whole + D * C + C,
        "disalign": 2 * C + D + 1,
        "crt": D * C + C,
        "lws": C,
        "medoe experts": whole + other,
        "medoe ensemble": 2 * 2 * C,
    }
    assert cost.parameters(table["medoe ensemble"][0]) == whole + other + 2 * 2 * C


@pytest.mark.parametrize(("optimizer", "slots"), [("sgd", 1), ("adamw", 2)])
def test_training_holds_parameters_buffers_and_slots(optimizer, slots):
    e = Experiment(optimizer=optimizer)
    learner, built = train.ready(cost.stages(tiny_network(), COUNTS, {"ce": {}})["ce"], e, CPU)
    held = 4 * cost.parameters(learner) + sum(b.nbytes for b in learner.buffers())
    assert cost.held_bytes(learner, built) == held
    train.optimise(learner, built, e, *batch())
    counters = 4 * len(list(learner.parameters())) if optimizer == "adamw" else 0
    assert cost.held_bytes(learner, built) == held + 4 * slots * cost.parameters(learner) + counters


def test_peak_memory_of_training_repeats_and_holds_what_backward_needs():
    e, table = ready()
    image, target = batch(size=(96, 128))
    peaks = {}
    for (name, pair), _ in itertools.product(table.items(), range(2)):
        step = lambda pair=pair: train.optimise(*pair, e, image, target)  # noqa: E731
        peaks.setdefault(name, []).append(cost.training_bytes(*pair, step, CPU))
    assert all(first == second for first, second in peaks.values())
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        table["ce"][0](image, target)
    own = {p.untyped_storage().data_ptr() for p in (*table["ce"][0].parameters(), image, target)}
    assert peaks["ce"][0] >= sum(size for place, size in kept.items() if place not in own)
    assert peaks["medoe experts"][0] > peaks["ce"][0] > peaks["lws"][0]


def test_the_loss_alone_has_the_gradient_of_the_whole_step_and_touches_no_network():
    """The gradients of what the loss reads, the experts' logits or the logits, and of its own parameters."""
    e, table = ready()
    image, target = batch()
    read: list[list[torch.Tensor]] = []
    for name, (learner, optimizer) in table.items():

        def note(_, arguments, name=name):
            output = arguments[0]
            read.append(list(output.experts) if name == "medoe experts" else [output.logits])
            for tensor in read[-1]:
                tensor.retain_grad()

        learner.criterion.register_forward_pre_hook(note)
        optimizer.zero_grad()
        torch.manual_seed(3)  # of the dropout
        step = cost.loss_step(learner, e, image, target)
        step()
        assert all(p.grad is None for p in learner.network.parameters())
        own = [p.grad.clone() for p in learner.criterion.parameters()]
        assert bool(own) is (name == "region_rebalance")
        optimizer.zero_grad()
        torch.manual_seed(3)
        learner.criterion(learner.network(image), target).backward()
        whole = [p.grad for p in learner.criterion.parameters()] + [tensor.grad for tensor in read[-1]]
        for alone, expected in zip(own + [tensor.grad for tensor in read[-2]], whole, strict=True):
            assert expected.any()
            torch.testing.assert_close(alone, expected)


def test_the_kept_measurement_meets_the_bar():
    """A training step of these takes at most 1.10 of one of cross-entropy."""
    kept = pd.read_csv(Path(__file__).parents[1] / "benchmarks" / "step_cost.csv", index_col="step")["value"]
    bound = ["blv", "pat", "focal", "ldam", "logit_adjustment", "balanced_softmax", "grw_ce", "region_rebalance"]
    assert kept[bound].le(1.10).all(), kept[bound].sort_values().tail(1)


def test_the_table_of_step_costs_is_that_of_the_kept_measurement():
    folder = Path(__file__).parents[1] / "benchmarks"
    kept = pd.read_csv(folder / "step_cost.csv", index_col="step")
    cells = (line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines())
    said = {step: rest for step, *rest in cells if step in kept.index}
    mib = ((kept["peak_bytes"] - kept.loc["ce", "peak_bytes"]) / 2**20).round()
    for step, row in kept.iterrows():
        beyond = "" if np.isnan(mib[step]) else f"{mib[step]:.0f}"
        shown = [f"{row['value']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}", beyond]
        assert [*said[step], ""][:3] == shown, f"{step}: the table says {said[step]}, step_cost.csv {shown}"
