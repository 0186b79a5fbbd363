"""Decay of products: every penalty against autograd, and what frobenius_decay_ does to a loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankwise
from rankwise.errors import LifeCycleError, OptionError, SelectionError
from rankwise.layers import LowRankConv2d, LowRankLinear
from rankwise.optim import decay
from rankwise.optim.decay import frobenius_decay_
from rankwise.optim.penalties import parse_penalty, penalty, penalty_gradients, product_norm

KINDS = (
    "frobenius",
    "kronecker",
    "l2",
    "frobenius+l2",
    "frobenius+kronecker",
    "0.5*l2+3*kronecker",
)
# (blocks, M, N, R): non-square both ways, rank one, full rank, several blocks, square.
SHAPES = ((None, 7, 5, 3), (None, 4, 9, 1), (None, 6, 6, 6), (3, 5, 8, 2), ((2, 3), 4, 4, 2))


def factors(shape: tuple, core: bool, dtype: torch.dtype = torch.float64) -> Any:
    """U, V and, if asked for, a core."""
    blocks, m, n, r = shape
    lead = () if blocks is None else blocks if isinstance(blocks, tuple) else (blocks,)
    generator = torch.Generator().manual_seed(m * n + r)
    sizes = [(*lead, m, r), (*lead, r, n)] + [(*lead, r, r)] * core
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in sizes)


def three(tensors: Any) -> Any:
    """U, V and the core or None."""
    return (*tensors, None)[:3]


def by_definition(u: Tensor, v: Tensor, core: Tensor | None, kind: str) -> Tensor:
    """The penalty with its products formed and summed block by block, halved like weight decay."""
    total = u.new_zeros(())
    product = u @ v if core is None else u @ core @ v
    for index in itertools.product(*(range(size) for size in u.shape[:-2])):
        parts = [f[index] for f in (u, v, core) if f is not None]
        sizes = [p.square().sum() for p in parts]
        values = {
            "frobenius": product[index].square().sum(),
            "kronecker": torch.stack(sizes).prod(),
            "l2": torch.stack(sizes).sum(),
        }
        for name, weight in parse_penalty(kind).items():
            total = total + weight / 2 * values[name]
    return total


@pytest.mark.parametrize("core", [False, True], ids=["UV", "UCV"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalty_and_gradients_equal_autograd_of_the_definition(shape, kind, core):
    tensors = [t.requires_grad_() for t in factors(shape, core)]
    u, v, middle = three(tensors)
    expected = by_definition(u, v, middle, kind)
    wanted = torch.autograd.grad(expected, tensors)
    torch.testing.assert_close(penalty(u, v, middle, kind), expected, rtol=1e-12, atol=0)
    own = torch.autograd.grad(penalty(u, v, middle, kind), tensors)
    with torch.no_grad():
        found = penalty_gradients(u, v, middle, kind)
    found = (found[0], found[-1], *found[1:-1])
    for a, b, c in zip(found, wanted, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(c, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_is_that_of_the_product(shape, core):
    u, v, middle = three(factors(shape, core))
    product = u @ v if middle is None else u @ middle @ v
    expected = product.square().sum((-2, -1)).sqrt()
    torch.testing.assert_close(product_norm(u, v, middle), expected, rtol=1e-12, atol=0)


def test_the_norm_of_nothing_is_zero():
    u, v = torch.zeros(4, 2), torch.zeros(2, 3)
    assert product_norm(u, v) == 0
    # Rows that cancel: by rounding the sum under the root comes out below 0 for some of them.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        u = torch.randn(37, 1, generator=generator).expand(37, 3)
        v = torch.randn(2, 27, generator=generator)
        norm = product_norm(u, torch.cat([v, -v.sum(0, keepdim=True)]))
        assert 0 <= norm < 1e-2 * u.norm() * v.norm()


def test_l2_is_weight_decay():
    u, v = factors((None, 5, 4, 2), core=False)
    gradients = penalty_gradients(u, v, kind="l2")
    torch.testing.assert_close(gradients, (u, v), rtol=0, atol=0)


def test_penalties_can_be_summed_with_weights():
    assert parse_penalty("none") == {}
    assert parse_penalty("frobenius") == {"frobenius": 1.0}
    assert parse_penalty(" frobenius+ 0.25 * l2 ") == {"frobenius": 1.0, "l2": 0.25}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobenious", "did you mean 'frobenius'"),
        ("l2+none", "unknown decay 'none'"),
        ("l2+l2", "names l2 twice"),
        ("x*l2", "'x' is no number"),
        ("-1*l2", "above 0"),
        ("nan*l2", "above 0"),
        ("", "unknown decay ''"),
    ],
)
def test_what_is_no_penalty_is_an_error(text, message):
    with pytest.raises(OptionError, match=message.replace("*", r"\*")):
        parse_penalty(text)


def test_the_product_is_never_formed():
    """Peak size of any tensor made: R x R or a factor, not M x N."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    u, v = factors((None, 100, 80, 4), core=False)
    with Sizes():
        penalty_gradients(u, v)
        penalty(u, v)
        product_norm(u, v)
    assert max(sizes) == 400
    assert math.prod((100, 80)) > max(sizes)


# ------------------------------------------------------------------------- in anybody's own loop


