"""Every figure and table of the notebooks again from finished runs, in processes that share their imports."""

from __future__ import annotations

import contextlib
import gc
import graphlib
import io
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ltseg_core import collection, config
from ltseg_core.config import UserError
from ltseg_core.notebook import code_as_run

SHARED = [
    "segmentation_models_pytorch",
    "timm",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_pdf",
    "matplotlib.backends.backend_svg",
    "fontTools.subset",
    "scipy.stats",
    "pyarrow.parquet",
    "IPython.core.interactiveshell",
    "ltseg_core.analysis",
    "ltseg_core.train",
    "ltseg_core.viz",
]
"""Imported once: a new process starts with them in milliseconds instead of ten seconds."""


def redraw(
    names: Sequence[str] | None = None,
    *,
    figures: str | os.PathLike[str],
    profile: str = "quick",
    runs: str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> dict[str, str]:
    """Run the code of the notebooks, without kernels and outputs, so that they write their figures and tables.

    Nothing is trained. What a notebook once computed from the runs (`results.remembered`) is read.
    Arguments as in `collection.run`. Returns a sentence for each notebook that failed; whose needs failed is left out.
    Raises UserError for what the caller can mend.
    """
    profile = config.choose("profile", profile, config.PROFILES)
    chosen = {n.name: n for n in collection.select(names, collection.notebooks(folder))}
    code = {name: _without_checks(code_as_run(n, profile)) for name, n in chosen.items()}
    env = {
        **collection.places(runs, figures, data_root),
        **collection.headless(threads=1),
        "LTSEG_TRAIN": "0",
        "MPLBACKEND": "agg",
    }
    Path(env["LTSEG_FIGURES"]).mkdir(parents=True, exist_ok=True)
    order = graphlib.TopologicalSorter({name: set(n.needs) & chosen.keys() for name, n in chosen.items()})
    order.prepare()
    failed: dict[str, str] = {}
    running: dict[Future[tuple[str | None, float]], str] = {}
    with (
        _environment(env),  # of the server and so of every process
        ProcessPoolExecutor(config.cores(), mp_context=config.sharing(SHARED), max_tasks_per_child=1) as pool,
    ):
        while (ready := order.get_ready()) or running:
            for name in sorted(ready, key=lambda name: -sum(map(len, code[name]))):  # about the longest first
                running[pool.submit(_draw, code[name], str(chosen[name].path.parent), env)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    error, wall_s = future.result()
                except BrokenProcessPool:
                    raise UserError(
                        f"the process of {name} ended without a word: was it killed for its memory?"
                    ) from None
                if error:
                    failed[name] = error
                else:
                    order.done(name)
                if show:
                    print(f"{name}: {error or 'drawn'}, {wall_s:.1f} s", file=sys.stderr, flush=True)
    return failed


def _without_checks(code: Sequence[str]) -> Sequence[str]:
    """Without the last cells where they only check the text, of which nothing is drawn."""
    checks = itertools.takewhile(lambda cell: "text_check()" in cell and "viz.save" not in cell, reversed(code))
    return code[: len(code) - len(list(checks))]


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Any:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _draw(code: Sequence[str], folder: str, env: Mapping[str, str]) -> tuple[str | None, float]:
    """Run the cells of one notebook in this process, which has no other use: what went wrong, and seconds."""
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    begin = time.monotonic()
    gc.freeze()  # what the server imported is no garbage: no collection looks at it
    os.environ.update(env)  # the server may have been started with another one
    os.chdir(folder)
    settings = Config(InteractiveShell={"colors": "nocolor"}, HistoryManager={"enabled": False})
    shell = InteractiveShell.instance(config=settings, display_pub_class=CapturingDisplayPublisher)
    for count, source in enumerate(code, start=1):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = shell.run_cell(source, store_history=True)
        if error := result.error_before_exec or result.error_in_exec:
            return f"cell {count}: {collection.sentence(error)}", time.monotonic() - begin
    return None, time.monotonic() - begin
