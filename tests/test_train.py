"""The training loop: determinism, resuming, several processes, teachers, and what stops it."""

import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ltseg_core import config, data, evaluate, metrics, parallel, results, stats, train
from ltseg_core.config import Experiment, UserError
from ltseg_core.data import batches
from ltseg_core.data.batches import BatchOrder, augment, collate, draw, generator
from ltseg_core.losses import BLV
from ltseg_core.methods import METHODS, build_method
from ltseg_core.models import build_model
from ltseg_core.train import (
    Learner,
    State,
    evaluation_set,
    fit,
    fit_all,
    learning_rate_factor,
)

SMALL = {"architecture": "Linknet", "encoder": "tu-mobilenetv3_small_050", "batch_size": 2}


@pytest.fixture
def tiny(folder):
    """Experiments on a folder of 32 x 48 pictures that take a second."""
    root = folder(train=6, val=2, test=2)

    def experiment(**changes):
        return Experiment(dataset=str(root), **SMALL | {"steps": 4, "checkpoint_every": 2} | changes)

    return experiment


def weights(run):
    return load_file(run.path / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_plain_sgd_run_equals_a_loop_written_by_hand(tiny):
    e = tiny(optimizer="sgd", lr=1e-3, weight_decay=1e-3, encoder_lr_factor=0.5, warmup_steps=2)
    run = fit(e)
    images = data.load(e.dataset, "train")
    torch.manual_seed(e.seed)
    network = build_model(e.architecture, e.encoder, 4)
    encoder, rest = (
        list(network.encoder.parameters()),
        [*network.decoder.parameters(), *network.classifier.parameters()],
    )
    buffers = dict.fromkeys(encoder + rest)
    network.train()
    for step, indices in enumerate(BatchOrder(range(6), 2, 0, start=0, stop=4)):
        batch = collate([images[i] for i in indices])
        chosen = draw(2, generator(e.seed, 2, step), scale_range=e.scale_range, flip=e.flip, colour=e.colour)
        image, target = augment(batch, chosen, None)
        torch.manual_seed(generator(e.seed, step, 0).initial_seed())
        nn.functional.cross_entropy(network(image).logits, target, ignore_index=255).backward()
        lr = 1e-3 * min(1, (step + 1) / 2) * (1 - step / 4) ** 0.9
        with torch.no_grad():
            for group, factor in ((encoder, 0.5), (rest, 1.0)):
                for p in group:
                    if p.grad is None:
                        continue
                    g = p.grad + 1e-3 * p
                    buffers[p] = g if buffers[p] is None else 0.9 * buffers[p] + g
                    p -= lr * factor * buffers[p]
                    p.grad = None
    for name, tensor in network.state_dict().items():
        assert torch.allclose(weights(run)[name], tensor, atol=2e-5), name


def test_same_seed_same_weights_other_seed_other_weights(tiny, tmp_path):
    one, two = fit(tiny(), runs=tmp_path / "a"), fit(tiny(), runs=tmp_path / "b")
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(fit(tiny(seed=1))))


def test_finished_run_is_returned_not_trained_again(tiny):
    run = fit(tiny())
    before = {p: p.stat().st_mtime_ns for p in run.path.iterdir()}
    again = fit(tiny())
    assert again.path == run.path
    assert {p: p.stat().st_mtime_ns for p in run.path.iterdir()} == before


def test_run_directory_is_complete_and_consistent(tiny):
    run = fit(tiny(eval_every=2))
    assert sorted(p.name for p in run.path.iterdir()) == [
        "classes.csv", "confusion.npz", "environment.json", "experiment.json", "history.parquet", "log.txt",
        "metrics.parquet", "model.safetensors",
    ]  # fmt: skip
    confusion = run.confusion("test")
    assert confusion.shape == (2, 4, 4)
    assert confusion.sum() == 2 * 32 * 48
    assert run.value("miou") == pytest.approx(float(metrics.miou(confusion.sum(0))), abs=1e-12)
    assert set(run.history["metric"]) == {"loss", "val miou", "val macc"}
    assert np.isfinite(run.history["value"]).all()
    assert run.experiment == tiny(eval_every=2)
    test = data.load(run.experiment.dataset, "test")
    assert np.array_equal(evaluate.confusion(run.network(), test).numpy(), confusion)


def test_training_reduces_the_loss(tiny):
    history = fit(tiny(steps=30, lr=5e-3, scale_range=(1, 1))).history
    loss = history[history["metric"] == "loss"]["value"].to_numpy()
    assert loss[-5:].mean() < 0.75 * loss[:5].mean()


