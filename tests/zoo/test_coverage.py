"""The page docs/coverage.md is what its script would write today: checked where that is cheap."""

from __future__ import annotations

import pytest
from architectures import ZOO
from coverage_page import PAGE, SIZES, row

CHEAP = ("OPT", "BERT", "ViT", "ResNet", "CLIP", "VGG-16", "MobileNetV2", "SqueezeNet")
BY_TITLE = {architecture.title: architecture for architecture in ZOO if architecture.full}


@pytest.mark.parametrize("title", CHEAP)
def test_the_row_of_an_architecture_is_current(title):
    architecture = BY_TITLE[title]
    pytest.importorskip(architecture.library)
    assert row(architecture) in PAGE.read_text(encoding="utf-8").splitlines()


def test_every_architecture_and_every_size_has_one_row():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = [line.split(" | ")[0].strip("| ").removesuffix(" †") for line in lines]
    for title in (*BY_TITLE, *(f"`{name}`" for name in SIZES)):
        assert first.count(title) == 1, title
    assert f"of {len(BY_TITLE)} architectures" in PAGE.read_text(encoding="utf-8")
