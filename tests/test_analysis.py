"""Tables from finished runs: what they contain, and what may not be compared."""

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from ltseg_core import analysis, metrics, results, stats, viz
from ltseg_core.config import Experiment, UserError
from ltseg_core.data.base import SegmentationDataset
from ltseg_core.models import Output
from ltseg_core.results import Run
from ltseg_core.stats import ClassCounts

COUNTS = ClassCounts(torch.tensor([900_000, 99_500, 500]), torch.tensor([50, 40, 3]))  # head, head, tail


@pytest.fixture
def make_run(tmp_path):
    """A finished run with given confusion counts (N, C, C), without any training."""

    def make(confusion, *, classes=("road", "car", "sign"), **fields):
        e = Experiment(**fields)
        path = tmp_path / f"{e.key()}"
        path.mkdir()
        (path / "experiment.json").write_text(json.dumps({"format": results.FORMAT, "experiment": e.to_dict()}))
        np.savez_compressed(path / "confusion.npz", test=confusion)
        stats.write_counts(path / "classes.csv", COUNTS, classes)
        return Run(path, e)

    return make


def confusions(seed, better=0):
    """(8, 3, 3); better: how many percent of the errors of class 2 are made good."""
    counts = np.random.default_rng(seed).integers(1, 60, (8, 3, 3))
    good = counts[:, 2, :2] * better // 100
    counts[:, 2, :2] -= good
    counts[:, 2, 2] += good.sum(1)
    return counts


@pytest.fixture
def runs(make_run):
    ce = [make_run(confusions(s), seed=s) for s in (0, 1, 2)]
    blv = [make_run(confusions(s, better=40), seed=s, method="blv", hyper={"sigma": 4}) for s in (2, 0, 1)]
    return ce + blv


def test_methods_in_order_of_seed(runs):
    table = analysis.by_method(runs)
    assert list(table) == ["ce", "blv sigma=4"]
    assert [[r.experiment.seed for r in group] for group in table.values()] == [[0, 1, 2]] * 2


def test_methods_are_averaged_over_the_same_classes(make_run):
    """Class 1 has no pixel; one method calls a pixel so, the other does not: no change of mIoU beyond that pixel."""
    plain = np.tile([[90, 0, 0], [0, 0, 0], [0, 0, 10]], (4, 1, 1))
    stray = np.tile([[89, 1, 0], [0, 0, 0], [0, 0, 10]], (4, 1, 1))
    runs = [make_run(plain), make_run(stray, method="pat")]
    assert metrics.miou(stray.sum(0)) == pytest.approx((89 / 90 + 0 + 1) / 3)  # a third lost
    levels = analysis.means(runs, replicates=50).query("metric == 'miou'")["value"]
    assert levels.tolist() == pytest.approx([1, (89 / 90 + 1) / 2])
    change = analysis.means(runs, baseline="ce", replicates=50).query("metric == 'miou'")
    assert change[["value", "low", "high"]].iloc[0].tolist() == pytest.approx([-1 / 180] * 3)


def test_other_labels_are_refused(make_run):
    own = confusions(0)
    relabelled = own.copy()
    relabelled[0, [0, 1]] = relabelled[0, [1, 0]]
    for seed, other in enumerate((relabelled, own[:7])):
        runs = [make_run(own, seed=seed), make_run(other, seed=seed, method="pat")]
        for compare in (analysis.means, analysis.per_class, analysis.class_changes):
            with pytest.raises(UserError, match="pat and ce were evaluated on different labels"):
                compare(runs, baseline="ce")
        with pytest.raises(UserError, match="pat and ce were evaluated on different labels"):
            analysis.judge(runs, {"PAT-01": [analysis.Comparison("pat")]})
    runs = [make_run(own, seed=2), make_run(own, seed=2, method="pat")]
    stats.write_counts(runs[1].path / "classes.csv", ClassCounts(COUNTS.pixels + 1, COUNTS.images), runs[0].classes)
    with pytest.raises(UserError, match="pat and ce differ in their training labels"):
        analysis.by_method(runs)


def test_with_few_labels_each_seed_has_its_own(make_run):
    few = {"labelled_images": 5, "ema_decay": 0.9}
    runs = [make_run(confusions(s), seed=s, method=m, **few) for m in ("ce", "pat") for s in (0, 1)]
    for run in runs:
        own = ClassCounts(COUNTS.pixels + run.experiment.seed, COUNTS.images)
        stats.write_counts(run.path / "classes.csv", own, run.classes)
    runs = [Run(run.path, run.experiment) for run in runs]  # what was read is kept
    assert [len(group) for group in analysis.by_method(runs).values()] == [2, 2]
    other = ClassCounts(COUNTS.pixels.flip(0), COUNTS.images.flip(0))
    for run in runs[1::2]:
        stats.write_counts(run.path / "classes.csv", other, run.classes)
    moved = [Run(run.path, run.experiment) for run in runs]
    for table in (analysis.means, analysis.per_class, analysis.class_changes):
        with pytest.raises(UserError, match="each seed has its own counts, and here other groups: pass groups="):
            table(moved)
    assert not analysis.means(moved, groups=stats.groups(COUNTS), replicates=20).empty
    stats.write_counts(runs[3].path / "classes.csv", COUNTS, runs[3].classes)
    runs[3] = Run(runs[3].path, runs[3].experiment)
    with pytest.raises(UserError, match="pat and ce differ in their training labels"):
        analysis.by_method(runs)


def test_a_run_that_was_trained_again_is_read_again(make_run):
    run = make_run(confusions(0))
    before = analysis.means([run], replicates=20)
    np.savez_compressed(run.path / "confusion.npz", test=confusions(1))
    os.utime(run.path / "confusion.npz", ns=(0, 1))  # a clock may tick slowly
    assert analysis.means([run], replicates=20)["value"][0] != before["value"][0]


