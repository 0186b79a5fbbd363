"""GPT-2's Conv1D keeps its function, its transposed weight, and returns as what it was."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankwise.errors import FactorizeError
from rankwise.layers import INITS, Form, LowRankTransposedLinear, low_rank_class


class Conv1D(nn.Module):
    """As in transformers, which the tests do not need: y = x W + b with W (nx, nf)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


Conv1D.__module__ = "transformers.pytorch_utils"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(kind: Any = Conv1D, nf: int = 12, nx: int = 8) -> Any:
    layer = kind(nf, nx)
    with torch.no_grad():
        layer.weight.copy_(noise(nx, nf))
        layer.bias.copy_(noise(nf, seed=1))
    return layer


def real() -> Any:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D


@pytest.mark.parametrize("genuine", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"core": True}, {"blocks": 3}, {"blocks": 3, "core": True}]
)
def test_full_rank_is_the_dense_layer(options: dict[str, Any], genuine: bool) -> None:
    reference = dense(real() if genuine else Conv1D)
    assert low_rank_class(reference) is LowRankTransposedLinear
    layer = LowRankTransposedLinear.from_dense(
        reference, 4 if "blocks" in options else 8, **options
    )
    x = noise(2, 5, 8, seed=2)
    assert_close(layer(x), reference(x), rtol=1e-5, atol=1e-5)
    assert layer.weight.shape == reference.weight.shape == layer.weight_shape
    assert_close(layer.weight, reference.weight, rtol=1e-5, atol=1e-5)
    assert layer.bias is reference.bias
    back = layer.to_dense()
    assert type(back) is type(reference)
    assert (back.nf, back.nx) == (12, 8)
    assert back.bias is reference.bias
    assert_close(back(x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_it_is_the_best_approximation_of_each_part_of_the_outputs(blocks: int) -> None:
    reference = dense()
    layer = LowRankTransposedLinear.from_dense(reference, 2, blocks=blocks)
    missed = (layer.weight - reference.weight).square().sum()
    parts = reference.weight.detach().chunk(blocks, 1)
    best = sum(torch.linalg.svdvals(part)[2:].square().sum() for part in parts)
    assert_close(missed, torch.as_tensor(best), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_factors_is_that_of_the_transposed_product() -> None:
    layer, x = LowRankTransposedLinear.from_dense(dense(), 3), noise(5, 8)
    layer(x).square().sum().backward()
    found = [layer.u.weight.grad, layer.v.weight.grad]
    layer.zero_grad()
    torch.addmm(dense().bias, x, layer.weight).square().sum().backward()
    assert_close(found, [layer.u.weight.grad, layer.v.weight.grad], rtol=1e-4, atol=1e-4)
    gradient = noise(8, 12, seed=3)
    u, v = layer.factors()
    carried = dict(zip(layer.new_parameters(), layer.moments().first(gradient), strict=True))
    assert_close(carried[layer.u.weight], gradient.T @ v.T, rtol=1e-5, atol=1e-5)
    assert_close(carried[layer.v.weight], u.T @ gradient.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_serves(init: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LowRankTransposedLinear.from_dense(dense(), 3, init=init, generator=generator)
    assert layer.factors()[0].shape == (12, 3)
    assert bool(torch.isfinite(layer(noise(2, 8))).all())


def test_copies_pickles_and_specs_know_the_dense_class() -> None:
    layer = LowRankTransposedLinear.from_dense(dense(), 3)
    x = noise(2, 8)
    assert type(copy.deepcopy(layer).to_dense()) is Conv1D
    fresh = LowRankTransposedLinear.from_spec(dense(), layer.spec())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    layer = LowRankTransposedLinear.from_dense(dense(real()), 3)
    assert_close(pickle.loads(pickle.dumps(layer)).to_dense()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_one_built_directly_needs_transformers_to_become_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = LowRankTransposedLinear(12, 8, 3)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FactorizeError, match="Conv1D of transformers, which is not installed"):
        layer.to_dense()
    torch.manual_seed(0)
    wide = LowRankTransposedLinear(400, 100, 20)
    assert_close(wide.weight.var(), torch.tensor(1 / 300), rtol=0.1, atol=0)


def test_a_subclass_and_a_namesake_are_left() -> None:
    class Own(Conv1D):
        pass

    class Other(Conv1D):
        pass

    Other.__name__ = "Conv1D"
    for kind in (Own, Other):
        assert "no low-rank form" in str(low_rank_class(dense(kind)))
    assert low_rank_class(dense(), Form(core=True)) is LowRankTransposedLinear
