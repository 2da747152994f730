"""Confusion counting against torchmetrics on one batch of label maps, in one process and one run.

    python benchmarks/bench_counting.py [--classes 150] [--batch 8] [--size 512] [--device cuda] [--repeats 9]

Both count the same batch (predictions int64 as `argmax` gives them, targets uint8 as the data sets give them; 10 %
of the pixels ignored) and return the class IoU. Prints the median times and how many times faster ours is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ltseg_core.metrics import ConfusionCounts

IGNORED = 255


def label_maps(classes: int, batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Blocks of 16 x 16 px, 80 % predicted right: (B, H, W) int64 predictions, uint8 targets."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(classes, (batch, size // 16, size // 16), generator=generator)
    target = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    noise = torch.randint(classes, target.shape, generator=generator)
    right = torch.rand(target.shape, generator=generator) < 0.8
    pred = torch.where(right, target, noise)
    target[:, : target.shape[1] // 10] = IGNORED
    return pred.to(device), target.to(torch.uint8).to(device)


def median_ms(function: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels, a multiple of 16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

    pred, target = label_maps(args.classes, args.batch, args.size, args.device)

    def ours() -> Tensor:
        counts = ConfusionCounts(args.classes, ignore_index=IGNORED)
        counts.update(pred, target)
        return counts.iou()

    def theirs(metric: type, validate: bool) -> Callable[[], Tensor]:
        options = {"average": None} if metric is MulticlassJaccardIndex else {}
        made = metric(args.classes, ignore_index=IGNORED, validate_args=validate, **options).to(args.device)

        def run() -> Tensor:
            made.reset()
            made.update(pred, target.long())
            return made.compute()

        return run

    torch.testing.assert_close(
        ours().float().nan_to_num(), theirs(MulticlassJaccardIndex, True)().float().cpu(), atol=1e-6, rtol=0
    )
    shape = f"{args.batch}x{args.size}x{args.size} px"
    print(f"{args.classes} classes, {shape}, {torch.get_num_threads()} threads on {args.device}")
    own = median_ms(ours, args.repeats, args.device)
    print(f"{'ltseg_core ConfusionCounts':<52}{own:8.2f} ms")
    for metric in (MulticlassConfusionMatrix, MulticlassJaccardIndex):
        for validate in (True, False):
            other = median_ms(theirs(metric, validate), args.repeats, args.device)
            name = f"torchmetrics {metric.__name__}, validate_args={validate}"
            print(f"{name:<62}{other:8.2f} ms   ratio {other / own:5.1f}")


if __name__ == "__main__":
    main()