def test_class_scores_are_those_of_all_classes_and_fp_per_tp_beside_them(runs):
    table = analysis.class_scores(runs, 1, replicates=50)
    assert table["seeds"].eq(3).all()
    everything = analysis.per_class(runs, replicates=50).query("class_id == 1")
    columns = ["method", "metric", "value", "low", "high"]
    shared = table[table["metric"].isin(["iou", "acc"])]
    pd.testing.assert_frame_equal(shared[columns].reset_index(drop=True), everything[columns].reset_index(drop=True))
    totals = analysis.counts_of(analysis.by_method(runs)["ce"]).sum(1)
    of = table.set_index(["method", "metric"])["value"]
    assert of["ce", "precision"] == pytest.approx(np.mean(metrics.precision(totals)[:, 1]))
    assert of["ce", "fp_per_tp"] == pytest.approx(np.mean((totals[:, :, 1].sum(1) / totals[:, 1, 1]) - 1))


def test_a_class_that_is_never_found_has_no_fp_per_tp(make_run):
    counts = confusions(0)
    counts[:, :, 2] = 0
    table = analysis.class_scores([make_run(counts), make_run(confusions(1), seed=1)], 2, replicates=20)
    assert table.set_index("metric")["seeds"].to_dict() == {"iou": 2, "acc": 2, "precision": 1, "fp_per_tp": 1}
    of = analysis.class_scores([make_run(counts, seed=2)], 2, replicates=20).set_index("metric")["value"]
    assert (of["iou"], of["acc"]) == (0, 0)
    assert np.isnan(of[["precision", "fp_per_tp"]]).all()


def test_means_are_the_mean_over_seeds_of_the_metric(runs):
    table = analysis.means(runs, replicates=50).set_index(["method", "metric"])
    counts = analysis.counts_of(analysis.by_method(runs)["ce"])
    assert counts.shape == (3, 8, 3, 3)
    totals = counts.sum(1)
    assert table.loc[("ce", "miou"), "value"] == pytest.approx(np.mean(metrics.miou(totals)))
    assert table.loc[("ce", "tail acc"), "value"] == pytest.approx(np.mean(metrics.acc(totals)[:, 2]))
    assert table.loc[("ce", "head iou"), "value"] == pytest.approx(np.mean(metrics.iou(totals)[:, :2]))
    assert table.loc[("ce", "pixel_acc"), "value"] == pytest.approx(np.mean(metrics.pixel_acc(totals)))
    assert "body iou" not in table.index.get_level_values("metric")  # no class of the body here
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_groups_may_be_given(runs):
    totals = analysis.counts_of(analysis.by_method(runs)["ce"]).sum(1)
    table = analysis.means(runs, groups=["head", "body", "body"], replicates=50).set_index(["method", "metric"])
    assert table.loc[("ce", "body acc"), "value"] == pytest.approx(np.mean(metrics.acc(totals)[:, 1:]))
    assert "tail acc" not in table.index.get_level_values("metric")
    tests = {"MED-03": [analysis.Comparison("blv sigma=4", metric="body acc")]}
    found = analysis.judge(runs, tests, groups=["head", "head", "body"], replicates=50).loc["MED-03"]
    expected = analysis.means(runs, baseline="ce", replicates=50).set_index("metric").loc["tail acc", "value"]
    assert f": {100 * expected:+.1f} [" in found["found"]


def test_differences_are_paired_and_their_own_direction(runs):
    by_class = analysis.per_class(runs, baseline="ce", replicates=200)
    assert set(by_class["method"]) == {"blv sigma=4"}
    sign = by_class[(by_class["class"] == "sign") & (by_class["metric"] == "acc")].iloc[0]
    assert (sign["group"], sign["train_pixels"]) == ("tail", 500)
    better = [np.subtract(*(metrics.acc(confusions(s, x).sum(0))[2] for x in (40, 0))) for s in range(3)]
    assert sign["value"] == pytest.approx(np.mean(better))
    assert 0 < sign["low"] < sign["value"] < sign["high"]
    means = analysis.means(runs, baseline="ce", replicates=200).set_index("metric")
    assert means.loc["miou", "value"] == pytest.approx(
        np.mean([metrics.miou(confusions(s, 40).sum(0)) - metrics.miou(confusions(s).sum(0)) for s in range(3)])
    )
    swapped = analysis.means(runs, baseline="blv sigma=4", replicates=200).set_index("metric")
    assert swapped.loc["miou", "high"] == pytest.approx(-means.loc["miou", "low"])


def test_per_class_scores_are_the_mean_over_seeds(runs):
    table = analysis.per_class(runs, replicates=20).set_index(["method", "metric", "class"])["value"]
    counts = {
        "ce": [confusions(s).sum(0) for s in range(3)],
        "blv sigma=4": [confusions(s, 40).sum(0) for s in range(3)],
    }
    scores = {"iou": metrics.iou, "acc": metrics.acc}
    assert table.to_dict() == pytest.approx(
        {
            (method, name, label): np.mean([score(total)[k] for total in counts[method]])
            for method in counts
            for name, score in scores.items()
            for k, label in enumerate(("road", "car", "sign"))
        }
    )


