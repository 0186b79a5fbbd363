"""An opened attention is the attention it stands for: results, gradients, random draws, masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankwise.errors import OptionError
from rankwise.layers import OpenAttention

B, L, S, E, H = 3, 5, 4, 16, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: Any, seed: int = 0) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed + i) / 4)
    return module


def same(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def inputs(batch_first: bool, kdim: int = E, vdim: int = E) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = noise(B, L, E), noise(B, S, kdim, seed=1), noise(B, S, vdim, seed=2)
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


FORMS: list[dict[str, Any]] = [
    {},
    {"fused": True},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]
PADDING = torch.arange(S)[None] >= torch.tensor([4, 3, 2])[:, None]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)[:, :S]
MASKS: list[dict[str, Any]] = [
    {},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": torch.zeros(B, S).masked_fill(PADDING, float("-inf"))},
    {"attn_mask": CAUSAL},
    {"attn_mask": CAUSAL.isinf()},
    {"attn_mask": noise(B * H, L, S, seed=5)},
    {"attn_mask": noise(B * H, L, S, seed=5) > 1.5},
    {"attn_mask": CAUSAL, "is_causal": True},
    {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING, "is_causal": True},
]


def pair(form: dict[str, Any], **more: Any) -> tuple[nn.MultiheadAttention, OpenAttention]:
    options = dict(form)
    fused = options.pop("fused", False)
    dense = filled(nn.MultiheadAttention(E, H, **options, **more))
    return dense, OpenAttention.of(copy.deepcopy(dense), fused=fused)


@pytest.mark.parametrize("weights", [None, "mean", "each"])
@pytest.mark.parametrize("mask", range(len(MASKS)))
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_outputs_weights_and_gradients_are_those_of_the_dense_attention(
    form: int, mask: int, weights: str | None
) -> None:
    dense, opened = pair(FORMS[form])
    chosen = {**MASKS[mask], "need_weights": weights is not None}
    chosen["average_attn_weights"] = weights == "mean"
    ways = []
    for module in (dense, opened):
        q, k, v = (
            x.detach().requires_grad_()
            for x in inputs(dense.batch_first, dense.kdim or E, dense.vdim or E)
        )
        out, attention = module(q, k, v, **chosen)
        (out.square().sum() + (0 if attention is None else attention.square().sum())).backward()
        ways.append((out, attention, q.grad, k.grad, v.grad))
    same(ways[1], ways[0])
    for packed, parts in opened.parts(dense).items():
        same(torch.cat([p.grad for p in parts if p.grad is not None]), packed.grad)
    same(opened.out_proj.weight.grad, dense.out_proj.weight.grad)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shared", ["all", "key and value", "query and key", "query and value"])
def test_inputs_that_are_one_tensor(shared: str, fused: bool) -> None:
    dense, opened = pair({"fused": fused})
    a, b = noise(L, B, E), noise(L, B, E, seed=1)
    given = {
        "all": (a, a, a),
        "key and value": (a, b, b),
        "query and key": (a, a, b),
        "query and value": (a, b, a),
    }[shared]
    same(opened(*given), dense(*given))


# The dense attention turns a bool padding mask and a float mask into one, and warns of it.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("weights", [True, False])
def test_one_sequence_without_a_batch(weights: bool) -> None:
    for form in ({}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}):
        dense, opened = pair(form)
        x = noise(L, E)
        padding = torch.tensor([False] * (L - 1) + [True])
        for mask in (None, noise(L, L, seed=3), noise(H, L, L, seed=3)):
            options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": weights}
            same(opened(x, x, x, **options), dense(x, x, x, **options))


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_draws_the_same_numbers(weights: bool) -> None:
    dense, opened = pair({"batch_first": True}, dropout=0.4)
    x = noise(B, L, E)
    outputs = []
    for module in (dense, opened):
        torch.manual_seed(3)
        outputs.append(module(x, x, x, need_weights=weights))
    same(outputs[1], outputs[0])
    opened.eval()
    same(opened(x, x, x, need_weights=weights)[0], dense.eval()(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    dense, opened = pair({"batch_first": True}, dtype=dtype)
    x = noise(B, L, E).to(dtype)
    padding = torch.arange(L)[None] >= torch.tensor([5, 3, 2])[:, None]
    for weights in (True, False):
        actual = opened(x, x, x, key_padding_mask=padding, need_weights=weights)[0]
        expected = dense(x, x, x, key_padding_mask=padding, need_weights=weights)[0]
        assert actual.dtype == dtype
        assert_close(actual, expected, rtol=0.03, atol=0.03)


def test_under_autocast() -> None:
    dense, opened = pair({"batch_first": True})
    x = noise(B, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    with torch.autocast("cpu", torch.bfloat16):
        for weights in (True, False):
            actual = opened(x, x, x, attn_mask=mask, need_weights=weights)[0]
            expected = dense(x, x, x, attn_mask=mask, need_weights=weights)[0]
            assert actual.dtype == expected.dtype
            assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_closed_again_it_is_the_attention_it_was(form: int) -> None:
    dense, opened = pair(FORMS[form])
    closed = opened.close()
    assert type(closed) is nn.MultiheadAttention
    assert list(closed.state_dict()) == list(dense.state_dict())
    for name, value in dense.state_dict().items():
        assert torch.equal(closed.state_dict()[name], value)
    x = inputs(dense.batch_first, dense.kdim or E, dense.vdim or E)
    same(closed(*x), dense(*x))


def test_opening_leaves_the_attention_alone_and_views_copy_nothing() -> None:
    dense = filled(nn.MultiheadAttention(E, H)).eval()
    dense.in_proj_bias.requires_grad_(False)
    dense.out_proj.train()
    before = dict(dense.named_parameters())
    opened = OpenAttention.of(dense)
    looked = OpenAttention.of(dense, view=True)
    assert dict(dense.named_parameters()) == before
    assert dense.out_proj.training
    assert not opened.training
    assert not opened.q.training
    assert looked.k.weight.data_ptr() == dense.in_proj_weight[E:].data_ptr()
    assert opened.k.weight.data_ptr() != dense.in_proj_weight[E:].data_ptr()
    assert [p.requires_grad for p in opened.k.parameters()] == [True, False]
    assert opened.out_proj is dense.out_proj


def test_a_parent_that_reads_weights_finds_them() -> None:
    for fused in (False, True):
        dense, opened = pair({"fused": fused})
        read = (opened.q_proj_weight, opened.k_proj_weight, opened.v_proj_weight)
        assert torch.equal(torch.cat(read), dense.in_proj_weight)
        assert_close(opened.in_proj_bias, dense.in_proj_bias, rtol=0, atol=0)
    assert pair({"bias": False})[1].in_proj_bias is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attn_mask": torch.zeros(1, S)},
            r"attn_mask of shape \(1, 4\) .* \(5, 4\) or \(12, 5, 4\)",
        ),
        ({"attn_mask": torch.zeros(B, L, S)}, r"attn_mask of shape \(3, 5, 4\)"),
        ({"key_padding_mask": torch.zeros(B, L)}, r"key_padding_mask of shape \(3, 5\)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "attn_mask is torch.int64"),
        ({"is_causal": True}, "is_causal=True is a hint"),
    ],
)
def test_masks_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pair({})[1](*inputs(False), **options)


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="embed_dim=10 is not divisible by num_heads=4"):
        OpenAttention(10, 4)
    with pytest.raises(OptionError, match="kdim=6"):
        OpenAttention(16, 4, kdim=6, fused=True)
