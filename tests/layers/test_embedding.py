"""A low-rank embedding is the embedding of the product: lookups, gradients, padding, sparsity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankwise.errors import FactorizeError, PlanError
from rankwise.layers import INITS, Form, LowRankEmbedding, low_rank_class

N, D = 30, 12


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, N, shape, generator=torch.Generator().manual_seed(1))


def dense(**options: Any) -> nn.Embedding:
    layer = nn.Embedding(N, D, **options)
    with torch.no_grad():
        layer.weight.copy_(noise(N, D))
        if layer.padding_idx is not None:
            layer.weight[layer.padding_idx] = 0
    return layer


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("shape", [(4, 7), (5,), ()])
def test_full_rank_is_the_dense_embedding(shape: tuple[int, ...], core: bool) -> None:
    reference = dense()
    layer = LowRankEmbedding.from_dense(reference, D, core=core)
    ids = tokens(*shape)
    assert_close(layer(ids), reference(ids), rtol=1e-5, atol=1e-5)
    assert_close(layer.weight, reference.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", [False, True])
def test_gradients_are_those_of_the_product(core: bool) -> None:
    layer = LowRankEmbedding.from_dense(dense(), 5, core=core).double()
    ids, target = tokens(4, 7), noise(4, 7, D).double()
    (layer(ids) - target).square().sum().backward()
    found = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    product = layer.weight
    (nn.functional.embedding(ids, product) - target).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), found, strict=True):
        assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-9)


def test_it_is_the_best_approximation_of_its_rank() -> None:
    reference = dense()
    layer = LowRankEmbedding.from_dense(reference, 4)
    missed = torch.linalg.matrix_norm(layer.weight - reference.weight)
    values = torch.linalg.svdvals(reference.weight)
    assert_close(missed, values[4:].square().sum().sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("padding", [0, 3, -1])
def test_the_padding_row_is_exactly_zero_and_gets_no_gradient(padding: int, init: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LowRankEmbedding.from_dense(
        dense(padding_idx=padding), 5, init=init, generator=generator
    )
    ids = torch.tensor([[padding % N, 7]])
    assert layer.padding_idx == padding % N
    assert layer(ids)[0, 0].tolist() == [0.0] * D
    assert layer(ids)[0, 1].abs().min() > 0
    layer(ids).sum().backward()
    assert layer.u.weight.grad[padding].tolist() == [0.0] * 5
    assert layer.u.weight.grad[7].abs().min() > 0
    fresh = LowRankEmbedding(N, D, 5, padding_idx=padding)
    assert fresh(ids)[0, 0].tolist() == [0.0] * D


def test_a_padding_row_of_other_values_is_approximated_like_any_other() -> None:
    reference = dense(padding_idx=2)
    with torch.no_grad():
        reference.weight[2] = noise(D, seed=4)
    layer = LowRankEmbedding.from_dense(reference, D)
    assert_close(layer.weight[2], reference.weight[2], rtol=1e-5, atol=1e-5)


def test_sparse_gradients_stay_sparse_and_equal_the_dense_ones() -> None:
    ways = [LowRankEmbedding.from_dense(dense(sparse=s), 5) for s in (True, False)]
    for layer in ways:
        layer(tokens(4, 7)).square().sum().backward()
    assert ways[0].u.weight.grad.is_sparse
    assert_close(ways[0].u.weight.grad.to_dense(), ways[1].u.weight.grad)
    assert_close(ways[0].v.weight.grad, ways[1].v.weight.grad)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sparse": True}])
def test_it_becomes_the_dense_embedding_again(options: dict[str, Any]) -> None:
    reference = dense(**options)
    layer = LowRankEmbedding.from_dense(reference, 5)
    back = layer.to_dense()
    assert type(back) is nn.Embedding
    assert repr(back) == repr(reference)
    assert vars(back).keys() == vars(reference).keys()
    assert_close(back(tokens(3, 4)), layer(tokens(3, 4)), rtol=1e-5, atol=1e-5)


def test_its_spec_rebuilds_it_with_the_same_keys() -> None:
    layer = LowRankEmbedding.from_dense(dense(padding_idx=1), 5, core=True)
    fresh = LowRankEmbedding.from_spec(dense(padding_idx=1), layer.spec())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(tokens(4)), layer(tokens(4)))
    assert fresh.spec() == layer.spec()


def test_a_fresh_one_has_the_variance_of_a_default_embedding() -> None:
    torch.manual_seed(0)
    for core in (False, True):
        layer = LowRankEmbedding(2000, 64, 16, core=core)
        assert 0.9 < float(layer.weight.detach().var()) < 1.1


@pytest.mark.parametrize(
    ("options", "form", "message"),
    [
        ({"max_norm": 1.0}, Form(), "max_norm rescales"),
        ({"scale_grad_by_freq": True}, Form(), "scale_grad_by_freq divides"),
        ({}, Form(norm=True), "no BatchNorm between the factors of an embedding"),
    ],
)
def test_what_factors_cannot_do_is_refused(
    options: dict[str, Any], form: Form, message: str
) -> None:
    layer = dense(**options)
    reason = low_rank_class(layer, form)
    assert isinstance(reason, str)
    assert message in reason
    with pytest.raises(FactorizeError, match=message):
        LowRankEmbedding.from_dense(layer, 3, norm=form.norm)


def test_ranks_out_of_range_and_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match="rank 13 does not fit a embedding weight of 30×12"):
        LowRankEmbedding.from_dense(dense(), 13)
    with pytest.raises(PlanError, match="does not split"):
        LowRankEmbedding.from_dense(dense(), 3, blocks=3)
    assert "has no low-rank form here" in str(low_rank_class(nn.EmbeddingBag(4, 4)))

    class Scaled(nn.Embedding):
        pass

    assert "forward of its own" in str(low_rank_class(Scaled(4, 4)))


def test_flags_dtype_and_moments_survive() -> None:
    reference = dense().to(torch.bfloat16).eval()
    reference.weight.requires_grad_(False)
    layer = LowRankEmbedding.from_dense(reference, 5)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.training
    layer = LowRankEmbedding.from_dense(dense(), 5)
    gradient = noise(N, D, seed=3)
    u, v = layer.factors()
    first = dict(zip(layer.new_parameters(), layer.moments().first(gradient), strict=True))
    assert_close(first[layer.u.weight], gradient @ v.T, rtol=1e-5, atol=1e-5)
    assert_close(first[layer.v.weight], u.T @ gradient, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(tokens(3)), layer(tokens(3)))