def test_class_changes_row_by_row(make_run):
    """Predictions are permuted, labels kept: IoU falls for some classes and not for others."""
    before = np.random.default_rng(0).integers(1, 60, (6, 2, 3, 3))
    before[0, :, 2, 2] = 0  # the first run never finds sign
    after = np.random.default_rng(1).permuted(before, axis=-1)
    runs = [make_run(counts, seed=seed) for seed, counts in enumerate(before)]
    runs += [make_run(counts, seed=seed, method="blv") for seed, counts in enumerate(after)]
    table = analysis.class_changes(runs)
    assert list(zip(table["seed"], table["class_id"], strict=True)) == list(np.ndindex(6, 3))
    assert set(table["method"]) == {"blv"}
    assert set(table["remark1"]) == {True, False}
    for row in table.itertuples():
        (tp, fp, n), (tp2, fp2, n2) = (
            (int(c[k, k]), int(c[:, k].sum() - c[k, k]), int(c[k].sum()))
            for k, c in ((row.class_id, counts[row.seed].sum(0)) for counts in (before, after))
        )
        assert n == n2
        assert (row.iou_before, row.acc_before, row.precision_before) == pytest.approx(
            (tp / (n + fp), tp / n, tp / (tp + fp))
        )
        assert (row.iou, row.acc, row.precision) == pytest.approx((tp2 / (n + fp2), tp2 / n, tp2 / (tp2 + fp2)))
        assert (row.fp_per_tp, row.more_fp) == pytest.approx((fp2 / tp2, fp2 - fp))
        assert 1 / row.iou == pytest.approx(1 / row.acc + row.fp_per_tp)
        assert row.remark1 == (Fraction(tp2, n + fp2) >= Fraction(tp, n + fp)) == (row.iou >= row.iou_before)
        if tp:
            affordable = Fraction(tp2 - tp, tp) * (n + fp)
            assert (row.fp_per_tp_before, row.afforded_fp) == pytest.approx((fp / tp, float(affordable)))
            assert row.remark1 == (fp2 - fp <= affordable) == (row.more_fp <= row.afforded_fp)
            kept = Fraction(tp2, n + Fraction(tp2 * fp, tp))  # as many false positives per true one as before
            assert row.iou_by_recall == pytest.approx(float(kept))
        else:
            assert (row.seed, row.class_id) == (0, 2)
            assert np.isnan([row.afforded_fp, row.iou_by_recall]).all()
    assert table.iloc[2][["class", "group", "train_pixels"]].tolist() == ["sign", "tail", 500]
    with pytest.raises(UserError, match="no runs of the baseline 'focal' among ce, blv"):
        analysis.class_changes(runs, baseline="focal")


def test_lead_of_the_head_among_false_positives():
    sources = np.tile([6.0, 1.0, 3.0], (2, 10, 1))  # 2 seeds, 10 images
    assert analysis.head_lead(sources) == pytest.approx((0.3, 0.3, 0.3))
    sources[1] = [2, 8, 0]
    assert analysis.head_lead(sources)[0] == pytest.approx((0.3 - 0.6) / 2)
    rng = np.random.default_rng(0)
    value, low, high = analysis.head_lead(rng.integers(0, 9, (3, 20, 3)))
    assert low < value < high
    assert np.isnan(analysis.head_lead(np.zeros((1, 4, 3)))[0])


class Drawn(SegmentationDataset):
    """Labels, and as red, green and blue of the image what three networks predict."""

    name, split, classes = "drawn", "test", ("sky", "pole", "sign")

    def __init__(self, labels, predicted):
        self.labels, self.predicted, self.names = labels, predicted, [str(i) for i in range(len(labels))]

    def sample(self, index):
        return self.predicted[index], self.labels[index]


class Reads(torch.nn.Module):
    """Predicts the class that stands in one channel of the image."""

    def __init__(self, channel):
        super().__init__()
        self.channel, self.unused = channel, torch.nn.Parameter(torch.zeros(1))

    def forward(self, image):
        classes = torch.arange(3).view(1, 3, 1, 1)
        return Output(image, -((255 * image[:, self.channel, None] - classes) ** 2))


def test_distances_to_the_nearest_tail_pixel(make_run, monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 255], np.uint8), (5, 9, 7), p=[0.7, 0.2, 0.1])
    predicted = rng.integers(0, 3, (5, 9, 7, 3), dtype=np.uint8)
    labels[0, 2, 3] = labels[3, 8, 0] = labels[3, 1, 1] = 2  # no tail pixel in the other images
    names = ("blv", "pat")
    expected = {(name, 3): [] for name in ("all", *names)}
    for i in (0, 3):
        tail = np.argwhere(labels[i] == 2)
        for pixel in np.argwhere(labels[i] == 0):
            away = np.sqrt(((tail - pixel) ** 2).sum(1).min())
            before, *after = predicted[i][tuple(pixel)]
            for name, new in [("all", 2), *zip(names, after, strict=True)]:
                if new == 2 and (name == "all" or before == 0):
                    expected[name, 3].append(away)
    channel = {"ce": 0, "blv": 1, "pat": 2}
    monkeypatch.setattr(Run, "network", lambda run: Reads((channel[run.experiment.method] + run.experiment.seed) % 3))
    runs = [make_run(confusions(0), seed=seed, method=m) for m in channel for seed in (3, 4)]
    dataset, groups = Drawn(labels, predicted), ["head", "body", "tail"]
    found = analysis.tail_distances(runs, dataset, groups)
    assert list(found) == [(name, seed) for seed in (3, 4) for name in ("all", *names)]
    for name in expected:
        np.testing.assert_allclose(np.sort(found[name]), np.sort(expected[name]), rtol=1e-6)
    assert len(found["blv", 3]) > 5
    np.testing.assert_array_equal(found["all", 4], found["all", 3])
    assert len(found["blv", 4]) != len(found["blv", 3]), "each seed has its own networks"
    nowhere = analysis.tail_distances(runs, Drawn(labels[1:2], predicted[1:2]), groups)
    assert nowhere.keys() == found.keys()
    assert not any(map(len, nowhere.values()))


def test_false_alarms_in_images_that_show_the_tail(make_run):
    counts = np.zeros((2, 4, 3, 3), int)
    counts[:, :, 0, 2] = [[1, 2, 3, 4], [0, 0, 5, 5]]  # head pixels called tail
    counts[:, :, 1, 2] = 100  # those of the body do not count
    counts[:, 2, 2, 1] = 7  # only the third image shows the tail
    runs = [make_run(c, seed=seed) for seed, c in enumerate(counts)]
    groups = ["head", "body", "tail"]
    value, low, high = analysis.alarms_beside_tail(runs, groups)
    assert value == pytest.approx((3 / 10 + 5 / 10) / 2)
    assert 0 <= low < value < high <= 1
    assert analysis.alarms_beside_tail(runs[:1], groups)[0] == pytest.approx(3 / 10)
    counts[:, :, 0, 2] = 0
    silent = make_run(counts[0], seed=9)
    assert np.isnan(analysis.alarms_beside_tail([silent], groups)).all()


