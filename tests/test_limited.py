"""A limited data set trains with a fixed part and is judged by all of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
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
    beginning, _ = whole.train.take(torch.arange(1000))
    assert not torch.equal(cast(Tensor, images), cast(Tensor, beginning))
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


def test_windows_of_a_limited_text_follow_each_other_also_in_streams(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(i % 251 for i in range(20_000)))
    whole = data.load_text(f"text:{path}", context=10)
    small = data.limited(whole, 30).train
    for draw in (0, 7):
        inputs, targets = small.for_epoch(draw).take(torch.arange(30))
        expected = torch.arange(draw, draw + 300) % 251
        assert_close(cast(Tensor, inputs).flatten(), expected, rtol=0, atol=0)
        assert_close(targets.flatten(), (expected + 1) % 251, rtol=0, atol=0)
    # Cut where the whole text would be, whose streams leave more over than a window.
    (inputs, _), (expected, _) = (
        part.for_epoch(43, streams=5).take(torch.arange(30)) for part in (small, whole.train)
    )
    assert_close(inputs, expected, rtol=0, atol=0)
    assert int(cast(Tensor, inputs)[0, 0]) == 43
    read = data.batches(small, batch_size=5, seed=0, epoch=1, streams=True)
    streams = torch.cat([cast(Tensor, inputs) for inputs, _ in read], dim=1)
    assert streams.shape == (5, 60)
    begins = streams[0, 0] + 60 * torch.arange(5)
    assert_close(streams, (begins[:, None] + torch.arange(60)) % 251, rtol=0, atol=0)


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
