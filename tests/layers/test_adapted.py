"""Adapted layers, a dense layer and its low-rank update, against the weight they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rankwise import onednn
from rankwise.errors import LifeCycleError, OptionError, PlanError
from rankwise.layers import AdaptedLayer, low_rank_class
from rankwise.layers.adapted import Chunks, draw_update
from rankwise.layers.adapted.products import adapted_linear

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 9), (4, 6)),
    "tokens": (lambda: nn.Linear(9, 6, bias=False), (4, 3, 9)),
    "conv1d of gpt-2": (lambda: Conv1D(9, 6), (4, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2), (4, 3, 9, 9)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (4, 4, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 5, 3, stride=2), (4, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=2), (4, 5)),
}


def inputs(shape: tuple[int, ...], layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(layer, nn.Embedding):
        return torch.randint(11, shape, generator=generator)
    return torch.randn(shape, generator=generator).double()


def dense(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind][0]().double()


def opened(layer: Any, rank: int = 2, *, blocks: int | None = None, **options: Any) -> Any:
    """With every factor drawn, as after some training."""
    stand_in: Any = low_rank_class(layer)
    parts: int = blocks or stand_in.blocks_of(layer)
    made = AdaptedLayer.of(layer, stand_in, rank, blocks=parts, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*made.heads.parameters(), *(made.merged or nn.ModuleList()).parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        heads: Any = made.heads
        for head in heads if isinstance(layer, nn.Embedding) else ():
            head.u.weight[layer.padding_idx] = 0  # where it begins, and stays: no gradient
    return made


def with_weight(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


FORMS: list[dict[str, Any]] = [
    {"heads": heads, "anchored": anchored, "diagonal": diagonal}
    for heads, anchored in [(1, False), (1, True), (3, False), (3, True)]
    for diagonal in ([False, True] if (heads == 3) is anchored else [False])
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_the_weight_it_stands_for(
    kind: str, form: dict[str, Any]
) -> None:
    layer = opened(copy.deepcopy(dense(kind)), scale=0.7, **form)
    x = inputs(KINDS[kind][1], dense(kind)).requires_grad_(kind != "embedding")
    y, expected = layer(x), with_weight(dense(kind), layer.weight, x)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).double()
    learning = [p for p in layer.parameters() if p.requires_grad]
    wanted = [*learning, x] if x.requires_grad else learning
    own_bias = layer.base.bias if getattr(layer.base, "bias", None) is not None else None
    wanted = [p for p in wanted if p is not own_bias]
    ours = torch.autograd.grad(y, wanted, cotangent)
    theirs = torch.autograd.grad(expected, wanted, cotangent)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert not layer.base.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_function(kind: str) -> None:
    layer = opened(dense(kind), heads=2, anchored=True, scale=0.5).eval()
    x = inputs(KINDS[kind][1], layer.base)
    before = layer(x)
    with torch.no_grad():
        layer.base.weight += layer.open_update()
    layer.anchor_()
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.open_update(), torch.zeros_like(layer.base.weight))
    torch.testing.assert_close(layer.to_dense()(x), before)


@pytest.mark.parametrize("kind", ["linear", "conv1d of gpt-2", "conv2d", "embedding"])
@pytest.mark.parametrize("batch", [6, 7])
def test_every_head_sees_its_own_chunk(kind: str, batch: int) -> None:
    """7 examples are chunks of 3, 2 and 2; gradients are those of each chunk's own mean."""
    layer = opened(dense(kind), heads=3, anchored=True, scale=0.7, chunks=Chunks(3))
    x = inputs((batch, *KINDS[kind][1][1:]), layer.base)
    y = layer(x)
    parts = []
    for n, part in enumerate(x.tensor_split(3)):
        update = layer.heads[n].weight - layer.merged[n].weight
        parts.append(with_weight(dense(kind), layer.base.weight + 0.7 * update, part))
    torch.testing.assert_close(y, torch.cat(parts))
    u = [head.u.weight for head in layer.heads]
    ours = torch.autograd.grad(y.square().mean(), u)
    for n, (grad, part) in enumerate(zip(ours, parts, strict=True)):
        own = torch.autograd.grad(part.square().mean(), u[n], retain_graph=True)[0]
        torch.testing.assert_close(grad, own)


