"""From a network to logits and labels at the label's own size."""

import numpy as np
import torch
import torch.nn.functional as F
from tiny import C, tiny_network

from ltseg_core import evaluate
from ltseg_core.data.base import SegmentationDataset


class Pictures(SegmentationDataset):
    """Two sizes of image; the labels of every third are twice as large."""

    name, split, classes, palette = "pictures", "test", tuple("abcd"), np.zeros((4, 3), np.uint8)

    def __init__(self):
        self.names = [str(i) for i in range(7)]

    def sample(self, index):
        rng = np.random.default_rng(index)
        height, width = (16, 24) if index < 4 else (20, 12)
        grow = 2 if index % 3 == 0 else 1
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return image, rng.integers(0, C, (grow * height, grow * width), dtype=np.uint8)


def test_logits_are_the_network_s_at_the_size_of_the_label():
    network, dataset = tiny_network().train(), Pictures()
    found = list(evaluate.logit_maps(network, dataset, range(7), batch_size=3))
    assert network.training, "the network must be as it was"
    assert len(found) == 7
    network.eval()
    for i, (logits, label) in enumerate(found):
        image, expected_label = dataset[i]
        with torch.no_grad():
            own = network(image[None] / 255).logits
        own = F.interpolate(own, expected_label.shape, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(logits, own)
        assert logits.dtype == torch.float32
        assert torch.equal(label, expected_label)


def test_predictions_are_the_largest_logits_and_the_first_of_equals():
    network, dataset = tiny_network(), Pictures()
    maps, predictions = (list(f(network, dataset, range(7))) for f in (evaluate.logit_maps, evaluate.predictions))
    assert len(maps) == 7
    for (logits, _), (predicted, _) in zip(maps, predictions, strict=True):
        assert torch.equal(predicted.long(), logits.argmax(0))
        assert predicted.dtype == torch.uint8
    assert any(predicted.any() for predicted, _ in predictions)
    torch.nn.init.zeros_(network.classifier.weight)
    torch.nn.init.constant_(network.classifier.bias, 1.0)
    assert not any(predicted.any() for predicted, _ in evaluate.predictions(network, dataset, range(7)))


def test_what_is_read_of_the_output_can_be_chosen():
    network, dataset = tiny_network(), Pictures()
    twice = list(evaluate.logit_maps(network, dataset, [1, 2], read=lambda o: torch.cat([o.logits, -o.logits], 1)))
    assert len(twice) == 2
    for (both, _), (logits, _) in zip(twice, evaluate.logit_maps(network, dataset, [1, 2]), strict=True):
        assert torch.equal(both, torch.cat([logits, -logits]))


def test_a_tally_counts_every_rule_in_one_pass():
    network, dataset = tiny_network(), Pictures()
    maps = list(evaluate.logit_maps(network, dataset, range(7)))
    rules = {
        "largest": lambda z, y: z.max(1).indices,
        "second": lambda z, y: z.topk(2, 1).indices[:, 1],
        "told": lambda z, y: y.long(),
    }
    found = evaluate.tally(iter(maps), rules, C)
    np.testing.assert_array_equal(found["largest"], evaluate.confusion(network, dataset).numpy())
    for i, (logits, label) in enumerate(maps):
        second = logits.topk(2, 0).indices[1]
        for k, j in np.ndindex(C, C):
            assert found["second"][i, k, j] == ((label == k) & (second == j)).sum()
        np.testing.assert_array_equal(found["told"][i], np.diag(np.bincount(label.flatten(), minlength=C)))
