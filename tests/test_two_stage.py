"""Re-trained and corrected classifiers, class means and re-sampling against closed forms, loops and scikit-learn."""

import copy
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import NearestCentroid
from tiny import COUNTS, C, D, batch, same, snapshot, tiny_network, train_steps

from ltseg_core import data, stats, train
from ltseg_core.config import IGNORE_INDEX, Experiment, UserError
from ltseg_core.data.base import Subset
from ltseg_core.data.batches import BatchOrder
from ltseg_core.losses import cross_entropy, pixel_nll
from ltseg_core.methods.two_stage import (
    BalancedSampling,
    NearestMean,
    balanced_bound,
    balanced_criterion,
    class_means,
    crt,
    keep_rates,
    lws,
    mask_pixels,
    ncm,
    nearest_labels,
    posthoc_logit_adjustment,
    repeat_factor,
    repeat_factors,
    tau_norm,
    tde,
    transposed_resize,
    undersampling,
)
from ltseg_core.models import CosineClassifier, Output
from ltseg_core.stats import ClassCounts

RETRAINED = {"crt": crt, "lws": lws, "balanced_bound": balanced_bound}
UNTRAINED = {"tau_norm": tau_norm, "posthoc_logit_adjustment": posthoc_logit_adjustment, "ncm": ncm, "tde": tde}


@pytest.fixture
def network():
    return tiny_network()


# --- what is frozen, what learns ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", RETRAINED)
@pytest.mark.parametrize("cosine", [False, True])
def test_only_the_classifier_learns_and_the_features_stay(network, name, cosine):
    if cosine:
        network.classifier = CosineClassifier(D, C)
    image, _ = batch(seed=9)
    features = network.eval()(image).features
    (stage,) = RETRAINED[name](network, COUNTS)
    before = snapshot(stage.network)
    train_steps(stage)
    changed = {key for key, equal in same(before, stage.network).items() if not equal}
    expected = {
        "lws": {"classifier.scale"},
        "crt": {"classifier.weight"} if cosine else {"classifier.weight", "classifier.bias"},
    }
    assert changed == expected.get(name, expected["crt"])
    assert torch.equal(stage.network.eval()(image).features, features)
    assert stage.share == 1.0


@pytest.mark.parametrize("name", UNTRAINED)
def test_corrections_take_no_step_and_have_nothing_to_learn(network, name):
    (stage,) = UNTRAINED[name](network, COUNTS)
    assert stage.share == 0.0
    assert stage.frozen == (stage.network,)
    assert (stage.prepare is not None) is (name in ("ncm", "tde"))


def test_crt_starts_anew_the_bound_from_the_finished_classifier(network):
    finished = copy.deepcopy(network.classifier)
    balanced_bound(network, COUNTS)
    assert torch.equal(network.classifier.weight, finished.weight)
    torch.manual_seed(1)
    crt(network, COUNTS)
    first = network.classifier.weight.clone()
    assert not torch.equal(first, finished.weight)
    assert torch.equal(network.classifier.bias, torch.zeros(C))
    torch.manual_seed(1)
    crt(network, COUNTS)
    assert torch.equal(network.classifier.weight, first)


def test_crt_resets_the_learned_scale_of_a_cosine_classifier(network):
    network.classifier = CosineClassifier(D, C, scale=10.0, learn_scale=True)
    network.classifier.scale.data.fill_(99.0)
    crt(network, COUNTS)
    assert network.classifier.scale.item() == 10.0


