"""Made-up notebooks in a temporary folder; whatever starts a kernel is marked slow."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ltseg_core import collection, config
from ltseg_core.collection import notebooks, select
from ltseg_core.config import UserError
from ltseg_core.notebook import check_published, package_hash, publish, source_hash
from ltseg_core.notebook import write as write_text

REPOSITORY = Path(__file__).parent.parent
DEFAULTS = 'profile = "quick"\nseeds = [0, 1]\nlr = 0.1\nsteps: int = -3  # a comment\nplain = True\ncrop = None'


def write(folder, name, *cells, parameters=DEFAULTS, needs=()):
    folder.mkdir(exist_ok=True)
    nb = new_notebook(cells=[new_markdown_cell(f"# What does {name} ask?\n\n**It asks\nnothing.** Or **does** it?")])
    if parameters is not None:
        nb.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [new_code_cell(cell) for cell in cells]
    if needs:
        nb.metadata["ltseg"] = {"needs": list(needs)}
    nbformat.write(nb, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def run(tmp_path, folder, monkeypatch):
    """`collection.run` on the temporary folders: {name: result}. Editing the package while tests run is no change."""
    monkeypatch.setattr(collection, "package_hash", lambda: "")

    def run(*names, **options):
        places = {"folder": folder, "out": tmp_path / "out", "runs": tmp_path / "runs", "show": False}
        return {r.notebook.name: r for r in collection.run(names, **{**places, **options})}

    return run


def states(results):
    return {name: result.state for name, result in results.items()}


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------ the collection


def test_notebooks_are_listed_by_number_with_question_needs_and_defaults(folder):
    write(folder, "02_second", needs=["01_first"])
    write(folder, "01_first", parameters=None)
    write(folder, "draft")
    first, second = notebooks(folder)
    assert (first.name, first.parameters, first.needs) == ("01_first", None, ())
    assert (second.question, second.answer) == ("What does 02_second ask?", "It asks nothing.")
    assert second.needs == ("01_first",)
    assert second.parameters == {
        "profile": "quick",
        "seeds": [0, 1],
        "lr": 0.1,
        "steps": -3,
        "plain": True,
        "crop": None,
    }


def test_a_folder_without_notebooks_or_with_broken_ones_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="no notebooks"):
        notebooks(tmp_path)
    write(folder, "01_a", parameters="n = 2\nm = n + 1")
    with pytest.raises(UserError, match=r"01_a.*plain literals"):
        notebooks(folder)
    (folder / "01_a.ipynb").write_text("{}")
    with pytest.raises(UserError, match=r"01_a.*not a notebook"):
        notebooks(folder)


def test_needs_must_exist_and_not_go_round_in_a_circle(folder):
    write(folder, "01_first", needs=["02_secnd"])
    write(folder, "02_second")
    with pytest.raises(UserError, match="did you mean '02_second'"):
        notebooks(folder)
    write(folder, "01_first", needs=["02_second"])
    write(folder, "02_second", needs=["01_first"])
    with pytest.raises(UserError, match=r"circle: 0._\w+ -> 0._\w+"):
        notebooks(folder)


def test_select_by_name_number_and_part(folder):
    available = [
        collection.Notebook(n, Path(n), "?", "", (), {}) for n in ("01_tail_statistics", "02_train", "10_tails")
    ]
    names = lambda *given: [n.name for n in select(given, available)]  # noqa: E731
    assert names() == [n.name for n in available]
    assert names("02_train", "01") == ["01_tail_statistics", "02_train"]
    assert names("2") == names("notebooks/02_train.ipynb") == names("Train") == ["02_train"]
    with pytest.raises(UserError, match="did you mean '02_train'"):
        names("02_trian")
    with pytest.raises(UserError, match="01_tail_statistics, 10_tails"):
        names("tail")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sedes": [0]}, "did you mean 'seeds'"),
        ({"seeds": 3}, r"01_a: parameter seeds must be of type list like \[0, 1\], got 3"),
        ({"seeds": [0, "x"]}, "type int like 0, got 'x'"),
        ({"steps": 1.5}, "type int"),
        ({"steps": True}, "type int"),
        ({"lr": "fast"}, "type float"),
        ({"lr": True}, "type float"),
        ({"plain": 1}, "type bool"),
        ({"profile": 1}, "type str"),
        ({"steps": None}, "type int"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(folder, run, tmp_path, given, message):
    write(folder, "01_a")
    with pytest.raises(UserError, match=message):
        run(parameters=given)
    assert not (tmp_path / "out").exists()


def test_parameters_reach_only_the_notebooks_that_declare_them(folder):
    write(folder, "01_a", parameters="profile = 'quick'\nlr = 0.1")
    write(folder, "02_b", parameters="n = 1")
    given = collection._parameters(notebooks(folder), {"lr": "1e-3"}, "smoke")
    assert given == {"01_a": {"profile": "smoke", "lr": 1e-3}, "02_b": {}}


def test_a_notebook_without_parameters_cell_is_refused(folder, run):
    write(folder, "01_a", parameters=None)
    with pytest.raises(UserError, match=r"01_a.*no cell tagged `parameters`"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": -1}, "jobs must be >= 0"),
        ({"timeout": 0}, "timeout > 0"),
        ({"profile": "smok"}, "unknown profile 'smok': did you mean 'smoke'"),
    ],
)
def test_run_refuses_wrong_options(folder, run, options, message):
    write(folder, "01_a")
    with pytest.raises(UserError, match=message):
        run(**options)


def test_an_output_folder_that_cannot_be_written_is_refused(folder, run, tmp_path):
    write(folder, "01_a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        run(out=tmp_path / "file" / "out")


def test_two_runs_cannot_share_an_output_folder(folder, run, tmp_path):
    write(folder, "01_a")
    with collection._claimed(tmp_path / "out"), pytest.raises(UserError, match="another run is writing"):
        run()


def test_the_hash_covers_sources_and_tags_but_not_outputs_or_injected_cells(folder):
    path = write(folder, "01_a", "1 + 1")
    nb = nbformat.read(path, as_version=4)
    same = source_hash(path)
    nb.cells[2].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nb.cells.insert(2, new_code_cell("x = 1", metadata={"tags": ["injected-parameters"]}))
    assert source_hash(nb) == same
    nb.cells[3].source = "1 + 2"
    assert source_hash(nb) != same


def test_the_hash_of_the_package_sees_every_change(tmp_path):
    (tmp_path / "a.py").write_text("1")
    hashes = [package_hash(tmp_path)]
    for change in (
        lambda: (tmp_path / "a.py").write_text("2"),
        lambda: (tmp_path / "a.py").rename(tmp_path / "b.py"),
        lambda: (tmp_path / "table.csv").touch(),
    ):
        change()
        hashes.append(package_hash(tmp_path))
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.pyc").touch()
    assert len(set(hashes)) == 4
    assert package_hash(tmp_path) == hashes[-1]


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    full = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_importing_the_module_is_cheap():
    heavy = "torch papermill nbformat sphinx distributed dask pandas IPython"
    code = f"import sys, ltseg_core.collection; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_committed_notebooks_are_as_they_were_run(path):
    assert check_published(path) is None
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", ()) if "data" in o]
    cut = [o["data"]["text/html"] for o in outputs if "...</td>" in o["data"].get("text/html", "")]
    assert not cut, f"a table is cut off, raise pandas' display options: {cut[0]}"


def test_the_readme_lists_the_notebooks_with_their_answers_and_times():
    table = (REPOSITORY / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| [")]
    found = [(name.partition("]")[0].lstrip("["), *rest) for name, *rest in rows]
    listed = notebooks(REPOSITORY / "notebooks")
    times = [f"{json.loads(n.path.read_text())['metadata']['ltseg']['wall_s']} s" for n in listed]
    assert found == [(n.name, n.question, n.answer, time) for n, time in zip(listed, times, strict=True)]
    assert all(n.answer for n in listed)


# ----------------------------------------------------------------------------------------------- execution


@pytest.mark.slow
def test_collection_runs_once_and_again_only_what_changed(folder, run, tmp_path, monkeypatch):
    ask = "import os, sys, json; keep = 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'LTSEG_HEADLESS', 'LTSEG_RUNS'"
    show = "print(json.dumps([profile, seeds, sys.executable, os.getcwd(), *[os.environ[k] for k in keep]]))"
    figure = "import os, pathlib; pathlib.Path(os.environ['LTSEG_FIGURES'], 'a.txt').touch()"
    write(folder, "01_first", ask, show)
    write(folder, "02_second", figure, needs=["01_first"])
    write(folder, "03_third", "'$x$'", parameters="n = 1")
    options = {"parameters": {"seeds": [7]}, "profile": "smoke", "jobs": 2}

    first = run(**options)
    assert set(states(first).values()) == {"finished"}
    nb = nbformat.read(first["01_first"].executed, as_version=4)
    threads = str(max(1, config.cores() // 2))
    expected = ["smoke", [7], sys.executable, str(folder), threads, threads, "1", str(tmp_path / "runs")]
    assert json.loads(nb.cells[-1].outputs[0].text) == expected
    text = collection.summary(list(first.values()), tmp_path / "out")
    assert text.startswith("3 notebooks: 3 finished")
    assert str(tmp_path / "out/figures") in text
    assert not list((tmp_path / "out").rglob(".*.ipynb*"))
    assert not list((tmp_path / "out/partial").iterdir())

    begin = time.monotonic()
    assert set(states(run(**options)).values()) == {"up to date"}
    assert time.monotonic() - begin < 2

    (tmp_path / "out/figures/a.txt").unlink()
    write(folder, "03_third", "'edited'", parameters="n = 1")
    expected = {"01_first": "up to date", "02_second": "finished", "03_third": "finished"}
    assert states(run(**options)) == expected
    # 02 needs 01, so both run again when a parameter of 01 changes; 03 was not asked for.
    assert states(run("02", **{**options, "profile": "quick"})) == {"01_first": "finished", "02_second": "finished"}
    monkeypatch.setattr(config, "STUDIES", tmp_path / "studies")
    for _ in range(2):
        last = states(run("03"))
    assert last == {"03_third": "up to date"}
    (tmp_path / "studies" / "some" / "run").mkdir(parents=True)
    assert states(run("03")) == {"03_third": "finished"}, "it may use the run that was kept since"


@pytest.mark.slow
def test_a_failure_stops_only_what_needs_it(folder, run, tmp_path):
    write(folder, "01_bad", "x = 1", "raise ValueError('no such thing\\nmore')")
    write(folder, "02_user", "from ltseg_core.config import UserError", "raise UserError('no data in /x: fetch it')")
    write(folder, "03_needs", needs=["01_bad"])
    write(folder, "04_needs_more", needs=["03_needs"])
    write(folder, "05_dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    write(folder, "06_good", "2")
    results = run()
    failed, skipped = ["01_bad", "02_user", "05_dies"], ["03_needs", "04_needs_more"]
    assert states(results) == {
        **dict.fromkeys(failed, "failed"),
        **dict.fromkeys(skipped, "skipped"),
        "06_good": "finished",
    }
    assert results["01_bad"].error == "cell 4: ValueError: no such thing"  # after parameters and injected parameters
    assert results["02_user"].error == "cell 4: no data in /x: fetch it"
    assert results["04_needs_more"].error == "needs 01_bad, which failed"
    assert "Kernel died" in results["05_dies"].error
    partial = nbformat.read(results["01_bad"].executed, as_version=4)
    assert any("no such thing" in str(c.get("outputs")) for c in partial.cells)
    assert not (tmp_path / "out/notebooks/01_bad.ipynb").exists()
    text = collection.summary(list(results.values()), tmp_path / "out")
    assert str(results["01_bad"].executed) in text
    assert "needs 01_bad" in text
    write(folder, "01_bad", "x = 1")
    again = states(run("04", "06"))
    assert again == {"01_bad": "finished", "03_needs": "finished", "04_needs_more": "finished", "06_good": "up to date"}


@pytest.mark.slow
def test_a_text_written_for_other_numbers_is_noticed_but_stops_nothing(folder, run, tmp_path):
    check = "from ltseg_core import notebook\nwith notebook.text_check():\n    assert {}"
    path = write(folder, "01_wrong", check.format("2 > 3, 'the text says 2 > 3'"), "'went on'")
    write(folder, "02_silent", check.format("1 == 4"), needs=["01_wrong"])
    write(folder, "03_right", check.format("2 < 3, 'never shown'"))
    results = run()
    assert set(states(results).values()) == {"finished"}
    found = {name: r.remark for name, r in results.items()}
    silent = "`assert 1 == 4` does not hold"
    assert found == {"01_wrong": "the text says 2 > 3", "02_silent": silent, "03_right": None}
    text = collection.summary(list(results.values()), tmp_path / "out")
    assert "the text of 01_wrong was written for other numbers: the text says 2 > 3" in text
    assert "03_right" not in text
    assert "went on" in results["01_wrong"].executed.read_text()
    assert "the text agrees" not in results["01_wrong"].executed.read_text()
    assert "the text agrees" in results["03_right"].executed.read_text()
    assert run()["01_wrong"].remark == "the text says 2 > 3", "what is up to date keeps its notice"
    with pytest.raises(UserError, match="correct it and run it again"):
        publish(results["01_wrong"].executed, path)


@pytest.mark.slow
def test_a_notebook_that_takes_too_long_fails(folder, run, tmp_path):
    write(
        folder,
        "01_slow",
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))",
        "time.sleep(60)",
    )
    result = run(timeout=6)["01_slow"]
    assert (result.state, result.error) == ("failed", "cell 4: took longer than 6 s")
    wait_until(lambda: not alive((tmp_path / "pid").read_text()), 5)


@pytest.mark.slow
def test_a_process_that_dies_at_once_is_not_taken_for_its_last_success(folder, run, monkeypatch):
    write(folder, "01_a")
    assert states(run()) == {"01_a": "finished"}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = run(force=True)["01_a"]
    assert result.state == "failed"
    assert result.error.startswith("the process ended")


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_runner_stops_its_kernels_and_loses_nothing(folder, run, tmp_path, end):
    pid = tmp_path / "pid"
    write(folder, "01_quick", "1")
    sleep = f"import time\nif not os.path.exists({str(tmp_path / 'awake')!r}): time.sleep(60)"
    write(folder, "02_sleeps", f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))", sleep, needs=["01_quick"])
    places = f"folder={str(folder)!r}, out={str(tmp_path / 'out')!r}, runs={str(tmp_path / 'runs')!r}"
    code = f"from ltseg_core import collection; collection.package_hash = lambda: ''; collection.run({places})"
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: pid.exists() and pid.read_text())
        runner.send_signal(end)
        printed, errors = runner.communicate(timeout=20)
    finally:
        with contextlib.suppress(OSError):
            runner.kill()
    assert "01_quick: finished" in printed
    assert ("KeyboardInterrupt" in errors) == (end == signal.SIGINT)
    wait_until(lambda: not alive(pid.read_text()), 15)
    (tmp_path / "awake").touch()
    assert states(run()) == {"01_quick": "up to date", "02_sleeps": "finished"}


@pytest.mark.slow
def test_jobs_bound_the_notebooks_that_run_at_once(folder, run, tmp_path):
    spans = tmp_path / "spans"
    spans.mkdir()
    work = "import pathlib, time; a = time.time(); time.sleep(1); b = time.time()"
    note = f"pathlib.Path({str(spans)!r}, name).write_text(f'{{a}} {{b}}')"
    for i in range(4):
        write(folder, f"0{i}_x", work, note, parameters=f"name = '{i}'")
    assert set(states(run(jobs=2)).values()) == {"finished"}
    times = [tuple(map(float, path.read_text().split())) for path in spans.iterdir()]
    assert len(times) == 4
    overlaps = [sum(a <= start < b for a, b in times) for start, _ in times]
    assert max(overlaps) == 2


@pytest.mark.slow
def test_a_dask_cluster_runs_the_same_notebooks(folder, run):
    from distributed import LocalCluster

    write(folder, "01_a", "import os; print(os.environ['OMP_NUM_THREADS'])")
    write(folder, "02_bad", "1 / 0", needs=["01_a"])
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        results = run(scheduler=cluster.scheduler_address)
    assert states(results) == {"01_a": "finished", "02_bad": "failed"}
    nb = nbformat.read(results["01_a"].executed, as_version=4)
    assert nb.cells[-1].outputs[0].text.strip() == str(config.cores())
    assert results["02_bad"].error == "cell 3: ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_an_absent_dask_scheduler_is_one_sentence(folder, run):
    write(folder, "01_a")
    with pytest.raises(UserError, match=r"no Dask scheduler with workers at tcp://127\.0\.0\.1:9"):
        run(scheduler="tcp://127.0.0.1:9")


# ------------------------------------------------------------------------------------ the committed copies


@pytest.mark.slow
def test_publish_strips_what_differs_between_runs_and_stores_the_hash(folder, run):
    path = write(folder, "01_a", "1 + 1", "print('two')")
    assert "never run" in check_published(path)
    executed = run()["01_a"].executed
    publish(executed, path)
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert check_published(path) is None
    assert [c.execution_count for c in nb.cells[1:]] == [1, 2, 3]
    assert nb.cells[2].outputs[0].execution_count == 2
    assert nb.cells[3].outputs[0].text == "two\n"
    assert set(nb.metadata) == {"kernelspec", "language_info", "ltseg"}
    assert [dict(c.metadata) for c in nb.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    text = path.read_text()
    publish(executed, path)
    assert path.read_text() == text
    assert set(states(run()).values()) == {"up to date"}  # outputs are no source

    nb.cells[2].source = "if False:\n    with notebook.text_check():\n        assert text == table"
    nb.cells[2].outputs = []
    nb.metadata.ltseg.source_sha256 = source_hash(nb)
    nbformat.write(nb, path)
    assert "not reached" in check_published(path)
    with pytest.raises(UserError, match="not reached with the default"):
        publish(path, path)

    nb.cells[2].source = "1 + 2"
    nbformat.write(nb, path)
    assert "edited since" in check_published(path)
    with pytest.raises(UserError, match="edited since"):
        publish(executed, path)


def executed_notebook(folder, output, **parameters):
    path = write(folder, "01_a", "1")
    nb = nbformat.read(path, as_version=4)
    nb.metadata["papermill"] = {"parameters": parameters}
    for cell in nb.cells[1:]:
        cell.execution_count = 1
    nb.cells[2].outputs = [output]
    nbformat.write(nb, path)
    return path


@pytest.mark.parametrize(
    ("output", "parameters", "message"),
    [
        (nbformat.v4.new_output("stream", text="ok"), {"profile": "smoke"}, "publish a run with the default"),
        (nbformat.v4.new_output("stream", text=f"{sys.prefix}/lib"), {}, "code cell 2 prints .* a path of this"),
        (nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]), {}, "code cell 2 failed"),
    ],
)
def test_publish_refuses_what_readers_should_not_get(folder, tmp_path, output, parameters, message):
    with pytest.raises(UserError, match=message):
        publish(executed_notebook(folder, output, **parameters), tmp_path / "target.ipynb")
    assert not (tmp_path / "target.ipynb").exists()
