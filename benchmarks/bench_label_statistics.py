"""Label statistics against pure PNG decoding with the same number of threads, alternating in one run.

    python benchmarks/bench_label_statistics.py [--data-root DIR] [--dataset camvid] [--repeats 9]

Counts the classes of the training split (`stats.count_classes`) and, between, only decodes the same files
(`np.asarray(Image.open(path))`), once as one would write it, one task per file, and once as fast as it gets, one task
per thread. Without the data set it makes 200 palette PNGs of coloured rectangles first. Prints the medians of the
paired ratios; the bar is 1.10.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ltseg_core import config, data, stats
from ltseg_core.config import data_root


def make_folder(root: Path, images: int = 200, classes: int = 12) -> None:
    """Folder data set of label maps with 300 random rectangles each, 480 x 360 px, and black images."""
    rng = np.random.default_rng(0)
    folders = [root / "train" / name for name in ("images", "labels")]
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(images):
        label = Image.new("P", (480, 360))
        label.putpalette(bytes(range(3 * classes)))
        draw = ImageDraw.Draw(label)
        for x, y, width, height in rng.integers((0, 0, 5, 5), (480, 360, 60, 60), (300, 4)):
            draw.rectangle((x, y, x + width, y + height), fill=int(rng.integers(classes)))
        label.save(folders[1] / f"{i:04}.png")
        Image.new("RGB", (480, 360)).save(folders[0] / f"{i:04}.png")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="default: $LTSEG_DATA, else ./data")
    parser.add_argument("--dataset", default="camvid")
    parser.add_argument("--threads", type=int, default=config.cores())
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.threads) as pool:
        if args.dataset in data.found(args.data_root):
            dataset = data.load(args.dataset, "train", args.data_root)
            folder = data_root(args.data_root) / args.dataset
        else:
            print(f"{args.dataset} not found: made-up label maps instead")
            folder = Path(temporary) / "rectangles"
            make_folder(folder)
            dataset = data.load(str(folder), "train")
        paths = sorted((folder / "train" / "labels").glob("*.png"))

        def decode(path: Path) -> None:
            np.asarray(Image.open(path))

        def decode_share(start: int) -> None:
            for path in paths[start :: args.threads]:
                decode(path)

        table = {
            "decode, one task per file": lambda: list(pool.map(decode, paths)),
            "decode, one task per thread": lambda: list(pool.map(decode_share, range(args.threads))),
            "count_classes": lambda: stats.count_classes(dataset, workers=args.threads),
        }
        times: dict[str, list[float]] = {name: [] for name in table}
        for _ in range(args.repeats + 1):  # the first round warms up
            for name, function in table.items():
                times[name].append(seconds(function))

        print(f"{dataset.name} train, {len(paths)} label maps, {args.threads} threads")
        for name, values in times.items():
            print(f"{name:<30}{1e6 * statistics.median(values[1:]) / len(paths):8.0f} us per image")
        counted = times.pop("count_classes")[1:]
        for name, values in times.items():
            ratios = [c / d for c, d in zip(counted, values[1:], strict=True)]
            print(f"ratio to {name}: {statistics.median(ratios):.2f} (bar 1.10)")


if __name__ == "__main__":
    main()