def _start(experiment, runs):
    """Train in a forked process: it starts at once, with everything imported."""
    process = multiprocessing.get_context("fork").Process(
        target=fit, args=(experiment,), kwargs={"runs": runs, "progress": False}
    )
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9},
        {"ema_decay": 0.9, "labelled_images": 3, "pseudo_threshold": 0.0, "method": "blv"},
        {"ema_decay": 0.9, "target": {}, "class_mix": True, "pseudo_selection": "dars"},
    ],
    ids=["plain", "teacher", "pseudo-labels", "class-mix"],
)
def test_killed_at_random_moments_gives_the_undisturbed_weights(tiny, tmp_path, changes):
    hyper = {"pseudo": True} if "method" in changes else {}
    e = tiny(steps=40, checkpoint_every=3, hyper=hyper, **changes)
    whole = fit(e, runs=tmp_path / "whole")
    runs, rng, kills = tmp_path / "killed", random.Random(7), 0
    checkpoint = runs / f"{e.key()}.partial" / "checkpoint.safetensors"
    while results.find(e, runs) is None:
        process = _start(e, runs)
        while process.is_alive() and not checkpoint.exists():  # the first kill leaves something to go on from
            time.sleep(0.01)
        process.join(timeout=rng.uniform(0, 0.7) if kills < 5 else 100)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills > 0
    killed = results.find(e, runs)
    assert "resumed at step" in (killed.path / "log.txt").read_text()
    assert same(weights(whole), weights(killed))
    assert whole.history.equals(killed.history)
    assert np.array_equal(whole.confusion("test"), killed.confusion("test"))


@pytest.mark.slow
def test_interrupt_keeps_the_checkpoint_and_the_next_call_resumes(tiny, tmp_path):
    e = tiny(steps=4000, checkpoint_every=2)
    process = _start(e, tmp_path)
    checkpoint = tmp_path / f"{e.key()}.partial" / "checkpoint.safetensors"
    deadline = time.time() + 60
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=30)
    assert process.exitcode not in (0, None)
    assert checkpoint.exists()
    assert results.find(e, tmp_path) is None
    process = _start(e, tmp_path)
    log = tmp_path / f"{e.key()}.partial" / "log.txt"
    while "resumed at step" not in log.read_text() and process.is_alive():
        time.sleep(0.05)
    process.kill()
    process.join()
    assert "resumed at step" in log.read_text()


def _after_checkpoint(monkeypatch, number, act):
    """Call `act` as soon as that many checkpoints are written."""
    real, count = State.save, itertools.count(1)

    def save(state, path):
        real(state, path)
        if next(count) == number:
            act()

    monkeypatch.setattr(State, "save", save)


def _interrupt():
    raise KeyboardInterrupt