def test_crt_and_bound_reach_one_optimum():
    ends = []
    for build, options in ((crt, {"balance": "weights"}), (balanced_bound, {})):
        (stage,) = build(tiny_network(), COUNTS, **options)
        image, target = batch()
        with torch.no_grad():
            features = stage.network.eval().features(image)
        classifier = stage.network.classifier.double()
        optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure(classifier=classifier, features=features, image=image, target=target, stage=stage, o=optimizer):
            o.zero_grad()
            logits = stage.network.resize(classifier(features.double()), image)
            loss = stage.criterion(Output(features, logits), target)
            loss.backward()
            return loss

        optimizer.step(closure)
        ends.append(closure().item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_the_bound_weighs_the_pixels_of_the_split_it_learns_from(network):
    (stage,) = balanced_bound(network, COUNTS, split="val")
    batches = [batch(seed=s) for s in range(3)]
    stage.prepare(batches)
    targets = torch.cat([target for _, target in batches])
    n = torch.tensor([(targets == k).sum() for k in range(C)], dtype=torch.float64)
    expected = 1 / n * n.sum() / C  # mean 1 over the pixels
    torch.testing.assert_close(stage.criterion.loss.weight.double(), expected, rtol=1e-6, atol=0)
    assert (stage.split, balanced_bound(network, COUNTS)[0].split) == ("val", "train")


def test_the_bound_learns_from_the_images_of_its_split(folder):
    root = folder(train=4, val=2, test=2, size=(32, 32))
    for path in (root / "val/labels").glob("*.png"):
        Image.fromarray(np.full((32, 32), 2, dtype=np.uint8)).save(path)
    base = Experiment(
        dataset=str(root), architecture="Linknet", encoder="tu-mobilenetv3_small_050",
        method="balanced_bound", batch_size=2, steps=40, lr=0.1,
    )  # fmt: skip
    predicted = {
        split: train.fit(dataclasses.replace(base, hyper={"split": split})).confusion("test").sum((0, 1))
        for split in ("train", "val")
    }
    assert predicted["val"][2] == predicted["val"].sum(), "val has one class only"
    assert predicted["train"][2] < predicted["train"].sum()
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match="val"):
        train.fit(dataclasses.replace(base, seed=1, hyper={"split": "val"}))


def test_lws_starts_as_the_finished_network_and_scales_its_logits(network):
    image, _ = batch()
    plain = network.eval()(image).logits
    (stage,) = lws(network, COUNTS)
    assert torch.equal(stage.network.eval()(image).logits, plain)
    f = torch.tensor([0.5, 1.0, 2.0, 4.0])  # powers of two: exact
    network.classifier.scale.data = f
    assert torch.equal(network(image).logits, f.view(-1, 1, 1) * plain)


# --- class-balanced criteria -------------------------------------------------------------------------------


def random_output(target, seed=0):
    logits = torch.randn(len(target), C, *target.shape[1:], generator=torch.Generator().manual_seed(seed)).double()
    return Output(logits.new_zeros(len(target), D, 1, 1), logits)


def class_mean_nll(logits, target):
    nll = pixel_nll(logits, target)
    return torch.stack([nll[target == k].mean() for k in target.unique().tolist() if k != IGNORE_INDEX])


def test_sampling_is_the_mean_of_the_class_means_in_expectation():
    _, target = batch()
    output = random_output(target)
    torch.manual_seed(0)
    criterion = BalancedSampling(C, samples=500)
    draws = torch.stack([criterion(output, target) for _ in range(600)])
    expected = class_mean_nll(output.logits, target).mean()
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(600)
    assert draws.std() < 0.1 * expected
    plain = cross_entropy(output.logits, target)
    assert abs(plain - expected) > 8 * draws.std() / math.sqrt(600)  # or the test could not tell them apart