def test_without_own_mean_a_heads_gradient_is_its_part_of_the_batchs() -> None:
    layer = opened(dense("tokens"), heads=2, chunks=Chunks(2))
    x = inputs((4, 3, 9), layer)
    u = [head.u.weight for head in layer.heads]
    own = torch.autograd.grad(layer(x).square().mean(), u)
    layer.own_mean = False
    for one, other in zip(own, torch.autograd.grad(layer(x).square().mean(), u), strict=True):
        torch.testing.assert_close(one, 2 * other)


def test_n_identical_heads_compute_the_function_of_one() -> None:
    one = opened(dense("linear"), scale=0.7)
    for chunks in (None, Chunks(4)):
        many = opened(dense("linear"), heads=4, scale=0.7, chunks=chunks)
        for head in many.heads:
            head.load_state_dict(one.heads[0].state_dict())
        x = inputs((8, 6), one)
        torch.testing.assert_close(many(x), one(x))


def test_evaluation_may_leave_out_what_is_not_merged() -> None:
    layer = opened(dense("linear"), heads=2, anchored=True).eval()
    x = inputs((4, 6), layer)
    layer.evaluates_open = False
    torch.testing.assert_close(layer(x), dense("linear")(x))
    torch.testing.assert_close(layer.weight, layer.base.weight)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_fused_projection_has_an_update_for_each_part(diagonal: bool) -> None:
    layer = opened(nn.Linear(5, 9).double(), blocks=3, diagonal=diagonal)
    assert layer.heads[0].v.weight.shape == (6, 5)
    x = inputs((4, 5), layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    # Each head is a layer of its own, too: where dropout or other dtypes need it.
    torch.testing.assert_close(layer.heads[0](x), F.linear(x, layer.heads[0].weight))
    rows = layer.open_update().chunk(3)
    assert all(torch.linalg.matrix_rank(part) == 2 for part in rows)


@pytest.mark.parametrize("rows", [2, 40])  # few: added to the output; many: summed with W
@pytest.mark.parametrize("heads", [0, 2])
def test_gradients_of_the_product_in_float64(rows: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    lead = (heads,) if heads else ()
    tensors = (draw(rows, 5), draw(7, 5), draw(7), draw(*lead, 7, 2), draw(*lead, 2, 5))

    def product(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return adapted_linear(x, weight, bias, u, v, 0.7)

    assert torch.autograd.gradcheck(product, tensors)
    assert torch.autograd.gradgradcheck(product, tensors)


def test_backward_saves_nothing_but_input_weight_and_factors() -> None:
    layer = opened(nn.Linear(64, 64).double(), rank=4)
    x = inputs((100, 64), layer).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in saved) == x.numel() + 64 * 64 + 2 * 4 * 64


def test_half_precision_and_autocast() -> None:
    layer = opened(dense("linear")).float()
    x = inputs((4, 6), layer).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    assert layer.heads[0].u.weight.grad.dtype == torch.float32
    wide = opened(dense("linear").bfloat16(), dtype=torch.float32)
    assert {p.dtype for p in wide.heads.parameters()} == {torch.float32}
    assert wide(x.bfloat16()).dtype == torch.bfloat16


def test_dropout_acts_on_the_update_alone_and_while_training_alone() -> None:
    layer = opened(dense("linear"), dropout=0.5)
    x = torch.ones(4000, 6).double()
    base = dense("linear")(x)
    dropped, update = layer(x) - base, layer.eval()(x) - base
    assert (dropped - update).abs().max() > 0.1
    torch.testing.assert_close(dropped.mean(0), update.mean(0), rtol=0.1, atol=0.02)
    torch.testing.assert_close(base + update, layer(x))


# torch's own, where it traces an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_without_graph_breaks() -> None:
    layer = opened(nn.Linear(6, 9), heads=2)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("draw", ["kaiming", "orthogonal", "normal"])
def test_an_update_begins_at_zero_with_a_v_that_carries_gradients(draw: str) -> None:
    layer = opened(nn.Linear(400, 30), rank=8)
    layer.restart_(draw, torch.Generator().manual_seed(0))
    v = layer.heads[0].v.weight.detach()
    assert not layer.heads[0].u.weight.any()
    variance = {"kaiming": 1 / 3 / 400, "orthogonal": 1 / 8, "normal": 1 / 400}[draw]
    torch.testing.assert_close(v.var(), torch.tensor(variance), rtol=0.1, atol=0)
    if draw == "orthogonal":
        torch.testing.assert_close(v @ v.mT, torch.eye(8) * 400 / 8, rtol=1e-4, atol=1e-3)


def test_errors_say_what_to_do() -> None:
    layer = opened(dense("tokens"), heads=3, chunks=Chunks(3))
    with pytest.raises(LifeCycleError, match="a batch of 2 cannot be divided among 3 heads"):
        layer(inputs((2, 3, 9), layer))
    with pytest.raises(LifeCycleError, match="no single weight stands for the layer"):
        _ = layer.weight
    layer.chunks.batch = 5
    with pytest.raises(LifeCycleError, match=r"was given 12 rows .* of a batch of 5"):
        layer(inputs((12, 9), layer))
    with pytest.raises(PlanError, match="heads=0 must be at least 1"):
        opened(dense("linear"), heads=0)
    with pytest.raises(PlanError, match="rank 7 does not fit"):
        opened(dense("linear"), rank=7)
    with pytest.raises(OptionError, match="unknown init 'ortogonal'; did you mean 'orthogonal'"):
        draw_update(layer.heads[0], "ortogonal", torch.Generator())
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("rows", [6, 200])  # more rows: the sum W + s U V is formed
def test_products_by_onednn_are_those_by_mm(rows, heads, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, bias = draw(2, rows // 2, 33), draw(40, 33), draw(40)
    u, v, grad = draw(*heads, 40, 5), draw(*heads, 5, 33), draw(2, rows // 2, 40)

    def passes(dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [t.to(dtype).requires_grad_() for t in (x, weight, bias, u, v)]
        y = adapted_linear(*tensors, scale=2.0)
        return [y, *torch.autograd.grad(y, tensors, grad.to(dtype))]

    exact = passes(torch.float64)
    for worth in (0.0, float("inf")):
        monkeypatch.setattr(onednn, "WORTH", worth)
        for mine, wanted in zip(passes(torch.float32), exact, strict=True):
            assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("rows", [6, 200])
def test_the_gradient_of_a_gradient_by_onednn_is_that_of_float64(rows, heads, monkeypatch):
    """As of a gradient penalty; oneDNN's products have no gradient, and said nothing of it."""
    monkeypatch.setattr(onednn, "WORTH", 0.0)
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 33), (40, 33), (40,), (*heads, 40, 5), (*heads, 5, 33))
    drawn = [torch.randn(*shape, generator=generator) for shape in shapes]

    def penalty(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x, weight, bias, u, v = (t.to(dtype).requires_grad_() for t in drawn)
        y = adapted_linear(x, weight, bias, u, v, scale=2.0)
        (of_x,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        return torch.autograd.grad(of_x.square().sum(), [x, u, v])

    for mine, wanted in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        assert_close(mine.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("rows", [6, 201])
def test_what_is_merged_already_is_less_and_does_not_learn(rows, heads):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, bias = draw(rows, 33), draw(40, 33), draw(40)
    u, v, u0, v0 = (draw(*heads, *shape) for _ in range(2) for shape in ((40, 5), (5, 33)))
    y = adapted_linear(x, weight, bias, u, v, 0.5, less=(u0.detach(), v0.detach()))
    update = 0.5 * (u @ v - (u0 @ v0).detach())
    parts = x.reshape(*heads, -1, 33) @ (weight + update).mT
    wanted = parts.reshape(rows, 40) + bias
    assert_close(y, wanted)
    grad, learned = draw(rows, 40), (x, bias, u, v)
    for mine, right in zip(
        torch.autograd.grad(y, learned, grad),
        torch.autograd.grad(wanted, learned, grad),
        strict=True,
    ):
        assert_close(mine, right)


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_an_adapted_map_compiles_as_a_whole(monkeypatch):
    monkeypatch.setattr(onednn, "WORTH", 0.0)
    torch.manual_seed(0)
    x, weight, u, v = (
        torch.randn(8, 16),
        torch.randn(12, 16),
        torch.randn(12, 3),
        torch.randn(3, 16),
    )

    def forward(x):
        return adapted_linear(x, weight, None, u, v, 2.0)

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    assert_close(compiled(x), forward(x), rtol=1e-5, atol=1e-5)