def test_correlation_with_frequency():
    rng = np.random.default_rng(0)
    frequency = pd.DataFrame({"pixels": rng.lognormal(8, 2, 20), "images": rng.lognormal(4, 1, 20)})
    acc = np.log(frequency["pixels"].to_numpy())
    acc[3], frequency.loc[5, "pixels"] = np.nan, 0  # an absent class, a class without training pixels
    table = analysis.frequency_correlations(frequency, {"acc": acc}, replicates=50)
    used = ~np.isin(range(20), (3, 5))
    value = table.set_index(["kind", "frequency"])["value"]
    x = {c: frequency[c].to_numpy()[used] for c in frequency}
    for kind, reference in {
        "pearson": lambda c: pearsonr(x[c], acc[used])[0],
        "pearson log": lambda c: pearsonr(np.log(x[c]), acc[used])[0],
        "spearman": lambda c: spearmanr(x[c], acc[used])[0],
    }.items():
        for column in x:
            assert value[kind, column] == pytest.approx(reference(column), abs=1e-9)
        assert value[kind, "images - pixels"] == pytest.approx(reference("images") - reference("pixels"), abs=1e-9)
    assert value["pearson log", "pixels"] == pytest.approx(1)
    assert set(table["classes"]) == {18}

    other = rng.normal(size=20)
    both = analysis.frequency_correlations(frequency, {"mean": np.stack([acc, other]), "other": other}, replicates=50)
    mean, second = (both[both["score"] == s].set_index(["kind", "frequency"])["value"] for s in ("mean", "other"))
    pd.testing.assert_series_equal(mean, (value + second) / 2)
    limits = table.set_index(["kind", "frequency"]).loc[("pearson", "images - pixels"), ["low", "high"]]
    x = {c: frequency[c].to_numpy()[used] for c in frequency}
    expected = stats.correlation(x["images"], acc[used], less=x["pixels"], replicates=50)
    np.testing.assert_allclose(limits.to_numpy(dtype=float), expected[1:], atol=1e-12)


@pytest.fixture
def made_up_results(tmp_path):
    """A data root with results of two models on the three classes of COUNTS, counted from 1 as ADE20K is."""
    (tmp_path / "ade20k_stats").mkdir()
    (tmp_path / "class_stats").mkdir()
    rows = [(model, "ce", "single-scale", k, 10.0 * k, 20.0 * k) for model in ("small", "large") for k in (1, 2, 3)]
    pd.DataFrame(rows, columns=["model", "method", "protocol", "class_idx", "iou", "acc"]).to_csv(
        tmp_path / "ade20k_stats" / "per_class_results.csv", index=False
    )
    stats.write_counts(tmp_path / "class_stats" / "ade20k.csv", COUNTS, ("road", "car", "sign"))
    return tmp_path


def test_public_results_are_fractions_beside_the_counts_of_their_class(made_up_results):
    table = analysis.public_results("ade20k", made_up_results)
    columns = ["protocol", "class_id", "iou", "acc", "pixels", "images"]
    row = table.set_index(["model", "class"]).loc[("large", "car"), columns]
    assert row.tolist() == ["single-scale", 1, 0.2, 0.4, 99_500, 40]
    assert table["class_id"].tolist() == [0, 1, 2] * 2


def test_public_results_that_are_missing_or_do_not_fit_are_refused(made_up_results):
    with pytest.raises(UserError, match="unknown public results 'ade20': did you mean 'ade20k'"):
        analysis.public_results("ade20", made_up_results)
    with pytest.raises(
        UserError, match=r"cityscapes_stats/per_class_results.csv is missing: .* data_prep cityscapes_stats`"
    ):
        analysis.public_results("cityscapes", made_up_results)
    counts = made_up_results / "class_stats" / "ade20k.csv"
    stats.write_counts(counts, ClassCounts(COUNTS.pixels[:2], COUNTS.images[:2]), ("road", "car"))
    with pytest.raises(UserError, match=r"results.csv has results of 3 classes, .*ade20k.csv counts of 2"):
        analysis.public_results("ade20k", made_up_results)
    counts.unlink()
    with pytest.raises(UserError, match=r"class_stats/ade20k.csv is missing: .* data_prep class_stats`"):
        analysis.public_results("ade20k", made_up_results)


@pytest.mark.parametrize(("name", "classes"), [("ade20k", 150), ("cityscapes", 19)])
def test_public_results_have_the_means_that_their_source_reports(real_data, name, classes):
    table = analysis.public_results(name, real_data)
    first = table[table["model"] == table["model"][0]].iloc[:classes]
    counts, names = stats.read_counts(real_data / "class_stats" / f"{name}.csv")
    assert first["class_id"].tolist() == list(range(classes))
    assert first["class"].tolist() == names
    assert first["pixels"].tolist() == counts.pixels.tolist()
    summary = pd.read_csv(real_data / f"{name}_stats" / "summary.csv").iloc[0]
    assert 100 * first["iou"].mean() == pytest.approx(summary["miou"], abs=0.01)
    assert 100 * first["acc"].mean() == pytest.approx(summary["macc"], abs=0.01)


def test_one_seed_still_has_an_interval_over_images(make_run):
    table = analysis.means([make_run(confusions(0))], replicates=50).set_index("metric")
    assert table.loc["miou", "seeds"] == 1
    assert table.loc["miou", "low"] < table.loc["miou", "high"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 5}, r"has the seeds \[5\]"),
        ({"dataset": "camvid"}, r"blv \(seed 0\) and ce differ in dataset: 'camvid' and 'scenes'"),
        ({"data_options": {"images": 4}}, "differ in data_options"),
        ({"eval_images": 4}, "differ in eval_images"),
        ({"steps": 4}, "differ in steps"),
        ({"encoder": "resnet18"}, "differ in encoder"),
    ],
)
def test_what_cannot_be_compared_is_refused(make_run, fields, message):
    runs = [make_run(confusions(0)), make_run(confusions(1), method="blv", **fields)]
    with pytest.raises(UserError, match=message):
        analysis.means(runs)


