"""Run directories: atomic writes, tidy tables, refusals."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ltseg_core import metrics, results
from ltseg_core.config import Experiment, UserError, profile
from ltseg_core.stats import ClassCounts

COUNTS = ClassCounts(torch.tensor([90_000, 9_950, 50]), torch.tensor([10, 9, 2]))  # head, head, tail


@pytest.fixture
def per_image():
    return np.random.default_rng(0).integers(0, 50, (4, 3, 3)).astype(np.int32)


def test_tidy_table_agrees_with_the_metrics(per_image):
    table = results.tidy_metrics({"val": per_image, "test": per_image[:2]}, "abc", COUNTS)
    assert list(table.columns) == ["split", "class_id", "class", "group", "metric", "value"]
    total = per_image.sum(0)
    val = table[table["split"] == "val"]
    iou = val[(val["metric"] == "iou")].sort_values("class_id")["value"].to_numpy()
    assert np.array_equal(iou, metrics.iou(total))
    means = val[val["class_id"] == -1].set_index(["group", "metric"])["value"]
    assert means["all", "miou"] == pytest.approx(np.mean(iou))
    assert means["head", "miou"] == pytest.approx(np.mean(iou[:2]))
    assert means["tail", "macc"] == pytest.approx(total[2, 2] / total[2].sum())
    assert np.isnan(means["body", "miou"])  # an empty group is never 0
    assert means["all", "classes_averaged"] == 3


def test_any_iou_can_be_computed_from_the_stored_counts(per_image):
    table = results.tidy_metrics({"val": per_image}, "abc", COUNTS)
    wide = table[table["class_id"] >= 0].pivot(index="class_id", columns="metric", values="value")
    union = wide["target_pixels"] + wide["predicted_pixels"] - wide["intersection"]
    assert np.allclose(wide["intersection"] / union, wide["iou"], atol=1e-15)


def test_class_absent_everywhere_is_left_out_and_said(per_image):
    per_image[:, 2] = per_image[:, :, 2] = 0
    table = results.tidy_metrics({"val": per_image}, "abc", COUNTS)
    means = table[table["class_id"] == -1].set_index(["group", "metric"])["value"]
    assert means["all", "classes_averaged"] == 2
    assert means["all", "miou"] == pytest.approx(np.nanmean(metrics.iou(per_image.sum(0))))


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table"
    results.write_atomically(path, lambda p: p.write_text("old"))

    def dies(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write_atomically(path, dies)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table"]


def test_publish_moves_everything_but_left_over_temporaries(tmp_path):
    partial = tmp_path / "key.partial"
    partial.mkdir()
    (partial / "a").write_text("1")
    (partial / ".checkpoint.123.tmp").write_text("half")
    results.publish(partial, tmp_path / "key")
    assert [p.name for p in (tmp_path / "key").iterdir()] == ["a"]
    assert not partial.exists()


def test_errors_while_writing_say_what_to_do_and_others_pass(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"cannot write the run to {tmp_path} \(.*Not a directory.*--runs or LTSEG_RUNS"
    with pytest.raises(UserError, match=message), results.writing(tmp_path):
        (tmp_path / "file" / "folder").mkdir()
    with pytest.raises(KeyError), results.writing(tmp_path):
        {}["missing"]


def test_runs_folder_order(monkeypatch, tmp_path):
    monkeypatch.setenv("LTSEG_RUNS", str(tmp_path))
    assert results.runs_folder() == tmp_path
    assert str(results.runs_folder("x")) == "x"
    monkeypatch.delenv("LTSEG_RUNS")
    assert str(results.runs_folder()) == "runs"


@pytest.fixture
def write_run(tmp_path):
    """A function that writes a run directory whose files are all there; their content but the experiment's is empty."""

    def write(folder="", **fields):
        e = Experiment(**fields)
        path = tmp_path / folder / e.key()
        path.mkdir(parents=True)
        for name in results.FILES:
            (path / name).touch()
        stored = {"format": results.FORMAT, "experiment": e.to_dict()}
        (path / "experiment.json").write_text(json.dumps(stored))
        return path

    return write


