"""The numbered notebooks as a graph: executed headless by papermill, in parallel or on a Dask cluster.

Every notebook runs in a process of its own (`launch`), which starts the kernel and lives no longer than its
caller. Layout of `out`: notebooks/ (executed), figures/; status/ (one JSON file for each notebook: what up-to-date
means); partial/ (the executed part of a notebook that runs or has failed); site/ is what `report` makes of it.
"""

from __future__ import annotations

import contextlib
import graphlib
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ltseg_core import config
from ltseg_core.config import UserError, choose
from ltseg_core.notebook import PACKAGE, Notebook, package_hash, read, source_hash, text_differs, write


@dataclass(frozen=True)
class Result:
    """What became of one notebook."""

    notebook: Notebook
    state: Literal["finished", "up to date", "failed", "skipped"]
    wall_s: float
    """Run time of the execution that made `executed`, in seconds."""
    executed: Path
    """The executed notebook; after a failure, the part that ran."""
    error: str | None = None
    """One sentence: cell and exception, or why the notebook was skipped."""
    remark: str | None = None
    """What `notebook.text_check` found: a statement of the text that does not hold for this run."""

    @property
    def failed(self) -> bool:
        """It failed or was skipped."""
        return self.error is not None


# ------------------------------------------------------------------------------------------ the collection


