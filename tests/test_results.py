"""Run directories: atomic writes, tidy tables, refusals."""

import numpy as np
import pytest
import torch

from ltseg_core import metrics, results
from ltseg_core.config import UserError
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