def test_seconds_of_all_sessions_are_added_up(tiny, tmp_path, monkeypatch):
    e, begin = tiny(), time.monotonic()
    _after_checkpoint(monkeypatch, 1, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(e, runs=tmp_path)
    path = tmp_path / f"{e.key()}.partial" / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    assert 0 < float(meta["seconds"]) < time.monotonic() - begin
    save_file(load_file(path), path, meta | {"seconds": "1000.0"})
    begin = time.monotonic()
    assert 1000 < fit(e, runs=tmp_path).environment["wall_s"] < 1000 + time.monotonic() - begin


def test_damaged_checkpoint_is_named_and_finished_runs_are_kept(tiny, tmp_path):
    other, e = fit(tiny(seed=5), runs=tmp_path), tiny()
    path = tmp_path / f"{e.key()}.partial" / "checkpoint.safetensors"
    path.parent.mkdir()
    for content in (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"):
        path.write_bytes(content)  # cut off, without metadata
        with pytest.raises(UserError, match=r"checkpoint.safetensors is truncated .*delete it"):
            fit(e, runs=tmp_path)
    assert results.find(tiny(seed=5), tmp_path) == other


def test_damaged_weights_are_named(tiny):
    run = fit(tiny())
    path = run.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model.safetensors is damaged .*delete .* and run again"):
        fit(tiny(method="tau_norm"))  # starts from it


def _die(*_):
    os._exit(1)


@pytest.mark.slow
def test_a_killed_process_of_fit_all_is_explained(tiny, monkeypatch):
    monkeypatch.setattr(train, "_fit_on_free_cores", _die)
    with pytest.raises(UserError, match="a process that trains ended without a word: .* below `if __name__"):
        fit_all([tiny(seed=1), tiny(seed=2)], jobs=2)


@pytest.mark.parametrize(
    ("what", "message"), [("names", "class list"), ("labels", "labelled pixels"), ("swapped", "images of the classes")]
)
def test_a_first_stage_of_other_data_is_refused(tiny, tmp_path, what, message):
    """The data folder changed between the two stages."""
    root = tmp_path / "changing"
    shutil.copytree(tiny().dataset, root)
    e = replace(tiny(), dataset=str(root))
    run = fit(e)
    if what == "names":
        table = pd.read_csv(root / "classes.csv")
        table.assign(class_name=[f"new {name}" for name in table["class_name"]]).to_csv(
            root / "classes.csv", index=False
        )
    elif what == "labels":
        Image.fromarray(np.full((32, 48), 3, np.uint8)).save(root / "train/labels/000.png")
    else:  # as many pixels of each class as before, in fewer images
        paths = [root / f"train/labels/{i:03}.png" for i in (0, 1)]
        pixels = np.sort([np.asarray(Image.open(path)) for path in paths], axis=None).reshape(2, 32, 48)
        for path, label in zip(paths, pixels, strict=True):
            Image.fromarray(label).save(path)
    with pytest.raises(UserError, match=rf"{run.path} \(ce\).*trained on other data: {message}.*[Dd]elete that folder"):
        fit(replace(e, method="lws"))


def test_one_first_run_has_one_name(tiny):
    written = [{}, {"first": "ce"}, {"FIRST": "CE"}], [{"first": "pat"}, {"First": "PAT"}]
    found = [{train._named(tiny(method="ncm", hyper=hyper)) for hyper in ways} for ways in written]
    assert [[e.hyper for e in ways] for ways in found] == [[{}], [{"first": "pat"}]]


def test_workers_have_the_environment_and_folder_of_their_pool(monkeypatch, tmp_path):
    for name in ("first", "second"):  # the server of the second is that of the first
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("LTSEG_PROBE", name)
        monkeypatch.chdir(folder)
        with parallel.pool(1, 1) as pool:
            assert pool.submit(os.getenv, "LTSEG_PROBE").result() == name
            assert pool.submit(os.getcwd).result() == str(folder)


@pytest.mark.parametrize(
    ("method", "hyper", "message"),
    [
        ("disalign", {"rho": -1}, "rho must be"),
        ("disalign", {"magnitude": False, "margin": False}, "nothing is calibrated"),
        ("tau_norm", {"tau": -1}, "tau must be"),
        ("crt", {"samples": 0}, "samples must be"),
        ("lws", {"first": "repeat_factr"}, "unknown first method .* did you mean 'repeat_factor'"),
        ("ncm", {"first": "medoe"}, "unknown first method 'medoe'"),
        ("tde", {"first": "clan"}, "unknown first method 'clan'"),
        ("tde", {"alpha": math.inf}, "alpha must be"),
        ("balanced_bound", {"first": "crt"}, "unknown first method 'crt'"),
        ("ncm", {"frist": "pat"}, "unknown hyper-parameter of ncm 'frist': did you mean 'first'"),
        ("ncm", {"first": "pat", "FIRST": "ce"}, "hyper-parameter of ncm 'first' is given twice"),
        ("repeat_factor", {"first": "ce"}, "unknown hyper-parameter of repeat_factor 'first'"),
    ],
)
def test_a_second_stage_is_refused_before_the_first_is_trained(tiny, tmp_path, method, hyper, message):
    with pytest.raises(UserError, match=message):
        fit(tiny(method=method, hyper=hyper), runs=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"method": "blvv"}, "did you mean 'blv'"),
        ({"method": "blv", "hyper": {"sgima": 1}}, "did you mean 'sigma'"),
        ({"method": "blv", "hyper": {"sigma": -1}}, "sigma must be >= 0, got -1"),
        ({"method": "medoe", "hyper": {"head_share": 1.5}}, "head_share must be in"),
        ({"method": "tau_norm", "model_options": {"classifier": "cosine"}}, "tau_norm needs a linear classifier"),
        ({"encoder": "resnet19"}, "did you mean 'resnet18'"),
        ({"method": "clan"}, "clan learns from images without labels, too"),
        ({"method": "clan", "labelled_images": 3, "ema_decay": 0.5, "class_mix": True}, "class_mix would paste"),
    ],
    ids=lambda value: value.get("method", "encoder") if isinstance(value, dict) else "",
)
def test_fit_all_refuses_one_before_it_trains_another(tiny, tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        fit_all([tiny(), tiny(**bad)], jobs=1, runs=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("method", "hyper"),
    [(name, {}) for name in METHODS if name != "medoe"]
    + [("medoe", {"Cuts": [1, 3]}), ("medoe", {"shares": []}), ("region_rebalance", {"smoothing": 0.9})],
    ids=str,
)
def test_what_suits_the_data_is_not_refused_before_anything_is_trained(tiny, method, hyper):
    train._refuse_bad_options(tiny(method=method, hyper=hyper), None)


def test_what_the_data_lack_is_refused_before_anything_is_trained(tiny, tmp_path):
    whole = tiny()
    lone = tmp_path / "lone"
    shutil.copytree(Path(whole.dataset) / "train", lone / "train")
    shutil.copytree(Path(whole.dataset) / "train", lone / "test")
    shutil.copy(Path(whole.dataset) / "classes.csv", lone)
    alone = replace(whole, dataset=str(lone))
    bound = replace(alone, method="balanced_bound", hyper={"split": "val"})
    groups = replace(alone, method="medoe", hyper={"shares": [0.9999]})
    for bad, message in (
        (bound, "labels of the split 'val'; .*lone has train, test"),
        (groups, "would have no classes: shares="),
    ):
        for train_it in (
            lambda e: fit(e, runs=tmp_path / "none"),
            lambda e: fit_all([alone, e], jobs=1, runs=tmp_path / "none"),
        ):
            with pytest.raises(UserError, match=message):
                train_it(bad)
            assert not list((tmp_path / "none").glob("*/experiment.json"))


def test_experiments_that_differ_in_the_seed_only_are_checked_once(tiny):
    kinds = ({}, {"method": "blv"}, {"method": "blv", "hyper": {"sigma": 4}}, {"data_options": {"images": 3}})
    settings = train._settings(tiny(seed=seed, **kind) for kind in kinds for seed in range(3))
    assert [(e.method, e.hyper) for e in settings] == [("ce", {}), ("blv", {}), ("blv", {"sigma": 4}), ("ce", {})]
    some = [tiny(labelled_images=3, ema_decay=0.5, seed=seed) for seed in range(3)]
    assert [e.seed for e in train._settings(some)] == [0, 1, 2], "it draws which images have labels"
    state = torch.get_rng_state()
    train._refuse_bad_options(settings[1], None)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are none of its business"


@pytest.mark.parametrize("size", [None, (16, 24)], ids=["own size", "resized"])
@pytest.mark.parametrize("limit", [batches.IN_MEMORY_BYTES, 0], ids=["in memory", "too large for it"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_label_that_is_no_class_is_refused_before_training(tiny, monkeypatch, split, limit, size):
    monkeypatch.setattr(batches, "IN_MEMORY_BYTES", limit)
    e = tiny(size=size)
    Image.fromarray(np.full((32, 48), 9, np.uint8)).save(Path(e.dataset) / split / "labels/001.png")
    with pytest.raises(UserError, match="001.* has the value 9"):
        fit(e)
    assert not list(results.runs_folder().rglob(train.CHECKPOINT)), "it took a step"


def test_diverging_loss_says_where_and_what_to_try(tiny):
    with pytest.raises(
        UserError, match=r"the loss of ce \(seed 0\) is (nan|inf) at step \d+: try a lower lr \(now 1e\+30\)"
    ):
        fit(tiny(optimizer="sgd", lr=1e30, steps=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "blvv"}, "did you mean 'blv'"),
        ({"method": "blv", "hyper": {"sigmaa": 1}}, "did you mean 'sigma'"),
        ({"encoder": "resnet19"}, "did you mean 'resnet18'"),
        ({"data_options": {"image": 1}}, "did you mean 'images'"),
        ({"labelled_images": 6, "ema_decay": 0.9}, "below the 6 training images"),
    ],
)
def test_refused_before_training(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        fit(tiny(**changes))


def test_a_kept_run_stands_in_where_no_weights_are_needed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "STUDIES", tmp_path / "studies")
    original = fit(tiny(), runs=tmp_path / "elsewhere")
    results.keep([original], "some")
    monkeypatch.setenv("LTSEG_TRAIN", "0")
    (kept,) = fit_all([], kept=[tiny()])
    assert kept.path == tmp_path / "studies" / "some" / tiny().key()
    assert np.array_equal(kept.confusion("test"), original.confusion("test"))
    with pytest.raises(UserError, match="no finished run of ce"):
        fit_all([tiny()])
    with pytest.raises(UserError, match=r"no finished run of ce on .* \(seed 1\)"):
        fit_all([], kept=[tiny(), tiny(seed=1)])
    with pytest.raises(UserError, match="no finished run of ce"):
        fit_all([tiny()], kept=[tiny()])
    monkeypatch.setenv("LTSEG_TRAIN", "all")
    (own,) = fit_all([], kept=[tiny()])
    assert own.path == tmp_path / "runs" / tiny().key()
    monkeypatch.delenv("LTSEG_TRAIN")
    assert fit_all([tiny()], kept=[tiny()]) == [own, own], "one's own run comes before the kept one"


@pytest.mark.parametrize("train_one", [fit, lambda e: fit_all([e])[0]], ids=["fit", "fit_all"])
def test_where_training_is_forbidden_only_finished_runs_are_returned(tiny, tmp_path, monkeypatch, train_one):
    run, folder = fit(tiny()), tmp_path / "runs"
    monkeypatch.setenv("LTSEG_TRAIN", "0")
    assert train_one(tiny()) == run
    message = (
        rf"no finished run of blv on {run.experiment.dataset} \(seed 3\) in {folder}, .*LTSEG_TRAIN=0.*`ltseg run`"
    )
    with pytest.raises(UserError, match=message):
        train_one(tiny(method="blv", seed=3))
    message = rf"{folder} \(it starts from a run of ce, which is missing, too\), and LTSEG_TRAIN=0"
    with pytest.raises(UserError, match=message):
        train_one(tiny(method="lws", seed=3))
    with pytest.raises(UserError, match=rf"no finished run of lws on .* in {folder}, and LTSEG_TRAIN=0"):
        train_one(tiny(method="lws"))  # its first stage is finished
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [run.path.name], "nothing was begun"


@pytest.mark.parametrize("blocked", ["runs", "runs/{}.partial", "runs/{}.lock/", "runs/{}.partial/log.txt/"])
def test_what_cannot_be_written_is_named(tiny, tmp_path, blocked):
    """A file where a folder should be, and the reverse."""
    path = tmp_path / blocked.format(tiny().key())
    path.parent.mkdir(parents=True, exist_ok=True)
    if blocked.endswith("/"):
        path.mkdir()
    else:
        path.write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write the run to .*runs \(.*choose another folder"):
        fit_all([tiny()], runs=tmp_path / "runs")


def _fit_on_a_full_disk(answer, experiment, runs, checkpoints, limit):
    """`fit` where no file may grow beyond `limit` bytes once so many checkpoints are written; answers the refusal."""

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    _after_checkpoint(pytest.MonkeyPatch(), checkpoints, fill)
    if checkpoints == 0:
        fill()
    try:
        fit(experiment, runs=runs, progress=False)
    except UserError as error:
        answer.send(str(error))


def test_full_disk_is_named_and_a_rerun_goes_on(tiny, tmp_path):
    """The log, the first checkpoint, a later one, the final tables and weights do not fit."""
    e, runs = tiny(), tmp_path / "full"
    whole, other = fit(e, runs=tmp_path / "whole"), fit(tiny(seed=5), runs=runs)
    kept = {path: path.read_bytes() for path in other.path.iterdir()}
    for checkpoints, limit in ((0, 0), (0, 20_000), (1, 20_000), (2, 20_000)):
        answer, end = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_fit_on_a_full_disk, args=(end, e, runs, checkpoints, limit)
        )
        process.start()
        end.close()
        refusal = answer.recv()
        process.join()
        assert refusal.startswith(f"cannot write the run to {runs} (")
        assert "File too large" in refusal
        assert "free disk space" in refusal
        assert results.find(e, runs) is None
        assert not list(runs.glob("*/.*.tmp"))
        again = fit(e, runs=runs)
        assert same(weights(again), weights(whole))
        resumed = f"resumed at step {2 * checkpoints}" in (again.path / "log.txt").read_text()
        assert resumed == (checkpoints > 0)
        shutil.rmtree(again.path)
    assert {path: path.read_bytes() for path in other.path.iterdir()} == kept


def test_errors_of_the_system_that_are_no_writes_keep_their_name(tiny, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(train, "build_model", unreachable)
    with pytest.raises(ConnectionError, match="no route to the hub"):
        fit(tiny())


def test_run_of_another_version_is_refused_and_kept(tiny):
    run = fit(tiny())
    stored = json.loads((run.path / "experiment.json").read_text())
    (run.path / "experiment.json").write_text(json.dumps(stored | {"format": 0}))
    with pytest.raises(UserError, match=r"written in run format 0, .* move it away or delete it"):
        fit(tiny())
    (run.path / "experiment.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        fit(tiny())
    assert (run.path / "model.safetensors").exists()


def test_two_callers_train_once(tiny, tmp_path):
    e = tiny(steps=20)
    processes = [_start(e, tmp_path) for _ in range(2)]
    for process in processes:
        process.join(timeout=60)
    assert [p.exitcode for p in processes] == [0, 0]
    assert (tmp_path / e.key() / "log.txt").read_text().count("finished") == 1


@pytest.mark.slow
def test_side_by_side_equals_one_after_the_other(tiny, tmp_path):
    experiments = [tiny(seed=s) for s in (0, 1, 2)]
    apart = fit_all(experiments, jobs=1, runs=tmp_path / "a", progress=False)
    together = fit_all([*experiments, experiments[0]], jobs=2, runs=tmp_path / "b", progress=False)
    assert [r.experiment.seed for r in together] == [0, 1, 2, 0]
    for a, b in zip(apart, together, strict=False):
        assert same(weights(a), weights(b))


def _taken(runs, cores):
    """How many of the cores are taken by trainings."""
    free = 0
    for core in range(cores):
        try:
            with FileLock(runs / f".core{core}.lock", timeout=0):
                free += 1
        except Timeout:
            pass
    return cores - free


@pytest.mark.parametrize(
    ("threads", "jobs", "world", "taken"),
    [(1, 1, 1, 1), (2, None, 1, 2), (9, None, 1, 3), (1, 3, 2, 0)],
    ids=["one thread", "two threads", "more threads than cores", "launched together"],
)
def test_one_missing_run_takes_its_cores_too(tiny, tmp_path, monkeypatch, threads, jobs, world, taken):
    seen = []
    monkeypatch.setattr(config, "cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(train, "fit", lambda e, runs: seen.append(_taken(runs, 3)))
    tmp_path.joinpath("runs").mkdir()
    fit_all([tiny()], jobs=jobs, runs=tmp_path / "runs")
    assert seen == ([taken, 0] if taken else [0])  # the last call only returns the run
    assert _taken(tmp_path / "runs", 3) == 0


def test_trainings_of_any_number_of_threads_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "cores", lambda: 3)
    busy, most, finished, lock = [], [], [], threading.Lock()

    def train_twice(threads):
        for _ in range(2):
            with parallel.take_cores(tmp_path, threads):
                with lock:
                    busy.append(threads)
                    most.append(sum(busy))
                time.sleep(0.05)
                with lock:
                    busy.remove(threads)
            finished.append(threads)

    callers = [threading.Thread(target=train_twice, args=(n,), daemon=True) for n in (2, 2, 3, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=20)
    assert sorted(finished) == [1, 1, 2, 2, 2, 2, 3, 3]
    assert max(most) == 3


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tiny, tmp_path):
    """Frozen batch norm, no ignored pixels: the mean of the two half batches is the mean of the batch."""
    taught = {"ema_decay": 0.5, "target": {}, "class_mix": True}
    e = tiny(batch_size=4, freeze_batch_norm=True, scale_range=(1, 1), steps=6, **taught)
    one = fit(e, runs=tmp_path / "one")
    path = tmp_path / "e.json"
    path.write_text(e.to_json())
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        "--dynamo_backend",
        "no",
        "-m",
        "ltseg_core.cli",
        "train",
        str(path),
    ]
    settings = {"LTSEG_RUNS": str(tmp_path / "two"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two = results.find(e, tmp_path / "two")
    assert two.environment["processes"] == 2
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-4), name
    assert np.array_equal(evaluate.confusion(two.network(), data.load(e.dataset, "test")), two.confusion("test"))
    assert one.value("miou") == pytest.approx(two.value("miou"), abs=2e-3)


def test_batch_that_processes_cannot_share_is_refused(tiny, monkeypatch):
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda _: 3))
    with pytest.raises(UserError, match="batch_size 2 cannot be shared by 3 processes"):
        fit(tiny())
    AcceleratorState._reset_state(reset_partial_state=False)
    assert PartialState().num_processes == 1


def test_bf16_stays_close_to_fp32(tiny):
    full, half = (fit(tiny(precision=p, lr=1e-4)).history["value"].to_numpy() for p in ("fp32", "bf16"))
    assert not np.array_equal(full, half)
    assert np.abs(full - half).max() < 0.1


def _learned(run):
    """The weights without what batch norm counts."""
    return {k: v for k, v in weights(run).items() if "running_" not in k and not k.endswith("num_batches_tracked")}


def test_unlabelled_stream_without_weight_or_labels_is_supervised_training(tiny, tmp_path):
    """Of the same images, with the same teacher. Only the batch-norm statistics see the other images, too."""
    e = tiny(labelled_images=3, ema_decay=0.5, pseudo_threshold=0.0)
    labelled = torch.randperm(6, generator=generator(e.seed, 4))[:3].tolist()
    root = tmp_path / "labelled"
    shutil.copytree(e.dataset, root)
    for path in root.glob("train/*/*.png"):
        if int(path.stem) not in labelled:
            path.unlink()
    supervised = fit(replace(e, dataset=str(root), labelled_images=None))
    for reduction in ({"unlabelled_weight": 0.0}, {"pseudo_threshold": 1.0}):  # 1.0: no pseudo-label is so sure
        run = fit(replace(e, **reduction))
        assert torch.equal(run.counts().pixels, supervised.counts().pixels)
        assert run.history.equals(supervised.history)
        assert same(_learned(supervised), _learned(run))
    frozen = {"freeze_batch_norm": True}
    supervised = fit(replace(supervised.experiment, **frozen))
    assert same(weights(supervised), weights(fit(replace(e, unlabelled_weight=0.0, **frozen))))
    used = fit(replace(e, **frozen))
    assert used.history["value"][0] > supervised.history["value"][0]
    assert not same(_learned(used), _learned(supervised))


def test_pseudo_labels_are_counted_over_one_epoch_each(tiny, monkeypatch):
    """Three images without labels, two a step: `end_epoch` comes in every third image's step, after its labels."""
    seen, counted = [], []
    observe, set_counts = BLV.observe, BLV.set_counts
    monkeypatch.setattr(BLV, "observe", lambda self, y: (seen.append(y.clone()), observe(self, y))[1])
    monkeypatch.setattr(BLV, "set_counts", lambda self, c: (counted.append((len(seen), c)), set_counts(self, c))[1])
    fit(tiny(method="blv", hyper={"pseudo": True}, labelled_images=3, ema_decay=0.5, pseudo_threshold=0.0, steps=6))
    assert [steps for steps, _ in counted] == [0, 2, 3, 5, 6]
    for (start, _), (stop, counts) in itertools.pairwise(counted):
        labels = torch.cat(seen[start:stop])
        images = torch.stack([(labels == k).flatten(1).any(1).sum() for k in range(4)])
        assert counts.pixels.tolist() == [(labels == k).sum().item() for k in range(4)]
        assert counts.images.tolist() == images.tolist()


def test_labels_of_the_unlabelled_images_are_never_looked_at(tiny, tmp_path):
    e = tiny(labelled_images=3, ema_decay=0.5, pseudo_threshold=0.0)
    root = tmp_path / "other labels"
    shutil.copytree(e.dataset, root)
    for i in torch.randperm(6, generator=generator(e.seed, 4))[3:].tolist():
        Image.fromarray(np.full((32, 48), 3, np.uint8)).save(root / f"train/labels/{i:03}.png")
    one, two = fit(e), fit(replace(e, dataset=str(root)))
    assert same(weights(one), weights(two))


def _target(e, folder, *, label=None):
    """Another data set of the same classes: images of `e` as negatives, training labels all `label`."""
    shutil.copytree(e.dataset, folder)
    for path in folder.glob("*/images/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    for path in folder.glob("train/labels/*.png") if label is not None else ():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), label)).save(path)
    return {"dataset": str(folder)}


def test_domain_adaptation_learns_from_the_source_and_is_evaluated_on_the_target(tiny, tmp_path):
    e = tiny(ema_decay=0.5, freeze_batch_norm=True)
    supervised, target = fit(e), _target(e, tmp_path / "target")
    alone = fit(replace(e, target=target, unlabelled_weight=0.0))
    assert same(weights(supervised), weights(alone))
    assert torch.equal(supervised.counts().pixels, alone.counts().pixels)
    elsewhere = data.load(target["dataset"], "test")
    assert np.array_equal(evaluate.confusion(alone.network(), elsewhere).numpy(), alone.confusion("test"))
    assert not np.array_equal(alone.confusion("test"), supervised.confusion("test"))
    assert len(train.evaluation_set(alone.experiment, "test")) == len(elsewhere)
    adapted = [fit(replace(e, target=_target(e, tmp_path / str(label), label=label))) for label in (1, 3)]
    assert same(*map(weights, adapted)), "labels of the target's training images were looked at"
    assert not same(weights(adapted[0]), weights(alone))
    few = fit(replace(e, target=target, labelled_images=3))
    assert few.counts().pixels.equal(fit(replace(e, labelled_images=3)).counts().pixels)
    assert "3 labelled, 6 unlabelled images" in (few.path / "log.txt").read_text(), "all of the target"


def test_pasting_all_of_an_image_is_the_loss_of_the_labelled_images_once_more(tiny, tmp_path):
    """Where each has one class, half of its classes, rounded up, is the whole image."""
    e = tiny(ema_decay=0.5, scale_range=(1, 1), colour=0, steps=1)
    source = tmp_path / "uniform"
    shutil.copytree(e.dataset, source)
    for path in source.glob("train/labels/*.png"):
        Image.fromarray(np.full((32, 48), int(path.stem) % 4, np.uint8)).save(path)
    e = replace(e, dataset=str(source), target={"dataset": e.dataset}, unlabelled_weight=0.5)
    alone, mixed = fit(replace(e, unlabelled_weight=0)), fit(replace(e, class_mix=True))
    assert mixed.history["value"][0] == pytest.approx(1.5 * alone.history["value"][0], rel=1e-6)
    assert fit(e).history["value"][0] != pytest.approx(mixed.history["value"][0], rel=1e-3)


def test_the_padding_of_a_smaller_image_gets_no_pseudo_label(tiny, tmp_path, monkeypatch):
    e = tiny(ema_decay=0.5, labelled_images=2, batch_size=4, scale_range=(1, 1), steps=2)
    mixed = tmp_path / "mixed"
    shutil.copytree(e.dataset, mixed)
    for path in (*mixed.glob("train/images/*.png"), *mixed.glob("train/labels/*.png")):
        if int(path.stem) % 2:
            Image.open(path).crop((0, 0, 40, 32)).save(path)
    seen, label = [], train.pseudo_labels

    def spy(logits, inside, threshold):
        seen.append(inside)
        return label(logits, inside, threshold)

    monkeypatch.setattr(train, "pseudo_labels", spy)
    fit(replace(e, dataset=str(mixed)))
    missing = torch.cat(seen).eq(255).sum((1, 2)).tolist()
    assert set(missing) == {0, 32 * 8}, "none of a whole image, of a narrow one the last eight columns"


@pytest.mark.parametrize("selection", ["cbst", "dars"])
def test_the_selection_of_pseudo_labels_is_told_its_share_and_prior(tiny, monkeypatch, selection):
    told, select = [], train.most_confident

    def spy(confidence, label, classes, share, prior, order):
        told.append((classes, share, prior, order.sort().values.tolist() == [*range(label.numel())]))
        return select(confidence, label, classes, share, prior, order)

    monkeypatch.setattr(train, "most_confident", spy)
    run = fit(tiny(ema_decay=0.5, labelled_images=3, pseudo_selection=selection, pseudo_share=0.5))
    assert [share for _, share, _, _ in told] == pytest.approx([0.5 * (0.4 + 0.6 * i / 4) for i in range(4)])
    for classes, _, prior, permuted in told:
        assert classes == 4
        assert permuted
        assert (prior is None) is (selection == "cbst")
        if prior is not None:
            torch.testing.assert_close(prior, run.counts().pixel_share().float())


def test_labels_of_a_target_are_not_for_training(tiny):
    e = tiny(ema_decay=0.5, target={}, method="balanced_bound", hyper={"split": "val"})
    with pytest.raises(UserError, match="balanced_bound learns from labels of the split 'val', and a target has none"):
        fit(e)
    assert results.finished() == [], "nothing was trained before"


def test_a_target_of_other_classes_is_refused(tiny, tmp_path):
    e = tiny(ema_decay=0.5)
    target = _target(e, tmp_path / "target")
    table = tmp_path / "target/classes.csv"
    table.write_text(table.read_text().replace("thing 3", "drei"))
    with pytest.raises(UserError, match="must have the same classes: class 3 is thing 3 and drei"):
        fit(replace(e, target=target))


def test_frozen_batch_norm_does_not_move(tiny):
    e = tiny(freeze_batch_norm=True)
    torch.manual_seed(e.seed)
    initial = build_model(e.architecture, e.encoder, 4).state_dict()
    final = weights(fit(e))
    norms = [k for k in final if "running_" in k or ("bn" in k and k.endswith(("weight", "bias")))]
    assert norms
    assert all(torch.equal(initial[k], final[k]) for k in norms)
    assert not torch.equal(initial["classifier.weight"], final["classifier.weight"])


def test_periodic_evaluation_changes_nothing(tiny):
    plain, looked = (fit(tiny(freeze_batch_norm=True, eval_every=n)) for n in (None, 1))
    assert same(weights(plain), weights(looked))
    plain, looked = (
        fit(tiny(method="disalign", hyper={"confidence": "conv_bn_relu"}, eval_every=n)) for n in (None, 1)
    )
    assert same(weights(plain), weights(looked))


def test_losses_follow_the_progress_of_their_stage(tiny):
    plain, temporal = (fit(tiny(method="blv", hyper={"temporal": t})) for t in (False, True))
    constant = fit(tiny())
    losses = [r.history["value"].to_numpy() for r in (plain, temporal, constant)]
    assert losses[1][0] == losses[2][0]  # sigma starts at 0
    assert (losses[1][1:3] != losses[2][1:3]).all()
    assert (losses[0] != losses[2]).all()


def test_label_noise_is_for_training_only():
    e = Experiment(data_options={"images": 40, "border_noise": 3}, eval_images=5)
    noisy, clean = evaluation_set(e, "test"), data.load("scenes", "test")
    assert noisy.names[0] == clean.names[0]
    assert torch.equal(noisy[0][1], clean[0][1])


def test_nothing_to_learn_from_or_to_evaluate_on(folder):
    root = folder(train=2)
    with pytest.raises(UserError, match="neither a val nor a test split"):
        fit(Experiment(dataset=str(root), **SMALL))
    root = folder(train=2, val=1)
    for path in (root / "train" / "labels").iterdir():
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(path)
    with pytest.raises(UserError, match="are all ignored"):
        fit(Experiment(dataset=str(root), **SMALL))


def test_learning_rate_schedule_closed_form():
    poly = Experiment(warmup_steps=0)
    assert [learning_rate_factor(poly, s, 10) for s in (0, 5)] == pytest.approx([1.0, 0.5**0.9])
    warm = Experiment(warmup_steps=4, schedule="constant")
    assert [learning_rate_factor(warm, s, 10) for s in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_tracker_names(tiny):
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        fit(tiny(), tracker="tensorbord")


@pytest.mark.slow
def test_tensorboard_receives_the_loss(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(tiny(), tracker="tensorboard", runs=tmp_path)
    events = EventAccumulator(str(next((tmp_path / "tracking").rglob("events*")).parent)).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    losses = run.history["value"].to_numpy()
    assert logged == pytest.approx({2: losses[1], 4: losses[3]}, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_finite_gradients_to_what_it_trains(method):
    counts = stats.ClassCounts(torch.tensor([960_000, 31_000, 8_500, 500]), torch.tensor([50, 40, 20, 3]))
    torch.manual_seed(0)
    network = build_model("Linknet", SMALL["encoder"], 4)
    image, target = torch.rand(2, 3, 32, 48), torch.randint(0, 4, (2, 32, 48))
    for stage in build_method(method, network, counts, {}):
        if stage.prepare is not None:
            stage.prepare([(image, target)])
        learner = Learner(stage)
        for module in stage.frozen:
            module.requires_grad_(False).eval()
        trained = [p for p in learner.parameters() if p.requires_grad]
        assert bool(trained) == bool(stage.share), stage.name
        if trained:
            learner(image, target, (image, target, 0.5) if METHODS[method].unlabelled else None).backward()
            gradients = [p.grad for p in trained if p.grad is not None]
            assert all(torch.isfinite(g).all() for g in gradients), stage.name
            assert sum(g.abs().sum() for g in gradients) > 0, stage.name
        learner.zero_grad()


SEVERAL = [(name, {}) for name in METHODS if METHODS[name].first] + [
    ("medoe", {"cuts": [1, 3]}),
    ("ncm", {"first": "focal"}),
    ("crt", {"first": "Region_Rebalance", "samples": 100}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "hyper"), SEVERAL)
def test_methods_of_several_stages_start_from_their_first_run(tiny, method, hyper):
    e = tiny(method=method, hyper=hyper, steps=12)
    run = fit(e)
    usual = METHODS[method].first
    first = results.find(tiny(method=hyper.get("first", usual).lower(), steps=12)) if usual else None
    assert (first is not None) == bool(usual)
    if first:
        shared = [k for k in weights(first) if k.startswith("encoder.")]
        assert shared
        stored = weights(run)
        prefix = "" if "encoder.model.conv_stem.weight" in stored else "network."
        assert all(torch.equal(weights(first)[k], stored[prefix + k]) for k in shared)
    test = data.load(e.dataset, "test")
    assert np.array_equal(evaluate.confusion(run.network(), test).numpy(), run.confusion("test"))
    losses = run.history["value"]
    assert len(losses) == round(12 * METHODS[method].length)
    assert np.isfinite(losses).all()


def test_the_progress_bar_is_gone_before_an_error_is_shown(tiny, monkeypatch, capsys):
    monkeypatch.delenv("LTSEG_HEADLESS")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with pytest.raises(UserError, match="head_share") as error:  # which keeps alive what it came from
        train.fit(tiny(method="medoe", hyper={"head_share": 1.5}))
    *before, blank, last = capsys.readouterr().err.split("\r")
    assert error.traceback
    assert any("medoe" in text for text in before), "there was a bar"
    assert blank.isspace()
    assert last == ""
