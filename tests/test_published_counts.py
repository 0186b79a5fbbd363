"""Our networks are as large as the published ones, and the page that says so is current."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rankwise
from rankwise import models

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("published_counts")
        for name in ("published_counts", "published_networks"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def counted(script: ModuleType) -> list[tuple[Any, dict[str, Any]]]:
    return [(row, script.count(row)) for row in script.ROWS]


def test_every_published_figure_is_met_to_its_last_digit(counted: Any) -> None:
    met = 0
    for row, figures in counted:
        for kind, figure in figures.items():
            assert figure.agrees, (row.network.title, row.form, kind, figure)
            met += bool(figure.published)
    assert met > 45


def test_these_counts_are_met_without_any_difference(counted: Any) -> None:
    found = {
        (row.network.title, row.form): figures["parameters"].ours
        for row, figures in counted
        if not figures["parameters"].differs
    }
    assert found["vgg-19", "dense"] == 20_560_330
    assert found["vgg-19", "hybrid, 1/4"] == 8_370_634
    assert found["resnet-50", "hybrid, 1/4"] == 15_202_344
    assert found["wrn-50-2", "hybrid, 1/4"] == 40_047_400
    assert found["transformer-base", "hybrid, 1/4"] == 26_696_192
    assert found["mlp-512x8", "rank 64"] == 935_434


def test_a_wrong_count_would_be_seen(script: ModuleType) -> None:
    for ours, more, published, agrees in (
        (4_014_999, 0, "4.01 M", True),
        (4_015_001, 0, "4.01 M", False),
        (3_752_000, 262_144, "4.01 M", True),
        (20_560_331, 0, "20,560,330", False),
        (555_000_000, 0, "0.56 G", True),
        (554_999_999, 0, "0.56 G", False),
        (1, 0, "", True),
    ):
        figure = script.Figure(ours, {"more": more}, published)
        assert figure.agrees is agrees, figure


def test_the_page_is_current(script: ModuleType, counted: Any) -> None:
    lines = script.PAGE.read_text(encoding="utf-8").splitlines()
    for row, figures in counted:
        assert lines.count(script.line(row, figures)) == 1
    assert all(argument in lines for argument in script.arguments())
    small = [n for n in script.NETWORKS if n.title in ("vgg-11", "gpt2-wikitext2")]
    for line in script.ratios(small):
        assert line in lines
    assert sum(line.startswith(f"| {n.title} |") for n in script.NETWORKS for line in lines) > 13


# What docs/models.md says repeats the hybrids of Pufferfish, with this package's own options. The
# counts are the paper's; its ResNet-18 leaves out a BatchNorm of 64 channels.
HYBRIDS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet-18": ({"keep_first": 3, "exclude": "*shortcut*"}, 3_336_138 + 128),
    "vgg-19": ({"keep_first": 9}, 8_370_634),
    "resnet-50": ({"layers": "layer4.*"}, 15_202_344),
    "wrn-50-2": ({"layers": "layer4.*"}, 40_047_400),
    "transformer-base": ({"layers": "*coder.[1-5].*"}, 26_696_192),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_options_of_a_hybrid_give_the_published_size(name: str) -> None:
    options, published = HYBRIDS[name]
    with torch.device("meta"):
        model = models.build(name, input_shape=(3, 32, 32) if name == "resnet-18" else None)
    assert rankwise.plan(model, 0.25, **options).parameters[1] == published
    said = (BENCHMARKS.parent / "docs" / "models.md").read_text(encoding="utf-8")
    words = ", ".join(
        f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in options.items()
    )
    assert f"`{words}`" in said


def test_gates_of_the_lstm_are_factorised_each_on_its_own() -> None:
    with torch.device("meta"):
        model = models.build("lstm-wikitext2")
    plan = rankwise.plan(model, 375, layers="lstm.*", split=True)
    # Two biases in torch's LSTM, one in the published.
    assert plan.parameters[1] == 67_962_278 + 12_000
    assert set(plan.ranks) == {f"lstm.{kind}_l{i}" for kind in ("ih", "hh") for i in (0, 1)}
