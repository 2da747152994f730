"""Confusion counts and scores against slow references, scikit-learn and torchmetrics; intervals by hand."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from ltseg_core import metrics, stats
from ltseg_core.metrics import ConfusionCounts, bootstrap, interval, paired_interval, seed_interval

seeds = st.integers(0, 2**32 - 1)


def maps(seed, classes=5, shape=(3, 7, 9), ignored=0.2, ignore_index=255):
    """pred, target: half of the pixels agree; the last class never occurs."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes - 1, shape)
    pred = np.where(rng.random(shape) < 0.5, target, rng.integers(0, classes - 1, shape))
    target[rng.random(shape) < ignored] = ignore_index
    return torch.from_numpy(pred), torch.from_numpy(target)


def counted(pred, target, classes=5, ignore_index=255):
    counts = ConfusionCounts(classes, ignore_index)
    counts.update(pred, target)
    return counts


def slow_counts(pred, target, classes, ignore_index=255):
    counts = np.zeros((len(pred), classes, classes), int)
    for n in range(len(pred)):
        for p, t in zip(pred[n].flatten().tolist(), target[n].flatten().tolist(), strict=True):
            if t != ignore_index:
                counts[n, t, p] += 1
    return counts


def random_counts(shape, classes, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (*shape, classes, classes))


def of_another_method(counts, seed=0):
    """Other predictions for the same labels."""
    return np.random.default_rng(seed).permuted(counts, axis=-1)


# --- ConfusionCounts


def test_two_by_two_image():
    """STYLE's example: of three classes one is absent, and leaves the mean. IoU 1/2 and 2/3: mean 0.58."""
    counts = counted(torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 1], [0, 1]]]), classes=3)
    assert counts.counts.tolist() == [[[1, 1, 0], [0, 2, 0], [0, 0, 0]]]
    np.testing.assert_allclose(counts.iou(), [1 / 2, 2 / 3, np.nan])
    np.testing.assert_allclose(counts.acc(), [1 / 2, 1, np.nan])
    np.testing.assert_allclose(counts.precision(), [1, 2 / 3, np.nan])
    np.testing.assert_allclose(counts.dice(), [2 / 3, 4 / 5, np.nan])
    assert counts.miou() == pytest.approx(7 / 12)
    assert counts.macc() == pytest.approx(3 / 4)
    assert counts.pixel_acc() == pytest.approx(3 / 4)
    assert counts.dice_error() == pytest.approx(1 - 11 / 15)
    assert metrics.class_mean(counts.iou()) == (pytest.approx(7 / 12), 2)


DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(d, i) for d in DTYPES for i in (5, 11, 254, 255) if d != "int8" or i < 128],  # values that fit
)
def test_counts_equal_a_per_pixel_loop(dtype, ignore_index):
    pred, target = maps(0, ignore_index=ignore_index)
    typed = [torch.from_numpy(x.numpy().astype(dtype)) for x in (pred, target)]
    counts = counted(*typed, ignore_index=ignore_index)
    assert np.array_equal(counts.counts, slow_counts(pred, target, 5, ignore_index))
    assert counts.counts.dtype == torch.int32
    assert counts.total().dtype == torch.int64


@pytest.mark.parametrize("classes", [1, 2, 150, 255])
def test_every_number_of_classes(classes):
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randint(classes, (2, 2, 40, 40), generator=generator).to(torch.uint8)
    target[:, 0] = 255
    assert np.array_equal(counted(pred, target, classes).counts, slow_counts(pred, target, classes))


def test_batches_are_joined_in_order():
    pred, target = maps(1, shape=(5, 4, 6))
    counts = ConfusionCounts(5)
    assert counts.counts.shape == (0, 5, 5)
    assert np.isnan(counts.miou())
    counts.update(pred[:2], target[:2])
    assert len(counts.counts) == 2  # reading in between changes nothing
    counts.update(pred[2:4, :2, :3], target[2:4, :2, :3])  # another image size
    counts.update(pred[4:], target[4:])
    expected = slow_counts(pred, target, 5)
    expected[2:4] = slow_counts(pred[2:4, :2, :3], target[2:4, :2, :3], 5)
    assert np.array_equal(counts.counts, expected)
    assert np.array_equal(counts.total(), expected.sum(0))