def notebooks(folder: str | os.PathLike[str] | None = None) -> list[Notebook]:
    """The notebooks `NN_name.ipynb` of `folder` (default: notebooks/ next to the package), by number.

    Raises UserError if there are none, one is not a notebook, a parameter is no plain literal, or `needs`
    names an unknown notebook or goes round in a circle.
    """
    folder = Path(folder) if folder else PACKAGE.parent / "notebooks"
    found = [read(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if not found:
        raise UserError(
            f"no notebooks NN_name.ipynb in {folder}: run from a clone of the repository, or name their folder"
        )
    names = [notebook.name for notebook in found]
    for notebook in found:
        for need in notebook.needs:
            if need not in names:
                choose(f"notebook in the needs of {notebook.path}:", need, names)
    try:
        graphlib.TopologicalSorter({n.name: n.needs for n in found}).prepare()
    except graphlib.CycleError as error:
        raise UserError(f"notebooks need each other in a circle: {' -> '.join(error.args[1])}") from None
    return found


def select(names: Iterable[str] | None, available: Sequence[Notebook]) -> list[Notebook]:
    """Those of `available` given by name, number ("02" or "2") or a part of the name; None or empty: all.

    Raises UserError for a name that fits no notebook, or a part that fits several.
    """
    chosen = set()
    for name in names or [n.name for n in available]:
        text = Path(name).stem.lower()
        by_number = [n.name for n in available if text.isdigit() and int(n.name[:2]) == int(text)]
        exact = [n.name for n in available if n.name.lower() == text]
        matches = exact or by_number or [n.name for n in available if text in n.name.lower()]
        if len(matches) > 1:
            raise UserError(f"notebook {name!r} fits {', '.join(matches)}: give its number")
        chosen.add(matches[0] if matches else choose("notebook", name, [n.name for n in available]))
    return [n for n in available if n.name in chosen]


def _parameters(chosen: Sequence[Notebook], given: Mapping[str, Any], profile: str) -> dict[str, dict[str, Any]]:
    """For each notebook the parameters to inject: those given that it declares, checked against its defaults."""
    for notebook in chosen:
        if notebook.parameters is None:
            raise UserError(f"{notebook.path} has no cell tagged `parameters`: tag the one with its parameters")
    known = {name for notebook in chosen for name in notebook.parameters or ()}
    for name in given:
        if name not in known:
            choose(f"parameter of {', '.join(n.name for n in chosen)}:", name, sorted(known))
    return {
        notebook.name: {
            name: _as_type_of(default, value, f"{notebook.name}: parameter {name}")
            for name, default in (notebook.parameters or {}).items()
            for value in [{"profile": profile, **given}.get(name, default)]
            if name in given or name == "profile"
        }
        for notebook in chosen
    }


def _as_type_of(default: Any, value: Any, where: str) -> Any:
    """`value` as the type of the default (an int becomes a float; None and [] accept any element)."""
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string
            return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return [_as_type_of(default[0], v, where) for v in value] if default else list(value)
    if default is None or type(value) is type(default):
        return value
    raise UserError(f"{where} must be of type {type(default).__name__} like {default!r}, got {value!r}")


# ----------------------------------------------------------------------------------------------- execution


def run(
    names: Iterable[str] | None = None,
    *,
    out: str | os.PathLike[str],
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    jobs: int = 0,
    scheduler: str | None = None,
    runs: str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    force: bool = False,
    show: bool = True,
    folder: str | os.PathLike[str] | None = None,
) -> list[Result]:
    """Execute the selected notebooks, and those they need, that are not up to date in `out`.

    parameters: injected into each notebook that declares them, like `profile`
    jobs: notebooks at a time, each with cores // jobs threads; 0: as many as there are cores or notebooks
    scheduler: address of a Dask cluster whose workers see the same file system; `jobs` then has no effect
    runs (default $LTSEG_RUNS or ./runs), figures (default out/figures), data_root (default $LTSEG_DATA or ./data):
        reach the notebooks as LTSEG_RUNS, LTSEG_FIGURES, LTSEG_DATA
    timeout: seconds one notebook may take
    A failure stops only the notebooks that need the failed one. Ctrl-C stops the kernels, keeps what has
    finished and raises KeyboardInterrupt.
    Raises UserError, before anything runs, for what the caller can mend.
    """
    if jobs < 0 or (timeout is not None and not timeout > 0):
        raise UserError(f"jobs must be >= 0 and timeout > 0 seconds, got {jobs} and {timeout}")
    profile = choose("profile", profile, config.PROFILES)
    available = notebooks(folder)
    chosen = _with_needs(select(names, available), available)
    values = _parameters(chosen, parameters or {}, profile)
    out = Path(out).expanduser().resolve()
    env = places(runs, figures or out / "figures", data_root)
    with _claimed(out, Path(env["LTSEG_FIGURES"]), Path(env["LTSEG_RUNS"])) as alive:
        keys = _keys(chosen, values, env)
        statuses = {n.name: _status(out, n.name) for n in chosen}
        fresh = {n.name for n in chosen if not force and _is_fresh(out, statuses[n.name], keys[n.name])}
        jobs = jobs or max(1, min(config.cores(), len(chosen) - len(fresh)))
        tasks = {
            n.name: {
                "name": n.name,
                "path": str(n.path),
                "out": str(out),
                "key": keys[n.name],
                "parameters": values[n.name],
                "env": env,
                "threads": None if scheduler else max(1, config.cores() // jobs),
                "timeout": timeout,
                "alive": str(alive),
            }
            for n in chosen
        }
        results: dict[str, Result] = {}
        with _executor(jobs, scheduler) as executor:
            _run_graph(chosen, tasks, fresh, executor, results, alive, show)
    return [results[n.name] for n in chosen]


def places(
    runs: str | os.PathLike[str] | None, figures: str | os.PathLike[str], data_root: str | os.PathLike[str] | None
) -> dict[str, str]:
    """The environment that tells a notebook where runs, figures and data are."""
    return {
        "LTSEG_RUNS": str(Path(runs or os.environ.get("LTSEG_RUNS") or "runs").expanduser().resolve()),
        "LTSEG_FIGURES": str(Path(figures).expanduser().resolve()),
        "LTSEG_DATA": str(config.data_root(data_root).resolve()),
    }


def headless(threads: int | str) -> dict[str, str]:
    """The environment of a process that runs a notebook for nobody to watch."""
    pools = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
    return {**dict.fromkeys(pools, str(threads)), "LTSEG_HEADLESS": "1", "TQDM_DISABLE": "1"}


def summary(results: Sequence[Result], out: str | os.PathLike[str]) -> str:
    """What ended how, one sentence for each failure, and where everything lies."""
    states = [r.state for r in results]
    counts = [f"{states.count(s)} {s}" for s in dict.fromkeys(states)]
    problems = [f"{r.notebook.name} {r.state}: {r.error}" for r in results if r.error]
    remarks = [f"the text of {r.notebook.name} was written for other numbers: {r.remark}" for r in results if r.remark]
    failed = [f"what ran of {r.notebook.name}: {r.executed}" for r in results if r.state == "failed"]
    where = [f"{name}: {Path(out, name)}" for name in ("notebooks", "figures")]
    return "\n".join([f"{len(results)} notebooks: {', '.join(counts)}", *problems, *remarks, *failed, *where])


def launch(task: Mapping[str, Any]) -> dict[str, Any]:
    """Execute one notebook in a new process (also the task of a Dask worker); return its status.

    Stops it when `task["alive"]` disappears or the time is over. The process reads its task from a pipe and
    takes the end of that pipe for the death of its caller.
    """
    if not os.path.exists(task["alive"]):
        return {"state": "failed", "error": "interrupted"}
    status_file = Path(task["out"], "status", f"{task['name']}.json")
    status_file.unlink(missing_ok=True)  # what it says from here on, this execution has written
    env = {
        **{name: value for name, value in os.environ.items() if name != "MPLBACKEND"},  # would hide figures
        **task["env"],
        **headless(task["threads"] or _worker_threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }
    begin, stopped = time.monotonic(), None
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ltseg_core.collection"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=env,
            cwd=Path(task["path"]).parent,
            start_new_session=True,  # Ctrl-C reaches only the caller, who stops everything in order
        )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(task).encode() + b"\n")
            child.stdin.flush()
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
            if not os.path.exists(task["alive"]):
                stopped = "interrupted"
            elif task["timeout"] and time.monotonic() - begin > task["timeout"]:
                stopped = f"took longer than {task['timeout']:g} s"
            if stopped and child.poll() is None:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10)
                child.kill()
        with contextlib.suppress(BrokenPipeError):  # what a dead child never read is still in the buffer
            child.stdin.close()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
    status = _status(Path(task["out"]), task["name"])
    if status.get("state") in ("finished", "failed"):
        return status
    cell = f"cell {status['cell']}: " if status.get("cell") else ""
    died = "was killed (out of memory?)" if child.returncode < 0 else f"ended: {last}"
    reason = stopped or f"the process {died}"
    status = {"state": "failed", "wall_s": time.monotonic() - begin, "error": cell + reason}
    with contextlib.suppress(UserError):
        write(status_file, json.dumps(status, indent=1))
    return status


def _run_graph(
    chosen: Sequence[Notebook],
    tasks: Mapping[str, Mapping[str, Any]],
    fresh: set[str],
    executor: Executor,
    results: dict[str, Result],
    alive: Path,
    show: bool,
) -> None:
    """Submit each notebook as soon as what it needs has finished; fill `results`, showing the progress."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(quiet=not show)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("cell {task.completed:.0f}/{task.total}"))
    bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not (show and console.is_terminal))

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    by_name = {n.name: n for n in chosen}
    order = graphlib.TopologicalSorter({n.name: n.needs for n in chosen})
    order.prepare()
    running: dict[Future[dict[str, Any]], tuple[str, TaskID]] = {}
    started: set[str] = set()

    def finish(name: str, state: Any, status: Mapping[str, Any]) -> None:
        good = state in ("finished", "up to date")
        executed = Path(tasks[name]["out"], "notebooks" if good else "partial", f"{name}.ipynb")
        remarks = status.get("error"), status.get("remark")
        results[name] = Result(by_name[name], state, status.get("wall_s", 0.0), executed, *remarks)
        say(f"{name}: {state}, {status.get('error') or format(status['wall_s'], '.1f') + ' s'}")
        if good:
            order.done(name)

    try:
        with bars:
            while (ready := order.get_ready()) or running:
                for name in sorted(ready):
                    if name in fresh:
                        finish(name, "up to date", _status(Path(tasks[name]["out"]), name))
                    else:
                        running[executor.submit(launch, tasks[name])] = (name, bars.add_task(name, total=None))
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    name, bar = running.pop(future)
                    bars.remove_task(bar)
                    try:
                        ended = future.result()
                    except Exception as error:  # e.g. the Dask worker was lost
                        ended = {"state": "failed", "error": sentence(error)}
                    finish(name, ended["state"], ended)
                for future, (name, bar) in running.items():
                    status = _status(Path(tasks[name]["out"]), name)
                    if bars.disable and future.running() and name not in started:  # no longer waits for a worker
                        say(f"{name}: started")
                        started.add(name)
                    bars.update(bar, completed=status.get("cell", 0), total=status.get("cells"))
    except BaseException:
        alive.unlink()  # stops every process that `launch` watches, here or on the cluster
        for future in running:
            future.cancel()
        wait(running, timeout=20)
        raise
    for notebook in chosen:
        if notebook.name not in results:
            failed = [n for n in _needed(notebook, by_name) if n in results and results[n].state == "failed"]
            finish(notebook.name, "skipped", {"error": f"needs {', '.join(failed)}, which failed"})


@contextlib.contextmanager
def _executor(jobs: int, scheduler: str | None) -> Iterator[Executor]:
    if scheduler is None:
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
        return
    from distributed import Client

    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(Client(scheduler, timeout=5, set_as_default=False))
            client.wait_for_workers(1, timeout=30)
        except (OSError, TimeoutError, ValueError) as error:
            raise UserError(f"no Dask scheduler with workers at {scheduler}: {sentence(error)}") from None
        yield client.get_executor(pure=False)


def _worker_threads() -> int:
    """Cores for each of the tasks that this Dask worker takes at a time (it sets OMP_NUM_THREADS to 1)."""
    from distributed import get_worker

    return max(1, config.cores() // get_worker().state.nthreads)


@contextlib.contextmanager
def _claimed(out: Path, *folders: Path) -> Iterator[Path]:
    """Make the folders and keep other runs out of `out`; yield the file whose absence stops this run."""
    from filelock import FileLock, Timeout

    try:
        for path in (out / "notebooks", out / "status", out / "partial", *folders):
            path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {out}: wait for it or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or out}: {error.strerror}; choose another --out") from None
    alive = out / f".alive-{uuid.uuid4().hex}"
    try:
        for stale in out.glob(".alive-*"):  # of a killed run, some of whose notebooks a cluster may still execute
            stale.unlink()
        alive.touch()
        yield alive
    finally:
        alive.unlink(missing_ok=True)
        lock.release()


# --------------------------------------------------------------------------------- what is up to date


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _keys(chosen: Sequence[Notebook], values: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """A hash for each notebook of everything that its outputs depend on."""
    data = Path(env["LTSEG_DATA"])
    surroundings = [
        package_hash(),
        sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}),  # some are found twice
        [sys.version, env],
        sorted(p.name for p in data.iterdir()) if data.is_dir() else [],  # a data set that arrives is used
        sorted(f"{p.parent.name}/{p.name}" for p in config.STUDIES.glob("*/*")),  # and so is a run that is kept
    ]
    keys: dict[str, str] = {}
    by_name = {n.name: n for n in chosen}
    for name in graphlib.TopologicalSorter({n.name: n.needs for n in chosen}).static_order():
        notebook = by_name[name]
        needed = [keys[need] for need in notebook.needs]
        keys[name] = _sha([source_hash(notebook.path), values[name], needed, surroundings])
    return keys


def _is_fresh(out: Path, status: Mapping[str, Any], key: str) -> bool:
    outputs = [out / path for path in status.get("outputs", [])]
    return status.get("state") == "finished" and status.get("key") == key and all(p.exists() for p in outputs)


def _with_needs(selected: Sequence[Notebook], available: Sequence[Notebook]) -> list[Notebook]:
    by_name = {n.name: n for n in available}
    wanted = {name for n in selected for name in (n.name, *_needed(n, by_name))}
    return [n for n in available if n.name in wanted]


def _needed(notebook: Notebook, by_name: Mapping[str, Notebook]) -> set[str]:
    """Everything that must run before `notebook`, however far back."""
    return {name for need in notebook.needs for name in (need, *_needed(by_name[need], by_name))}


def _status(out: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((out / "status" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def sentence(error: BaseException) -> str:
    """What went wrong, in one line: the message of a UserError, type and message of anything else."""
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


# ------------------------------------------------------------------------------------ the process of `launch`


def _execute(task: Mapping[str, Any]) -> None:
    """Run one notebook in this process; its status file says what became of it."""
    # jsonschema needs it only to check links, which notebooks do not have; it takes 0.9 s to import.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    out, name = Path(task["out"]), task["name"]
    partial, figures = out / "partial" / f"{name}.ipynb", Path(task["env"]["LTSEG_FIGURES"])
    nb = nbformat.read(task["path"], as_version=4)
    cells = sum(c.cell_type == "code" and bool(c.source.strip()) for c in nb.cells) + bool(task["parameters"])
    status: dict[str, Any] = {"key": task["key"], "state": "running", "cell": 0, "cells": cells}
    begin, before = time.monotonic(), _modified(figures)

    def save(**changes: Any) -> None:
        status.update(changes, wall_s=time.monotonic() - begin)
        write(out / "status" / f"{name}.json", json.dumps(status, indent=1))

    def count(cell: Any, **_: Any) -> None:
        if cell.cell_type == "code" and cell.source.strip():
            save(cell=status["cell"] + 1)

    try:
        save()
        executed = papermill.execute_notebook(
            nb,
            str(partial).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
            task["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            on_cell_start=count,
            config=Config(KernelManager={"transport": "tcp"}),  # parallel kernels met on one ipc path
        )
        executed.metadata.papermill["input_path"] = task["path"]  # papermill has put the whole notebook there
        write(out / "notebooks" / f"{name}.ipynb", nbformat.writes(executed))
        partial.unlink()
        made = [str(p) for p, modified in _modified(figures).items() if before.get(p) != modified]
        outputs = [f"notebooks/{name}.ipynb", *made]
        save(state="finished", outputs=outputs, remark=text_differs(executed))
    except PapermillExecutionError as error:  # its metadata are no witness: cells that never ran are "completed"
        first = error.evalue.strip().partition("\n")[0]
        what = first if error.ename == "UserError" else f"{error.ename}: {first}"
        save(state="failed", error=f"cell {error.exec_count or status['cell']}: {what}")
    except Exception as error:
        save(state="failed", error=f"cell {status['cell']}: {sentence(error)}")


def _modified(folder: Path) -> dict[Path, int]:
    """Files of a folder and when they changed; not those that are just being written (under a name with a dot)."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("[!.]*") if p.is_file()}


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _stop_with_caller() -> None:
    sys.stdin.read()  # returns when the caller closes the pipe or dies
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_with_caller, daemon=True).start()
    # Kernel `python3` is this interpreter whatever kernels the user has installed; nothing is read from or
    # written to the user's Jupyter and IPython folders.
    with tempfile.TemporaryDirectory(prefix="ltseg-") as folder:
        spec = Path(folder, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        private = ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
        os.environ.update(dict.fromkeys(private, folder))
        _execute(given)
