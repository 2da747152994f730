"""What the figures show: positions, heights, orders, labels, interval ends, colours; and what they are saved as."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgb

from ltseg_core import metrics, viz
from ltseg_core.config import UserError
from ltseg_core.methods import METHODS
from ltseg_core.stats import ClassCounts, groups

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def score_table(
    classes: int = 4, methods: tuple[str, ...] = ("ce", "blv"), *, column: str = "value", seed: int = 0
) -> pd.DataFrame:
    """Tidy per-class scores with intervals; frequency falls with class_id reversed, so the order must change."""
    rng = np.random.default_rng(seed)
    pixels = np.geomspace(10, 10**6, classes).astype(int)
    group = groups(ClassCounts(torch.from_numpy(pixels), torch.ones(classes, dtype=torch.int64)))
    rows = [
        (m, k, f"class {k}", group[k], pixels[k], metric, value := rng.uniform(-0.2, 0.8), value - 0.03, value + 0.05)
        for m in methods
        for metric in ("iou", "acc")
        for k in range(classes)
    ]
    names = ["method", "class_id", "class", "group", "train_pixels", "metric", column, "low", "high"]
    return pd.DataFrame(rows, columns=names)


def segments(ax: mpl.axes.Axes) -> list[np.ndarray]:
    drawn = [s for c in ax.collections if isinstance(c, LineCollection) for s in c.get_segments()]
    return [np.asarray(s) for s in drawn if len(s)]  # an interval with NaN limits has no points


def ticks(ax: mpl.axes.Axes) -> list[str]:
    return [t.get_text() for t in ax.get_xticklabels()]


def luminance(colour: str) -> float:
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


# ------------------------------------------------------------------------------------------ colours and saving


def test_every_method_looks_different_and_always_the_same() -> None:
    names = list(dict.fromkeys([*METHODS, *viz.METHOD_LABELS]))
    looks = [viz.method_style(name) for name in names]
    assert len({look.colour for look in looks}) == len(looks)
    assert len({(look.marker, look.line) for look in looks}) == len(looks)  # told apart without colour
    assert len({(look.hatch, look.line) for look in looks}) == len(looks)
    assert max(luminance(look.colour) for look in looks) < 0.8  # seen on white
    assert viz.method_colour("ce") == "#333333"
    assert viz.method_colour("balanced_softmax") == "#e69f00"
    assert viz.method_colour("blv") == "#0072b2"


def test_an_unknown_method_has_a_stable_look_and_importing_viz_is_light() -> None:
    here = viz.method_style("blv sigma=6")
    assert here.label == "BLV sigma=6"
    assert here.colour == viz.method_colour("blv")
    assert here.marker != viz.method_style("blv sigma=1").marker
    heavy = ("matplotlib", "seaborn", "torchvision", "timm", "segmentation_models_pytorch")
    code = f"""import sys