@pytest.mark.parametrize(
    ("where", "value", "dtype"),
    [
        *(("pred", value, torch.int64) for value in (5, 255, -1, 256, 2**40)),
        *(("target", value, torch.int64) for value in (5, 254, -1, 256, 256 + 3, -100)),
        *(("pred", value, torch.uint8) for value in (5, 255)),
        *(("target", value, torch.uint8) for value in (5, 254)),
    ],
)
def test_values_out_of_range_are_named_on_reading(where, value, dtype):
    pred, target = (x.to(dtype) for x in maps(2))
    {"pred": pred, "target": target}[where][1, 2, 3] = value
    counts = counted(*(x.to(dtype) for x in maps(0)))
    counts.update(pred, target)
    counts.update(*(x.to(dtype) for x in maps(0)))
    for read in (counts.miou, counts.iou, counts.total):
        with pytest.raises(ValueError, match=rf"^{where} must be a class in \[0, 4\].*, got {value}$"):
            read()


def test_prediction_out_of_range_at_an_ignored_pixel_is_noticed():
    counts = counted(torch.tensor([[[7]]]), torch.tensor([[[255]]]))
    with pytest.raises(ValueError, match="got 7"):
        counts.miou()


def test_another_ignore_index_leaves_255_invalid():
    counts = counted(torch.zeros(1, 1, 2, dtype=torch.uint8), torch.tensor([[[11, 255]]]).byte(), 11, 11)
    with pytest.raises(ValueError, match=r"or 11 \(ignored\), got 255"):
        counts.miou()


def test_wrong_arguments():
    pred, target = maps(0)
    counts = ConfusionCounts(5)
    for bad in ((pred[0], target[0]), (pred, target[:, 1:]), (pred[:0], target[:0])):
        with pytest.raises(ValueError, match=r"one shape \(B, H, W\), got"):
            counts.update(*bad)
    for bad in ((pred.float(), target), (pred, target > 0)):
        with pytest.raises(TypeError, match="must be an integer tensor, got torch"):
            counts.update(*bad)
    for classes in (0, 256):
        with pytest.raises(ValueError, match=rf"\[1, 255\], got {classes}"):
            ConfusionCounts(classes)
    for ignore_index in (-100, 4, 256):
        with pytest.raises(ValueError, match=rf"= \[5, 255\], got {ignore_index}"):
            ConfusionCounts(5, ignore_index)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_sum_of_images_is_the_count_of_all(seed):
    pred, target = maps(seed)
    assert torch.equal(
        counted(pred, target).total(), counted(pred.view(1, 7, -1), target.view(1, 7, -1)).counts[0].long()
    )


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_ignored_pixels_change_nothing(seed):
    pred, target = maps(seed)
    more = torch.full_like(target, 255)
    extended = counted(torch.cat([pred, pred], 1), torch.cat([target, more], 1))
    assert torch.equal(extended.counts, counted(pred, target).counts)


@given(seeds, st.permutations(range(5)))
@settings(max_examples=25, deadline=None)
def test_permuting_classes_permutes_results(seed, order):
    pred, target = maps(seed)
    new = torch.tensor([*order, *[255] * 251])
    before, after = counted(pred, target), counted(new[pred], new[target])
    for name in ("iou", "acc", "precision", "dice"):
        np.testing.assert_array_equal(getattr(after, name)()[list(order)], getattr(before, name)())
    for name in ("miou", "macc", "pixel_acc", "dice_error"):
        assert getattr(after, name)() == pytest.approx(getattr(before, name)(), abs=1e-12)


# --- scores


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learn(seed):
    pred, target = maps(seed)
    valid = target != 255
    p, t = pred[valid].numpy(), target[valid].numpy()
    counts = counted(pred, target)
    assert np.array_equal(counts.total(), confusion_matrix(t, p, labels=range(5)))
    for ours, theirs in (
        (counts.iou, jaccard_score),
        (counts.acc, recall_score),
        (counts.precision, precision_score),
        (counts.dice, f1_score),
    ):
        expected = theirs(t, p, labels=range(4), average=None)
        np.testing.assert_allclose(ours()[:4], expected, rtol=1e-12)
        assert torch.isnan(ours()[4])
    weighted = jaccard_score(t, p, average="weighted")
    assert float(metrics.weighted_iou(counts.total())) == pytest.approx(weighted, rel=1e-12)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_scores_equal_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    pred, target = maps(4, classes=6, shape=(4, 20, 20))
    theirs = classification.multiclass_jaccard_index(pred, target, 6, average=None, ignore_index=255)
    torch.testing.assert_close(counted(pred, target, 6).iou().nan_to_num().float(), theirs)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_numpy_and_torch_and_leading_axes_agree(name):
    counts = random_counts((2, 3), 4)
    counts[..., 3, :] = counts[..., :, 3] = 0
    metric = metrics.METRICS[name]
    result = metric(counts)
    assert result.dtype == np.float64
    from_torch = metric(torch.from_numpy(counts))
    assert isinstance(from_torch, torch.Tensor)
    np.testing.assert_allclose(from_torch, result, rtol=1e-12)
    np.testing.assert_allclose(metric(metrics.marginals(counts)), result, rtol=0)
    one_by_one = [[metric(image) for image in row] for row in counts]
    np.testing.assert_allclose(one_by_one, result, rtol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_identity_of_iou_acc_and_precision(seed):
    counts = np.random.default_rng(seed).integers(1, 1000, (6, 6))
    inverse = 1 / metrics.acc(counts) + 1 / metrics.precision(counts) - 1
    np.testing.assert_allclose(1 / metrics.iou(counts), inverse, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 1000, 2**30]))