def test_sampling_draws_every_class_of_the_batch_equally_often():
    _, target = batch()
    logits = torch.zeros(2, C, *target.shape[1:], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    BalancedSampling(C, samples=200_000)(Output(logits, logits), target).backward()
    # at zero logits a pixel drawn m times has the gradient m / M (1/C - 1) at its own class
    own = logits.grad.gather(1, target.clamp(max=C - 1).unsqueeze(1)).squeeze(1) / (1 / C - 1)
    share = torch.stack([own[target == k].sum() for k in range(C)])
    torch.testing.assert_close(share, torch.full((C,), 1 / C).double(), atol=0.005, rtol=0)
    assert not (logits.grad * (target == IGNORE_INDEX).unsqueeze(1)).any()


def test_weights_are_the_mean_of_the_class_means_over_the_training_set():
    target = torch.tensor([0] * 80 + [1] * 15 + [2] * 4 + [3]).view(1, 10, 10)
    counts = ClassCounts(torch.bincount(target.flatten(), minlength=C), torch.ones(C).long())
    output = random_output(target)
    loss = balanced_criterion(counts, "weights")(output, target)
    torch.testing.assert_close(loss, class_mean_nll(output.logits, target).mean())


@pytest.mark.parametrize("balance", ["sampling", "weights"])
def test_a_batch_without_labels_gives_zero_with_a_graph(balance):
    target = torch.full((2, 3, 4), IGNORE_INDEX)
    output = random_output(target)
    output.logits.requires_grad_()
    loss = balanced_criterion(COUNTS, balance, 10)(output, target)
    loss.backward()
    assert loss.item() == 0
    assert not output.logits.grad.any()


# --- tau-normalisation, logit adjustment -------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
def test_tau_normalisation_divides_each_row(kernel):
    network = tiny_network(kernel=kernel)
    weight = network.classifier.weight.detach().clone().double()
    for tau in (0.0, 0.5, 1.0):
        changed = copy.deepcopy(network)
        tau_norm(changed, COUNTS, tau=tau)
        ours = changed.classifier.weight.double()
        assert changed.classifier.bias is None
        for k in range(C):
            norm = math.sqrt(sum(v * v for v in weight[k].flatten().tolist()))
            torch.testing.assert_close(ours[k], weight[k] / norm**tau, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.flatten(1).norm(dim=1), torch.ones(C).double())  # tau 1


def test_tau_zero_without_bias_changes_nothing(network):
    image, _ = batch()
    network.classifier.bias.data.zero_()
    plain = network.eval()(image).logits
    tau_norm(network, COUNTS, tau=0.0)
    assert torch.equal(network(image).logits, plain)


def test_tau_normalisation_keeps_a_weight_of_zeros_finite(network):
    network.classifier.weight.data[2] = 0
    tau_norm(network, COUNTS)
    assert torch.equal(network.classifier.weight[2], torch.zeros(D, 1, 1))


@pytest.mark.parametrize(("tau", "prior"), [(1.0, "pixel"), (-0.5, "pixel"), (1.0, "region")])
def test_posthoc_logit_adjustment_subtracts_tau_log_prior(network, tau, prior):
    image, _ = batch()
    plain = network.eval()(image).logits
    posthoc_logit_adjustment(network, COUNTS, tau=tau, prior=prior)
    sizes = (COUNTS.images if prior == "region" else COUNTS.pixels).tolist()
    offset = torch.tensor([tau * math.log(n / sum(sizes)) for n in sizes])
    torch.testing.assert_close(network(image).logits, plain - offset.view(-1, 1, 1), rtol=1e-5, atol=1e-5)


def test_posthoc_logit_adjustment_turns_the_posterior_into_the_balanced_one(network):
    image, _ = batch()
    posterior = network.eval()(image).logits.double().softmax(1)
    posthoc_logit_adjustment(network, COUNTS)
    balanced = posterior / COUNTS.pixel_share().view(-1, 1, 1)
    balanced = balanced / balanced.sum(1, keepdim=True)
    torch.testing.assert_close(network(image).logits.double().softmax(1), balanced, rtol=1e-4, atol=1e-6)


def test_posthoc_logit_adjustment_of_tau_zero_changes_nothing(network):
    image, _ = batch()
    plain = network.eval()(image).logits
    posthoc_logit_adjustment(network, COUNTS, tau=0.0)
    assert torch.equal(network(image).logits, plain)


@pytest.mark.parametrize("prior", ["pixel", "region"])
def test_posthoc_logit_adjustment_favours_no_class_that_never_occurred(network, prior):
    image, _ = batch()
    network.classifier.bias.data[3] = -2.0
    plain = network.eval()(image).logits
    assert (plain.argmax(1) != 3).all()
    counts = ClassCounts(torch.tensor([5000, 400, 300, 0]), torch.tensor([90, 80, 70, 0]))
    posthoc_logit_adjustment(network, counts, prior=prior)
    found = network(image).logits
    offset = (found - plain).mean((0, 2, 3))
    assert (offset[:2] < offset[1:3]).all(), "the rarer, the more"
    torch.testing.assert_close(offset[3], offset[0])
    assert (found.argmax(1) != 3).all()


# --- total direct effect -----------------------------------------------------------------------------------


def deconfounded(network, alpha):
    (stage,) = tde(network, COUNTS, alpha=alpha)
    batches = [batch(seed=s, images=s + 1) for s in range(2)]
    stage.prepare(batches)
    return batches


@pytest.mark.parametrize("cosine", [False, True])
def test_tde_takes_off_what_the_mean_direction_gives(network, cosine):
    """Of the labelled pixels of all batches, at one position, in sums of products; 0 takes off nothing."""
    if cosine:
        network.classifier = CosineClassifier(D, C, scale=16.0)
    base = copy.deepcopy(network).eval()
    batches = deconfounded(network, 1.5)
    mean = torch.cat([labelled(pixel_features(base, i), t)[0] for i, t in batches]).double().mean(0)
    features = torch.cat([base.features(image) for image, _ in batches]).detach().double()
    x, d = features[1, :, 2, 3].tolist(), (mean / mean.norm()).tolist()
    along = sum(a * b for a, b in zip(x, d, strict=True))
    if cosine:
        along /= math.sqrt(sum(a * a for a in x))  # cos(x, d)
    found = network.eval().classifier(features.float())[1, :, 2, 3].double()
    plain = base.classifier(features.float())[1, :, 2, 3].double()
    for k, w in enumerate(base.classifier.weight.flatten(1).double().tolist()):
        scale = 16 / math.sqrt(sum(a * a for a in w)) if cosine else 1.0
        effect = 1.5 * along * scale * sum(a * b for a, b in zip(w, d, strict=True))
        assert abs(effect) > 1e-3
        assert found[k].item() == pytest.approx(plain[k].item() - effect, abs=1e-5)
    unchanged = copy.deepcopy(base)
    image = deconfounded(unchanged, 0.0)[0][0]
    torch.testing.assert_close(unchanged.eval()(image).logits, base(image).logits)


def test_of_the_mean_direction_nothing_is_left_with_alpha_1(network):
    deconfounded(network, 1.0)
    features = torch.randn(2, D, 3, 4)
    more = features + torch.randn(2, 1, 3, 4) * network.classifier.direction
    torch.testing.assert_close(network.classifier(more), network.classifier(features))


# --- nearest class mean ------------------------------------------------------------------------------------


def pixel_features(network, image):
    """Features at every pixel, (B, D, H, W), by the network's own resizing."""
    with torch.no_grad():
        return network.resize(network.eval().features(image), image)


def labelled(features, target):
    """(pixels, D) and (pixels,) of the labelled ones."""
    valid = target != IGNORE_INDEX
    return features.permute(0, 2, 3, 1)[valid], target[valid]


def test_transposed_resizing_is_the_adjoint(network):
    image, target = batch()
    features = network.eval().features(image).detach()
    ours = transposed_resize(network, image, target, features.new_zeros(2, C, *features.shape[-2:]))
    one_hot = F.one_hot(target.clamp(max=C), C + 1)[..., :C].permute(0, 3, 1, 2).float()
    left = torch.einsum("bkhw,bdhw->kd", one_hot, network.resize(features, image))
    torch.testing.assert_close(torch.einsum("bkhw,bdhw->kd", ours, features), left)
    torch.testing.assert_close(ours.sum((0, 2, 3)), one_hot.sum((0, 2, 3)))


def test_class_means_are_those_of_the_labelled_pixels(network):
    batches = [batch(seed=s) for s in range(3)]
    means, pixels = class_means(network, batches, C + 1)
    features, labels = zip(*(labelled(pixel_features(network, i), t) for i, t in batches), strict=True)
    features, labels = torch.cat(features).double(), torch.cat(labels)
    for k in range(C):
        torch.testing.assert_close(means[k], features[labels == k].mean(0), rtol=1e-5, atol=1e-6)
    assert pixels.round(decimals=3).tolist() == torch.bincount(labels, minlength=C + 1).tolist()
    assert not means[C].any()


def test_nearest_labels_read_the_label_at_each_centre(network):
    image, target = batch()
    features = network.features(image)
    ours = nearest_labels(target, features, network.stride)
    assert ours.shape == (2, 5, 6)  # of 18 x 23, padded to 20 x 24, stride 4
    for r in range(5):
        for c in range(6):
            y, x = 4 * r + 2, 4 * c + 2
            expected = target[:, y, x] if y < 18 and x < 23 else torch.full((2,), IGNORE_INDEX)
            assert torch.equal(ours[:, r, c], expected)
    means, _ = class_means(network, [(image, target)], C, labels="nearest")
    flat, labels = labelled(network.eval().features(image).detach(), ours)
    for k in range(3):
        torch.testing.assert_close(means[k], flat[labels == k].double().mean(0), rtol=1e-5, atol=1e-6)


def test_class_means_leave_the_training_modes_as_they_were(network):
    network.train()
    network.encoder.eval()
    before = [m.training for m in network.modules()], snapshot(network)
    class_means(network, [batch()], C)
    assert [m.training for m in network.modules()] == before[0]
    assert all(same(before[1], network).values())


def test_euclidean_ncm_agrees_with_scikit_learn(network):
    image, target = batch(images=4)
    x, y = labelled(pixel_features(network, image), target)
    reference = NearestCentroid().fit(x.double().numpy(), y.numpy())
    (stage,) = ncm(network, COUNTS, distance="euclidean")
    stage.prepare([(image[:2], target[:2]), (image[2:], target[2:])])
    features = network.eval().features(image)
    flat = features.permute(0, 2, 3, 1).reshape(-1, D).detach()
    ours = network.classifier(features).argmax(1).flatten().numpy()
    assert len(np.unique(ours)) > 1
    assert np.array_equal(ours, reference.predict(flat.double().numpy()))


def test_cosine_ncm_has_the_largest_cosine(network):
    image, target = batch(images=4)
    (stage,) = ncm(network, COUNTS)
    stage.prepare([(image, target)])
    means, _ = class_means(network, [(image, target)], C)
    features = network.eval().features(image).double().detach()
    expected = F.cosine_similarity(features.unsqueeze(1), means[None, :, :, None, None], dim=2)
    torch.testing.assert_close(network.classifier(features).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_ncm_never_predicts_a_class_without_mean_and_keeps_its_precision(distance):
    classifier = NearestMean(D, C, distance)
    x = torch.randn(2, D, 4, 4)
    classifier.set_means(torch.randn(C, D).double(), torch.tensor([True, True, False, True]))
    logits = classifier(x)
    assert (F.interpolate(logits, (16, 16), mode="bilinear").argmax(1) != 2).all()
    assert logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(x), logits)


def test_ncm_needs_labels(network):
    (stage,) = ncm(network, COUNTS)
    for batches in ([], [(batch()[0], torch.full((2, 18, 23), IGNORE_INDEX))]):
        with pytest.raises(UserError, match="no pixel of the training images has a label"):
            stage.prepare(batches)


# --- re-sampling -------------------------------------------------------------------------------------------


def test_repeat_factors_by_hand():
    presence = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    # shares 7/8, 1/4, 1/8
    expected = [1, math.sqrt(2), 1, 2, 1, 1, 1, 1]
    torch.testing.assert_close(repeat_factors(presence, threshold=0.5), torch.tensor(expected).double())
    assert torch.equal(repeat_factors(presence, threshold=0.125), torch.ones(8).double())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1.0))
