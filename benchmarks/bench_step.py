"""Training step of every method against cross-entropy's, alternating in one run: time, and memory beyond it.

    python benchmarks/bench_step.py [--profile camvid_cpu] [--device cuda] [--rounds 7] [--methods blv pat ...]

A step is what `train.fit` does: forward, loss, backward, optimiser, at the profile's network, size and precision, on
random images and labels (one process, the threads torch takes). Stages that train a frozen network's last layer are
shown too. Prints the median of the paired ratios with their quartiles, and the peak of the memory that the step
allocates beyond cross-entropy's. `extra decoders` is what MEDOE's first stage may cost: 1 + the forward and
backward pass of its further decoders alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler is used for its counts of memory: nothing to report

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ltseg_core import config
from ltseg_core.evaluate import autocast
from ltseg_core.losses import cross_entropy
from ltseg_core.methods import METHODS, build_method
from ltseg_core.methods.base import Stage
from ltseg_core.models import build_model
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner, build_optimizer

CLASSES = 11
Step = Callable[[], Tensor]


def stage_step(e: config.Experiment, image: Tensor, target: Tensor, stage: Stage) -> Step:
    """One training step of a stage."""
    learner = Learner(stage).to(image.device).train()
    for module in stage.frozen:
        module.requires_grad_(False).eval()
    optimizer = build_optimizer(learner, e)

    def step() -> Tensor:
        with autocast(image.device, e.precision):
            loss = learner(image, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def method_steps(e: config.Experiment, image: Tensor, target: Tensor, names: list[str]) -> dict[str, Step]:
    """One step of each stage that trains, by the name of method and stage."""
    pixels = (1e9 * 0.45 ** torch.arange(CLASSES)).long()
    counts = ClassCounts(pixels, pixels.clamp(max=367))
    steps = {}
    for name in names:

        def stages(name: str = name) -> list[Stage]:  # anew for each step: a stage freezes what the one before trains
            network = build_model(e.architecture, e.encoder, CLASSES, **e.model_options)
            return [stage for stage in build_method(name, network, counts, {}) if stage.share]

        for number, stage in enumerate(first := stages()):
            title = name if len(first) == 1 else f"{name}, {stage.name}"
            steps[title] = stage_step(e, image, target, stages()[number])
    return steps


def decoder_step(e: config.Experiment, image: Tensor, target: Tensor, decoders: int) -> Step:
    """Forward and backward pass of `decoders` decoders with classifier and cross-entropy, on given encoder maps."""
    network = build_model(e.architecture, e.encoder, CLASSES, **e.model_options).to(image.device).train()
    with torch.no_grad(), autocast(image.device, e.precision):
        maps = network.encode(image)

    def step() -> Tensor:
        for _ in range(decoders):
            with autocast(image.device, e.precision):
                logits = network.resize(network.classifier(network.decode(maps)), image)
                loss = cross_entropy(logits, target)
            loss.backward()
        return loss

    return step


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step().item()
    return time.perf_counter() - start


def peak_bytes(step: Step, device: str) -> int:
    """Largest amount of memory a step holds beyond what was there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step().item()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((ev.start_ns(), ev.nbytes()) for ev in events if ev.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="camvid_cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="*", default=[m for m in METHODS if METHODS[m].length])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    e = config.profile(args.profile).experiment()
    height, width = e.size or ((96, 128) if e.dataset == "scenes" else (360, 480))
    image = torch.rand(e.batch_size, 3, height, width, device=args.device)
    blocks = torch.randint(CLASSES, (e.batch_size, height // 20, width // 20), device=args.device)
    target = blocks.repeat_interleave(20, 1).repeat_interleave(20, 2)
    target[:, :4] = config.IGNORE_INDEX

    steps = method_steps(e, image, target, ["ce", *(m for m in args.methods if m != "ce")])
    if "medoe" in args.methods:
        steps["extra decoders"] = decoder_step(e, image, target, 2)
    peak = {}
    for name, step in steps.items():
        seconds(step)  # allocates the optimiser's state
        peak[name] = peak_bytes(step, args.device)
    # each beside a step of cross-entropy just before it: a slow moment of the machine slows both
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    base = []
    for _ in range(args.rounds):
        for name, step in steps.items():
            base.append(seconds(steps["ce"]))
            ratios[name].append(seconds(step) / base[-1])

    print(f"{e.architecture}, {e.encoder}, batch {e.batch_size}, {height}x{width} px, {e.precision}, {args.device}, "
          f"{torch.get_num_threads()} threads; a step of ce: {1000 * statistics.median(base):.0f} ms, "
          f"{peak['ce'] / 2**20:.0f} MiB")  # fmt: skip
    print(f"{'':28}{'of ce':>7}{'quartiles':>14}{'MiB beyond':>12}")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        if name == "extra decoders":
            low, middle, high = 1 + low, 1 + middle, 1 + high
        print(f"{name:28}{middle:7.2f}{f'{low:.2f}-{high:.2f}':>14}{(peak[name] - peak['ce']) / 2**20:12.0f}")


if __name__ == "__main__":
    main()