def test_remark_1_says_exactly_when_iou_falls(seed, most):
    """Against IoU as exact fractions, over counts small enough for ties and too large for float64."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, most, 50)
    before, after = (
        metrics.Marginals(tp := rng.integers(0, pixels + 1), rng.integers(0, most, 50), pixels - tp) for _ in "ab"
    )
    old, new = (
        [Fraction(int(t), int(n + f)) for t, n, f in zip(m.tp, pixels, m.fp, strict=True)] for m in (before, after)
    )
    assert metrics.remark1(before, after).tolist() == [b >= a for a, b in zip(old, new, strict=True)]


def test_remark_1_by_hand():
    # n = 10. Acc 0.4 -> 0.8 (K = 1) with 2 false positives: up to 2 * 2 + 10 = 14 leave IoU at 4 / 12 or above.
    before = metrics.Marginals(np.array([4, 4, 0]), np.array([2, 2, 7]), np.array([6, 6, 10]))
    after = metrics.Marginals(np.array([8, 8, 0]), np.array([14, 15, 99]), np.array([2, 2, 10]))
    assert metrics.remark1(before, after).tolist() == [True, False, True]  # a class never found cannot lose IoU


@given(st.integers(0, 2**32 - 1))
def test_iou_from_accuracy_and_false_positives_per_true_one(seed):
    counts = np.random.default_rng(seed).integers(1, 1000, (6, 6))
    m, accuracy = metrics.marginals(counts), metrics.acc(counts)
    np.testing.assert_allclose(metrics.iou_at(accuracy, m.fp / m.tp), metrics.iou(counts), rtol=1e-12)
    for ratio, slope in ((0, 1), (1, 0.39), (3, 0.13)):  # the papers' slopes at Acc 0.6
        step = metrics.iou_at(0.6 + 1e-6, ratio) - metrics.iou_at(0.6 - 1e-6, ratio)
        assert step / 2e-6 == pytest.approx((metrics.iou_at(0.6, ratio) / 0.6) ** 2)
        assert step / 2e-6 == pytest.approx(slope, abs=0.005)


def test_false_positives_per_true_one():
    counts = random_counts((2, 3), 5)
    m = metrics.marginals(counts)
    for k in range(5):
        np.testing.assert_allclose(metrics.fp_per_tp(counts, [k]), 1 / metrics.precision(counts)[..., k] - 1)
    both = (m.fp[..., 1] + m.fp[..., 3]) / (m.tp[..., 1] + m.tp[..., 3])
    np.testing.assert_allclose(metrics.fp_per_tp(counts, [1, 3]), both)
    never_right = np.array([[0, 4], [3, 5]])
    assert np.isnan(metrics.fp_per_tp(never_right, [0]))  # not infinite
    assert metrics.fp_per_tp(torch.tensor(never_right), [0, 1]) == 7 / 5


def test_error_map_counts_as_the_confusion_counts_do():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 4, (2, 9, 7)).astype(np.uint8)
    label[:2] = 255
    counts = metrics.ConfusionCounts(4)
    counts.update(torch.from_numpy(predicted)[None], torch.from_numpy(label)[None])
    for k in range(4):
        errors = metrics.error_map(label, predicted, k)
        assert errors.dtype == np.uint8
        m = metrics.marginals(counts.total())
        assert [(errors == kind).sum() for kind in (1, 2, 3)] == [m.tp[k], m.fp[k], m.fn[k]]
        np.testing.assert_array_equal(errors == 255, label == 255)
    with pytest.raises(ValueError, match=r"share one shape, got \(9, 7\) and \(2, 7\)"):
        metrics.error_map(label, predicted[:2], 0)


def test_false_positives_by_true_group():
    counts = np.array([[5, 1, 2], [3, 6, 4], [7, 8, 9]])
    sources = metrics.false_positive_sources(counts, ["head", "tail", "tail"])
    np.testing.assert_array_equal(sources, [[0, 1, 2], [0, 0, 0], [3 + 7, 8, 4]])
    many = random_counts((2, 3), 5)
    whole = metrics.false_positive_sources(many, ["head", "body", "tail", "body", "head"])
    np.testing.assert_array_equal(whole.sum(-2), metrics.marginals(many).fp)


def test_fates_of_a_group_by_hand():
    counts = np.array([[6, 2, 1, 1], [4, 12, 2, 2], [0, 5, 3, 2], [0, 0, 0, 0]])  # class 3 has no pixel
    found = metrics.fates(counts, ["head", "head", "tail", "tail"])
    np.testing.assert_allclose(found[0], [(0.6 + 0.6) / 2, (0.2 + 0.2) / 2, 0, 0, (0.2 + 0.2) / 2])
    np.testing.assert_allclose(found[2], [0.3, 0.2, 0.5, 0, 0])
    assert np.isnan(found[1]).all()  # no body


def test_fates_add_up_and_know_the_accuracy():
    counts, groups = random_counts((2, 3), 6), ["head", "tail", "body", "tail", "head", "body"]
    found = metrics.fates(counts, groups)
    np.testing.assert_allclose(found.sum(-1), 1)
    means = [[metrics.group_means(row, groups)[g].value for g in stats.GROUPS] for row in metrics.acc(counts[0])]
    np.testing.assert_allclose(found[0, :, :, 0], means)
    leave = metrics.false_positive_sources(metrics.uniform_test(counts), groups)  # of true group, called class
    to_tail = leave[..., [k for k, g in enumerate(groups) if g == "tail"]].sum(-1) / 2  # each group has two classes
    np.testing.assert_allclose(found[..., :2, 4], to_tail[..., :2])


def test_absent_classes():
    only_predicted = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]])  # class 1 absent, class 2 predicted in error
    np.testing.assert_array_equal(metrics.iou(only_predicted), [0.75, np.nan, 0])
    np.testing.assert_array_equal(metrics.acc(only_predicted), [0.75, np.nan, np.nan])
    np.testing.assert_array_equal(metrics.precision(only_predicted), [1, np.nan, 0])
    assert metrics.miou(only_predicted) == 0.375
    assert metrics.macc(only_predicted) == 0.75
    empty = np.zeros((3, 3))
    for metric in metrics.METRICS.values():
        assert np.isnan(metric(empty)).all()


def test_group_means():
    scores = np.array([0.9, 0.5, np.nan, 0.3])
    means = metrics.group_means(scores, ["head", "body", "body", "body"])
    assert means["head"] == (0.9, 1)
    assert means["body"] == (pytest.approx(0.4), 2)
    assert np.isnan(means["tail"].value)
    assert means["tail"].classes == 0
    as_tensor = metrics.group_means(torch.from_numpy(scores), ["head", "body", "body", "body"])
    assert as_tensor["body"] == (pytest.approx(0.4), 2)
    with pytest.raises(ValueError, match=r"shape \(2,\), one per group name, got \(4,\)"):
        metrics.group_means(scores, ["head", "tail"])
    with pytest.raises(ValueError, match="got 'medium'"):
        metrics.group_means(scores, ["head", "medium", "tail", "tail"])


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_uniform_test_equals_repeated_pixels(convert):
    """Dividing row k by n_k is the same as repeating the pixels until every class has equally many."""
    counts = np.array([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    repeated = np.array([[6, 2, 0], [4, 4, 0], [0, 0, 0]])
    rates = metrics.uniform_test(convert(counts))
    np.testing.assert_allclose(rates, [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(metrics.iou(rates), metrics.iou(repeated))
    np.testing.assert_array_equal(metrics.acc(rates), metrics.acc(counts))


def test_counts_must_be_square():
    for bad in (np.zeros((3, 2)), np.zeros(3), torch.zeros(2, 3, 4)):
        for function in (metrics.iou, metrics.uniform_test):
            with pytest.raises(ValueError, match=r"must have shape \(\.\.\., C, C\), got"):
                function(bad)


# --- calibration


def logits_and_target(seed, images=2, classes=5, size=(9, 11)):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, *size, generator=generator)
    target = torch.randint(0, classes - 1, (images, *size), generator=generator)
    target[:, 0, :3] = 255
    return logits, target.to(torch.uint8)


def reference_ece(confidence, right, bins):
    """From scikit-learn's reliability curve, whose bins are closed on the right too."""
    share, mean = calibration_curve(right, confidence, n_bins=bins)
    pixels = np.histogram(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence), np.arange(bins + 1))[0]
    return (np.abs(share - mean) * pixels[pixels > 0]).sum() / len(right)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 20))