def test_other_refusals(make_run, runs):
    with pytest.raises(UserError, match="no runs to compare"):
        analysis.means([])
    with pytest.raises(UserError, match="no runs of the baseline 'focal'"):
        analysis.per_class(runs, baseline="focal")
    with pytest.raises(UserError, match="nothing to compare it with"):
        analysis.means(runs[:3], baseline="ce")
    with pytest.raises(UserError, match="several runs of one seed"):
        analysis.by_method([runs[0], make_run(confusions(4), seed=0, steps=9)])
    with pytest.raises(UserError, match="no confusion counts of split 'val', only test"):
        analysis.means(runs, split="val")
    other = make_run(confusions(7), method="focal", seed=0, classes=("a", "b", "c"))
    with pytest.raises(UserError, match="differ in their class lists"):
        analysis.by_method([runs[0], other])


def test_histories(make_run):
    import pandas as pd

    run = make_run(confusions(0), seed=3)
    pd.DataFrame({"step": [1, 2, 2], "metric": ["loss", "loss", "val miou"], "value": [2.0, 1.0, 0.5]}).to_parquet(
        run.path / "history.parquet"
    )
    assert analysis.histories([run]).to_dict("list") == {
        "step": [1, 2], "value": [2.0, 1.0], "method": ["ce", "ce"], "seed": [3, 3],
    }  # fmt: skip


def test_run_table_holds_the_integers(make_run):
    run = make_run(confusions(0), seed=3)
    results.tidy_metrics({"test": confusions(0)}, run.classes, COUNTS).to_parquet(run.path / "metrics.parquet")
    table = analysis.run_table([run])
    total = confusions(0).sum(0)
    assert table["intersection"].tolist() == np.diagonal(total).tolist()
    assert table["target_pixels"].tolist() == total.sum(1).tolist()
    assert table["predicted_pixels"].tolist() == total.sum(0).tolist()
    assert table["train_pixels"].tolist() == COUNTS.pixels.tolist()
    assert table["train_images"].tolist() == COUNTS.images.tolist()
    assert table.iloc[0][["method", "seed", "split", "class"]].tolist() == ["ce", 3, "test", "road"]


@pytest.mark.parametrize(
    ("study", "title"),
    [("camvid_cpu", "## CamVid"), ("camvid_baselines", "## The other losses on CamVid"), ("ccp_cpu", "## CCP")],
)
def test_kept_studies_agree_with_what_is_said_of_them(study, title):
    folder = Path(__file__).parents[1] / "results"
    text = (folder / "README.md").read_text().partition(title)[2].partition("\n## ")[0]
    rows = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *lines = ([cell.strip() for cell in row] for row in rows)
    runs, short = results.kept(study), {name: metric for metric, name in viz.METRIC_LABELS.items()}
    written = pd.read_csv(folder / f"{study}.csv", keep_default_na=False)  # a class is called "null"
    pd.testing.assert_frame_equal(written, analysis.run_table(runs), check_dtype=False)
    if study == "camvid_baselines":  # of the seed that they all have
        plain = [run for run in results.kept("camvid_cpu") if run.experiment.method == "ce"]
        runs = [run for run in [*plain, *runs] if run.experiment.seed == 0]
    tables = {None: analysis.means(runs), "ce": analysis.means(runs, baseline="ce")}
    tables = {k: t.set_index(["method", "metric"])[["value", "low", "high"]] for k, t in tables.items()}

    def cell(method, column):
        baseline, sign = ("ce", "+") if "against CE" in column else (None, "")
        if method == baseline:
            return ""
        name = column.split(",")[0].removesuffix(" (%)")
        metric = short.get(name) or " ".join(short.get(word, word) for word in name.split())
        return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(100 * tables[baseline].loc[method, metric]), s=sign)

    expected = [[method, *(cell(method, column) for column in header[1:])] for method in analysis.by_method(runs)]
    assert sorted(lines) == sorted(expected)


def test_what_is_said_of_three_trainings_with_dice():
    text = " ".join((Path(__file__).parents[1] / "results" / "README.md").read_text().split())
    runs = [*results.kept("camvid_cpu"), *results.kept("camvid_baselines")]
    runs = [run for run in runs if analysis.label(run) in ("ce", "dice")]
    table = 100 * analysis.means(runs, baseline="ce").set_index("metric")[["value", "low", "high"]]
    change = {metric: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*table.loc[metric]) for metric in ("miou", "macc")}
    assert f"over the three seeds mIoU {change['miou']} and mAcc {change['macc']} points against" in text


def test_what_is_said_of_single_trainings_on_photographs():
    text = " ".join((Path(__file__).parents[1] / "results" / "README.md").read_text().split())
    first = [run for run in results.kept("camvid_cpu") if run.experiment.seed == 0]
    alone = analysis.means(first, baseline="ce").set_index(["metric", "method"]).loc["miou", ["value", "low", "high"]]
    (value, low, high), (blv, blv_low, blv_high) = (-100 * alone.loc[m].to_numpy() for m in ("region_rebalance", "blv"))
    assert f"{blv:.1f}" == f"{value:.1f}", "as far"
    over_seeds = analysis.means(results.kept("camvid_cpu"), baseline="ce").set_index(["metric", "method"]).loc["miou"]
    assert over_seeds["low"]["region_rebalance"] < 0 < over_seeds["high"]["region_rebalance"], "the first is open"
    assert over_seeds["high"]["blv"] < 0, "the second stands"
    said = f"seed 0 alone had region rebalance {value:.1f} points of mIoU below cross-entropy [{high:.1f}, {low:.1f}] "
    assert said + f"and BLV as far, [{blv_high:.1f}, {blv_low:.1f}]" in text
    plain = [run.confusion("test").sum(0) for run in results.kept("ccp_cpu") if run.experiment.method == "ce"]
    found = [int((metrics.iou(counts) > 0).sum()) for counts in plain]
    assert f"finds {min(found)} to {max(found)} of the {(plain[0].sum(1) > 0).sum()} classes" in text
    assert int((results.kept("ccp_cpu")[0].counts().pixels == 0).sum()) == 4
    assert "Four classes have no training pixel" in text


