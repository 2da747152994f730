"""Figures again from finished runs: the same files as the kernels write, and what is remembered between the two."""

import os

import nbformat
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config

from ltseg_core import collection, results
from ltseg_core.config import Experiment
from ltseg_core.redraw import _without_checks, redraw


def write(folder, name, *cells, needs=()):
    nb = new_notebook(cells=[new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]})])
    nb.cells += [new_code_cell('# Parameters\nprofile = "ccp"', metadata={"tags": ["injected-parameters"]})]  # executed
    nb.cells += [new_code_cell(cell) for cell in cells]
    nb.metadata["ltseg"] = {"needs": list(needs)}
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.mark.slow
def test_redrawn_figures_are_those_of_the_kernels(tmp_path):
    folder, runs = tmp_path / "source", tmp_path / "runs"
    write(
        folder,
        "01_draws",
        "import numpy as np, pandas as pd\nfrom ltseg_core import results, viz\nassert profile == 'smoke'",
        f"def slow():\n    open({str(tmp_path / 'called')!r}, 'a').write('x')\n    return {{'y': np.arange(4.0)}}",
        "y = results.remembered('y', slow)['y']\nfigure, axes = viz.subplots()\naxes[0, 0].plot(y)",
        "viz.save_figure(figure, '01_line')\nviz.save_table(pd.DataFrame({'y': y}), '01_claims')\nfigure",
        "from ltseg_core.notebook import text_check\nwith text_check():\n    "
        f"open({str(tmp_path / 'checked')!r}, 'a').write('x')",
    )
    mark = "open({!r}, 'w')"
    write(folder, "02_fails", mark.format(str(tmp_path / "before")), "1 / 0", mark.format(str(tmp_path / "after")))
    write(
        folder, "03_reads", "from ltseg_core import viz\nassert list(viz.saved_tables('*_claims'))", needs=["01_draws"]
    )
    write(folder, "04_needs", mark.format(str(tmp_path / "needs")), needs=["02_fails"])
    places = {"folder": folder, "runs": runs, "show": False}
    collection.run(["01"], out=tmp_path / "out", profile="smoke", **places)
    failed = [redraw(figures=tmp_path / name, profile="smoke", **places) for name in ("first", "second")]
    assert failed == [{"02_fails": "cell 4: ZeroDivisionError: division by zero"}] * 2
    assert (tmp_path / "before").exists()
    assert not (tmp_path / "after").exists(), "a cell after one that failed"
    assert not (tmp_path / "needs").exists(), "a notebook whose needs failed"
    assert (tmp_path / "called").read_text() == "x", "computed by the kernel, read by the others"
    assert (tmp_path / "checked").read_text() == "x", "the text is checked where there is one, by the kernel"
    names = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert names == ["01_claims.csv", "01_line.pdf", "01_line.png", "01_line.svg"]
    for name in names:
        drawn = [(tmp_path / at / name).read_bytes() for at in ("out/figures", "first", "second")]
        assert drawn[0] == drawn[1] == drawn[2], name


def test_only_checks_at_the_end_that_draw_nothing_are_left_out():
    check, drawn, both = "with text_check():\n    assert x", "x = 1", "with text_check():\n    viz.save_table(x, 'x')"
    assert _without_checks([drawn, check, check]) == [drawn]
    for code in ([], [check, drawn], [drawn, both], [drawn]):
        assert _without_checks(code) == code


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """An IPython session that nobody else sees, with a runs folder of its own."""
    made = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    monkeypatch.setattr("IPython.get_ipython", lambda: made)
    monkeypatch.setenv("LTSEG_RUNS", str(tmp_path))
    return made


def test_remembered_until_a_cell_the_package_or_a_folder_changes(shell, monkeypatch, tmp_path):
    calls = []

    def value():
        calls.append(1)
        return {"a": np.arange(3), ("b", 0.5): np.ones((2, 2), dtype=bool)}

    for _ in range(2):
        kept = results.remembered("x", value)
        assert {k: v.tolist() for k, v in kept.items()} == {k: v.tolist() for k, v in value().items()}
        assert kept["b", 0.5].dtype == bool
        calls.pop()
    assert len(calls) == 1
    results.remembered("other name", value)
    assert len(calls) == 2
    shell.run_cell("z = 1", store_history=True)
    results.remembered("x", value)
    assert len(calls) == 3
    monkeypatch.setattr(results, "package_hash", lambda: "edited")
    results.remembered("x", value)
    assert len(calls) == 4
    monkeypatch.setenv("LTSEG_DATA", str(tmp_path / "elsewhere"))
    results.remembered("x", value)
    assert len(calls) == 5
    for path in (tmp_path / "remembered").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert results.remembered("x", value)["a"].tolist() == [0, 1, 2], "a damaged file is computed again"
    assert len(calls) == 6


def test_remembered_until_another_run_takes_the_place_of_one(shell, tmp_path):
    calls, runs = [], [results.Run(tmp_path / place, Experiment()) for place in ("kept", "own")]
    for run in runs:
        run.path.mkdir()
        (run.path / "confusion.npz").write_bytes(b"")

    def value():
        calls.append(1)
        return {"a": np.ones(1)}

    for expected, run in ((1, runs[0]), (1, runs[0]), (2, runs[1]), (2, runs[0])):
        results.remembered("x", value, [run])
        assert len(calls) == expected
    os.utime(runs[0].path / "confusion.npz", ns=(0, 0))
    results.remembered("x", value, runs[:1])
    assert len(calls) == 3, "trained again"


def test_remembered_tables(shell):
    table = pd.DataFrame({"method": ["ce"], "value": [0.1]})
    for compute in (lambda: table, lambda: pytest.fail("computed again")):
        pd.testing.assert_frame_equal(results.remembered("t", compute), table)


def test_outside_ipython_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LTSEG_RUNS", str(tmp_path))
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    assert results.remembered("x", lambda: {"a": np.ones(1)})["a"] == 1
    assert list(tmp_path.iterdir()) == []
