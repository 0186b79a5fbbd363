"""What happens to an image follows from pass and number; a batch is varied as each image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rankwise.data import AUGMENTS, Split, batches, load
from rankwise.images import variation
from rankwise.images.variation import boxes, draws, shifted
from rankwise.training import Recipe

KINDS = [name for name, entry in AUGMENTS.items() if entry is not None]


def varied(kind: str, images: Tensor, drawn: np.ndarray) -> Tensor:
    entry = AUGMENTS[kind]
    assert entry is not None
    return entry(images, drawn)


def pictures(count: int, channels: int = 3, side: int = 8) -> Tensor:
    """Bytes in channels-last order, none of them black."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, side, side, channels)
    pixels = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    return pixels.movedim(-1, 1)


def split(count: int, kind: str, channels: int = 3) -> Split:
    images = load("mnist-5k").train.normalise
    return Split(pictures(count, channels), torch.arange(count), images, augment=AUGMENTS[kind])


def test_a_recipe_can_name_every_way() -> None:
    choices = Recipe.__dataclass_fields__["augment"].metadata["choices"]
    assert choices == tuple(AUGMENTS)


def test_drawn_numbers_are_even_and_those_of_an_image_whatever_the_batch() -> None:
    chosen = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    drawn = draws(2**64 - 5, chosen.numpy())
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_array_equal(draws(2**64 - 5, chosen[7:19].numpy()), drawn[7:19])
    assert np.unique(drawn).size == drawn.size
    # Even in every column, and columns, neighbours and passes apart from each other.
    deviation = 3.5 / np.sqrt(12 * len(drawn))
    assert np.abs(drawn.mean(0) - 0.5).max() < deviation
    ordered = draws(7, np.arange(4000))
    others = [
        np.roll(ordered, 1, axis=0),
        np.roll(ordered, 1, axis=1),
        draws(8, np.arange(4000)),
    ]
    for other in others:
        related = [np.corrcoef(ordered[:, at], other[:, at])[0, 1] for at in range(variation.DRAWN)]
        assert np.abs(related).max() < 4 / np.sqrt(4000)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["flip", "crop-flip"])
def test_a_batch_is_what_each_image_becomes_alone(kind: str, channels: int) -> None:
    images, drawn = pictures(40, channels), draws(3, np.arange(40))
    found = varied(kind, images, drawn)
    entry = AUGMENTS[kind]
    assert entry is not None
    alone = [
        shifted(image.movedim(0, -1).numpy(), numbers, entry.padding)
        for image, numbers in zip(images, drawn, strict=True)
    ]
    np.testing.assert_array_equal(found.movedim(1, -1).numpy(), np.stack(alone))
    assert found.dtype == torch.uint8
    assert len({tuple(row.flatten().tolist()) for row in found}) == 40


def test_a_shift_keeps_what_it_can_and_is_black_where_nothing_was() -> None:
    drawn = np.full((1, variation.DRAWN), 0.9999)  # no flip; down and across by 8 of 0 to 8
    image = pictures(1, side=16)
    found = varied("crop-flip", image, drawn)
    torch.testing.assert_close(found[..., :12, :12], image[..., 4:, 4:], rtol=0, atol=0)
    assert int(found[..., 12:, :].count_nonzero() + found[..., 12:].count_nonzero()) == 0


def test_every_place_and_both_sides_are_drawn_equally_often() -> None:
    drawn = draws(5, np.arange(8100))
    places = variation.offset(drawn[:, variation.DOWN], 4) * 9 + variation.offset(drawn[:, 2], 4)
    counts = np.bincount(places, minlength=81)
    assert counts.size == 81
    assert ((counts - 100) ** 2 / 100).sum() < 125  # chi square of 80 degrees, 0.1 %
    assert abs(int((drawn[:, variation.FLIP] < 0.5).sum()) - 4050) < 150


@pytest.mark.parametrize(("width", "height"), [(32, 32), (400, 300), (1, 1), (200, 3), (2, 900)])
def test_boxes_lie_inside_and_have_the_area_and_shape_that_was_asked(
    width: int, height: int
) -> None:
    found = boxes(draws(2, np.arange(2000)), width, height)
    left, top, right, bottom = found.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    wide, high = right - left, bottom - top
    assert min(wide.min(), high.min()) >= 1
    if min(width, height) > 100:
        assert 0.07 < (wide * high / (width * height)).min() < 0.1
        assert (wide * high / (width * height)).max() > 0.95
        assert 0.74 < (wide / high).min() < 0.8
        assert 1.25 < (wide / high).max() < 1.35
        np.testing.assert_allclose((left + right).mean() / 2, width / 2, rtol=0.03)


def test_a_cut_of_everything_is_the_image_and_a_part_is_scaled_up() -> None:
    images, drawn = pictures(2, side=9), np.full((2, variation.DRAWN), 0.5)
    drawn[:, variation.AREAS] = 1.0  # all of it, square
    drawn[1, variation.FLIP] = 0.4
    found = varied("random-resized-crop", images, drawn)
    expected = torch.stack([images[0], images[1].flip(-1)]).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    ramp = torch.arange(12.0).expand(1, 1, 12, 12)
    drawn = np.full((1, variation.DRAWN), 0.5)
    drawn[:, variation.AREAS] = (0.25 - 0.08) / 0.92
    left, _, right, _ = boxes(drawn, 12, 12)[0]
    found = varied("random-resized-crop", ramp, drawn)
    inside = left + (torch.arange(12) + 0.5) * (right - left) / 12 - 0.5
    torch.testing.assert_close(found[0, 0, 5], inside.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_passes_and_resumption_draw_what_one_run_would(kind: str) -> None:
    part = split(30, kind, channels=1)
    whole = list(batches(part, batch_size=6, seed=3, epoch=1))
    for worker in range(2):
        mine = batches(part, batch_size=6, seed=3, epoch=1, worker=worker, workers=2)
        for (images, labels), (all_images, all_labels) in zip(mine, whole, strict=True):
            torch.testing.assert_close(labels, all_labels[worker::2], rtol=0, atol=0)
            torch.testing.assert_close(images, all_images[worker::2], rtol=0, atol=0)
    rest = batches(part, batch_size=6, seed=3, epoch=1, start=3)
    for (images, _), (expected, _) in zip(rest, whole[3:], strict=True):
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
    by_label = {int(n): i for images, labels in whole for i, n in zip(images, labels, strict=True)}
    for seed, epoch in [(3, 2), (4, 1)]:
        same = 0
        for images, labels in batches(part, batch_size=6, seed=seed, epoch=epoch):
            same += sum(
                torch.equal(by_label[int(n)], i) for i, n in zip(images, labels, strict=True)
            )
        assert same < (25 if kind == "flip" else 6)


def test_outside_a_pass_images_stay_as_they_are() -> None:
    plain, other = split(9, "none", 1), split(9, "random-resized-crop", 1)
    chosen = torch.tensor([4, 4, 0])
    assert torch.equal(other.take(chosen)[0], plain.images[chosen])
    assert torch.equal(other.images, plain.images)
    taken, _ = next(iter(batches(plain, batch_size=9, seed=0, epoch=0)))
    assert isinstance(taken, Tensor)
    assert sorted(taken.flatten().tolist()) == sorted(plain.images.flatten().tolist())