def test_majority_rule():
    def judged(count, number):
        part = analysis.Majority("cars", count, number)
        return tuple(analysis.judge([], {"RR-09": [part]}).loc["RR-09", ["found", "verdict"]])

    assert judged(0, 0) == ("cars: there is none", "open")
    k, n, z = 15, 18, 1.959964
    centre, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    assert judged(k, n) == (f"cars: 15 of 18 [{centre - half:.0%}, {centre + half:.0%}]", "supported")
    assert judged(n - k, n)[1] == "contradicted"
    assert judged(2, 2)[1] == "open"  # two cases decide nothing


def test_verdict_rule():
    assert analysis.verdict(0.1, 0.2, "positive") == "supported"
    assert analysis.verdict(0.1, 0.2, "negative") == "contradicted"
    assert analysis.verdict(-0.1, 0.2, "positive") == "open"
    assert analysis.verdict(-0.2, -0.1, "negative") == "supported"
    assert analysis.verdict(-0.2, -0.1, "positive") == "contradicted"
    assert analysis.verdict(0.1, 0.2, "positive", margin=0.15) == "open"
    assert analysis.verdict(-0.1, 0.1, "positive", margin=0.15) == "contradicted"  # not by as much as claimed
    assert analysis.verdict(-0.1, 0.1, "negative", margin=0.15) == "contradicted"
    assert analysis.verdict(0.0, 0.2, "positive") == "open"
    assert analysis.verdict(np.nan, np.nan, "positive") == "open"
    assert analysis.verdict(-0.1, 0.1, "equal", margin=0.2) == "supported"
    assert analysis.verdict(-0.1, 0.3, "equal", margin=0.2) == "open"
    assert analysis.verdict(0.3, 0.4, "equal", margin=0.2) == "contradicted"
    assert analysis.verdict(-0.4, -0.3, "equal", margin=0.2) == "contradicted"
    assert analysis.verdict(np.nan, np.nan, "equal", margin=0.2) == "open"
    for arguments in ((0.3, 0.2, "positive"), (0.1, 0.2, "up"), (0.1, 0.2, "equal")):
        with pytest.raises(ValueError, match="expected"):
            analysis.verdict(*arguments)


def test_a_claim_of_several_parts():
    assert analysis.overall(["supported", "supported"]) == "supported"
    assert analysis.overall(["supported", "open"]) == "open"
    assert analysis.overall(["supported", "open", "contradicted"]) == "contradicted"


def test_claims_on_photographs(make_run, monkeypatch):
    camvid = [
        make_run(confusions(seed, better=40 * (method == "medoe")), seed=seed, method=method, dataset="camvid", **other)
        for seed in range(2)
        for method, other in (("ce", {}), ("medoe", {"hyper": {"shares": [0.01]}}))
    ]
    ccp = [make_run(confusions(0, better=40 * (m == "medoe")), method=m, dataset="ccp") for m in ("ce", "medoe")]
    held, second = {"hyper": {"split": "val"}, "dataset": "camvid"}, "balanced_bound split=val"
    bound = [make_run(confusions(seed, better=20), seed=seed, method="balanced_bound", **held) for seed in range(2)]
    studies = {"camvid_cpu": camvid, "ccp_cpu": ccp, "second_stages": bound}
    monkeypatch.setattr(analysis, "kept", studies.__getitem__)
    C = analysis.Comparison
    tests = {
        "MED-03": [C("medoe")],
        "DIS-04": [C(second, "medoe")],  # on CamVid only
        "MED-13": [C("medoe"), C("medoe", "focal")],  # not run there
        "MED-24": [C("medoe"), analysis.Exact("equal", True)],  # not only a comparison
        "MED-05": "needs more",
        "MED-07": [],
    }
    table = analysis.judge_on_photographs(tests)
    medoe = "medoe shares=[0.01]"
    alone = analysis.judge([*camvid, *bound], {"MED-03": [C(medoe)], "DIS-04": [C(second, medoe)]})
    assert table.index.tolist() == ["MED-03", "DIS-04", "MED-03"]
    assert table["data"].tolist() == ["camvid", "camvid", "ccp"]
    assert table["verdict"].tolist() == ["supported", "contradicted", "open"]
    pd.testing.assert_frame_equal(table[table["data"] == "camvid"].drop(columns="data"), alone)
    assert "one seed" in table["found"].iloc[2]
    assert analysis.judge_on_photographs(tests, besides="camvid")["data"].tolist() == ["ccp"]


