"""Images per second of CPU time of the embedded scenes: `python benchmarks/bench_scenes.py` (bar: 300 at 96x128)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from ltseg_core.data.scenes import Scenes


def images_per_s(read: Callable[[int], object], images: int) -> float:
    start = time.process_time()
    for index in range(images):
        read(index)
    return images / (time.process_time() - start)


def main(*, images: int = 200, repeats: int = 7) -> None:
    for style in ("day", "night"):
        scenes = Scenes("train", style=style)
        scenes.sample(0)  # draws the sprites and textures once
        for name, read in (("sample", scenes.sample), ("label", scenes.label), ("instances", scenes.instances)):
            rates = [images_per_s(read, images) for _ in range(repeats)]
            print(
                f"{style:5s} {name:9s} {statistics.median(rates):6.0f} images/s "
                f"(median of {repeats}; {min(rates):.0f} to {max(rates):.0f}; {scenes.height}x{scenes.width})"
            )


if __name__ == "__main__":
    main()