def layers(core: bool = False) -> nn.Sequential:
    """A convolution and a linear layer, each with gradients, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankConv2d(3, 6, 3, rank=4, stride=2, core=core, dtype=torch.float64),
        nn.Flatten(),
        nn.Tanh(),
        LowRankLinear(24, 7, rank=2, core=core, dtype=torch.float64),
        nn.Linear(7, 2, dtype=torch.float64),
    )
    model(torch.ones(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    return model


def weights_of(model: Any) -> list[nn.Parameter]:
    return [getattr(model[i], part).weight for i in (0, 3) for part in model[i].parts]


@pytest.mark.parametrize("core", [False, True])
def test_coupled_decay_adds_the_penaltys_gradient_to_the_gradients(core):
    model: Any = layers(core)
    weights = weights_of(model)
    before = {p: p.detach().clone() for p in model.parameters()}
    grads = {p: p.grad.clone() for p in model.parameters()}
    total = (model[0].weight.square().sum() + model[3].weight.square().sum()) / 2
    pulls = dict(zip(weights, torch.autograd.grad(total, weights), strict=True))
    frobenius_decay_(model, 0.3)
    for p in model.parameters():
        expected = grads[p] + 0.3 * pulls[p] if p in pulls else grads[p]
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(p.detach(), before[p], rtol=0, atol=0)


@pytest.mark.parametrize("core", [False, True])
def test_decoupled_decay_moves_the_weights_and_no_gradient(core):
    model: Any = layers(core)
    weights = weights_of(model)
    before = {p: p.detach().clone() for p in model.parameters()}
    grads = {p: p.grad.clone() for p in model.parameters()}
    total = (model[0].weight.square().sum() + model[3].weight.square().sum()) / 2
    pulls = dict(zip(weights, torch.autograd.grad(total, weights), strict=True))
    frobenius_decay_(model, 0.3, lr=0.1)
    for p in model.parameters():
        expected = before[p] - 0.03 * pulls[p] if p in pulls else before[p]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(p.grad, grads[p], rtol=0, atol=0)


def test_frozen_and_unused_factors_are_left_alone():
    model: Any = layers()
    model[0].v.weight.grad = None
    u, v = (getattr(model[0], part).weight.detach().clone() for part in ("u", "v"))
    frobenius_decay_(model, 0.3, lr=0.1)
    torch.testing.assert_close(model[0].v.weight.detach(), v, rtol=0, atol=0)
    assert not torch.equal(model[0].u.weight.detach(), u)


def test_a_tied_layer_decays_once():
    twins: Any = nn.Sequential(LowRankLinear(8, 8, 2), LowRankLinear(8, 8, 2))
    twins[1].u.weight, twins[1].v.weight = twins[0].u.weight, twins[0].v.weight
    alone: Any = nn.Sequential(LowRankLinear(8, 8, 2))
    alone.load_state_dict(twins.state_dict(), strict=False)
    for model in (twins, alone):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        frobenius_decay_(model, 0.5)
    torch.testing.assert_close(twins[0].u.weight.grad, alone[0].u.weight.grad, rtol=0, atol=0)
    assert twins[0].u.weight.grad.abs().max() > 0


@pytest.mark.parametrize("limit", [0, 10**6])
def test_equal_layers_decay_together_as_they_do_alone(limit, monkeypatch):
    monkeypatch.setattr(decay, "SMALL", limit)
    torch.manual_seed(0)
    shapes = [(8, 6, 2), (8, 6, 2), (8, 6, 3), (6, 8, 2), (8, 6, 2)]
    layers = [LowRankLinear(i, o, r, dtype=torch.float64) for i, o, r in shapes]
    model = nn.Sequential(*layers)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    frobenius_decay_(model, 0.5)
    for layer in layers:
        u, v = layer.factors()
        torch.testing.assert_close(layer.u.weight.grad, 0.5 * u @ (v @ v.T))
        torch.testing.assert_close(layer.v.weight.grad, 0.5 * (u.T @ u) @ v)


def test_autocast_does_not_reach_the_grams():
    model: Any = layers().float()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frobenius_decay_(model, 1.0)
    u, v = model[3].factors()
    torch.testing.assert_close(model[3].u.weight.grad, u @ (v @ v.T), rtol=1e-5, atol=1e-7)


def test_what_cannot_decay_is_an_error():
    model: Any = layers()
    with pytest.raises(SelectionError, match="Linear holds no low-rank layer"):
        frobenius_decay_(model[4], 0.1)
    with pytest.raises(OptionError, match="strength=-1 must be 0 or more"):
        frobenius_decay_(model, -1)
    with pytest.raises(OptionError, match="lr=nan must be 0 or more"):
        frobenius_decay_(model, 1.0, lr=math.nan)
    model.zero_grad()
    with pytest.raises(LifeCycleError, match="between backward"):
        frobenius_decay_(model, 0.1)
    with pytest.raises(OptionError, match="0 has a BatchNorm between its factors"):
        frobenius_decay_(nn.Sequential(LowRankLinear(8, 8, 2, norm=True)), 0.1)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Linear(16, 2))
    rankwise.factorize(model, 4, layers="0")
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptionError, match="0 gets sparse gradients"):
        frobenius_decay_(model, 0.1)