def test_repeat_factors_agree_with_loops(seed, threshold):
    rng = np.random.default_rng(seed)
    histogram = rng.integers(0, 50, (12, 5)) * (rng.random((12, 5)) < rng.random(5))
    expected = []
    for row in histogram:
        factors = [1.0]
        for k, pixels in enumerate(row):
            if pixels:
                share = sum(1 for other in histogram if other[k]) / len(histogram)
                factors.append(max(1.0, math.sqrt(threshold / share)))
        expected.append(max(factors))
    ours = repeat_factors(torch.from_numpy(histogram), threshold=threshold)
    torch.testing.assert_close(ours, torch.tensor(expected).double())


def test_repeat_factor_is_cross_entropy_on_images_weighted_by_their_factors(network):
    _, target = batch()
    output = random_output(target)
    (stage,) = repeat_factor(network, COUNTS, threshold=0.5)
    assert torch.equal(stage.criterion(output, target), cross_entropy(output.logits, target))
    presence = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(stage.sampling(presence), repeat_factors(presence, threshold=0.5))
    # LVIS: up to sqrt(100) = 10 times for a class in one of 100 000 images; here in one of 400
    presence = torch.zeros(400, 2, dtype=torch.bool)
    presence[:, 0] = presence[7, 1] = True
    expected = torch.ones(400).double()
    expected[7] = 10
    (stage,) = repeat_factor(network, COUNTS)
    torch.testing.assert_close(stage.sampling(presence), expected)
    assert crt(network, COUNTS)[0].sampling is None


