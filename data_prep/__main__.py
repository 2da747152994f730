"""`python -m data_prep DATASET --root DIR`: fetch, check and convert one public data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data_prep.camvid import CAMVID
from data_prep.ccp import CCP
from data_prep.cifar100 import prepare as prepare_cifar100
from data_prep.class_stats import CLASS_STATS
from data_prep.install import prepare_images, prepare_tables
from data_prep.public_results import ADE20K_STATS, CITYSCAPES_STATS
from ltseg_core.config import UserError, choose, data_root

DATASETS: dict[str, Callable[..., str]] = {
    "camvid": partial(prepare_images, CAMVID),
    "ccp": partial(prepare_images, CCP),
    "cifar100": prepare_cifar100,
    "class_stats": partial(prepare_tables, CLASS_STATS),
    "ade20k_stats": partial(prepare_tables, ADE20K_STATS),
    "cityscapes_stats": partial(prepare_tables, CITYSCAPES_STATS),
}
HELP = """data sets:
  camvid            street scenes, 11 classes, 701 frames (190 MB to download, 41 MB kept)
  ccp               clothing, 59 classes, 1,004 photographs (130 MB to download, 29 MB kept)
  cifar100          image classification, 100 classes, long-tailed (48 MB kept)
  class_stats       class counts of ADE20K, COCO-Stuff and Cityscapes (10 kB)
  ade20k_stats      published IoU and accuracy per class, 24 results on ADE20K (15 MB to download, 0.6 MB kept)
  cityscapes_stats  the same, 45 results on Cityscapes (16 MB to download, 0.1 MB kept)

examples:
  python -m data_prep camvid --root data
  LTSEG_DATA=~/datasets python -m data_prep ccp

A command that was interrupted goes on where it stopped when it is run again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line on standard error for anything the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Fetch a public data set, check it, and convert it into the layout that ltseg reads.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help=", ".join(DATASETS))
    parser.add_argument("--root", type=Path, help="data root; default $LTSEG_DATA, else ./data")
    parser.add_argument("--base-url", help="a mirror, asked for the same paths as the data set's servers")
    parser.add_argument("--keep-archive", action="store_true", help="keep downloads, in ROOT/.data_prep")
    options = parser.parse_args(arguments)
    try:
        prepare = DATASETS[choose("data set", options.dataset, DATASETS)]
        base_url = options.base_url and options.base_url.rstrip("/")
        print(prepare(data_root(options.root), base_url=base_url, keep_archive=options.keep_archive))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # the disk: read-only, full, a file where a folder should be
        where = f" {error.filename}" if error.filename else ""
        print(
            f"error: cannot write{where}: {error.strerror}; free space or choose another folder with --root",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
