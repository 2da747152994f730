"""Shared fixtures: small made-up data folders, and the real data where it is present."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts the tests in the background
torch.set_num_threads(1)  # tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"
DATA = Path(os.environ["LTSEG_DATA"]).resolve() if "LTSEG_DATA" in os.environ else None


@pytest.fixture(autouse=True)
def _no_ambient_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests see neither the user's data root nor the user's runs."""
    for name in ("LTSEG_DATA", "LTSEG_TRAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LTSEG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LTSEG_HEADLESS", "1")


@pytest.fixture
def real_data() -> Path:
    """The data root with CamVid, CCP, class statistics and public results; without one the test is left out."""
    if DATA is None or not DATA.is_dir():
        pytest.skip("LTSEG_DATA does not point to the real data")
    return DATA


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a data folder: folder(train=6, val=3, classes=4, size=(32, 48)) -> its path."""

    def write(*, classes: int = 4, size: tuple[int, int] = (32, 48), seed: int = 0, **splits: int) -> Path:
        rng = np.random.default_rng(seed)
        root = tmp_path / "pictures"
        colours = rng.integers(0, 256, (classes, 3))
        for split, count in (splits or {"train": 6, "val": 3, "test": 3}).items():
            for kind in ("images", "labels"):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                label = np.kron(rng.integers(0, classes, (size[0] // 8, size[1] // 8)), np.ones((8, 8), int))
                image = np.clip(colours[label] + rng.normal(0, 20, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(root / split / "images" / f"{i:03}.png")
                Image.fromarray(label.astype(np.uint8)).save(root / split / "labels" / f"{i:03}.png")
        names = "".join(f"{i},thing {i}\n" for i in range(classes))
        (root / "classes.csv").write_text("class_index,class_name\n" + names)
        return root

    return write
