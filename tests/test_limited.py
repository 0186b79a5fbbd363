"""A limited data set trains with a fixed part and is judged by all of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rankwise import data
from rankwise.errors import OptionError
from rankwise.training import Recipe, setup


def test_images_are_a_fixed_choice_from_all_classes() -> None:
    whole = data.load("mnist-5k")
    small, again = (data.limited(whole, 1000).train for _ in range(2))
    assert len(small) == 1000
    images, labels = small.take(torch.arange(1000))
    assert_close(images, again.take(torch.arange(1000))[0], rtol=0, atol=0)
    assert labels.bincount().min() > 70
    assert len({tuple(image.flatten().tolist()) for image in images}) > 990  # none twice


def test_a_text_is_its_beginning_in_every_pass(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(i // 100 for i in range(20_000)))
    small = data.limited(data.load_text(f"text:{path}", context=10), 30).train
    for draw in (0, 7, 13):
        _, targets = small.for_epoch(draw).take(torch.arange(len(small)))
        assert targets.shape == (30, 10)
        assert int(targets.max()) <= 3
    streams = small.for_epoch(3, streams=5)
    _, targets = streams.take(torch.arange(len(small)))
    assert int(targets.max()) <= 3


def test_what_judges_is_whole_and_too_much_is_refused() -> None:
    whole = data.load("mnist-5k")
    limited = data.limited(whole, 64)
    assert limited.validation is whole.validation
    assert limited.test is whole.test
    assert (limited.classes, limited.checksum, limited.task) == (
        whole.classes,
        whole.checksum,
        whole.task,
    )
    with pytest.raises(OptionError, match="has 4,000 images to train with"):
        data.limited(whole, 4001)
    assert len(setup.load_data(Recipe(limit=100)).train) == 100
