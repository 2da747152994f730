"""Trainings side by side: processes, and the cores they share with those of other notebooks."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ltseg_core import config, results


def take_cores(folder: Path, count: int) -> ExitStack:
    """Wait until `count` cores are not taken by processes that share `folder`; hold them until closed."""
    with results.writing(folder), ExitStack() as held:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".cores.lock"):  # one collects at a time: two halves would wait for each other
            while True:
                for core in range(config.cores()):
                    with suppress(Timeout):
                        held.enter_context(FileLock(folder / f".core{core}.lock", timeout=0))
                        count -= 1
                    if count == 0:
                        return held.pop_all()
                time.sleep(0.1)


@contextmanager
def pool(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of `threads` torch threads each; an exception, or the end of their parent, ends them at once."""
    workers = ProcessPoolExecutor(
        jobs,
        mp_context=config.sharing(["ltseg_core.train", "segmentation_models_pytorch"]),
        initializer=_start_worker,
        initargs=(threads, dict(os.environ)),
    )
    try:
        yield workers
    except BaseException:
        for process in list(workers._processes.values()):
            process.terminate()
        workers.shutdown(wait=True, cancel_futures=True)
        raise
    workers.shutdown()


def _start_worker(threads: int, environment: dict[str, str]) -> None:
    """Take threads and environment, which is the server's as yet; end with the parent, even one that was killed."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
