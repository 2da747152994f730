"""Drawn pixels, features brought to them, and measures of feature spaces against closed forms and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import special_ortho_group
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from tiny import tiny_network

from ltseg_core import data, evaluate, features, metrics
from ltseg_core.config import UserError
from ltseg_core.data.base import Resized, SegmentationDataset
from ltseg_core.features import Pixels, at_pixels, by_class, coverage, draw_pixels, interval, margin, purity, spread

C = 4


class Maps(SegmentationDataset):
    """Given label maps with noise for images; class 3 exists by name only."""

    def __init__(self, labels, size=None):
        self.name, self.split, self.classes = "maps", "test", ("a", "b", "c", "d")
        self.labels, self.names = labels, [str(i) for i in range(len(labels))]
        self.size = size

    def sample(self, index):
        rng = np.random.default_rng(index)
        label = self.labels[index]
        return rng.integers(0, 256, (*(self.size or label.shape), 3), dtype=np.uint8), label


@pytest.fixture(scope="module")
def maps():
    """Ten maps of 18 x 23: class 1 in all but two, class 2 with 3 pixels in one image and 40 in two, some ignored."""
    labels = np.zeros((10, 18, 23), dtype=np.uint8)
    labels[2:, 5:9] = 1
    labels[0, 17, :3] = 2
    labels[7:9, :5, 15:23] = 2
    labels[:, :2, :2] = 255
    return Maps(list(labels))


# ----------------------------------------------------------------------------------------------------- pixels


def test_every_class_gets_the_same_number_of_pixels_from_as_many_images(maps):
    pixels = draw_pixels(maps, images=3, pixels=5, seed=1)
    images, number = coverage(pixels, C)
    assert images.tolist() == [3, 3, 2, 0]
    assert number.tolist() == [15, 15, 10, 0]
    assert (np.diff(pixels.image) >= 0).all()
    where = list(zip(pixels.image, pixels.row, pixels.column, strict=True))
    assert len(set(where)) == len(where)
    assert [maps.labels[i][r, c] for i, r, c in where] == pixels.label.tolist()


def test_a_draw_is_its_seed(maps):
    one, same, other = (draw_pixels(maps, images=3, pixels=5, seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(np.stack([one.row, one.column]), np.stack([other.row, other.column]))


def test_every_pixel_of_a_class_is_as_likely():
    label = np.zeros((4, 5), dtype=np.uint8)
    label[1:3, 1:4] = 2
    drawn = [draw_pixels(Maps([label]), images=1, pixels=2, seed=s) for s in range(600)]
    counts = np.zeros((4, 5))
    for pixels in drawn:
        np.add.at(counts, (pixels.row, pixels.column), 1)
    assert np.abs(counts[label == 2] - 200).max() < 60  # 600 * 2 / 6, five standard deviations
    assert np.abs(counts[label == 0] - 600 * 2 / 14).max() < 45


def test_nothing_to_draw(maps):
    with pytest.raises(UserError, match=r"'test' of maps has 500 pixels of a class"):
        draw_pixels(maps, pixels=500)
    with pytest.raises(ValueError, match="images and pixels must be >= 1, got 0 and 25"):
        draw_pixels(maps, images=0)


@pytest.mark.parametrize("label_size", [(18, 23), (37, 50)])
def test_logits_at_a_pixel_are_those_that_an_evaluation_compares(label_size):
    """The image (18 x 23) is padded to 20 x 24, its features are 5 x 6; labels may be larger than the image."""
    rng = np.random.default_rng(0)
    dataset = Maps(list(rng.integers(0, 3, (3, *label_size)).astype(np.uint8)), size=(18, 23))
    network = tiny_network()
    pixels = draw_pixels(dataset, images=3, pixels=40)
    _, logits = at_pixels(network, dataset, pixels, batch_size=2)
    with torch.inference_mode():
        full = network.eval()(torch.stack([dataset[i][0] for i in range(3)]) / 255).logits
        full = F.interpolate(full, label_size, mode="bilinear", align_corners=False).double().numpy()
    assert np.abs(logits - full[pixels.image, :, pixels.row, pixels.column]).max() < 1e-5
    maps = [p.numpy() for p, _ in evaluate.predictions(network, dataset, range(3))]
    predicted = [maps[i][r, c] for i, r, c in zip(*pixels[:3], strict=True)]
    assert np.array_equal(logits.argmax(1), predicted)


def test_features_at_a_pixel_give_its_logits_through_a_linear_classifier():
    """Interpolation commutes with a 1x1 convolution, so both are sampled at the same place, padding included."""
    rng = np.random.default_rng(1)
    dataset = Maps(list(rng.integers(0, 3, (2, 18, 23)).astype(np.uint8)))
    network = tiny_network()
    pixels = draw_pixels(dataset, images=2, pixels=60)
    found, logits = at_pixels(network, dataset, pixels)
    weight, bias = (p.detach().double().numpy() for p in network.classifier.parameters())
    assert found.dtype == logits.dtype == np.float64
    assert np.abs(found @ weight[:, :, 0, 0].T + bias - logits).max() < 1e-5


def test_resized_images_keep_their_labels(folder):
    dataset = Resized(data.load(str(folder()), "test"), (16, 24), resize_labels=False)
    pixels = draw_pixels(dataset, images=2, pixels=4)
    assert pixels.row.max() >= 16, "places are those of the label map"
    found, logits = at_pixels(tiny_network(), dataset, pixels)
    assert len(found) == len(logits) == len(pixels.label)


# --------------------------------------------------------------------------------------------------- measures


def cloud(seed=0, n=60, dim=5, classes=4):
    """Gaussian classes of different width around different means; class 2 does not occur."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.r_[[0, 1, 3], rng.choice([0, 1, 3], n - 3)])
    return rng.normal(size=(classes, dim))[labels] * 3 + rng.normal(size=(n, dim)) * (1 + labels[:, None]), labels