def test_claims_in_other_networks(make_run, monkeypatch):
    def network(better, **fields):
        methods = (("ce", 0), ("blv", better))
        return [make_run(confusions(s, better=b), seed=s, method=m, **fields) for s in range(2) for m, b in methods]

    first, second = network(40, architecture="PSPNet"), network(-40, architecture="Segformer", encoder="mit_b0")
    monkeypatch.setattr(analysis, "kept", {"quick_networks": [*second[:2], *first, *second[2:]]}.__getitem__)
    names = ["Segformer with mit_b0", f"PSPNet with {first[0].experiment.encoder}"]
    assert analysis.in_networks() == dict(zip(names, (second, first), strict=True))
    tests = {"BLV-01": [analysis.Comparison("blv")], "BLV-02": [analysis.Comparison("gcl")]}
    table = analysis.judge_in_networks(tests)
    each = [analysis.judge(runs, tests) for runs in (second, first)]
    assert [t["verdict"]["BLV-01"] for t in each] == ["contradicted", "supported"]
    assert table["verdict"].tolist() == ["contradicted", "open"]  # it must hold in each of them
    assert table["data"].tolist() == ["scenes in other networks"] * 2
    said = "; ".join(f"{name}: {t['found']['BLV-01']}" for name, t in zip(names, each, strict=True))
    assert table["found"]["BLV-01"] == said
    alone = analysis.judge_in_networks(tests, names[1:])
    pd.testing.assert_frame_equal(alone.drop(columns=["data", "found"]), each[1].drop(columns="found"))
    assert alone["data"].tolist() == [f"scenes in {names[1]}"] * 2
    with pytest.raises(UserError, match="unknown network 'PSPNet with mit_b0'"):
        analysis.judge_in_networks(tests, ["PSPNet with mit_b0"])


def test_gain_with_classes(make_run, monkeypatch):
    def study(dataset, seeds, **hyper):
        methods = (("ce", 0, {}), ("medoe", 40 if dataset == "ccp" else 10, hyper))
        return [
            make_run(confusions(seed, better=better), seed=seed, method=m, hyper=h, dataset=dataset)
            for seed in seeds
            for m, better, h in methods
        ]

    studies = {"camvid_cpu": study("camvid", (0, 1), shares=[0.01]), "ccp_cpu": study("ccp", (0, 1, 2))}
    monkeypatch.setattr(analysis, "kept", studies.__getitem__)
    found, else_equal = analysis.gain_with_classes("medoe")
    gain = {k: analysis.means(runs, baseline="ce").set_index("metric").loc["miou"] for k, runs in studies.items()}
    few, many = (gain[k] for k in ("camvid_cpu", "ccp_cpu"))
    value = many["value"] - few["value"]
    low = value - np.hypot(many["value"] - many["low"], few["high"] - few["value"])
    high = value + np.hypot(many["high"] - many["value"], few["value"] - few["low"])
    np.testing.assert_allclose(found.limits, (value, low, high))
    assert value > 0
    assert (found.seeds, found.expected) == (2, "positive")
    assert else_equal.holds is None
    assert f"camvid (3 classes) {100 * few['value']:+.1f} and ccp (3 classes) {100 * many['value']:+.1f}" in found.what


def test_judged_claims(runs, make_run):
    better = analysis.Comparison("blv sigma=4", metric="tail acc")
    more = analysis.Comparison("blv sigma=4", metric="tail acc - head acc")
    single = [make_run(confusions(0, better=40), seed=0, method="pat")]
    table = analysis.judge(
        runs + single,
        {
            "BLV-01": [better],
            "BLV-02": [better, more],
            "BLV-03x": [better._replace(expected="negative"), better],
            "PAT-02": [analysis.Comparison("pat", metric="tail acc")],
            "MED-03": [analysis.Comparison("medoe")],
            "BLV-04": "needs a semi-supervised run",
            "DIS-02": [better._replace(metric="body acc")],
            "MED-26": [analysis.Measured("over-confidence", (-0.012, -0.02, -0.004), 3, "negative"), better],
            "MED-12": [analysis.Measured("head", (0.0, -0.001, 0.001), 1, "equal", 0.01)],
            "MED-25": [analysis.Measured("nearer, in pixels", (-12.34, -20.0, -4.5), 3, "negative", points=False)],
            "MED-24": [analysis.Exact("equal in every class", True)],
            "PAT-18": [analysis.Exact("no difference", None)],
            "PAT-19": [analysis.Measured("gap", (0.001, np.nan, np.nan), 3)],
            "RR-10": [analysis.Exact("equal in every class", False), better],
            "RR-11": [analysis.Exact("equal in every class", True), better._replace(metric="body acc")],
        },
        replicates=200,
    )
    verdicts = {"BLV-01": "supported", "BLV-02": "supported", "BLV-03x": "contradicted"} | dict.fromkeys(
        ("MED-24", "MED-25", "MED-26"), "supported"
    )
    still_open = ["PAT-02", "MED-03", "BLV-04", "DIS-02", "MED-12", "RR-11", "PAT-18", "PAT-19"]
    assert table["verdict"].to_dict() == verdicts | {"RR-10": "contradicted"} | dict.fromkeys(still_open, "open")
    assert table.loc["PAT-19", "found"] == "gap: +0.1"
    assert table.loc["RR-10", "found"].startswith("equal in every class; tail acc of blv")
    assert table.loc["MED-26", "found"].startswith("over-confidence: -1.2 [-2.0, -0.4]; ")
    assert table.loc["MED-12", "found"] == "head: +0.0 [-0.1, +0.1] (one seed)"
    assert table.loc["MED-25", "found"] == "nearer, in pixels: -12.34 [-20.00, -4.50]"
    assert table.loc["BLV-01", "statement"].startswith("BLV improves fully supervised mIoU")
    assert "one seed" in table.loc["PAT-02", "found"]
    assert "not run here" in table.loc["MED-03", "found"]
    assert table.loc["BLV-04", "found"] == "needs a semi-supervised run"
    assert "no class of that group" in table.loc["DIS-02", "found"]
    expected = [
        np.mean([f(metrics.acc(confusions(s, 40).sum(0))) - f(metrics.acc(confusions(s).sum(0))) for s in range(3)])
        for f in (lambda a: a[2], lambda a: a[2] - a[:2].mean())
    ]
    for value, text in zip(expected, table.loc["BLV-02", "found"].split("; "), strict=True):
        assert f": {100 * value:+.1f} [" in text
    with pytest.raises(UserError, match="unknown claim 'BLV-99'"):
        analysis.judge(runs, {"BLV-99": [better]})
    with pytest.raises(UserError, match="unknown metric 'mio': did you mean 'miou'"):
        analysis.judge(runs, {"BLV-01": [better._replace(metric="mio")]})


