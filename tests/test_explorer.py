"""Notebook 16: what can be picked, what a network sees of one image, its features as colours, the menus."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from tiny import tiny_network

from ltseg_core import analysis, evaluate, explorer, metrics, results, train, viz
from ltseg_core.config import Experiment, UserError, profile
from ltseg_core.explorer import ALONE, Pick, View
from ltseg_core.models import SegmentationNetwork
from ltseg_core.results import Run
from ltseg_core.stats import count_classes, write_counts

CLASSES = [f"thing {i}" for i in range(4)]


@pytest.fixture
def make_run(folder, tmp_path, monkeypatch):
    """A finished run of a network of a few hundred parameters, another one for every seed and method."""
    root = folder(train=3, val=2, test=4, size=(32, 48))
    monkeypatch.setattr(explorer, "_network", lambda run: network(run.experiment))

    def network(e: Experiment) -> SegmentationNetwork:
        return tiny_network(seed=10 * e.seed + len(e.method)).eval()

    def make(**fields) -> Run:
        e = Experiment(**{"dataset": str(root)} | fields)
        path = tmp_path / e.key()
        path.mkdir()
        counts = count_classes(train.evaluation_set(e, "train"))
        found = {s: evaluate.confusion(network(e), train.evaluation_set(e, s)).numpy() for s in ("val", "test")}
        (path / "experiment.json").write_text(json.dumps({"format": results.FORMAT, "experiment": e.to_dict()}))
        write_counts(path / "classes.csv", counts, CLASSES)
        results.tidy_metrics(found, CLASSES, counts).to_parquet(path / "metrics.parquet")
        np.savez_compressed(path / "confusion.npz", **found)
        return Run(path, e)

    return make


@pytest.fixture
def runs(make_run):
    return [
        make_run(method="blv", hyper={"sigma": 1}, seed=5),  # no seed in common with the others
        make_run(method="blv", seed=1),
        *[make_run(method="balanced_softmax", seed=s) for s in (2, 1)],
        *[make_run(method="ce", seed=s) for s in (1, 0, 2)],
    ]


# ---------------------------------------------------------------------------------------------- what there is


def test_settings_hold_what_may_be_compared_under_short_names(make_run, runs):
    name = runs[0].experiment.dataset
    table = explorer.settings([*runs, make_run(seed=9, eval_every=2)])
    assert list(table) == [name]
    assert list(table[name]) == ["ce", "balanced_softmax", "blv", "blv sigma=1"]  # the order of the figures
    assert list(table[name]["ce"]) == [0, 1, 2, 9]
    table = explorer.settings([*runs, make_run(steps=3), make_run(steps=3, lr=1)])
    assert list(table) == sorted(f"{name} (lr={lr}, steps={n})" for lr, n in ((0.001, 400), (0.001, 3), (1, 3)))
    assert explorer.setting_of(Experiment(dataset=name, steps=3, method="pat"), table) == f"{name} (lr=0.001, steps=3)"
    assert explorer.setting_of(Experiment(dataset=name, steps=4), table) is None


def test_a_setting_of_a_profile_is_named_after_it(tmp_path):
    quick = Run(tmp_path, profile("quick").experiment(method="pat", seed=7))
    assert list(explorer.settings([quick])) == ["scenes (quick)"]
    other = Run(tmp_path, replace(quick.experiment, steps=3))
    assert list(explorer.settings([quick, other])) == ["scenes (quick)", "scenes (steps=3)"]


def test_without_runs_one_sentence_says_which_command_makes_them():
    with pytest.raises(UserError, match="no finished runs .* `ltseg run 02 --profile quick`"):
        explorer.settings([])


def test_defaults_are_the_first_two_methods_and_the_class_and_image_that_show_most(runs):
    table = explorer.settings(runs)
    options, pick = explorer.choices(table, Pick())
    ce, other = (
        sum(run.confusion("test").sum(0) for run in runs if run.experiment.method == m and run.experiment.seed)
        for m in ("ce", "balanced_softmax")  # seeds 1 and 2
    )
    k = int(np.abs(metrics.acc(ce) - metrics.acc(other)).argmax())
    pixels = [int((label == k).sum()) for _, label in train.evaluation_set(runs[0].experiment, "test")]
    assert pick[1:5] == ("ce", "balanced_softmax", "test", CLASSES[k])
    assert pick.image == f"{int(np.argmax(pixels)):03}"
    assert {name: text for name, text in options["image"].items() if name == "002"} == {"002": f"002: {pixels[2]:,} px"}
    assert list(options["image"]) == sorted(options["image"], key=lambda name: -pixels[int(name)])
    assert [len(options[field]) for field in Pick._fields] == [1, 4, 3, 2, 4, 4]
    trained = runs[0].counts().pixels
    assert [int(trained[CLASSES.index(c)]) for c in options["class_name"]] == sorted(trained.tolist(), reverse=True)


def test_only_methods_with_a_common_seed_are_offered_together(runs):
    table = explorer.settings(runs)
    options, _ = explorer.choices(table, Pick(first="ce"))
    assert list(options["second"]) == ["balanced_softmax", "blv", ALONE]
    options, pick = explorer.choices(table, Pick(first="blv sigma=1"))
    assert list(options["second"]) == [ALONE]
    assert pick.second == ALONE
    groups = explorer.compared(table, Pick(pick.setting, "ce", "balanced_softmax"))
    assert {m: [r.experiment.seed for r in group] for m, group in groups.items()} == {
        "ce": [1, 2],
        "balanced_softmax": [1, 2],
    }
    alone = explorer.compared(table, Pick(pick.setting, "ce", ALONE))
    assert {m: len(group) for m, group in alone.items()} == {"ce": 3}


def test_a_method_alone_is_shown_on_the_class_of_lowest_accuracy(runs):
    _, pick = explorer.choices(explorer.settings(runs), Pick(first="blv", second=ALONE))
    assert pick.class_name == CLASSES[int(metrics.acc(runs[1].confusion("test").sum(0)).argmin())]


def test_what_is_not_to_be_had_gives_way_or_is_refused(runs):
    table = explorer.settings(runs)
    wanted = Pick("elsewhere", "cee", "blv", "tests", "thing 3", "7")
    _, pick = explorer.choices(table, wanted)
    assert pick[:5] == (next(iter(table)), "ce", "blv", "test", "thing 3")
    assert explorer.choices(table, pick, strict=True)[1] == pick
    for field, message in (
        ("setting", "unknown data set 'elsewhere'"),
        ("first", "unknown method 'cee': did you mean 'ce'"),
        ("split", "unknown split 'tests': did you mean 'test'"),
        ("image", "unknown image '7': choose one of 00"),
    ):
        with pytest.raises(UserError, match=message):
            explorer.choices(table, pick._replace(**{field: getattr(wanted, field)}), strict=True)
    for second in ("ce", "blv sigma=1"):
        with pytest.raises(UserError, match=f"{second} cannot be compared with ce: it is the same, or was run with"):
            explorer.choices(table, pick._replace(second=second), strict=True)


def test_data_that_changed_since_is_noticed(runs, tmp_path):
    (tmp_path / "pictures" / "test" / "images" / "003.png").unlink()
    (tmp_path / "pictures" / "test" / "labels" / "003.png").unlink()
    explorer._dataset.cache_clear()
    with pytest.raises(UserError, match=r"has 3 images in split 'test', .* evaluated on 4: the data changed"):
        explorer.choices(explorer.settings(runs), Pick())


# ------------------------------------------------------------------------------------- what the networks see


@pytest.mark.parametrize("size", [None, (18, 23)])
def test_a_view_is_what_the_run_was_evaluated_on(make_run, size):
    """With padding (18 x 23 is no multiple of 4) and labels of another size than the images."""
    run = make_run(size=size)
    dataset = train.evaluation_set(run.experiment, "test")
    for index in range(len(dataset)):
        image, label = dataset[index]
        view = explorer.look(run, "test", index)
        counts = metrics.ConfusionCounts(4)
        counts.update(torch.from_numpy(view.predicted)[None], label[None])
        np.testing.assert_array_equal(counts.counts[0], run.confusion("test")[index])
        seen = tiny_network(seed=2).eval().features(image[None] / 255)[0].permute(1, 2, 0).detach()
        rows, columns = view.features.shape[:2]
        np.testing.assert_allclose(view.features, seen[:rows, :columns], atol=1e-6)
        for cells, cell, own, network in zip((rows, columns), view.cell, label.shape, image.shape[1:], strict=True):
            assert cell == pytest.approx(4 * own / network)  # the stride, in pixels of the label
            assert (cells - 1) * cell < own <= cells * cell + 1e-9  # no more cells than the image needs
    assert explorer.look(run, "test", 0) is explorer.look(run, "test", 0)


def view(features, shape=(12, 16)):
    return View(np.zeros(shape, np.uint8), features, (shape[0] / features.shape[0], shape[1] / features.shape[1]))


def encoded(picture):
    """Brightness, yellow to blue, green to red."""
    return np.asarray(Image.fromarray(picture).convert("YCbCr"), dtype=float)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    spread = np.array([5, 3, 2, 0.2, 0.1])
    return [(rng.normal(size=(6, 8, 5)) * spread + shift).astype(np.float32) for shift in (0, 20)]


def test_colours_are_the_common_principal_components(features):
    pictures, shares = explorer.feature_colours([view(x) for x in features])
    flat = [x.reshape(-1, 5) - x.reshape(-1, 5).mean(0) for x in features]
    scores = [PCA(3).fit(np.concatenate(flat)).transform(x) for x in flat]
    for picture, score, share, x in zip(pictures, scores, shares, flat, strict=True):
        assert picture.shape == (12, 16, 3)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture[::2, ::2], picture[1::2, 1::2])  # a cell is two pixels wide
        assert share == pytest.approx((score**2).sum() / (x**2).sum())
        colours = encoded(picture[::2, ::2]).reshape(-1, 3)
        for component in range(3):  # but for rounding, clipping and the sign
            assert abs(np.corrcoef(colours[:, component], score[:, component])[0, 1]) > 0.98


def test_equal_features_have_equal_colours_whatever_their_mean_and_axes(features):
    a, _ = explorer.feature_colours([view(features[0]), view(features[0] + 7)])
    assert np.abs(a[0].astype(int) - a[1]).max() <= 1
    assert len(np.unique(a[0])) > 20
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0].astype(np.float32)
    plain, shares = explorer.feature_colours([view(x) for x in features])
    turned, turned_shares = explorer.feature_colours([view(x @ turn) for x in features])
    assert turned_shares == pytest.approx(shares, rel=1e-4)
    for a, b in zip(encoded(plain[0]).reshape(-1, 3).T, encoded(turned[0]).reshape(-1, 3).T, strict=True):
        assert abs(np.corrcoef(a, b)[0, 1]) > 0.98  # a component may come with the other sign


def test_features_without_variance_and_of_other_length(features):
    pictures, shares = explorer.feature_colours([view(np.ones((6, 8, 5), np.float32))])
    assert shares == [0]
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="features differ in length: \\[5, 4\\]"):
        explorer.feature_colours([view(features[0]), view(features[1][..., :4])])
    titles = [title for title, _ in explorer._feature_pictures({"a": view(features[0])}).values()]
    assert titles == ["features: 3 of 5, 100% of variance"]
    mixed = explorer._feature_pictures({"a": view(features[0]), "b": view(features[1][..., :4])})
    assert [title.rpartition(", ")[2] for title, _ in mixed.values()] == ["own colours"] * 2


# -------------------------------------------------------------------------------------------------- the page


def test_numbers_are_those_of_the_image_and_of_the_whole_split(runs):
    table = explorer.settings(runs)
    _, pick = explorer.choices(table, Pick(split="val", class_name="thing 2", image="001"))
    shown = explorer.load(table, pick)
    found = explorer.numbers(shown)
    run = next(r for r in runs if r.experiment.method == "ce" and r.experiment.seed == 1)
    here = run.confusion("val")[1]
    assert found.index.tolist() == [
        (name, where)
        for name in ("cross-entropy", "balanced softmax")
        for where in ("this image", "val split, 2 seeds")
    ]
    image = found.loc["cross-entropy", "this image"]
    assert image["IoU (%)"] == f"{100 * metrics.iou(here)[2]:.1f}"
    assert image["Acc (%)"] == f"{100 * metrics.acc(here)[2]:.1f}"
    wrong, right = here[:, 2].sum() - here[2, 2], here[2, 2]
    assert image["FP/TP"] == (f"{wrong / right:.1f}" if right else "–")
    scores = analysis.per_class([r for group in explorer.compared(table, pick).values() for r in group], split="val")
    chosen = scores[(scores["class_id"] == 2) & (scores["method"] == "ce") & (scores["metric"] == "acc")]
    value, low, high = 100 * chosen[["value", "low", "high"]].to_numpy()[0]
    assert found.loc[("cross-entropy", "val split, 2 seeds"), "Acc (%)"] == f"{value:.1f} [{low:.1f}, {high:.1f}]"


def test_a_dash_stands_where_there_is_nothing_to_divide_by(runs):
    table = explorer.settings(runs)
    _, pick = explorer.choices(table, Pick(second=ALONE))
    shown = explorer.load(table, pick)
    label = np.full_like(shown.label, (shown.class_id + 1) % 4)
    label[:8] = 255  # counts nowhere
    views = {m: v._replace(predicted=np.where(label == 255, shown.class_id, label)) for m, v in shown.views.items()}
    found = explorer.numbers(shown._replace(label=label, views=views))
    assert found.iloc[0].tolist() == ["–"] * 4


def test_the_figure_shows_the_pick(runs):
    table = explorer.settings(runs)
    _, pick = explorer.choices(table, Pick(second=ALONE, split="val"))
    axes = np.array(explorer.draw(explorer.load(table, pick)).axes).reshape(2, 3)
    assert axes[0, 0].get_title("left") == f"image {pick.image}"
    assert axes[0, 2].get_ylabel() == f"{pick.class_name}, whole val split (%)"
    assert [t.get_text() for t in axes[0, 2].get_xticklabels()] == ["IoU", "Acc", "precision"]
    assert axes[1, 0].get_ylabel() == "cross-entropy"


# ---------------------------------------------------------------------------------------------- the controls


def test_every_menu_changes_the_page_and_the_menus_after_it(make_run, runs):
    last = make_run(method="ce", steps=3, size=(18, 23))
    table = explorer.settings([*runs, last])
    first, other = (str(explorer.setting_of(r.experiment, table)) for r in (runs[0], last))
    _, pick = explorer.choices(table, Pick(first))
    box = explorer.controls(table, pick)
    menus, picture, below = {m.description: m for m in box.children[0].children}, *box.children[1:]
    assert list(menus) == ["data set", "method", "against", "split", "class", "image"]
    assert tuple(menu.value for menu in menus.values()) == pick
    pages = [(picture.value, below.value)]
    assert Image.open(io.BytesIO(picture.value)).size[0] == viz.WIDTH * viz.DPI
    wanted = {"method": "blv", "against": ALONE, "class": "thing 3", "image": "003", "split": "val", "data set": other}
    for name, value in wanted.items():
        menus[name].value = value
        assert menus[name].value == value
        pages.append((picture.value, below.value))
    assert len(set(pages)) == 7
    assert menus["method"].options == (("cross-entropy", "ce"),)  # all that was run in that setting
    assert menus["against"].value == ALONE
    assert menus["split"].value == "val"  # stays where it can
    assert [value for _, value in menus["image"].options] in (["000", "001"], ["001", "000"])
    assert "cross-entropy" in below.value


def test_what_cannot_be_shown_is_said_in_place_of_the_numbers(runs, tmp_path):
    table = explorer.settings(runs)
    _, pick = explorer.choices(table, Pick())
    box = explorer.controls(table, pick)
    (menu,) = (m for m in box.children[0].children if m.description == "against")
    (tmp_path / runs[1].experiment.key() / "confusion.npz").write_bytes(b"<half>")
    menu.value = "blv"
    _, picture, below = box.children
    assert picture.layout.display == "none"
    assert "confusion.npz is damaged" in below.value
    menu.value = "balanced_softmax"
    assert picture.layout.display is None
    assert "balanced softmax" in below.value