def test_closed_forms_on_a_line():
    """Class 0 at -1 and 1, class 1 at 10 and 14: means 0 and 12, squared distance of the means 144."""
    x, labels = np.array([[-1.0], [1.0], [10.0], [14.0]]), np.array([0, 0, 1, 1])
    assert np.allclose(spread(x, labels), np.array([1, 1, 4, 4]) / 144)
    assert np.allclose(margin(x, labels), [12 / 13, 10 / 11, 8 / 10, 12 / 14])
    assert purity(x, labels, neighbours=1).tolist() == [1, 1, 1, 1]
    assert np.allclose(purity(x, labels, neighbours=3), 1 / 3)
    equal = margin(np.array([[0.0], [2.0], [1.0], [1.0], [3.0]]), np.array([0, 0, 1, 1, 2]))
    assert np.allclose(equal, [0, 0, 0, 0, 1])  # the means of classes 0 and 1 are both 1


def test_margin_is_the_nearest_mean_classifier_s():
    x, labels = cloud()
    means = features.class_means(x, labels)
    assert np.isnan(means[2]).all()
    assert np.allclose(means[3], x[labels == 3].mean(0))
    nearest = np.nanargmin(np.linalg.norm(x[:, None] - means, axis=2), axis=1)
    assert 0 < (nearest == labels).mean() < 1
    assert np.array_equal(margin(x, labels) > 0, nearest == labels)


def test_spread_is_variance_over_the_mean_distance_of_pairs():
    x, labels = cloud(3)
    means = {k: x[labels == k].mean(0) for k in (0, 1, 3)}
    pairs = [((means[a] - means[b]) ** 2).sum() for a, b in ((0, 1), (0, 3), (1, 3))]
    for k in means:
        assert spread(x, labels)[labels == k].mean() == pytest.approx(x[labels == k].var(0).sum() / np.mean(pairs))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(-100, 100))
def test_measures_do_not_depend_on_place_scale_direction_or_order(seed, scale, shift):
    x, labels = cloud(seed)
    turned = scale * x @ special_ortho_group.rvs(x.shape[1], random_state=seed) + shift
    order = np.random.default_rng(seed).permutation(len(x))
    for measure in (spread, margin, purity):
        assert np.allclose(measure(turned, labels), measure(x, labels), rtol=1e-6, atol=1e-9)
        assert np.allclose(measure(x[order], labels[order]), measure(x, labels)[order], rtol=1e-9)


