"""The form of a factorisation: which class it picks, how names choose parts, what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankwise.errors import FactorizeError, OptionError, PlanError
from rankwise.layers import (
    BlockLinear,
    Form,
    LowRankConv2d,
    LowRankConvTranspose2d,
    LowRankLinear,
    LowRankSeparableConv2d,
    low_rank_class,
)


def blocks(form: Form, name: str, dense: Any) -> int:
    kind = low_rank_class(dense, form)
    assert isinstance(kind, type)
    return form.keywords(name, dense, kind)["blocks"]


def test_the_form_picks_the_class() -> None:
    conv = nn.Conv2d(4, 6, 3)
    assert low_rank_class(conv) is LowRankConv2d
    assert low_rank_class(conv, Form(separable=True)) is LowRankSeparableConv2d
    assert low_rank_class(nn.Linear(4, 6), Form(separable=True)) is LowRankLinear


REFUSED: list[tuple[Any, Form, str]] = [
    (nn.Conv2d(6, 6, 3, groups=6), Form(), "each of its 6 groups is a 1×9 matrix"),
    (nn.Conv1d(6, 12, 1, groups=6), Form(), "is a 2×1 matrix"),
    (nn.ConvTranspose2d(6, 6, 3, groups=6), Form(), "depthwise convolution"),
    (nn.Conv2d(4, 8, 3, groups=2), Form(separable=True), "2 groups.*no separable form"),
    (nn.Conv2d(4, 8, 3), Form(separable=True, norm=True), "separable form takes no norm"),
    (nn.ConvTranspose2d(4, 8, 3), Form(norm=True), "transposed convolution takes no norm"),
    (nn.LSTM(4, 8), Form(), "LSTM has no low-rank form here"),
    (nn.Bilinear(4, 4, 8), Form(), "Bilinear has no low-rank form here"),
]


@pytest.mark.parametrize(("dense", "form", "reason"), REFUSED)
def test_what_has_no_such_form_says_why(dense: Any, form: Form, reason: str) -> None:
    verdict = low_rank_class(dense, form)
    assert isinstance(verdict, str)
    assert re.search(reason, verdict)


def test_groups_of_two_rows_are_no_depthwise_convolution() -> None:
    assert low_rank_class(nn.Conv2d(4, 8, 3, groups=4)) is LowRankConv2d


def test_classes_refuse_a_norm_that_they_have_no_place_for() -> None:
    conv = nn.ConvTranspose2d(4, 8, 3)
    with pytest.raises(FactorizeError, match="shift is no bias"):
        LowRankConvTranspose2d.from_dense(conv, 2, norm=True)


def test_a_subclass_has_a_forward_of_its_own() -> None:
    class Mine(nn.ConvTranspose1d):
        """Someone's."""

    assert low_rank_class(Mine(2, 2, 1)) == "Mine has a forward of its own"


def test_true_splits_the_known_fused_projections_with_three_equal_parts() -> None:
    form = Form(split=True)
    for name in ("blocks.0.attn.qkv", "h.1.c_attn", "to_qkv", "x.Wqkv", "a.query_key_value"):
        assert blocks(form, name, nn.Linear(8, 24)) == 3
    assert blocks(form, "blocks.0.attn.qkv", nn.Linear(8, 12)) == 1  # grouped queries
    assert blocks(form, "mixer.in_proj", nn.Linear(6, 24)) == 1  # Mamba's, of two other parts
    assert blocks(form, "blocks.0.mlp.fc1", nn.Linear(8, 24)) == 1
    assert blocks(form, "blocks.0.qkv", nn.Conv1d(8, 24, 1)) == 1
    assert blocks(Form(), "blocks.0.attn.qkv", nn.Linear(8, 24)) == 1


def test_globs_choose_the_parts_and_the_first_match_counts() -> None:
    form = Form(split={"first.*": 6, "*.kv": 2, "*": 4})
    assert blocks(form, "first.kv", nn.Linear(8, 24)) == 6
    assert blocks(form, "second.kv", nn.Linear(8, 24)) == 2
    assert blocks(form, "second.q", nn.Linear(8, 24)) == 4


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks=5 does not divide the 24 rows of this linear"):
        blocks(Form(split={"*": 5}), "qkv", nn.Linear(8, 24))
    with pytest.raises(PlanError, match="its groups"):
        blocks(Form(split={"*": 3}), "conv", nn.Conv2d(8, 24, 3))
    with pytest.raises(PlanError, match="separable_conv2d layer does not split"):
        blocks(Form(split={"*": 3}, separable=True), "conv", nn.Conv2d(8, 24, 3))
    for wrong in ("qkv", 3, ["qkv"]):
        with pytest.raises(OptionError, match="neither True nor"):
            Form(split=wrong)  # pyright: ignore[reportArgumentType]
    for switch in ("norm", "core", "separable"):
        with pytest.raises(OptionError, match=f"{switch}=1 must be True or False"):
            Form(**{switch: 1})  # pyright: ignore[reportArgumentType]
    for parts in (0, -1, 1.5, True, "3"):
        with pytest.raises(OptionError, match=r"for '\*' is no number of parts"):
            Form(split={"*": parts})  # pyright: ignore[reportArgumentType]
    for wrong in (0, 2.0, -3, 5):
        with pytest.raises(PlanError, match="does not divide the 24 rows"):
            LowRankLinear.from_dense(nn.Linear(8, 24), 2, blocks=wrong)  # pyright: ignore[reportArgumentType]
    for wrong in (5, 0, -1):
        with pytest.raises(PlanError, match=f"{wrong} blocks do not divide 24 out_features"):
            LowRankLinear(8, 24, 2, blocks=wrong)
    with pytest.raises(PlanError, match="5 blocks do not divide"):
        BlockLinear(10, 24, 5)
    with pytest.raises(PlanError, match="3 groups do not divide 4 -> 6 channels"):
        LowRankConv2d(4, 6, 3, 1, groups=3)


def test_each_part_of_a_split_layer_has_a_rank_of_its_own() -> None:
    """A fused weight whose parts have rank 2 each: rank 2 per part is exact, rank 2 in one not."""
    source = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(5, 2, generator=source) @ torch.randn(2, 7, generator=source) for _ in range(3)
    ]
    dense = nn.Linear(7, 15)
    dense.weight = nn.Parameter(torch.cat(parts))
    split = LowRankLinear.from_dense(dense, 2, blocks=3).weight
    whole = LowRankLinear.from_dense(dense, 2).weight
    torch.testing.assert_close(split, dense.weight, rtol=1e-5, atol=1e-5)
    assert float((whole - dense.weight).detach().abs().max()) > 0.1


def test_a_block_linear_is_its_blocks_side_by_side() -> None:
    layer = BlockLinear(6, 9, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.block_diag(*layer.weight.unflatten(0, (3, 3)))
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert "blocks=3" in repr(layer)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("core", [False, True])
def test_counters_see_every_product_of_a_split_layer(rank: int, core: bool) -> None:
    layer = LowRankLinear(8, 24, rank, blocks=3, core=core)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(2, 5, 8))
    expected = 2 * 10 * 3 * (rank * (8 + 8) + (rank**2 if core else 0))
    assert counter.get_total_flops() == expected