def test_repeated_images_bring_a_rare_class_to_the_square_root_of_its_share():
    presence = torch.zeros(100, 2, dtype=torch.bool)
    presence[:, 0] = presence[:4, 1] = True  # in 4 %
    weights = repeat_factors(presence, threshold=1.0)
    order = BatchOrder(range(100), 8, 0, start=0, stop=2000, weights=weights)
    drawn = torch.tensor([i for step in order for i in step])
    expected = 4 * 5 / (4 * 5 + 96)
    share = presence[drawn, 1].double().mean().item()
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / len(drawn))


@pytest.mark.parametrize("labelled", [None, 5])
def test_training_draws_the_labelled_images_by_their_factors(folder, monkeypatch, labelled):
    root = folder(train=8, test=1, classes=8, size=(16, 24))  # six patches: no image has all classes
    e = Experiment(
        dataset=str(root), architecture="Linknet", encoder="tu-mobilenetv3_small_050", batch_size=2, steps=5,
        method="repeat_factor", hyper={"threshold": 0.9}, labelled_images=labelled,
        ema_decay=0.5 if labelled else None, checkpoint_every=1,
    )  # fmt: skip
    orders, loader = [], train.loader

    def spy(dataset, order, **options):
        orders.append(list(order))
        return loader(dataset, order, **options)

    monkeypatch.setattr(train, "loader", spy)
    train.fit(e)
    whole = data.load(str(root), "train")
    images = train._shares(e, 8)[0]
    weights = repeat_factors(stats.class_presence(Subset(whole, images)), threshold=0.9)
    assert len(weights.unique()) > 1
    assert orders[0] == list(BatchOrder(images, 2, e.seed, start=0, stop=5, weights=weights))
    assert len(orders) == (2 if labelled else 1)


