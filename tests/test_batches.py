"""Order, collation and augmentation of training batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltseg_core import data
from ltseg_core.data import batches
from ltseg_core.data.base import Subset
from ltseg_core.data.batches import Batch, BatchOrder, Draw, augment, collate, draw, generator, recolour, unlabelled


def plain_draw(count, *, zoom=1.0, flip=0.0, place=0.0):
    return Draw(
        torch.full((count,), zoom), torch.full((count, 2), place), torch.full((count,), flip), torch.ones(count, 3)
    )


def pictures(count=3, height=12, width=20, seed=0):
    source = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (count, 3, height, width), generator=source, dtype=torch.uint8)
    label = torch.randint(0, 5, (count, height, width), generator=source, dtype=torch.uint8)
    label[:, 0, 0] = 255
    return Batch(image, label, torch.tensor([[height, width]] * count))


def test_without_change_augmentation_is_the_identity():
    batch = pictures()
    image, target = augment(batch, plain_draw(3), None)
    assert torch.allclose(image, batch.image / 255, atol=1e-6)
    assert torch.equal(target, batch.label.long())


def test_flip_mirrors_image_and_label_together():
    batch = pictures()
    image, target = augment(batch, plain_draw(3, flip=1.0), None)
    assert torch.allclose(image, batch.image.flip(-1) / 255, atol=1e-5)
    assert torch.equal(target, batch.label.flip(-1).long())


def test_integer_zoom_repeats_pixels_and_crop_selects_the_window():
    batch = pictures()
    _, target = augment(batch, plain_draw(3, zoom=2.0), None)
    whole = batch.label.long().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(target, whole[:, :12, :20])  # place 0: the upper left window
    _, target = augment(batch, plain_draw(3, zoom=2.0, place=1.0), (6, 8))
    assert torch.equal(target, whole[:, -6:, -8:])


def test_outside_is_ignored_and_black():
    batch = pictures(3, 12, 21)
    image, target = augment(batch, plain_draw(3, zoom=1 / 3), None)
    assert (target[:, 4:] == 255).all()
    assert (target[:, :, 7:] == 255).all()
    assert (image[:, :, 5:] == 0).all()
    # the middle of every 3 x 3 block, with no new class values from interpolation
    assert torch.equal(target[:, :4, :7], batch.label[:, 1::3, 1::3].long())


def test_image_and_label_stay_aligned():
    batch = pictures(4, 24, 32)
    label = torch.arange(24 * 32).view(24, 32) // 100
    batch = Batch(label.to(torch.uint8).repeat(4, 3, 1, 1) * 20, label.to(torch.uint8).repeat(4, 1, 1), batch.sizes)
    chosen = draw(4, generator(1), scale_range=(1.0, 2.0), flip=0.5, colour=0.0)
    image, target = augment(batch, chosen, (16, 16))
    flat = torch.nn.functional.avg_pool2d(target.float(), 3, 1, 1) == target  # away from label borders
    assert flat.float().mean() > 0.3
    assert torch.allclose(image[:, 0][flat] * 255 / 20, target[flat].float(), atol=0.01)


def test_padded_pixels_never_enter_through_flip_or_place():
    small, large = torch.full((3, 6, 8), 200, dtype=torch.uint8), torch.full((3, 10, 12), 100, dtype=torch.uint8)
    batch = collate([(small, torch.ones(6, 8, dtype=torch.uint8)), (large, torch.ones(10, 12, dtype=torch.uint8))])
    assert batch.image.shape == (2, 3, 10, 12)
    assert (batch.label[0, 6:] == 255).all()
    assert (batch.label[0, :, 8:] == 255).all()
    _, target = augment(batch, plain_draw(2, flip=1.0), (6, 8))
    assert (target == 1).all()


def test_a_batch_without_labels_knows_its_padding():
    items = [
        (torch.zeros(3, h, w, dtype=torch.uint8), torch.full((h, w), 255, dtype=torch.uint8))
        for h, w in ((4, 6), (5, 3))
    ]
    label = unlabelled(collate(items)).label
    assert label.dtype == torch.uint8
    expected = torch.full((2, 5, 6), 255)
    expected[0, :4, :6] = expected[1, :5, :3] = 0
    assert torch.equal(label.long(), expected)


def test_ignore_label_survives_resampling():
    batch = pictures()
    batch = batch._replace(label=torch.full_like(batch.label, 255))
    _, target = augment(batch, draw(3, generator(0), scale_range=(0.5, 2), flip=0.5, colour=0.5), (9, 9))
    assert (target == 255).all()


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_generators_depend_on_the_whole_key(a, b):
    one, same, swapped = generator(a, b), generator(a, b), generator(b, a)
    assert one.initial_seed() == same.initial_seed()
    assert a == b or one.initial_seed() != swapped.initial_seed()


def test_recolour_closed_forms():
    image = torch.rand(2, 3, 5, 5) * 0.4 + 0.2
    ones = torch.ones(2, 3)
    assert torch.allclose(recolour(image, ones), image, atol=1e-6)
    assert torch.allclose(recolour(image, ones * torch.tensor([1.5, 1, 1])), image * 1.5, atol=1e-6)
    grey = recolour(image, ones * torch.tensor([1, 1, 0.0]))
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)
    flat = recolour(image, ones * torch.tensor([1, 0.0, 1]))
    luma = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))
    assert torch.allclose(
        (flat * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2)), luma, atol=1e-5
    )


def test_draw_ranges():
    chosen = draw(2000, generator(0), scale_range=(0.5, 2.0), flip=0.25, colour=0.2)
    assert 0.5 <= chosen.zoom.min() < 0.51
    assert 1.99 < chosen.zoom.max() <= 2.0
    assert 0.2 < chosen.flip.mean() < 0.3
    assert (chosen.colour - 1).abs().max() <= 0.2


@settings(max_examples=30)
@given(st.integers(1, 13), st.integers(1, 5), st.integers(1, 20))
def test_order_visits_every_image_once_per_epoch(images, batch_size, steps):
    order = BatchOrder(range(images), batch_size, 3, start=0, stop=steps)
    seen = [i for batch in order for i in batch]
    assert len(seen) == steps * batch_size
    for epoch in range(len(seen) // images):
        assert sorted(seen[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_order_can_start_anywhere_and_be_shared():
    whole = list(BatchOrder(range(10), 4, 0, start=0, stop=9))
    assert list(BatchOrder(range(10), 4, 0, start=5, stop=9)) == whole[5:]
    parts = [list(BatchOrder(range(10), 4, 0, start=0, stop=9, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert list(BatchOrder(range(10), 4, 1, start=0, stop=9)) != whole


WEIGHTS = torch.tensor([1.0, 4.0, 0.0, 2.5, 1.0], dtype=torch.float64)


def test_weighted_order_draws_in_proportion_to_the_weights():
    indices, steps, batch_size = [10, 11, 12, 13, 14], 1500, 4
    order = BatchOrder(indices, batch_size, 3, start=0, stop=steps, weights=WEIGHTS)
    assert len(order) == steps
    drawn = np.bincount([i - 10 for batch in order for i in batch], minlength=5)
    n, share = steps * batch_size, (WEIGHTS / WEIGHTS.sum()).numpy()
    assert drawn.sum() == n
    assert drawn[2] == 0
    assert (np.abs(drawn - n * share) <= 4 * np.sqrt(n * share * (1 - share))).all()
    assert max(len(batch) - len(set(batch)) for batch in order) > 0  # with replacement


def test_weighted_order_can_start_anywhere_and_be_shared():
    def order(seed=0, **span):
        return list(BatchOrder(range(5), 4, seed, **{"start": 0, "stop": 9} | span, weights=WEIGHTS))

    whole = order()
    assert order(start=5) == whole[5:]
    assert order(stop=20)[:9] == whole  # a function of the step, not of what comes after
    assert [a + b for a, b in zip(order(rank=0, world=2), order(rank=1, world=2), strict=True)] == whole
    assert order(1) != whole
    assert list(BatchOrder(range(5), 4, 0, start=0, stop=9, weights=8 * WEIGHTS)) == whole  # only their ratios count
    assert len({tuple(batch) for batch in whole}) > 5


def test_weights_must_match_the_images():
    with pytest.raises(ValueError, match=r"expected weights of shape \(3,\), got \(5,\)"):
        BatchOrder(range(3), 2, 0, start=0, stop=1, weights=WEIGHTS)


@pytest.mark.parametrize("crop", [None, (7, 9)])
def test_zoom_matches_pil_on_smooth_images(crop):
    from PIL import Image

    y, x = np.mgrid[0:24, 0:32]
    smooth = (4 * y + 3 * x + 20).astype(np.uint8)
    image = torch.from_numpy(smooth).repeat(1, 3, 1, 1)
    batch = Batch(image, torch.zeros(1, 24, 32, dtype=torch.uint8), torch.tensor([[24, 32]]))
    ours, _ = augment(batch, plain_draw(1, zoom=2.0), crop)
    other = np.asarray(Image.fromarray(smooth).resize((64, 48), Image.Resampling.BILINEAR), dtype=np.float32)
    h, w = ours.shape[-2:]
    # inside: at the border PIL repeats edge pixels, grid_sample mixes in the black outside
    assert np.abs(ours[0, 0, 2:, 2:].numpy() * 255 - other[2:h, 2:w]).max() < 1.01


def test_what_was_drawn_once_is_kept_as_long_as_the_data_set():
    import gc

    first, again = (data.load("scenes", "val", images=8, size=[48, 64]) for _ in range(2))
    assert first is again
    assert first is not data.load("scenes", "val", images=8, size=[48, 64], seed=1)
    held = batches.in_memory_if_small(first)
    assert batches.in_memory_if_small(again) is held
    assert torch.equal(held[3][0], first[3][0])
    assert first.evenly_spaced(3) is again.evenly_spaced(3)
    assert first.evenly_spaced(3).names == [first.names[i] for i in (0, 4, 7)]
    short = Subset(first, [0, 1])
    batches.in_memory_if_small(short)
    gc.collect()  # what other tests left
    before = len(batches._IN_MEMORY)
    del short
    gc.collect()
    assert len(batches._IN_MEMORY) == before - 1