def test_calibration_equals_scikit_learn(seed, bins):
    logits, target = logits_and_target(seed)
    counts = metrics.calibration_counts(logits, target, bins=bins)
    assert counts.shape == (2, 2, 5, bins, 3)
    confidence, predicted = (x.numpy() for x in logits.softmax(1).max(1))
    confidence, labels = confidence.astype(float), target.numpy()
    for owner, found in zip((labels, predicted), counts.sum(1), strict=True):
        for k in range(5):
            chosen = (owner == k) & (labels != 255)
            if not chosen.any():
                assert not found[k].any()
                assert metrics.ece(found[k]).isnan()
                continue
            sure, right = confidence[chosen], (predicted == labels)[chosen]
            assert float(metrics.ece(found[k])) == pytest.approx(reference_ece(sure, right, bins), abs=1e-12)
            assert float(metrics.overconfidence(found[k])) == pytest.approx(sure.mean() - right.mean(), abs=1e-12)
    for group in counts.sum((1, 2)):  # all classes together, whatever the axis
        every = labels != 255
        expected = reference_ece(confidence[every], (predicted == labels)[every], bins)
        assert float(metrics.ece(group)) == pytest.approx(expected, abs=1e-12)
        assert abs(float(metrics.overconfidence(group))) <= float(metrics.ece(group)) + 1e-12