def test_finished_runs_are_found_without_a_word_about_what_is_none(write_run, tmp_path, recwarn):
    wanted = {write_run(seed=s): Experiment(seed=s) for s in (0, 1, 2)}
    (tmp_path / "0123456789abcdef.partial").mkdir()  # not finished
    (tmp_path / "0123456789abcdef.lock").touch()
    (tmp_path / "0123456789abcdef").touch()  # a file
    (tmp_path / "notes").mkdir()
    found = results.finished(tmp_path)
    assert {run.path: run.experiment for run in found} == wanted
    assert [run.path for run in found] == sorted(wanted)
    assert not recwarn.list
    assert results.finished(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "experiment.json").write_text("{"), "is damaged .*delete it and run again"),
        (lambda p: (p / "experiment.json").write_text('{"format": 1}'), "is damaged .*experiment"),
        (lambda p: (p / "experiment.json").write_text('{"format": 0, "experiment": {}}'), "written in run format 0"),
        (
            lambda p: (p / "experiment.json").write_text('{"format": 1, "experiment": {"stepz": 3}}'),
            "cannot be read: unknown experiment field 'stepz'",
        ),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "experiment.json").unlink(), "is damaged"),
        (lambda p: p.rename(p.with_name("0123456789abcdef")), f"holds the run {Experiment(seed=1).key()}"),
    ],
)
def test_a_damaged_run_is_left_out_and_named(write_run, tmp_path, damage, message):
    write_run(seed=0)
    damage(write_run(seed=1))
    with pytest.warns(UserWarning, match=message) as caught:
        found = results.finished(tmp_path)
    assert [run.experiment.seed for run in found] == [0]
    assert len(caught) == 1


def test_kept_runs_need_no_weights_and_say_so(write_run, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "STUDIES", tmp_path / "studies")
    with pytest.raises(UserError, match="no kept studies in .*they come with the repository"):
        results.kept("some")
    for m, s in (("pat", 0), ("ce", 1), ("ce", 0)):
        write_run(folder="runs", method=m, seed=s)
    results.keep(results.finished(), "some")
    runs = results.kept("some")
    assert [(run.experiment.method, run.experiment.seed) for run in runs] == [("ce", 0), ("ce", 1), ("pat", 0)]
    assert {path.name for run in runs for path in run.path.iterdir()} == set(results.KEPT)
    assert results.find_kept(runs[1].experiment) == runs[1]
    assert results.find_kept(Experiment(method="blv")) is None
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.path.iterdir()}
    results.keep(results.finished(), "some")
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.path.iterdir()} == before
    with pytest.raises(UserError, match="without the network's weights: train it again"):
        runs[0].weights()
    with pytest.raises(UserError, match="unknown study 'sone': did you mean 'some'"):
        results.kept("sone")
    (runs[0].path / "confusion.npz").unlink()
    with pytest.warns(UserWarning, match="confusion.npz is missing"):
        assert len(results.kept("some")) == 2


NETWORK = ("architecture", "encoder", "model_options")
TAUGHT = ("ema_decay", "pseudo_threshold", "pseudo_selection", "unlabelled_weight")


@pytest.mark.filterwarnings("error")  # a run under another name than its key, or without a file, would be left out
@pytest.mark.parametrize(
    ("study", "differs"),
    [
        ("quick_arms", NETWORK),
        ("quick_networks", (*NETWORK, "lr")),
        ("quick_few_labels", ("labelled_images", *TAUGHT)),
        ("quick_domains", ("data_options", "target", "class_mix", *NETWORK, "lr", *TAUGHT)),
        ("camvid_cpu", ()),
        ("ccp_cpu", ()),
        ("second_stages", ()),
        ("camvid_baselines", ()),
    ],
)
def test_kept_studies_are_whole_and_of_their_profile(study, differs):
    runs, seeds = results.kept(study), {}
    for run in runs:
        e = run.experiment
        own = {name: getattr(e, name) for name in ("method", "hyper", "seed", *differs)}
        of = profile("quick" if study.startswith("quick") else f"{e.dataset}_cpu")
        assert of.experiment(**own) == e, f"{run.path} differs from the profile in more than its arm"
        seeds.setdefault(replace(e, seed=0), []).append(e.seed)
    once = {profile("camvid_cpu").ablation_seeds} if study == "camvid_baselines" else set()
    assert {tuple(sorted(s)) for s in seeds.values()} == {profile("quick").seeds, *once}
    labels = {}
    for run in runs[:: len(runs) // 10]:
        counted = {split: run.confusion(split) for split in ("val", "test")}
        of = labels.setdefault(str(run.experiment.evaluated_on), {k: v.sum(2) for k, v in counted.items()})
        assert all(np.array_equal(counted[split].sum(2), of[split]) for split in of), "other labels"
        pd.testing.assert_frame_equal(run.metrics, results.tidy_metrics(counted, run.classes, run.counts()))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 half of one", None])
def test_damaged_confusion_counts_say_what_to_do(write_run, tmp_path, content):
    path = write_run()
    run = results.find(Experiment(), tmp_path)
    if content is None:
        (path / "confusion.npz").unlink()
    else:
        (path / "confusion.npz").write_bytes(content)
    with pytest.raises(UserError, match=f"confusion.npz is damaged .*delete {path} and run again"):
        run.confusion("test")
    np.savez_compressed(path / "confusion.npz", test=np.eye(2, dtype=np.int32)[None])
    np.testing.assert_array_equal(run.confusion("test"), [[[1, 0], [0, 1]]])
    with pytest.raises(UserError, match="no confusion counts of split 'val', only test"):
        run.confusion("val")
