"""CLAN: its loss against sums over pixels, what each part of it trains, and training with images without labels."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny import COUNTS, C, batch, tiny_network
from torch.nn import functional as F

from ltseg_core import data, evaluate, train
from ltseg_core.config import Experiment, UserError
from ltseg_core.losses import cross_entropy
from ltseg_core.methods import clan
from ltseg_core.methods.medoe import ExpertOutput
from ltseg_core.train import Learner

SIZE = (32, 36)


def outputs(seed=0):
    """What the network gave for labelled images and others, float64 leaves."""
    torch.manual_seed(seed)
    pairs = torch.randn(2, 2, 2, C, *SIZE, dtype=torch.float64).requires_grad_()
    return pairs, [ExpertOutput(pair[0], pair[0] + pair[1], (pair[0], pair[1])) for pair in pairs]


def alignment(**options):
    (stage,) = clan.build(tiny_network(), COUNTS, **options)
    return stage.align.double(), stage.network.double()


def classifiers(network):
    return network.network.classifier, network.second


def grads(loss, tensors):
    found = torch.autograd.grad(loss, list(tensors), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def of_network(align, others):
    """lambda_adv L_adv without damping, from its definition."""
    judged = align.discriminator(others.logits.softmax(1))
    sure = F.interpolate(judged, SIZE, mode="bilinear").sigmoid()[:, 0]
    p1, p2 = (z.softmax(1) for z in others.experts)
    weight = align.epsilon + align.lambda_local * (1 - F.cosine_similarity(p1, p2, dim=1))
    return -align.lambda_adv * (weight * (1 - sure).log()).mean()


@pytest.mark.parametrize(("progress", "damping"), [(0.0, True), (0.3, True), (0.3, False)])
def test_the_loss_is_that_of_the_paper(progress, damping):
    """In the probabilities of the discriminator and pixel by pixel; before `preheat` every pixel weighs 1."""
    align, network = alignment(lambda_adv=0.7, lambda_weight=0.3, lambda_local=5.0, epsilon=0.2, damping=damping)
    align.progress = progress
    _, (labelled, others) = outputs()

    def sure(output):  # D, of each pixel
        judged = align.discriminator(output.logits.softmax(1))
        return F.interpolate(judged, SIZE, mode="bilinear").sigmoid()[:, 0].flatten().tolist()

    p1, p2 = (z.softmax(1).movedim(1, -1).flatten(0, 2).tolist() for z in others.experts)
    fooled = told = 0.0
    for a, b, d in zip(p1, p2, sure(others), strict=True):
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        weight = 0.2 + 5 * (1 - cosine) if progress else 1.0
        fooled -= weight * math.log(1 - d) / len(p1)
        told -= weight * math.log(d) / len(p1)
    told -= sum(math.log(1 - d) for d in sure(labelled)) / len(p1)
    w1, w2 = (torch.cat([c.weight.flatten(), c.bias]) for c in classifiers(network))
    factor = 1 - progress if damping else 1.0
    expected = factor * (0.3 * (w1 @ w2 / (w1.norm() * w2.norm())).item() + 0.7 * fooled) + told
    assert align(labelled, others).item() == pytest.approx(expected, rel=1e-9)


def test_the_network_fools_and_the_discriminator_does_not_help_it():
    """Of lambda_adv L_adv the discriminator has no gradient, of L_D nothing but the discriminator has one."""
    torch.manual_seed(1)
    align, network = alignment(lambda_adv=0.5, lambda_weight=0.0, preheat=0.0)
    alone, _ = alignment(lambda_adv=0.0, lambda_weight=0.0, preheat=0.0)
    alone.load_state_dict(align.state_dict())
    pairs, given = outputs()
    own, without = (grads(a(*given), [*a.discriminator.parameters(), pairs]) for a in (align, alone))
    assert all(torch.equal(a, b) for a, b in zip(own[:-1], without[:-1], strict=True))
    assert min(g.abs().max() for g in own[:-1]) > 0
    assert without[-1].eq(0).all()
    assert own[-1][0].eq(0).all(), "nor is a labelled image changed to fool it"
    others = given[1]
    (expected,) = grads(of_network(align, others), [pairs])
    torch.testing.assert_close(own[-1], expected)  # through the weights M_u, too
    weights = [c.weight for c in classifiers(network)]
    assert all(g.eq(0).all() for g in grads(align(*given), weights))
    apart, network = alignment(lambda_weight=0.5)
    weights = [c.weight for c in classifiers(network)]
    step = grads(apart(*given), weights)
    before = F.cosine_similarity(*(w.flatten() for w in weights), dim=0)
    after = F.cosine_similarity(*((w - 0.1 * g).flatten() for w, g in zip(weights, step, strict=True)), dim=0)
    assert after < before, "a step keeps the classifiers apart"


def test_two_classifiers_read_one_decoder_and_their_logits_are_added():
    (stage,) = clan.build(tiny_network(), COUNTS)
    image, target = batch(size=(32, 36))
    network = stage.network.eval()
    output = network(image)
    first, second = classifiers(network)
    assert not torch.equal(first.weight, second.weight)
    features = network.network.features(image)
    for classifier, logits in zip((first, second), output.experts, strict=True):
        torch.testing.assert_close(network.network.resize(classifier(features), image), logits)
    torch.testing.assert_close(output.logits, sum(output.experts))
    both = sum(cross_entropy(z, target) for z in output.experts)
    torch.testing.assert_close(Learner(stage)(image, target), both)
    pseudo = torch.full_like(target, 255)
    torch.testing.assert_close(
        Learner(stage)(image, target, (image, pseudo, 0.0)), both + stage.align(output, network(image))
    )


def test_the_discriminator_has_its_own_learning_rate(folder):
    (stage,) = clan.build(tiny_network(), COUNTS, discriminator_lr=0.2)
    optimizer = train.build_optimizer(Learner(stage), Experiment(lr=0.1, encoder_lr_factor=0.5))
    peaks = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert len(peaks) == len(list(Learner(stage).parameters())), "every parameter once"
    for name, parameter in Learner(stage).named_parameters():
        factor = 0.2 if "discriminator" in name else 0.5 if "encoder" in name else 1
        assert peaks[id(parameter)] == pytest.approx(0.1 * factor), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_adv": -1.0}, "lambda_adv must be >= 0, got -1"),
        ({"lambda_local": math.inf}, "lambda_local must be >= 0, got inf"),
        ({"preheat": 1.5}, r"preheat must be in \[0, 1\], got 1.5"),
        ({"epsilom": 1.0}, "did you mean 'epsilon'"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        clan.build(tiny_network(), COUNTS, **options)


def test_small_images_are_refused():
    align, _ = alignment()
    small = ExpertOutput(*[torch.rand(1, C, 31, 40)] * 2, (torch.rand(1, C, 31, 40),) * 2)
    with pytest.raises(UserError, match="at least 32x32 pixels, got 31x40"):
        align(small, small)


def test_training_needs_images_without_labels_and_uses_them(folder):
    e = Experiment(
        dataset=str(folder(train=6, val=2, test=2)), architecture="Linknet", encoder="tu-mobilenetv3_small_050",
        batch_size=2, steps=4, lr=1e-2, method="clan", checkpoint_every=2,
    )  # fmt: skip
    for refuse in (train.fit, lambda e: train.fit_all([dataclasses.replace(e, method="ce"), e], jobs=1)):
        with pytest.raises(UserError, match="clan learns from images without labels, too: set target or"):
            refuse(e)
    few = dataclasses.replace(e, labelled_images=2, ema_decay=0.5, unlabelled_weight=0.0)
    with pytest.raises(UserError, match="class_mix would paste labelled pixels into what clan takes"):
        train.fit(dataclasses.replace(few, class_mix=True))
    run = train.fit(few)
    assert np.isfinite(run.history["value"]).all()
    test = data.load(e.dataset, "test")
    assert np.array_equal(evaluate.confusion(run.network(), test).numpy(), run.confusion("test"))
    assert not [name for name in run.weights() if "discriminator" in name]
    alone = train.fit(dataclasses.replace(few, hyper={"lambda_adv": 0.0}))
    assert not torch.equal(*(r.weights()["network.encoder.model.conv_stem.weight"] for r in (run, alone))), (
        "they had a say"
    )


def test_the_loop_tells_how_far_it_is(folder, monkeypatch):
    seen, forward = [], clan.CategoryAlignment.forward
    monkeypatch.setattr(
        clan.CategoryAlignment, "forward", lambda self, *a: seen.append(self.progress) or forward(self, *a)
    )
    train.fit(
        Experiment(
            dataset=str(folder(train=4, val=1, test=1)), architecture="Linknet", encoder="tu-mobilenetv3_small_050",
            batch_size=2, steps=5, method="clan", labelled_images=2, ema_decay=0.5,
        )
    )  # fmt: skip
    assert seen == [0, 0.25, 0.5, 0.75, 1]


def test_the_discriminator_is_clipped_apart_from_the_network():
    """Its gradients, of which lambda_local makes more, change nothing of a network that does not ask it."""
    (image, target), networks = batch(size=SIZE), []
    e = Experiment(lr=0.1, optimizer="sgd", clip_norm=0.01)
    for local in (0.0, 100.0):
        torch.manual_seed(0)
        (stage,) = clan.build(tiny_network(), COUNTS, lambda_adv=0.0, lambda_local=local, preheat=0.0)
        learner = Learner(stage)
        optimizer = train.build_optimizer(learner, e)
        train.optimise(learner, optimizer, e, image, target, (image, target, 0.0))
        parts = (learner.network, learner.align)
        norms = [math.hypot(*(p.grad.norm() for p in part.parameters())) for part in parts]
        assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
        networks.append(learner.network.state_dict())
    assert all(torch.equal(networks[0][name], tensor) for name, tensor in networks[1].items())
