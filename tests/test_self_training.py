"""Pseudo-labels, which of them are used, and what is pasted onto their images."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from ltseg_core.config import IGNORE_INDEX, UserError
from ltseg_core.self_training import class_mix, most_confident, pseudo_labels, update_teacher


def test_teacher_is_the_closed_form_average():
    student = nn.BatchNorm1d(3)
    teacher = copy.deepcopy(student)
    expected = student.weight.detach().clone()
    for step in range(1, 6):
        nn.init.constant_(student.weight, float(step))
        student.num_batches_tracked += 1
        update_teacher(teacher, student, 0.8)
        expected = 0.8 * expected + 0.2 * step
    assert torch.allclose(teacher.weight, expected)
    assert teacher.num_batches_tracked == 5


def test_pseudo_labels():
    logits = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # p = (.5, .5) and (.88, .12)
    inside = torch.zeros(1, 1, 2, dtype=torch.long)
    confidence, label = pseudo_labels(logits, inside, 0.0)
    assert label.tolist() == [[[0, 0]]]
    assert confidence.flatten().tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert pseudo_labels(logits, inside, 0.6)[1].tolist() == [[[255, 0]]]
    assert pseudo_labels(logits, torch.full_like(inside, 255), 0.0)[1].tolist() == [[[255, 255]]]


@pytest.mark.parametrize("prior", [None, torch.tensor([0.5, 0.2, 0.25, 0.05, 0])])
def test_the_most_confident_pseudo_labels_of_each_class(prior):
    """Against a loop; class 3 has fewer than are wanted, class 4 none; of equals the first in `order`."""
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 6, 7))
    label[0, 0, 0], label[1, 2:4, 1:4] = 3, IGNORE_INDEX
    confidence, order = torch.rand(2, 6, 7).mul(8).round().div(8), torch.randperm(84)  # ties
    chosen = most_confident(confidence, label, 5, 0.6, prior, order)
    pixels, places = (label != IGNORE_INDEX).sum(), order.argsort().view_as(label)
    for k in range(5):
        own = sorted((label == k).nonzero().tolist(), key=lambda u: (-confidence[tuple(u)], places[tuple(u)]))
        wanted = math.ceil(round(0.6 * (len(own) if prior is None else float(prior[k]) * int(pixels)), 4))
        assert sorted(own[:wanted]) == (chosen == k).nonzero().tolist()
    assert ((chosen == label) | (chosen == IGNORE_INDEX)).all()
    assert torch.equal(most_confident(confidence, label, 5, 1.0, None, order), label), "all of each class are all"


def test_class_mix_pastes_the_classes_of_the_lowest_scores():
    """Against a loop over pixels: of three classes two, of four two, of one that one, of none nothing."""
    torch.manual_seed(0)
    label = torch.randint(0, 4, (4, 5, 7))
    label[0][label[0] == 2] = 255  # three classes and pixels without one
    label[2], label[3] = 1, 255
    image, onto, onto_label = torch.rand(4, 3, 5, 7), torch.rand(4, 3, 5, 7), torch.randint(4, 8, (4, 5, 7))
    score = torch.rand(4, 6)
    mixed, mixed_label = class_mix(image, label, onto, onto_label, score)
    for b in range(4):
        present = sorted(set(label[b].ravel().tolist()) - {255}, key=lambda k: score[b, k])
        pasted = present[: math.ceil(len(present) / 2)]
        assert len(pasted) == [2, 2, 1, 0][b]
        for y, x in itertools.product(range(5), range(7)):
            here = int(label[b, y, x]) in pasted
            assert mixed_label[b, y, x] == (label if here else onto_label)[b, y, x]
            assert mixed[b, :, y, x].equal((image if here else onto)[b, :, y, x])


def test_class_mix_needs_images_of_one_size():
    image, onto = torch.zeros(1, 3, 4, 6), torch.zeros(1, 3, 5, 6)
    with pytest.raises(UserError, match="images of one size, got 4x6 and 5x6: set size or crop"):
        class_mix(image, image[:, 0].long(), onto, onto[:, 0].long(), torch.rand(1, 2))