def test_calibration_by_hand():
    """Four pixels of class 0 with p = 0.75; three are right: ECE 0. The ignored pixel and class 1 change nothing."""
    logits = torch.zeros(1, 2, 1, 5)
    logits[0, 0] = np.log(3)
    target = torch.tensor([[[0, 0, 0, 1, 255]]])
    by_true, by_predicted = metrics.calibration_counts(logits, target, bins=5)
    assert by_predicted[0, :, :, 0].tolist() == [[0, 0, 0, 4, 0], [0, 0, 0, 0, 0]]
    assert float(metrics.ece(by_predicted[0, 0])) == pytest.approx(0, abs=1e-7)
    assert float(metrics.overconfidence(by_true[0, 0])) == pytest.approx(-0.25)
    assert float(metrics.overconfidence(by_true[0, 1])) == pytest.approx(0.75)
    half = metrics.calibration_counts(torch.zeros(1, 2, 1, 5), target, bins=4)  # 1/2 closes the second bin
    assert half[1, 0, 0].tolist() == [[0, 0, 0], [4, 2, 3], [0, 0, 0], [0, 0, 0]]


def test_calibration_of_images_adds_up():
    logits, target = logits_and_target(0, images=4)
    parts = [metrics.calibration_counts(logits[i : i + 1], target[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(parts, 1), metrics.calibration_counts(logits, target))


def test_a_network_that_knows_the_posterior_is_calibrated_by_prediction_not_by_truth():
    """Labels drawn from the network's own probabilities: a rare class is missed, and no calibration can help it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 400, 500, generator=generator) + torch.tensor([2.0, 0.0, -2.0])[:, None, None]
    drawn = torch.multinomial(logits[0].softmax(0).flatten(1).T, 1, generator=generator)
    by_true, by_predicted = metrics.calibration_counts(logits, drawn.view(1, 400, 500))
    assert float(metrics.ece(by_predicted[0].sum(0))) < 0.005
    assert (metrics.overconfidence(by_predicted[0]).abs() < 0.03).all()
    assert float(metrics.overconfidence(by_true[0, 2])) > 0.5
    assert float(metrics.overconfidence(by_true[0, 0])) < -0.1


def test_truth_counts_equal_a_slow_loop():
    logits, target = logits_and_target(3)
    logits[:, 1] = -torch.inf  # a class taken out: its pixels are never right and lack all of their probability
    found = metrics.truth_counts(logits, target)
    expected = np.zeros((*logits.shape[:2], 3))
    for b, y, x in np.ndindex(*target.shape):
        if (k := int(target[b, y, x])) != 255:
            z = logits[b, :, y, x].double().numpy()
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            expected[b, k] += 1, z.argmax() == k, 1 - p[k]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found[:, 1, 1] == 0).all()
    assert torch.equal(found[:, 1, 0], found[:, 1, 2])


@given(seeds)
def test_truth_counts_hold_accuracy_and_calibration(seed):
    logits, target = logits_and_target(seed)
    found = metrics.truth_counts(logits, target).sum(0)
    counts = counted(logits.argmax(1), target).total()
    np.testing.assert_allclose(found[:, 1] / found[:, 0], metrics.acc(counts))
    by_true = metrics.calibration_counts(logits, target)[0].sum((0, 2))  # (C, 3)
    assert torch.equal(found[:, :2], by_true[:, [0, 2]])
    assert (found[:, 0] - found[:, 2] <= by_true[:, 1] + 1e-5).all(), "p_y is no more than the confidence"


def test_regions_are_called_what_their_mean_logit_says():
    logits, target = logits_and_target(5)
    found = metrics.region_prediction(logits, target)
    for b in range(len(target)):
        for k in target[b].unique():
            region = target[b] == k
            called = np.argmax([logits[b, j][region].double().mean() for j in range(5)])
            assert found[b][region].unique().tolist() == [called]


def test_regions_of_a_linear_classifier_are_those_of_the_mean_feature():
    """Region Rebalance, Sec. 3.3.1: the classifier on the mean feature of a region, and a shift of every pixel."""
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(2, 8, 6, 7, generator=generator), torch.randn(5, 8, generator=generator)
    target = logits_and_target(5)[1][:2, :6, :7]
    shift = torch.tensor([0.0, 1, -1, 2, 0])[:, None, None]
    called = metrics.region_prediction(torch.einsum("ck,bkhw->bchw", weight, features) + shift, target)
    found = counted(called, target).counts
    for b, k in np.ndindex(2, 5):
        if (region := target[b] == k).any():
            mean = features[b][:, region].mean(1)
            assert found[b, k].argmax() == (weight @ mean + shift.flatten()).argmax()
    regions = torch.tensor([len(set(t.flatten().tolist()) - {255}) for t in target])
    assert torch.equal((found > 0).sum((1, 2)), regions), "one entry for each region"


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_nanmean_leaves_out_nan_and_nothing_else(kind):
    found = metrics.nanmean(kind([[1.0, np.nan, 4], [np.inf, 1, np.nan], [np.nan] * 3]))
    np.testing.assert_array_equal(found, [2.5, np.inf, np.nan])


@pytest.mark.parametrize("count", [metrics.calibration_counts, metrics.truth_counts, metrics.region_prediction])
def test_counts_from_logits_refuse(count):
    logits, target = logits_and_target(0)
    for arguments in ((logits, target[:1]), (logits[0], target[0]), (logits, target[:, :, 1:])):
        with pytest.raises(ValueError, match=r"expected logits \(B, C, H, W\) and target \(B, H, W\), got"):
            count(*arguments)
    target[1, 2, 3] = 5
    with pytest.raises(ValueError, match=r"target must be a class in \[0, 4\] or 255 \(ignored\), got 5"):
        count(logits, target)
    with pytest.raises(TypeError, match="target must be an integer tensor"):
        count(logits, target.float())


def test_calibration_refuses_no_bins():
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        metrics.calibration_counts(*logits_and_target(0), bins=0)


# --- intervals


@pytest.mark.parametrize("metric", [metrics.miou, metrics.iou, metrics.pixel_acc])
def test_paired_interval_equals_a_slow_loop(metric):
    a = random_counts((3, 6), 4, 1)
    a[:, 1:, 3, :] = a[:, 1:, :, 3] = 0  # class 3 lives in image 0 only: NaN in some resamples
    b = of_another_method(a)
    replicates = 200
    rng = np.random.default_rng(7)
    images = rng.integers(6, size=(replicates, 6))

    def scores(x, images):
        return np.array([metric(x[s][images].sum(0)) for s in range(3)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing but NaN
        samples = [np.nanmean(scores(a, i), 0) - np.nanmean(scores(b, i), 0) for i in images]
        low, high = np.nanquantile(samples, [0.05, 0.95], axis=0)
    each = scores(a, range(6)) - scores(b, range(6))
    mean, half = each.mean(0), student.ppf(0.95, 2) * each.std(0, ddof=1) / np.sqrt(3)
    expected = mean - np.sqrt((mean - low) ** 2 + half**2), mean + np.sqrt((high - mean) ** 2 + half**2)
    got = paired_interval(a, b, metric, replicates=replicates, confidence=0.9, seed=7)
    np.testing.assert_allclose(got[0], mean, rtol=1e-12)
    np.testing.assert_allclose(got[1:], expected, rtol=1e-9, atol=1e-12)
    assert isinstance(got[0], np.ndarray if metric is metrics.iou else float)


def test_contrast_of_four_parts():
    a, b, c = (np.random.default_rng(s).integers(1, 40, (3, 6, 4, 4)) for s in range(3))
    parts = [(1, a, metrics.miou), (-1, b, metrics.miou), (-0.5, c, metrics.macc), (2, a, metrics.pixel_acc)]
    value, low, high = metrics.contrast(*parts, replicates=300, confidence=0.9, seed=5)
    drawn = stats.resampling_weights(5, 300, 6)
    resampled = [np.einsum("rn,snij->srij", drawn, counts) for _, counts, _ in parts]
    of_seed = sum(k * score(counts.sum(1)) for k, counts, score in parts)
    samples = sum(k * score(counts) for (k, _, score), counts in zip(parts, resampled, strict=True)).mean(0)
    images, seeds = np.quantile(samples, [0.05, 0.95]), metrics.seed_interval(of_seed, confidence=0.9)
    half = (seeds[2] - seeds[1]) / 2
    expected = of_seed.mean(), -np.hypot(of_seed.mean() - images[0], half), np.hypot(images[1] - of_seed.mean(), half)
    np.testing.assert_allclose((value, low - value, high - value), expected, rtol=1e-9)
    other = a[..., ::-1]  # the same labels
    assert metrics.contrast(parts[0], (-1, other, metrics.miou)) == paired_interval(a, other)
    with pytest.raises(ValueError, match="same seeds and images"):
        metrics.contrast(parts[0], (1, b[:2], metrics.miou))


def test_paired_interval_is_paired():
    """Images differ wildly in difficulty, b is a little worse on each: the difference has no spread to speak of."""
    hits = np.random.default_rng(0).integers(10, 90, (1, 40))
    right = np.stack([np.stack([hits, 100 - hits], -1), np.stack([100 - hits, hits], -1)], -2)
    wrong = np.array([[-1, 1], [1, -1]])
    difference, low, high = paired_interval(right, right + wrong, metrics.pixel_acc)
    assert difference == pytest.approx(0.01)
    assert (low, high) == pytest.approx((0.01, 0.01))
    assert paired_interval(right, right) == (0, 0, 0)
    value, low, high = interval(right, metrics.pixel_acc)
    assert low < value - 0.05 < value + 0.05 < high


def test_interval_matches_the_binomial():
    """Images of one pixel: pixel accuracy is a share of hits; its interval has the width of the normal one."""
    hit = np.random.default_rng(0).random(800) < 0.3
    counts = np.zeros((800, 2, 2), int)
    counts[np.arange(800), 0, np.where(hit, 0, 1)] = 1
    value, low, high = interval(torch.from_numpy(counts)[None], metrics.pixel_acc)
    assert value == hit.mean()
    half = 1.96 * np.sqrt(value * (1 - value) / 800)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    per_class = interval(counts[None], metrics.acc, replicates=50)
    assert per_class[0].shape == per_class[1].shape == (2,)
    assert np.isnan(per_class[2][1])


def test_seed_spread_enters_the_paired_interval():
    a, b = np.tile(random_counts((1, 30), 3, 1), (2, 4, 1, 1, 1))
    lost = a[..., 0, 0] * np.array([[10], [25], [40], [55]]) // 100  # each seed of b errs in its own way
    b[..., 0, 0] -= lost
    b[..., 0, 1] += lost
    single = np.subtract(*paired_interval(a[:1], b[:1])[:0:-1])
    several = paired_interval(a, b)
    assert several[2] - several[1] > 0
    without_spread = paired_interval(a, np.tile(b[:1], (4, 1, 1, 1)))
    assert without_spread[2] - without_spread[1] == pytest.approx(single, rel=0.1)
    assert several[2] - several[1] > 1.3 * single


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_what_they_claim_with_few_seeds(seeds):
    """Pixel accuracy 0.7 + noise per seed; resampling so few seeds would cover 52, 73 and 87 % only."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        right = rng.binomial(1000, np.clip(0.7 + 0.05 * rng.standard_normal((seeds, 1)), 0, 1), (seeds, 40))
        counts = np.zeros((seeds, 40, 2, 2))
        counts[..., 0, 0], counts[..., 0, 1] = right, 1000 - right
        _, low, high = interval(counts, metrics.pixel_acc, replicates=40)
        hits += low <= 0.7 <= high
    assert 0.92 <= hits / 300 <= 0.99


def test_marginals_may_be_given_instead_of_counts():
    a = random_counts((2, 5), 4, 1)
    b = of_another_method(a)
    assert paired_interval(metrics.marginals(a), metrics.marginals(b), replicates=50) == paired_interval(
        a, b, replicates=50
    )


def test_one_image_or_seed_has_no_interval():
    one = random_counts((1, 1), 3)
    assert np.isnan(interval(one)[1:]).all()
    assert np.isnan(paired_interval(one, one)[1:]).all()
    np.testing.assert_array_equal(seed_interval([0.3]), (0.3, np.nan, np.nan))
    low = seed_interval(np.ones((1, 4)))[1]
    assert low.shape == (4,)
    assert np.isnan(low).all()


def test_seed_interval_is_student_t():
    values = [0.1, 0.4, 0.3]
    expected = student.interval(0.9, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / np.sqrt(3))
    assert seed_interval(values, confidence=0.9) == pytest.approx((np.mean(values), *expected))
    columns = seed_interval(np.stack([values, values], 1), confidence=0.9)
    np.testing.assert_allclose(columns[1], [expected[0]] * 2)
    with pytest.raises(ValueError, match="at least one value per seed"):
        seed_interval([])


def test_bootstrap_of_a_metric_is_its_interval_and_of_a_difference_its_paired_interval():
    a = random_counts((3, 6), 4, 1)
    b = of_another_method(a)
    np.testing.assert_allclose(bootstrap(a, metrics.miou), interval(a, metrics.miou), rtol=1e-9)
    np.testing.assert_allclose(bootstrap(a[:1, :1], metrics.miou), interval(a[:1, :1], metrics.miou), rtol=1e-9)
    found = bootstrap(np.stack([a, b], 2), lambda c: metrics.iou(c[..., 0, :, :]) - metrics.iou(c[..., 1, :, :]))
    np.testing.assert_allclose(found, paired_interval(a, b, metrics.iou), rtol=1e-9)


def test_bootstrap_in_parts_is_bootstrap_at_once():
    sums = np.random.default_rng(0).random((2, 5, 4000))  # 2000 replicates of it take two parts
    score = lambda x: x[..., :3] / x.sum(-1, keepdims=True)  # noqa: E731
    drawn = stats.resampling_weights(0, 2000, 5)
    samples = score(np.einsum("rn,snk->srk", drawn, sums)).mean(0)
    value, low, high = bootstrap(sums, score)
    each = score(sums.sum(1))
    half = student.ppf(0.975, 1) * each.std(0, ddof=1) / np.sqrt(2)
    limits = np.quantile(samples, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(value, each.mean(0), rtol=1e-12)
    np.testing.assert_allclose(low, value - np.hypot(value - limits[0], half), rtol=1e-9)
    np.testing.assert_allclose(high, value + np.hypot(limits[1] - value, half), rtol=1e-9)


def test_bootstrap_reweighs_every_replicate():
    """Acc does not change on a uniform test set, replicate by replicate; IoU does."""
    counts = random_counts((2, 8), 3)
    uniform = bootstrap(counts, lambda c: metrics.acc(metrics.uniform_test(c)))
    np.testing.assert_allclose(uniform, interval(counts, metrics.acc), rtol=1e-9)
    flat = bootstrap(counts, lambda c: metrics.miou(metrics.uniform_test(c)))
    assert flat[0] == pytest.approx(np.mean(metrics.miou(metrics.uniform_test(counts.sum(1)))))
    assert flat[1] < flat[0] < flat[2]


def test_intervals_refuse():
    a = random_counts((2, 5), 4)
    for b in (a[:1], a[:, 1:], random_counts((2, 5), 3)):
        with pytest.raises(ValueError, match=r"same seeds, images and classes, got 2 x 5 x 4 and"):
            paired_interval(a, b)
    with pytest.raises(ValueError, match="a and b differ in their labelled pixels"):
        paired_interval(a, of_another_method(a).swapaxes(-1, -2))
    with pytest.raises(ValueError, match=r"expected counts of shape \(S, N, C, C\)"):
        paired_interval(a[0], a[0])
    with pytest.raises(ValueError, match=r"expected counts of shape \(S, N, C, C\)"):
        interval(a[:, :0])
    with pytest.raises(ValueError, match="replicates must be >= 1, got 0"):
        interval(a, replicates=0)
    with pytest.raises(ValueError, match="replicates must be >= 1, got 0"):
        bootstrap(a, metrics.miou, replicates=0)
    with pytest.raises(ValueError, match=r"expected sums of shape \(S, N, ...\), none of them 0, got \(2, 0, 4, 4\)"):
        bootstrap(a[:, :0], metrics.miou)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
        paired_interval(a, a, confidence=1)
