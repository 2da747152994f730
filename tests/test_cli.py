"""The command line: help with examples, one sentence per error, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ltseg_core import cli
from ltseg_core.config import UserError

COMMANDS = ("run", "train", "figures", "stats", "report", "doctor")


def ltseg(*words, monkeypatch, capsys):
    """Exit code, standard output, standard error of `ltseg words`."""
    monkeypatch.setattr(sys, "argv", ["ltseg", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *words: ltseg(*words, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    text = CliRunner().invoke(cli.app, [command, "--help"]).output
    assert f"ltseg {command}" in text
    assert "Example" in text


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ltseg', '--help']\nfrom ltseg_core import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'papermill', 'yaml'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--method", "blvv"], "unknown method 'blvv': did you mean 'blv'?"),
        (["train", "--profile", "quik"], "unknown profile 'quik': did you mean 'quick'?"),
        (["train", "-p", "stepz=3"], "unknown experiment field 'stepz': did you mean 'steps'?"),
        (["train", "-p", "steps=many"], "steps must be int, got 'many'"),
        (["train", "-p", "steps"], "-p takes name=value, got 'steps'"),
        (["train", "-p", "steps=[1"], "not valid YAML"),
        (["train", "-p", "a=2020-13-45"], "not valid YAML"),
        (["train", "-p", "steps.x=3"], "steps must be int, got {'x': 3}"),
        (["train", "-p", "encoder_weights.x=3"], "encoder_weights must be str or null, got {'x': 3}"),
        (["train", "-p", "hyper=3", "-p", "hyper.a=1"], "-p hyper.a=1 adds to a mapping, but an earlier -p set hyper"),
        (["train", "-p", "steps=3", "-p", "Steps=4"], "'steps' is given twice, also as 'Steps'"),
        (["train", "."], ". cannot be read as an experiment file: Is a directory"),
        (["train", "picture"], "picture is not valid YAML"),
        (["train", "e.yaml", "--profile", "quick"], "experiment file e.yaml or --profile quick, not both"),
        (["train", "nowhere.yaml"], "no experiment file at nowhere.yaml"),
        (["train", "--dataset", "camvid"], "no data set 'camvid' at data/camvid: fetch it with `python -m data_prep"),
        (["stats", "camvit"], "unknown data set 'camvit': did you mean 'camvid'?"),
        (["stats", "scenes", "--split", "trian"], "did you mean 'train'"),
        (["stats", "scenes", "-p", "split=val"], "'split' is no data option"),
        (["stats", "scenes", "-p", "name=ccp"], "'name' is no data option"),
        (["stats", "scenes", "-p", "root=."], "'root' is no data option"),
        (["stats", "scenes", "-p", "imagez=30"], "did you mean 'images'"),
        (["report", "--out", "nowhere"], "nowhere/notebooks: run `ltseg run --out"),
        (["run", "99"], "unknown notebook '99': choose one of 00_start_here, 01_"),
        (["figures", "99"], "unknown notebook '99': choose one of 00_start_here, 01_"),
        (["figures", "2_trian"], "did you mean '02_train_and_compare'"),
        (["run", "--profile", "quik"], "did you mean 'quick'"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(call, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture").write_bytes(b"\x89PNG")
    code, _, err = call(*words)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_unknown_option_is_exit_code_2(call):
    code, _, err = call("train", "--methd", "ce")
    assert code == 2
    assert "--methd" in err


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch):
    for words in (["--debug", "train", "--method", "blvv"], ["train", "--method", "blvv", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["ltseg", *words])
        with pytest.raises(UserError, match="did you mean 'blv'"):
            cli.main()


def test_interrupt_is_one_sentence(call, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ltseg_core.train.fit", interrupted)
    code, _, err = call("train")
    assert code == 130
    assert err.count("\n") == 1
    assert "run the same command to continue" in err


def test_assignments():
    pairs = ["steps=5", "hyper.sigma=6", "hyper.sign=-1", "seeds=[0, 1]", "size=null", "name=a=b"]
    expected = {"steps": 5, "hyper": {"sigma": 6, "sign": -1}, "seeds": [0, 1], "size": None, "name": "a=b"}
    assert cli._assignments(pairs) == expected


def test_train_prints_the_scores_and_merges_settings(call, folder, tmp_path):
    root = folder(train=4, val=2, test=2)
    path = tmp_path / "e.yaml"
    path.write_text(
        f"dataset: {root}\nsteps: 50\nbatch_size: 2\narchitecture: Linknet\nmethod: blv\nhyper: {{sign: -1}}\n"
    )
    words = ("train", path, "-p", "Steps=2", "-p", "hyper.sigma=4")
    code, out, _ = call(*words)
    assert code == 0
    assert "miou" in out
    run = Path(out.split("run directory: ")[1].strip())
    text = (run / "experiment.json").read_text()
    assert '"sigma": 4' in text
    assert '"sign": -1' in text
    assert '"steps": 2' in text


def test_stats_of_a_folder(call, folder):
    code, out, _ = call("stats", folder(train=3, classes=3), "--split", "Train", "-p", "Images=2")
    assert code == 0
    assert "pictures, train: 2 images" in out
    assert "imbalance factor" in out
    assert "thing 2" in out


def test_doctor_and_version(call, tmp_path):
    code, out, _ = call("doctor", "--data-root", tmp_path)
    assert code == 0
    for part in ("torch", "devices", "camvid: absent, fetch it with", "scenes: found", "free disk"):
        assert part in out
    assert call("--version")[1].startswith("ltseg ")