from ltseg_core import metrics, viz
print(viz.method_colour('blv sigma=6'), [m for m in {heavy} if m in sys.modules])"""
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    seen = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert seen.strip() == f"{here.colour} []"


COLOUR_BLIND = [  # Machado et al. 2009, severity 1: protanopia, deuteranopia
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
]


def seen_distances(colours: Sequence[str], matrix: list[list[float]]) -> np.ndarray:
    """How far apart each two of N colours are for a colour-blind reader, (N, N); inf from a colour to itself."""
    rgb = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.4)
    return np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.diag([np.inf] * len(rgb))


@pytest.mark.parametrize("matrix", COLOUR_BLIND)
def test_the_main_methods_differ_for_colour_blind_readers(matrix: list[list[float]]) -> None:
    colours = [viz.method_colour(name) for name in list(viz.METHOD_LABELS)[:7]]
    assert seen_distances(colours, matrix).min() > 0.1


def test_groups_and_the_first_methods_keep_their_order_in_grey() -> None:
    head, body, tail = (luminance(viz.GROUP_COLOURS[g]) for g in ("head", "body", "tail"))
    assert head + 0.15 < body < tail - 0.15
    ce, blv, balanced = (luminance(viz.method_colour(m)) for m in ("ce", "blv", "balanced_softmax"))
    assert ce + 0.08 < blv < balanced - 0.08


def test_save_figure_writes_three_formats_with_equal_bytes_each_time(tmp_path: Path) -> None:
    figure = viz.plot_per_class(score_table())[0].figure
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    assert viz.save_figure(figure, "a", first) == first / "a.png"
    viz.save_figure(figure, "a", again)
    viz.save_figure(viz.plot_per_class(score_table())[0].figure, "a", other)
    assert sorted(p.name for p in first.iterdir()) == ["a.pdf", "a.png", "a.svg"]
    for path in first.iterdir():
        data = path.read_bytes()
        assert data == (again / path.name).read_bytes(), f"{path.name} changes from call to call"
        assert data == (other / path.name).read_bytes(), f"{path.name} changes from figure to figure"
        assert b"CreationDate" not in data
        assert b"<dc:date>" not in data
    from PIL import Image

    assert Image.open(first / "a.png").width == viz.WIDTH * viz.DPI


def test_fonts_in_a_pdf_have_glyphs_and_no_tables_for_setting_text(tmp_path: Path) -> None:
    from fontTools import subset
    from fontTools.ttLib import TTFont

    figure, axes = viz.subplots()
    axes[0, 0].set_title("ffi AV")
    options = subset.Options
    data = viz.save_figure(figure, "x", tmp_path).with_suffix(".pdf").read_bytes()
    streams = [zlib.decompress(part) for part in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL)]
    fonts = [TTFont(io.BytesIO(x)) for x in streams if x.startswith(b"\0\1\0\0")]
    assert fonts
    for font in fonts:
        assert "glyf" in font
        assert not {"GDEF", "GPOS", "GSUB"}.intersection(font.keys())
    assert subset.Options is options


def test_save_figure_draws_once_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = viz.subplots()
    draws, draw = [], type(figure).draw
    monkeypatch.setattr(type(figure), "draw", lambda *args: (draws.append(args), draw(*args)))
    viz.save_figure(figure, "x", tmp_path)
    assert len(draws) == 3


def test_save_figure_goes_to_the_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = viz.subplots()
    monkeypatch.setenv("LTSEG_FIGURES", str(tmp_path / "chosen"))
    assert viz.save_figure(figure, "x") == tmp_path / "chosen" / "x.png"
    monkeypatch.delenv("LTSEG_FIGURES")
    monkeypatch.chdir(tmp_path)
    assert viz.save_figure(figure, "x") == Path("figures/x.png")


def test_save_figure_refuses_bad_names_and_folders(tmp_path: Path) -> None:
    figure, _ = viz.subplots()
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="name must be"):
            viz.save_figure(figure, name, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write x\.\w+ to .*file.*LTSEG_FIGURES"):
        viz.save_figure(figure, "x", tmp_path / "file")


def test_tables_beside_the_figures(tmp_path: Path) -> None:
    table = pd.DataFrame({"found": ["+1.0 [0.5, 1.5]", "a, b"]}, index=pd.Index(["RR-05", "RR-06"], name="claim"))
    assert viz.save_table(table, "05_claims", tmp_path) == tmp_path / "05_claims.csv"
    viz.save_table(table, "05_other", tmp_path)
    read = viz.saved_tables("*_claims", tmp_path)
    assert list(read) == ["05_claims"]
    pd.testing.assert_frame_equal(read["05_claims"].set_index("claim"), table)


def test_an_interrupted_save_keeps_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = viz.subplots()
    old = viz.save_figure(figure, "x", tmp_path).read_bytes()

    def die(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", die)
    with pytest.raises(KeyboardInterrupt):
        viz.save_figure(figure, "x", tmp_path)
    assert (tmp_path / "x.png").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 3


def test_the_style_ends_with_the_figure() -> None:
    before = mpl.rcParams["font.size"], mpl.rcParams["svg.hashsalt"]
    viz.plot_means(score_table().groupby(["method", "metric"], as_index=False).first())
    assert (mpl.rcParams["font.size"], mpl.rcParams["svg.hashsalt"]) == before
    mpl.interactive(False)
    with viz.style():
        mpl.interactive(True)  # what the inline backend does on the first figure
    assert mpl.is_interactive()
    mpl.interactive(False)


# --------------------------------------------------------------------------------------------------- pictures

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0]], dtype=np.uint8)
CLASSES = ("sky", "road", "car")
LABEL = np.array([[0, 0, 1], [0, 255, 1]], dtype=np.uint8)


def legend_of(figure: mpl.figure.Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_colourise_takes_the_palette_and_leaves_unlabelled_white() -> None:
    assert viz.colourise(LABEL, PALETTE)[0, 2].tolist() == [200, 0, 0]
    assert viz.colourise(LABEL, PALETTE)[1, 1].tolist() == [255, 255, 255]


def test_samples_show_image_labels_instances_and_a_legend_of_what_occurs() -> None:
    image = np.full((2, 3, 3), 7, dtype=np.uint8)
    axes = viz.plot_samples([image] * 2, [LABEL] * 2, PALETTE, CLASSES, instances=[LABEL * 0] * 2, titles=["a", "b"])
    assert axes.shape == (3, 2)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["image", "label map", "instances"]
    assert [ax.get_title("left") for ax in axes[0]] == ["a", "b"]
    np.testing.assert_array_equal(axes[0, 1].images[0].get_array(), image)
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), viz.colourise(LABEL, PALETTE))
    assert (axes[2, 0].images[0].get_array() == 235).all()
    assert legend_of(axes[0, 0].figure) == ["sky", "road", "not labelled"]


def test_samples_without_photographs() -> None:
    axes = viz.plot_samples(None, [LABEL], PALETTE, CLASSES)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["label map"]


def test_the_legend_lists_all_classes_when_no_labels_are_given() -> None:
    figure, _ = viz.subplots()
    viz.plot_label_legend(figure, PALETTE, CLASSES)
    assert legend_of(figure) == list(CLASSES)
    patches = figure.legends[0].get_patches()
    assert [to_hex(p.get_facecolor()) for p in patches] == ["#0a141e", "#c80000", "#00c800"]


def test_predictions_have_a_column_per_method_in_order() -> None:
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    wrong = np.full_like(LABEL, 2)
    axes = viz.plot_predictions([image], [LABEL], {"ce": [wrong], "blv": [LABEL]}, PALETTE, CLASSES)
    assert axes.shape == (1, 4)
    assert [ax.get_title("left") for ax in axes[0]] == ["image", "ground truth", "cross-entropy", "BLV"]
    assert (axes[0, 2].images[0].get_array() == PALETTE[2]).all()
    assert legend_of(axes[0, 0].figure) == ["sky", "road", "car", "not labelled"]


def error_axes(*methods: str, label: np.ndarray = LABEL) -> np.ndarray:
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    wrong = {"ce": np.full_like(label, 2), "blv": np.array([[0, 1, 1], [2, 1, 0]], dtype=np.uint8)}
    features = {m: (f"features of {m}", image + i) for i, m in enumerate(methods)}
    scores = score_table(methods=methods).query("class_id == 1")
    chosen = {m: wrong[m] for m in methods}
    return viz.plot_errors(image, label, chosen, features, scores, PALETTE, CLASSES, 1, title="image 7", over="test")


def test_errors_have_a_row_per_method_below_image_ground_truth_and_scores() -> None:
    axes = error_axes("ce", "blv")
    assert axes.shape == (3, 3)
    assert [ax.get_title("left") for ax in axes[0, :2]] == ["image 7", "ground truth"]
    np.testing.assert_array_equal(axes[0, 1].images[0].get_array(), viz.colourise(LABEL, PALETTE))
    assert axes[0, 2].get_ylabel() == "road, test (%)"
    assert [t.get_text() for t in axes[0, 2].get_legend().get_texts()] == ["cross-entropy", "BLV"]
    assert [ax.get_ylabel() for ax in axes[1:, 0]] == ["cross-entropy", "BLV"]
    assert (axes[1, 0].images[0].get_array() == PALETTE[2]).all()
    errors = metrics.error_map(LABEL, np.array([[0, 1, 1], [2, 1, 0]], dtype=np.uint8), 1)
    np.testing.assert_array_equal(axes[2, 1].images[1].get_array(), viz.error_colours(errors))
    tp, fp, fn = ((errors == kind).sum() for kind in (1, 2, 3))
    assert axes[2, 1].get_title("left") == f"TP {tp}, FP {fp}, FN {fn} px"
    assert axes[1, 1].get_title("left") == f"TP 0, FP 0, FN {(LABEL == 1).sum()} px"
    assert axes[2, 2].get_title("left") == "features of blv"
    assert (axes[2, 2].images[0].get_array() == 101).all()
    legend = axes[2, 1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [
        "road found (TP)",
        "wrongly called road (FP)",
        "road missed (FN)",
    ]
    assert [to_hex(p.get_facecolor()) for p in legend.get_patches()] == list(viz.ERROR_COLOURS.values())
    assert legend_of(axes[0, 0].figure) == ["sky", "road", "car", "not labelled"]


def test_errors_of_one_method_and_scores_that_are_missing_or_zero() -> None:
    axes = error_axes("ce")
    assert axes.shape == (2, 3)
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    scores = pd.DataFrame({"method": "ce", "metric": ["iou", "acc"], "value": [0, np.nan], "low": 0.0, "high": np.nan})
    axes = viz.plot_errors(image, LABEL, {"ce": LABEL}, {"ce": ("", image)}, scores, PALETTE, CLASSES, 2)
    assert axes[0, 2].get_ylim() == pytest.approx((-0.0003, 0.0103))
    with pytest.raises(ValueError, match="lacks the column 'low'"):
        viz.plot_errors(image, LABEL, {}, {}, scores.drop(columns="low"), PALETTE, CLASSES, 2)


def test_error_colours_say_what_the_map_says() -> None:
    picture = viz.error_colours(np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8))
    assert picture.dtype == np.uint8
    assert (picture[[0, 1], [0, 2], 3] == 0).all()  # the image shows through
    assert [to_hex(picture[at][:3] / 255) for at in ((0, 1), (0, 2), (1, 0))] == list(viz.ERROR_COLOURS.values())
    assert picture[1, 1].tolist() == [255] * 4


@pytest.mark.parametrize("matrix", COLOUR_BLIND)
def test_error_colours_differ_in_grey_and_for_colour_blind_readers(matrix: list[list[float]]) -> None:
    errors, faded = list(viz.ERROR_COLOURS.values()), ["#cccccc", "#ebebeb"]  # darkest and lightest of the image below
    assert np.diff(np.sort([luminance(c) for c in [*errors, faded[0]]])).min() > 0.08
    assert seen_distances([*errors, *faded], matrix)[: len(errors)].min() > 0.25


# ------------------------------------------------------------------------------------------------- statistics


def counts_of(pixels: list[int], images: list[int]) -> ClassCounts:
    return ClassCounts(torch.tensor(pixels), torch.tensor(images))


def dots(ax: mpl.axes.Axes) -> dict[str, np.ndarray]:
    found = [c for c in ax.collections if isinstance(c, PathCollection)]
    return {str(c.get_label()): np.asarray(c.get_offsets()) for c in found}


def test_class_shares_are_sorted_coloured_by_group_and_leave_out_absent_classes() -> None:
    counts = counts_of([4, 0, 990, 6], [1, 0, 2, 1])
    ax = viz.plot_class_shares(counts, ["few", "none", "most", "some"])
    shown = dots(ax)
    np.testing.assert_allclose(shown["pixels, head"], [[0, 0.99]])
    np.testing.assert_allclose(shown["pixels, body"], [[1, 0.006], [2, 0.004]])
    assert "pixels, tail" not in shown
    np.testing.assert_allclose(shown["regions"], [[0, 0.5], [1, 0.25], [2, 0.25]])
    assert ticks(ax) == ["most", "some", "few"]
    assert "1 of 4 never occur" in ax.get_xlabel()
    assert ax.get_yscale() == "log"
    head = next(c for c in ax.collections if c.get_label() == "pixels, head")
    assert to_hex(head.get_facecolor()[0]) == viz.GROUP_COLOURS["head"]


@pytest.mark.parametrize("number", [11, 12, 59, 150, 171])
def test_class_names_never_overlap(number: int) -> None:
    pixels = np.geomspace(10**6, 10, number).astype(int).tolist()
    names = [f"a class with a long name {k}; synonym" for k in range(number)]
    ax = viz.plot_class_shares(counts_of(pixels, [1] * number), names)
    ax.figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.get_xticklabels()]
    assert all(a.x1 <= b.x0 + 1 for a, b in pairwise(boxes))
    assert len(boxes) >= min(number, 40)
    assert all(len(name) <= 16 for name in ticks(ax))


def test_imbalance_shows_both_factors_sorted_and_their_ratio() -> None:
    table = pd.DataFrame({"dataset": ["small", "large"], "pixel": [100.0, 4000.0], "region": [50.0, 20.0]})
    ax = viz.plot_imbalance(table)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["small", "large"]  # the largest on top
    shown = dots(ax)
    np.testing.assert_allclose(shown["pixels: largest / smallest class"], [[100, 0], [4000, 1]])
    np.testing.assert_allclose(shown["images with the class: most / fewest"], [[50, 0], [20, 1]])
    assert [t.get_text() for t in ax.texts] == ["2 ×", "200 ×"]


def test_image_imbalance_is_the_share_of_images_with_at_least_that_ratio() -> None:
    ax = viz.plot_image_imbalance(pd.DataFrame({"dataset": "d", "ratio": [4.0, 1.0, 2.0, 3.0]}))
    steps = ax.lines[0]
    np.testing.assert_allclose(steps.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(steps.get_ydata(), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(ax.lines[1].get_xdata(), 2.5)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["d: median 2.5"]


def test_mask_sizes_draw_median_quartiles_and_range() -> None:
    sizes = pd.DataFrame({"image": "i", "class_id": [1] * 101 + [0], "pixels": [*range(100, 201), 7]})
    ax = viz.plot_mask_sizes(sizes, ["rare", "common"], group=["tail", "head"])
    assert ticks(ax) == ["common", "rare"]
    np.testing.assert_allclose(dots(ax)["head"], [[0, 150]])
    np.testing.assert_allclose(dots(ax)["tail"], [[1, 7]])
    ends = {tuple(s[:, 1].round(6)) for s in segments(ax) if s[0, 0] == 0}
    assert ends == {(105.0, 195.0), (125.0, 175.0)}


# ------------------------------------------------------------------------------------------------ comparisons


def test_history_draws_the_mean_over_seeds_and_their_range() -> None:
    rows = [("ce", seed, step, float(seed)) for seed in (0, 1, 5) for step in range(10)]
    rows += [("blv", 0, step, 3.0) for step in range(10)]
    ax = viz.plot_history(pd.DataFrame(rows, columns=["method", "seed", "step", "value"]))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 2.0)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 3.0)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.0, 5.0)
    assert len(ax.collections) == 1  # one seed has no band
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["cross-entropy, 3 seeds", "BLV, 1 seed"]
    assert [to_hex(line.get_color()) for line in ax.lines] == [viz.method_colour("ce"), viz.method_colour("blv")]


def test_history_smooths_each_seed_by_a_centred_mean() -> None:
    table = pd.DataFrame({"method": "ce", "seed": 0, "step": range(5), "value": [0.0, 0, 3, 0, 0]})
    ax = viz.plot_history(table, smooth=3)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 1, 1, 1, 0])


def test_per_class_dots_and_intervals_stand_at_their_class_by_frequency() -> None:
    table = score_table(4)
    axes = viz.plot_per_class(table)
    assert [ax.get_ylabel() for ax in axes] == ["IoU (%)", "Acc (%)"]
    assert ticks(axes[-1]) == ["class 3", "class 2", "class 1", "class 0"]
    for ax, metric in zip(axes, ("iou", "acc"), strict=True):
        for line, method in zip(ax.lines[:2], ("ce", "blv"), strict=True):
            rows = table[(table["method"] == method) & (table["metric"] == metric)].sort_values("class_id")
            np.testing.assert_allclose(line.get_ydata(), rows["value"].to_numpy()[::-1])
            assert np.abs(line.get_xdata() - np.arange(4)).max() < 0.5
            assert to_hex(line.get_color()) == viz.method_colour(method)
            drawn = {tuple(s[:, 1].round(9)) for s in segments(ax)}
            assert {tuple(r) for r in rows[["low", "high"]].round(9).to_numpy()} <= drawn
    assert not set(axes[0].lines[0].get_xdata()) & set(axes[0].lines[1].get_xdata())  # side by side
    assert axes[0].yaxis.get_major_formatter()(0.25, 0) == "25"


def test_a_missing_score_has_no_dot() -> None:
    table = score_table(3, ("ce",))
    table.loc[(table["class_id"] == 1) & (table["metric"] == "iou"), ["value", "low", "high"]] = np.nan
    ax = viz.plot_per_class(table)[0]
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, True, False]


def test_group_names_stand_over_their_classes() -> None:
    table = score_table(6, ("ce",))
    ax = viz.plot_per_class(table)[0]
    group = table.drop_duplicates("class_id").sort_values("train_pixels", ascending=False)["group"].to_numpy()
    expected = {name: float(np.flatnonzero(group == name).mean()) for name in set(group)}
    assert {t.get_text(): t.get_position()[0] for t in ax.texts} == expected


def test_deltas_are_bars_by_frequency_pale_where_the_interval_holds_zero() -> None:
    table = score_table(5, ("blv", "balanced_softmax"))
    sure = (table["low"] > 0) | (table["high"] < 0)
    table.loc[table["class_id"] == 2, ["value", "low", "high"]] = [0.01, -0.02, 0.04]
    sure[table["class_id"] == 2] = False
    axes = viz.plot_deltas(table)
    assert axes.shape == (2, 2)
    assert [ax.get_title("left") for ax in axes.flat] == [
        "BLV: ΔIoU", "BLV: ΔAcc", "balanced softmax: ΔIoU", "balanced softmax: ΔAcc",
    ]  # fmt: skip
    for i, method in enumerate(("blv", "balanced_softmax")):
        for j, metric in enumerate(("iou", "acc")):
            ax, rows = axes[i, j], (table["method"] == method) & (table["metric"] == metric)
            bars = list(ax.patches)
            np.testing.assert_allclose([b.get_height() for b in bars], table[rows]["value"].to_numpy()[::-1])
            np.testing.assert_allclose([b.get_x() + b.get_width() / 2 for b in bars], range(5), atol=1e-9)
            full = [to_hex(b.get_facecolor()) == viz.method_colour(method) for b in bars]
            assert full == sure[rows].tolist()[::-1]
            ends = [s[:, 1].tolist() for s in segments(ax)]
            np.testing.assert_allclose(ends, table[rows][["low", "high"]].to_numpy()[::-1])
    assert ticks(axes[1, 0]) == [f"class {k}" for k in (4, 3, 2, 1, 0)]
    assert axes[0, 0].yaxis.get_major_formatter()(-0.05, 0) == "-5"
    assert axes[0, 0].yaxis.get_major_formatter()(0.05, 0) == "+5"


def test_a_difference_without_an_interval_is_pale() -> None:
    table = score_table(3, ("blv",)).assign(low=np.nan, high=np.nan)
    ax = viz.plot_deltas(table)[0, 0]
    assert all(to_hex(b.get_facecolor()) != viz.method_colour("blv") for b in ax.patches)


def test_map_of_changes() -> None:
    table = score_table(5, ("ce", "blv", "pat"))
    table["seeds"] = table["method"].map({"ce": 3, "blv": 1, "pat": 3})
    table.loc[table["class_id"] == 2, ["value", "low", "high"]] = [0.12, -0.02, 0.4]
    table.loc[table["class_id"] == 3, ["value", "low", "high"]] = np.nan
    axes = viz.plot_delta_map(table)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["cross-entropy", "PAT", "BLV"]  # one seed comes last
    assert [line.get_ydata()[0] for line in axes[0].lines if len(set(line.get_ydata())) == 1] == [1.5]
    for ax, metric in zip(axes, ("iou", "acc"), strict=True):
        rows = table[table["metric"] == metric].set_index(["method", "class_id"])["value"].unstack()
        drawn = ax.images[0].get_array()
        np.testing.assert_allclose(drawn.filled(np.nan), 100 * rows.loc[["ce", "pat", "blv"], [4, 3, 2, 1, 0]])
        texts = {t.get_position(): t for t in ax.texts if isinstance(t.get_position()[0], int)}
        assert texts[2, 0].get_text() == "+12"
        assert [texts[place].get_weight() for place in ((2, 0), (0, 0))] == ["normal", "bold"]
        assert not any(x == 1 for x, _ in texts)  # nothing stands where there is no score


def test_map_of_changes_of_many_classes_marks_the_sign_of_what_is_sure() -> None:
    table = score_table(30, ("blv",))
    for ax, metric in zip(viz.plot_delta_map(table), ("iou", "acc"), strict=True):
        rows = table[table["metric"] == metric].sort_values("train_pixels", ascending=False)
        signs = ["+" if low > 0 else "−" if high < 0 else None for low, high in rows[["low", "high"]].to_numpy()]
        assert set(signs) == {"+", "−", None}
        shown = {t.get_position(): t.get_text() for t in ax.texts if isinstance(t.get_position()[0], int)}
        assert shown == {(x, 0): sign for x, sign in enumerate(signs) if sign}


def test_means_stand_at_their_metric_with_their_intervals() -> None:
    rows = [("ce", "miou", 0.4, 0.35, 0.45), ("ce", "head", 0.8, 0.7, 0.9), ("blv", "miou", 0.5, 0.4, 0.6)]
    ax = viz.plot_means(pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high"]))
    assert ticks(ax) == ["mIoU", "head"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.4, 0.8])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.5, np.nan])
    assert {(0.35, 0.45), (0.7, 0.9), (0.4, 0.6)} <= {tuple(s[:, 1].round(9)) for s in segments(ax)}
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["cross-entropy", "BLV"]


def test_scores_over_frequency_stand_at_their_share_in_the_look_of_their_group() -> None:
    table = pd.DataFrame({"class": list("abcd"), "images": [50, 30, 15, 5], "acc": [0.9, 0.7, 0.2, 0.4]})
    table["group"] = ["head", "head", "body", "tail"]
    ax = viz.plot_against_frequency(table, frequency="images", log=True)
    shown = dots(ax)
    np.testing.assert_allclose(shown["head"], [[0.5, 0.9], [0.3, 0.7]])
    np.testing.assert_allclose(shown["tail"], [[0.05, 0.4]])
    assert [t.get_text() for t in ax.texts] == ["a"], "the most frequent is named"
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "share of images (%)", "Acc (%)")


def test_correlations_are_full_where_the_interval_leaves_out_zero() -> None:
    columns = ["data", "score", "kind", "frequency", "value", "low", "high"]
    rows = [
        ("here", "one", "pearson", "pixels", 0.4, 0.2, 0.5),
        ("here", "one", "pearson", "images", 0.1, -0.2, 0.3),
        ("here", "two", "pearson", "pixels", -0.3, -0.5, -0.1),
        ("here", "paper", "pearson", "images", 0.4, np.nan, np.nan),
        ("here", "one", "pearson log", "pixels", 0.6, 0.5, 0.7),
        ("there", "three", "pearson log", "pixels", 0.7, 0.6, 0.8),
    ]
    axes = viz.plot_correlations(pd.DataFrame(rows, columns=columns))
    assert [ax.get_title("left") for ax in axes[0]] == ["raw counts", "log counts"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["here", "there"]
    raw = axes[0, 0]
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in axes[:, 0]] == [["one", "two", "paper"], ["three"]]
    assert raw.yaxis_inverted()
    pixels, images = (c for c in raw.collections if isinstance(c, PathCollection))
    full = [[to_hex(face) != "#ffffff" for face in c.get_facecolor()] for c in (pixels, images)]
    assert [full[0][:2], full[1][0], full[1][2]] == [[True, True], False, False]
    np.testing.assert_allclose(pixels.get_offsets()[:2], [[0.4, -0.15], [-0.3, 0.85]])
    np.testing.assert_allclose(images.get_offsets()[0], [0.1, 0.15])
    assert {tuple(s[:, 0]) for s in segments(raw)} >= {(0.2, 0.5), (-0.2, 0.3), (-0.5, -0.1)}
    assert legend_of(raw.figure) == ["pixels", "images"]
    assert raw.get_xlim() == axes[0, 1].get_xlim()
    assert raw.get_xlim()[0] < -0.5
    assert raw.get_xlim()[1] > 0.7


def test_groups_of_a_method_share_a_row_with_their_intervals() -> None:
    rows = [
        ("ce", "head", "ΔIoU", 0.4, 0.35, 0.45, 3),
        ("ce", "tail", "ΔIoU", -0.1, -0.2, 0.0, 3),
        ("blv", "head", "ΔIoU", 0.2, 0.1, 0.3, 1),
        ("blv", "tail", "ΔAcc", 0.5, np.nan, np.nan, 3),
        ("blv", "body", "ΔAcc", 0.1, 0.0, 0.2, 3),  # not in the first panel
    ]
    table = pd.DataFrame(rows, columns=["method", "group", "metric", "value", "low", "high", "seeds"])
    axes = viz.plot_by_group(table)
    assert [ax.get_title("left") for ax in axes] == ["ΔIoU", "ΔAcc"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["cross-entropy", "BLV"]
    for ax, metric in zip(axes, ("ΔIoU", "ΔAcc"), strict=True):
        dots = {
            (round(y), to_hex(line.get_color()), to_hex(line.get_markerfacecolor()) == "#ffffff"): x
            for line in ax.lines
            if line.get_marker() != "None"
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        shown = table[table["metric"] == metric]
        assert dots == {
            (["ce", "blv"].index(r.method), viz.GROUP_COLOURS[r.group], r.seeds == 1): r.value
            for r in shown.itertuples()
        }
        drawn = {tuple(s[:, 0].round(9)) for s in segments(ax)}
        assert {tuple(r) for r in shown[["low", "high"]].dropna().to_numpy()} <= drawn
    assert legend_of(axes[0].figure) == ["head", "body", "tail"]
    assert "one seed" in axes[0].figure.get_supxlabel()
    with pytest.raises(ValueError, match="expected 1 axes, one per metric, got 2"):
        viz.plot_by_group(table[:3], axes)


def test_parts_are_stacked_away_from_zero_and_the_whole_lies_at_their_sum() -> None:
    parts = pd.DataFrame({"recall": [0.3, -0.1], "false positives": [-0.2, -0.3], "found": [0.1, 0.05]}, ["pat", "blv"])
    whole = pd.DataFrame({"value": parts.sum(axis=1), "low": [0.1, -0.4], "high": [0.3, -0.3]})
    colours = ("#0072b2", "#d55e00", "#f0e442")
    ax = viz.plot_parts(parts, whole[::-1], {n: {"color": c} for n, c in zip(parts, colours, strict=True)})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["PAT", "BLV"]
    bars = {(to_hex(p.get_facecolor()), round(p.get_y() + p.get_height() / 2)): p for p in ax.patches}
    spans = {k: tuple(sorted((round(p.get_x(), 9), round(p.get_x() + p.get_width(), 9)))) for k, p in bars.items()}
    blue, red, yellow = colours
    assert [spans[c, 0] for c in (blue, red, yellow)] == [(0, 0.3), (-0.2, 0), (0.3, 0.4)]
    assert [spans[c, 1] for c in (blue, red, yellow)] == [(-0.1, 0), (-0.4, -0.1), (0, 0.05)]
    dots = next(line for line in ax.lines if line.get_label() == "whole change")
    np.testing.assert_allclose(dots.get_xdata(), [0.2, -0.35])
    assert {(0.1, 0.3), (-0.4, -0.3)} <= {tuple(s[:, 0].round(9)) for s in segments(ax)}


def test_a_sweep_is_hollow_where_it_rests_on_one_seed() -> None:
    rows = [(0.1, 0.2, 0.1, 0.3, 1), (1.0, 0.4, 0.3, 0.5, 3), (0.5, 0.3, np.nan, np.nan, 1)]
    table = pd.DataFrame(rows, columns=["weight", "value", "low", "high", "seeds"]).assign(metric="miou")
    (ax,) = viz.plot_sweep(table, "weight")
    full, hollow = ax.lines
    assert [*zip(full.get_xdata(), full.get_ydata(), strict=True)] == [(0.1, 0.2), (0.5, 0.3), (1.0, 0.4)]
    assert [*zip(hollow.get_xdata(), hollow.get_ydata(), strict=True)] == [(0.1, 0.2), (0.5, 0.3)]
    assert to_hex(hollow.get_markerfacecolor()) == "#ffffff"
    assert "one seed" in ax.figure.get_supxlabel()
    (ax,) = viz.plot_sweep(table.drop(columns="seeds"), "weight")
    assert len(ax.lines[1].get_xdata()) == 0
    assert ax.figure.get_supxlabel() == ""


def test_costs_are_dots_on_a_logarithmic_axis_with_intervals_and_a_reference() -> None:
    rows = [
        ("blv", "step", 1.05, 1.0, 1.1, 1.02),
        ("medoe experts", "step", 2.0, np.nan, np.nan, np.nan),
        ("blv", "memory", 1.5, 1.5, 1.5, np.nan),
    ]
    axes = viz.plot_costs(pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "reference"]))
    assert [ax.get_title(loc="left") for ax in axes] == ["step", "memory"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["BLV", "MEDOE experts"]
    assert axes[0].get_xscale() == "log"
    drawn = [(ln.get_marker(), *np.r_[ln.get_xdata()], *np.r_[ln.get_ydata()]) for ln in axes[0].lines[1:]]
    crosses = [d for d in drawn if d[0] == "x" and not np.isnan(d[1])]
    assert crosses == [("x", 1.02, 0)]
    assert [d[1:] for d in drawn if d[0] != "x"] == [(1.05, 0), (2.0, 1)]
    assert [s.tolist() for s in segments(axes[0])] == [[[1.0, 0.0], [1.1, 0.0]]]
    assert np.isnan([ln.get_xdata()[0] for ln in axes[1].lines[1:]]).sum() == 3  # no memory of medoe, no reference


def test_levels_stand_beside_what_is_usual() -> None:
    far, share = "distance (px)", "share (%)"
    rows = [("blv", far, 7, 0, 13), ("pat", far, 16, 12, 19), ("blv", share, 84, 73, 93)]
    table = pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high"])
    axes = viz.plot_levels(table, {far: 29, share: 89})
    assert [ax.get_xlabel() for ax in axes] == [far, share]
    assert [ax.lines[0].get_xdata()[0] for ax in axes] == [29, 89]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["BLV", "PAT"]
    assert [s.tolist() for s in segments(axes[0])] == [[[0.0, 0.0], [13.0, 0.0]], [[12.0, 1.0], [19.0, 1.0]]]
    dots = [(*np.r_[ln.get_xdata()], *np.r_[ln.get_ydata()]) for ln in axes[0].lines[1:] if ln.get_marker() != "x"]
    assert dots == [(7, 0), (16, 1)]
    assert [ax.get_xlim()[0] for ax in axes] == [0, 0]


def test_figures_are_drawn_on_the_axes_given() -> None:
    _, axes = viz.subplots(2, 2)
    table = score_table(3, ("ce", "blv"))
    assert viz.plot_deltas(table, axes)[1, 1] is axes[1, 1]
    assert viz.plot_per_class(score_table(3), axes[:, :1])[0] is axes[0, 0]
    with pytest.raises(ValueError, match=r"expected 2 x 1 axes, got 4"):
        viz.plot_per_class(score_table(3), axes)


@pytest.mark.parametrize(
    "plot",
    [
        "plot_imbalance",
        "plot_image_imbalance",
        "plot_history",
        "plot_per_class",
        "plot_deltas",
        "plot_delta_map",
        "plot_means",
        "plot_against_frequency",
        "plot_correlations",
        "plot_by_group",
        "plot_costs",
    ],
)
def test_a_table_without_a_column_is_refused_by_name(plot: str) -> None:
    with pytest.raises(ValueError, match="the table lacks the column"):
        getattr(viz, plot)(pd.DataFrame({"unrelated": [1]}))


def test_names_of_another_number_of_classes_are_refused() -> None:
    counts = counts_of([3, 1], [1, 1])
    with pytest.raises(ValueError, match="classes must have 2 entries, one per class, got 1"):
        viz.plot_class_shares(counts, ["only"])
    with pytest.raises(ValueError, match="group must have 2 entries"):
        viz.plot_class_shares(counts, ["a", "b"], group=["head"])
