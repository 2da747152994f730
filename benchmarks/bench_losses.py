"""Time of forward + backward of every loss, beside plain cross-entropy and beside a whole training step.

python benchmarks/bench_losses.py [--device cuda] [--rounds 9]

Losses are timed alone, in turns, best of the rounds: next to a network their cost drowns in its noise. `of step`
is what a training step then costs relative to the same step with cross-entropy, with the step time given by
--step-ms (default: measured here with DeepLabV3+ and a mobilenet_v2 encoder). On a GPU the memory beyond
cross-entropy is shown too.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

from ltseg_core.losses import LOSSES, PixelLoss, build_loss
from ltseg_core.stats import ClassCounts

SIZES = ((8, 11, 180, 240), (8, 12, 96, 128))


def step_ms(loss: PixelLoss, logits: torch.Tensor, target: torch.Tensor) -> float:
    logits.grad = None
    start = time.perf_counter()
    loss(logits, target).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def network_step_ms(shape: tuple[int, ...], device: str, rounds: int) -> float:
    """A training step of the network that the bars name, without the loss: forward, backward, AdamW."""
    import segmentation_models_pytorch as smp

    batch, classes, height, width = shape
    model = smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    image = torch.randn(batch, 3, -(-height // 32) * 32, -(-width // 32) * 32, device=device)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(image).mean().backward()
        optimizer.step()
        if image.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-ms", type=float, help="time of the rest of a training step")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for shape in SIZES:
        torch.manual_seed(0)
        batch, classes, height, width = shape
        pixels = (1e8 * 0.5 ** torch.arange(classes)).long()
        counts = ClassCounts(pixels, pixels.clamp(max=400))
        losses = {name: build_loss(name, counts).to(args.device) for name in LOSSES}
        logits = torch.randn(shape, device=args.device, requires_grad=True)
        target = torch.randint(classes, (batch, height, width), device=args.device)
        target[:, :4] = 255

        best = dict.fromkeys(losses, float("inf"))
        peak = dict.fromkeys(losses, 0)
        for turn in range(args.rounds + 1):  # the first turn warms up
            for name, loss in losses.items():
                if logits.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                ms = step_ms(loss, logits, target)
                if turn:
                    best[name] = min(best[name], ms)
                if logits.is_cuda:
                    peak[name] = torch.cuda.max_memory_allocated()
        rest = args.step_ms or network_step_ms(shape, args.device, min(args.rounds, 3))
        print(f"\nlogits {shape}, {args.device}, {torch.get_num_threads()} threads, "
              f"rest of the step {rest:.0f} ms")  # fmt: skip
        print(f"{'loss':18}{'ms':>9}{'of ce':>9}{'of step':>9}" + ("   MiB beyond ce" if logits.is_cuda else ""))
        for name, ms in best.items():
            row = f"{name:18}{ms:9.2f}{ms / best['ce']:9.2f}{(rest + ms) / (rest + best['ce']):9.3f}"
            print(row + (f"{(peak[name] - peak['ce']) / 2**20:17.1f}" if logits.is_cuda else ""))


if __name__ == "__main__":
    main()