def test_claims_board():
    def table(data="scenes", **verdicts):
        rows = [(c.replace("_", "-"), *v.split(": ")[::-1], data) for c, v in verdicts.items()]
        return pd.DataFrame(rows, columns=["claim", "found", "verdict", "data"])

    tables = {
        "02_claims": table(
            RR_05="supported: falls", RR_06="open: -", BLV_01="supported: up", MED_02="open: see notebook 04",
            X_06="supported: +2 [1, 3]", DIS_01="supported: up", DIS_02="supported: up",
        ),
        "04_claims": table(MED_02="contradicted: weaker"),
        "05_claims": table(
            RR_05="open: needs more", RR_06="open: -", BLV_01="contradicted: down", PAT_18="open: see notebook 14",
            X_06="open: +1 [-1, 3]",
        ),
        "13_claims": table("photographs", DIS_01="contradicted: down", DIS_02="open: +1 [-1, 3] (one seed)"),
    }  # fmt: skip
    board = analysis.claims_board(tables)
    assert board.index.tolist() == analysis.claims().index.tolist()
    assert board.loc[["MED-02", "X-06"], "paper"].tolist() == ["MEDOE", "where papers disagree"]
    assert board["paper"].notna().all()
    found = "02 (scenes): falls; 05 (scenes): needs more"
    assert board.loc["RR-05", ["verdict", "found"]].tolist() == ["supported", found]
    assert board.loc["RR-05", ["notebooks", "data"]].tolist() == ["02, 05", "scenes"]
    on_one = board.loc[["RR-06", "BLV-01", "X-06"], "verdict"].tolist()
    assert on_one == ["open", "contradicted", "open"], "nobody knows; a part fails; a part is undecided"
    assert board.loc[["DIS-01", "DIS-02"], "verdict"].tolist() == ["open", "supported"], "two data sets"
    known = {"RR-05", "BLV-01", "X-06", "DIS-01", "DIS-02", "MED-02"}
    assert set(board.index[board["measured"]]) == known, "those with a verdict or an interval"
    assert board.loc["MED-02", ["verdict", "found"]].tolist() == ["contradicted", "04 (scenes): weaker"]
    assert board.loc["PAT-18", ["verdict", "found"]].tolist() == ["open", "05 (scenes): see notebook 14"]
    assert board.loc["RR-01", ["verdict", "notebooks"]].tolist() == ["open", ""]
    assert "was run" in board.loc["RR-01", "found"]
    with pytest.raises(UserError, match="RR-99"):
        analysis.claims_board(tables | {"06_claims": table(RR_99="open: -")})
    nothing = analysis.claims_board({})
    assert (nothing["verdict"] == "open").all()
    assert not nothing["measured"].any()


def test_published_tables_are_carried_whole():
    table = analysis.published("rr_table05_lambda")
    assert table.set_index("lambda")["value"].to_dict() == {0.0: 43.95, 0.1: 44.61, 0.2: 44.85, 0.3: 45.02, 0.4: 44.64}
    with pytest.raises(UserError, match="did you mean 'rr_table05_lambda'"):
        analysis.published("rr_table05_lamda")
    claims = analysis.claims()
    assert claims.index.is_unique
    assert not claims.isna().any(axis=None)
    assert claims.index.str.split("-").str[0].value_counts().to_dict() == {
        "RR": 26, "BLV": 27, "PAT": 20, "MED": 27, "DIS": 20, "X": 6,
    }  # fmt: skip


def test_levels_stay_within_their_range(make_run):
    few = [make_run(confusions(0, better=b), seed=s) for s, b in enumerate((-9, 40, 0))]
    counts = analysis.counts_of(few)
    free = np.array(metrics.interval(counts, metrics.acc))[1:]
    assert free.min() < 0 or free.max() > 1, "Student's t over three seeds leaves the range"
    cut = analysis.per_class(few).query("metric == 'acc'")[["low", "high"]].to_numpy().T
    np.testing.assert_array_equal(cut, free.clip(0, 1))


def test_ranked_by_the_mean_of_one_metric_keeps_the_rows_of_a_method_together():
    scores = {"a": (0.1, 0.9), "b": (0.3, 0.2), "c": (0.2, 0.5)}
    rows = [(m, *at) for m, both in scores.items() for at in zip(("miou", "macc"), both, strict=True)]
    table = pd.DataFrame(rows, columns=["method", "metric", "value"])
    by_miou, by_macc = analysis.ranked(table), analysis.ranked(table, "macc")
    assert (by_miou["method"] + by_miou["metric"]).tolist() == ["bmiou", "bmacc", "cmiou", "cmacc", "amiou", "amacc"]
    assert by_macc["method"].drop_duplicates().tolist() == ["a", "c", "b"]
    pd.testing.assert_frame_equal(by_miou.sort_index(), table)


def test_readable_tables(runs):
    text = analysis.readable(analysis.means(runs, replicates=50))
    row = analysis.means(runs, replicates=50).set_index(["method", "metric"]).loc[("ce", "miou")]
    value, low, high = (round(100 * row[c], 1) for c in ("value", "low", "high"))
    assert text.loc["ce", "miou"] == f"{value:.1f} [{low:.1f}, {high:.1f}]"
    assert list(text.index) == ["ce", "blv sigma=4"]
    changes = analysis.means(runs, baseline="ce", replicates=50)
    row = changes.set_index(["method", "metric"]).loc[("blv sigma=4", "macc")]
    value, low, high = (100 * row[c] for c in ("value", "low", "high"))
    beside = analysis.beside_paper(changes, pd.Series({"ce": 0.5, "blv sigma=4": -0.0123}), "macc")
    assert beside.to_dict("list") == {
        "paper (points)": ["-1.23"],
        "here (points)": [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"],
        "seeds": [row["seeds"]],
    }
    assert analysis.beside_paper(changes, pd.Series(dtype=float))["paper (points)"].tolist() == ["–"]
