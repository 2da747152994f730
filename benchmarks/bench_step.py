"""Training step of every method against cross-entropy's, interleaved in one run: time, and peak memory.

    python benchmarks/bench_step.py [--profile camvid_cpu] [--device cuda] [--rounds 6] [--methods blv pat ...]
                                    [--out benchmarks/step_cost.csv]

A step is what `train.fit` does: forward, loss, backward, optimiser, at the profile's network, size and precision, on
random images and labels. On a CPU it is timed in one thread and in processor time (see `ltseg_core.cost`). Stages
that train a frozen network's last layer are shown too. Prints medians of the ratios with 95 % intervals.
MEDOE's first stage may cost a step of cross-entropy with the forward and backward pass of its two further decoders,
`ce + decoders`; with their classifiers `ce + experts`; with the cross-entropy of each, as experts without MEDOE's
auxiliary loss would have it, `ce + experts' ce`. Each is timed as one step.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from ltseg_core import config, cost, train
from ltseg_core.evaluate import autocast
from ltseg_core.losses import cross_entropy
from ltseg_core.methods import SUPERVISED
from ltseg_core.models import SegmentationNetwork, build_model
from ltseg_core.stats import ClassCounts

CLASSES = 11


def decoder_steps(
    ce: cost.Step, network: SegmentationNetwork, e: config.Experiment, image: Tensor, target: Tensor, decoders: int
) -> dict[str, cost.Step]:
    """A step of cross-entropy, then the forward and backward pass of `decoders` decoders on given encoder maps, with
    more and more of what follows.
    """
    network = network.to(image.device).train()
    with torch.no_grad(), autocast(image.device, e.precision):
        maps = network.encode(image)

    def logits() -> Tensor:
        return network.resize(network.classify(network.decode(maps)), image)

    def step(forward: Callable[[], Tensor], gradient: Tensor) -> None:
        ce()
        for _ in range(decoders):
            with autocast(image.device, e.precision):
                result = forward()
            result.backward(gradient)

    parts = {
        "ce + decoders": lambda: network.decode(maps),
        "ce + experts": logits,
        "ce + experts' ce": lambda: cross_entropy(logits(), target),
    }
    with autocast(image.device, e.precision):
        return {name: partial(step, forward, torch.ones_like(forward())) for name, forward in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="camvid_cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=6, help="fewer than 6 give no interval")
    parser.add_argument("--methods", nargs="*", default=[m for m in SUPERVISED if SUPERVISED[m].length])
    parser.add_argument("--out", help="also write the table to this CSV file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    e, device = config.profile(args.profile).experiment(), torch.device(args.device)
    height, width = e.size or ((96, 128) if e.dataset == "scenes" else (360, 480))
    image = torch.rand(e.batch_size, 3, height, width, device=device)
    blocks = torch.randint(CLASSES, (e.batch_size, height // 20 + 1, width // 20 + 1), device=device)
    target = blocks.repeat_interleave(20, 1).repeat_interleave(20, 2)[:, :height, :width]
    target[:, :4] = config.IGNORE_INDEX
    pixels = (1e9 * 0.45 ** torch.arange(CLASSES)).long()
    counts = ClassCounts(pixels, pixels.clamp(max=367))

    network = build_model(e.architecture, e.encoder, CLASSES, **e.model_options)
    stages = cost.stages(network, counts, {m: {} for m in dict.fromkeys(["ce", *args.methods])})
    trained = {name: train.ready(stage, e, device) for name, stage in stages.items() if stage.share}
    steps: dict[str, cost.Step] = {
        name: partial(train.optimise, *pair, e, image, target) for name, pair in trained.items()
    }
    timed = dict(steps)
    if "medoe" in args.methods:
        timed |= decoder_steps(steps["ce"], network, e, image, target, 2)
    times = cost.ratios(cost.paired_times(timed, steps["ce"], rounds=args.rounds, device=device))
    peak = {name: cost.training_bytes(*pair, steps[name], device) for name, pair in trained.items()}
    times["peak_bytes"] = pd.Series(peak)

    print(f"{e.architecture}, {e.encoder}, batch {e.batch_size}, {height}x{width} px, {e.precision}, {args.device}; "
          f"a step of ce: {1000 * times.loc['ce', 'seconds']:.0f} ms, {peak['ce'] / 2**20:.0f} MiB")  # fmt: skip
    print("| method | time | 95 % | MiB beyond |\n|---|---|---|---|")
    for name, row in times.iterrows():
        beyond = "" if pd.isna(row["peak_bytes"]) else f"{(row['peak_bytes'] - peak['ce']) / 2**20:.0f}"
        print(f"| {name} | {row['value']:.2f} | {row['low']:.2f}-{row['high']:.2f} | {beyond} |")
    if args.out:
        times.rename_axis("step").astype({"peak_bytes": "Int64"}).to_csv(args.out, float_format="%.4g")


if __name__ == "__main__":
    main()