@pytest.mark.parametrize("neighbours", [1, 5, 17])
def test_purity_is_scikit_learn_s(neighbours, monkeypatch):
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 70)
    x, labels = cloud(5, n=200, dim=8)
    own = NearestNeighbors(n_neighbors=neighbours).fit(x).kneighbors(return_distance=False)  # leaves the point out
    assert np.abs(purity(x, labels, neighbours=neighbours) - (labels[own] == labels[:, None]).mean(1)).max() < 1e-9


def test_purity_in_other_images_is_scikit_learn_s():
    x, labels = cloud(6, n=150, dim=8)
    image = np.random.default_rng(0).integers(0, 7, 150)
    expected = np.zeros(150)
    for i in range(7):
        away = KNeighborsClassifier(9).fit(x[image != i], labels[image != i])
        chance = away.predict_proba(x[image == i])
        expected[image == i] = chance[np.arange(len(chance)), np.searchsorted(away.classes_, labels[image == i])]
    assert np.abs(purity(x, labels, neighbours=9, blocks=image) - expected).max() < 1e-9


def test_tied_neighbours_share_the_last_places():
    """Around the point at 0: one of its class at 1, then at distance 2 one of its class and two of the other."""
    x = np.array([[0.0, 0], [1, 0], [2, 0], [-2, 0], [0, 2], [40, 40]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert purity(x, labels, neighbours=1)[0] == 1
    assert purity(x, labels, neighbours=2)[0] == pytest.approx((1 + 1 / 3) / 2)
    assert purity(x, labels, neighbours=3)[0] == pytest.approx((1 + 2 / 3) / 3)
    assert purity(x, labels, neighbours=4)[0] == pytest.approx(2 / 4)


def test_a_class_of_one_image_has_no_purity():
    x, labels = cloud(7, n=30)
    image = np.where(labels == 3, 0, np.arange(30) % 5)
    found = purity(x, labels, neighbours=5, blocks=image)
    assert np.isnan(found[labels == 3]).all()
    assert np.isfinite(found[labels != 3]).all()


@pytest.mark.parametrize("measure", [spread, margin, purity])
def test_refused_features(measure):
    x, labels = cloud(n=30)
    with pytest.raises(ValueError, match=r"integer labels \(N,\), got \(30, 5\) and \(29,\)"):
        measure(x, labels[:-1])
    with pytest.raises(ValueError, match="integer labels.*float64"):
        measure(x, labels.astype(float))
    with pytest.raises(ValueError, match="finite, got nan"):
        measure(np.where(np.arange(5) == 2, np.nan, x), labels)
    with pytest.raises(ValueError, match="at least two classes"):
        measure(x, np.ones(30, int))


def test_refused_neighbours():
    x, labels = cloud(n=30)
    with pytest.raises(ValueError, match=r"neighbours must be in \[1, 29\].*got 30"):
        purity(x, labels, neighbours=30)
    with pytest.raises(ValueError, match=r"neighbours must be in \[1, 10\].*got 11"):
        purity(x, labels, neighbours=11, blocks=np.arange(30) // 20)


# -------------------------------------------------------------------------------------------------- intervals


def grid_of_pixels(images=6, per=2):
    """Classes 0, 1, 3, two pixels of each in every image."""
    image, label, _ = (v.ravel() for v in np.meshgrid(np.arange(images), [0, 1, 3], np.arange(per), indexing="ij"))
    return Pixels(image * 10, np.zeros_like(image), np.zeros_like(image), label)


def test_class_means_of_a_measure_and_absent_classes():
    pixels = grid_of_pixels()
    v = np.random.default_rng(0).normal(size=(2, len(pixels.label)))
    v[0, 0] = np.nan
    found = by_class(v, pixels, C, replicates=7)
    assert found.seeds.shape == (2, C)
    assert found.replicates.shape == (2, 7, C)
    assert found.images == 6
    for s in range(2):
        expected = [np.nanmean(v[s, pixels.label == k]) for k in (0, 1, 3)]
        assert np.allclose(found.seeds[s, [0, 1, 3]], expected)
    assert np.isnan(found.seeds[:, 2]).all()
    assert np.isnan(found.replicates[:, :, 2]).all()


def test_images_are_resampled_whole():
    """The replicates of a class are means over the drawn images, so their variance is that of a mean of 6 values."""
    pixels = grid_of_pixels()
    of_image = np.random.default_rng(0).normal(size=6)
    found = by_class([of_image[pixels.image // 10]], pixels, C, replicates=4000)
    assert found.replicates[0, :, 0].var() == pytest.approx(of_image.var() / 6, rel=0.1)
    assert np.array_equal(found.replicates[0, :, 0], found.replicates[0, :, 1])  # classes share the images


def test_intervals_add_images_and_seeds():
    pixels = grid_of_pixels()
    constant = [np.full(len(pixels.label), value) for value in (1.0, 2.0, 4.0)]
    value, low, high = interval(by_class(constant, pixels, C), lambda v: v[..., 0])
    assert np.allclose((value, low, high), metrics.seed_interval([1.0, 2.0, 4.0]))  # the images do not differ
    of_image = np.random.default_rng(1).normal(size=6)[pixels.image // 10]
    one = by_class([of_image], pixels, C)
    value, low, high = interval(one, lambda v: v[..., 0])
    assert np.allclose((low, high), np.quantile(one.replicates[0, :, 0], [0.025, 0.975]))  # one seed
    assert interval(by_class([of_image + 3], pixels, C), lambda v: v[..., 0], less=one) == pytest.approx((3, 3, 3))
    wide = interval(by_class(constant, pixels, C), lambda v: v[..., 0], within=(0, 4))
    assert wide == pytest.approx((7 / 3, 0, 4))  # cut off at the range


def test_log_ratio_of_groups():
    score = features.log_ratio(["head", "head", "tail", "tail"], "tail", "head")
    assert score(np.array([1.0, 4.0, 8.0, 2.0])) == pytest.approx(np.log(2))  # geometric means 2 and 4
    assert score(np.array([[1.0, 4.0, 8.0, np.nan]])) == pytest.approx([np.log(4)])  # an absent class is left out
    assert np.isnan(score(np.array([1.0, 4.0, np.nan, np.nan])))
    assert np.isnan(features.log_ratio(["head"] * 4, "tail", "head")(np.ones(4)))


def test_refused_values():
    pixels = grid_of_pixels()
    with pytest.raises(ValueError, match=r"expected values \(S, 36\).*got \(36,\)"):
        by_class(np.zeros(36), pixels, C)
    two, one = (by_class(np.ones((s, 36)), pixels, C) for s in (2, 1))
    with pytest.raises(ValueError, match="the same pixels and seeds"):
        interval(two, less=one)


# ------------------------------------------------------------------------------------------------------ t-SNE


def test_maps_start_from_the_first_space():
    """A space turned by 180 degrees has the same neighbours, but its own plane of largest variance is turned too."""
    x, _ = cloud(0, n=60, dim=6)
    alone = {name: features.tsne({name: space}, perplexity=10)[name] for name, space in (("x", x), ("turned", -x))}
    assert not np.allclose(alone["x"], alone["turned"], atol=1)
    for first, second in (("x", "turned"), ("turned", "x")):
        spaces = {"x": x, "turned": -x}
        maps = features.tsne({name: spaces[name] for name in (first, second)}, perplexity=10)
        assert np.array_equal(maps[first], alone[first])
        assert np.array_equal(maps[second], alone[first]), "started from its own plane"


def test_maps_keep_neighbours():
    x, labels = cloud(0, n=90, dim=6)
    x = x + 30 * np.eye(6)[labels]
    maps = features.tsne({"a": x, "b": 7 * x, "c": x @ np.diag([1, 1, 1, 1, 1, 3])}, perplexity=10)
    assert list(maps) == ["a", "b", "c"]
    assert maps["a"].shape == (90, 2)
    assert np.allclose(maps["a"], features.tsne({"z": x}, perplexity=10)["z"])  # again the same
    assert purity(maps["a"].astype(float), labels, neighbours=5).mean() == 1
    assert purity(maps["c"].astype(float), labels, neighbours=5).mean() == 1
    with pytest.raises(ValueError, match="the same pixels in every space"):
        features.tsne({"a": x, "b": x[:-1]})


@pytest.mark.parametrize("points", [12, 13])
def test_a_perplexity_takes_more_points(points):
    x = np.random.default_rng(0).normal(size=(points, 3))
    with pytest.raises(ValueError, match=rf"perplexity.*13.*must be less than.*{points}"):
        features.tsne({"a": x}, perplexity=13)
    assert np.isfinite(features.tsne({"a": x}, perplexity=points - 1)["a"]).all()