def test_keep_rates_equalise_the_expected_counts():
    assert torch.equal(keep_rates(COUNTS) * COUNTS.pixels, torch.full((C,), 10.0).double())
    torch.testing.assert_close(keep_rates(COUNTS, 0.5), torch.tensor([850 / 8000, 850 / 1500, 1, 1]).double())
    assert torch.equal(keep_rates(COUNTS, 1.0), torch.ones(C).double())
    absent = ClassCounts(torch.tensor([100, 10, 0]), torch.tensor([2, 1, 0]))
    torch.testing.assert_close(keep_rates(absent), torch.tensor([0.1, 1.0, 1.0]).double())
    with pytest.raises(ValueError, match="no class has a pixel"):
        keep_rates(ClassCounts(torch.zeros(2).long(), torch.zeros(2).long()))


def test_masking_keeps_each_class_at_its_rate_and_ignores_the_rest():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, C, (4, 300, 300), generator=g)
    target[:, :50] = IGNORE_INDEX
    before = target.clone()
    keep = torch.tensor([0.05, 0.4, 1.0, 0.0])
    masked = mask_pixels(target, keep, generator=g)
    assert torch.equal(target, before)
    assert masked.dtype == target.dtype
    assert ((masked == target) | (masked == IGNORE_INDEX)).all()
    for k, rate in enumerate(keep.tolist()):
        n = (target == k).sum().item()
        share = ((masked == k).sum() / n).item()
        assert abs(share - rate) <= 4 * math.sqrt(rate * (1 - rate) / n)
    again = mask_pixels(target, keep, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again, mask_pixels(target, keep, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(again, masked)


def test_undersampling_is_cross_entropy_of_the_kept_pixels(network):
    _, target = batch()
    output = random_output(target)
    (stage,) = undersampling(network, COUNTS, quantile=1.0)
    torch.testing.assert_close(stage.criterion(output, target), cross_entropy(output.logits, target))
    (stage,) = undersampling(network, COUNTS, quantile=0.5)
    torch.manual_seed(3)
    ours = stage.criterion(output, target)
    torch.manual_seed(3)
    kept = mask_pixels(target, keep_rates(COUNTS, 0.5))
    assert 0 < (kept != IGNORE_INDEX).sum() < (target != IGNORE_INDEX).sum()
    torch.testing.assert_close(ours, cross_entropy(output.logits, kept))
    before = snapshot(stage.network)
    train_steps(stage)
    assert not any(same(before, stage.network)[name] for name in ("encoder.0.weight", "classifier.weight"))
    assert stage.criterion(output, torch.full_like(target, IGNORE_INDEX)).item() == 0


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (crt, {"balance": "sample"}, "balance must be 'sampling' or 'weights', got 'sample'"),
        (crt, {"balanc": "weights"}, "did you mean 'balance'"),
        (balanced_bound, {"tau": 1.0}, "unknown hyper-parameter 'tau': choose one of split"),
        (crt, {"samples": 0}, "samples must be >= 1, got 0"),
        (lws, {"balance": "none"}, "got 'none'"),
        (lws, {"samples": -5}, "got -5"),
        (tau_norm, {"tau": -0.5}, "tau must be >= 0, got -0.5"),
        (tau_norm, {"tau": math.inf}, "got inf"),
        (posthoc_logit_adjustment, {"tau": math.nan}, "tau must be float, got nan"),
        (posthoc_logit_adjustment, {"tau": math.inf}, "tau must be finite, got inf"),
        (posthoc_logit_adjustment, {"prior": "pixels"}, "prior must be 'pixel' or 'region', got 'pixels'"),
        (tde, {"alpha": math.inf}, "alpha must be finite, got inf"),
        (ncm, {"distance": "cosin"}, "distance must be 'cosine' or 'euclidean', got 'cosin'"),
        (ncm, {"labels": "neares"}, "labels must be 'exact' or 'nearest', got 'neares'"),
        (undersampling, {"quantile": 1.5}, r"quantile must be in \[0, 1\], got 1.5"),
        (repeat_factor, {"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0"),
        (repeat_factor, {"threshold": 1.1}, r"threshold must be in \(0, 1\], got 1.1"),
    ],
)
def test_options_out_of_range_are_refused_before_the_network_is_touched(network, build, options, message):
    before = snapshot(network)
    with pytest.raises(UserError, match=message):
        build(network, COUNTS, **options)
    assert all(same(before, network).values())


def test_other_refusals(network):
    with pytest.raises(UserError, match="needs a linear classifier, got CosineClassifier"):
        network.classifier = CosineClassifier(D, C)
        tau_norm(network, COUNTS)
    with pytest.raises(UserError, match=r"threshold must be in \(0, 1\], got 0"):
        repeat_factors(torch.ones(2, 2), threshold=0.0)
    with pytest.raises(UserError, match="did you mean 'sampling'"):
        balanced_criterion(COUNTS, "sample")
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        NearestMean(D, C, "cosin")
    with pytest.raises(ValueError, match=r"\(N, C\).*\(3,\)"):
        repeat_factors(torch.ones(3), threshold=0.5)


# --- a cosine base -----------------------------------------------------------------------------------------


def test_every_correction_runs_on_a_finished_run_with_a_cosine_classifier(folder):
    base = Experiment(
        dataset=str(folder(train=4, test=2, size=(32, 32))), architecture="Linknet",
        encoder="tu-mobilenetv3_small_050", batch_size=2, steps=4, lr=1e-2,
        model_options={"classifier": "cosine", "scale": 20, "learn_scale": True},
    )  # fmt: skip
    finished = train.fit(base).network().classifier
    assert isinstance(finished, CosineClassifier)
    assert 0 < abs(finished.scale.item() - 20) < 1
    found = {}
    for method in ("disalign", "crt", "lws", "balanced_bound", "posthoc_logit_adjustment", "ncm", "tde"):
        network = train.fit(dataclasses.replace(base, method=method)).network()
        found[method] = network.network.classifier if method == "disalign" else network.classifier
    kept = [found["disalign"], found["lws"].base, found["posthoc_logit_adjustment"].base, found["tde"].base]
    assert all(torch.equal(classifier.weight, finished.weight) for classifier in kept)
    for name in ("crt", "balanced_bound"):
        assert isinstance(found[name], CosineClassifier)
        assert not torch.equal(found[name].weight, finished.weight)
    assert isinstance(found["ncm"], NearestMean)
    with pytest.raises(UserError, match="needs a linear classifier, got CosineClassifier"):
        train.fit(dataclasses.replace(base, method="tau_norm"))


def test_an_auxiliary_head_of_the_base_is_frozen_too():
    from ltseg_core.models import build_model

    network = build_model("Linknet", "tu-mobilenetv3_small_050", C, auxiliary=True)
    (stage,) = crt(network, COUNTS, balance="weights")
    before = snapshot(network.auxiliary)
    train_steps(stage, steps=1, decay=0.1)
    assert all(same(before, network.auxiliary).values())
