"""Truncation is best, factors are balanced, moments are carried by the chain rule."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rankwise import linalg
from rankwise.errors import FactorizeError


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A matrix of drawn shape, dtype and strides, and a rank that fits it."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**16))
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    matrix = {
        "plain": lambda: noise(rows, columns, seed=seed),
        "transposed": lambda: noise(columns, rows, seed=seed).T,
        "strided": lambda: noise(2 * rows, 3 * columns, seed=seed)[::2, 1::3],
        "expanded": lambda: noise(rows, 1, seed=seed).expand(rows, columns),
    }[layout]().to(dtype)
    return matrix, draw(st.integers(1, min(rows, columns)))


@given(matrices())
def test_the_error_of_the_product_is_the_tail_of_the_singular_values(drawn: tuple) -> None:
    matrix, rank = drawn
    u, v = linalg.spectral_factors(matrix, rank)
    exact = matrix.double()
    tail = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    error = (exact - u.double() @ v.double()).norm()
    tolerance = 1e-10 if matrix.dtype == torch.float64 else 2e-5
    assert u.dtype == linalg.working_dtype(matrix.dtype)
    assert_close(error, tail, rtol=0, atol=tolerance * (1 + float(exact.norm())))


@given(matrices())
def test_the_factors_are_balanced(drawn: tuple) -> None:
    matrix, rank = drawn
    u, v = linalg.spectral_factors(matrix, rank)
    assert u.shape == (matrix.shape[0], rank)
    assert v.shape == (rank, matrix.shape[1])
    assert_close(u.T @ u, v @ v.T, rtol=0, atol=1e-5 * (1 + float(matrix.double().norm())))


@pytest.mark.parametrize(("shape", "rank"), [((16, 16), 4), ((16, 16), 8), ((4, 16), 3)])
def test_none_of_100_random_candidates_is_better(shape: tuple[int, int], rank: int) -> None:
    matrix = noise(*shape)
    u, v = linalg.spectral_factors(matrix, rank)
    best = (matrix - u @ v).norm()
    for seed in range(1, 101):
        # The strongest kind of candidate: a random row space with the best coefficients in it.
        rows = noise(rank, shape[1], seed=seed)
        fit = matrix @ torch.linalg.pinv(rows) @ rows
        near = (u + 0.05 * noise(*u.shape, seed=seed)) @ (v + 0.05 * noise(*v.shape, seed=seed))
        assert best <= (matrix - fit).norm()
        assert best <= (matrix - near).norm()


def test_a_zero_matrix_has_zero_factors() -> None:
    u, v = linalg.spectral_factors(torch.zeros(5, 3), 2)
    assert_close(u @ v, torch.zeros(5, 3), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_that_are_not_finite_are_counted(value: float, dtype: torch.dtype) -> None:
    matrix = noise(4, 6, dtype=dtype)
    matrix[1, 2] = matrix[3, 5] = value
    with pytest.raises(FactorizeError, match="2 of 24 weights are not finite"):
        linalg.spectral_factors(matrix, 2)


def test_a_weight_on_the_meta_device_gives_factors_of_the_right_shape() -> None:
    u, v = linalg.spectral_factors(torch.empty(7, 5, device="meta"), 3)
    assert (u.device.type, u.shape, v.shape) == ("meta", (7, 3), (3, 5))


@pytest.mark.parametrize("rank", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("variance", [1e-4, 2.0])
def test_the_variance_of_random_factors_product_does_not_depend_on_the_rank(
    rank: int, variance: float
) -> None:
    generator = torch.Generator().manual_seed(rank)
    u, v = linalg.variance_factors((600, 500), rank, variance, generator)
    # An entry's fourth moment makes the estimate of a rank-1 product the noisiest: 500 + 600
    # independent numbers, so about 9 % of spread.
    spread = 0.3 if rank == 1 else 0.2 / rank**0.5 + 0.02
    assert_close((u @ v).var(), torch.tensor(variance), rtol=spread, atol=0)
    assert_close(u.var(), v.var(), rtol=0.5 if rank < 4 else 0.15, atol=0)


def test_first_moments_are_carried_by_the_chain_rule() -> None:
    u, v = noise(6, 3).requires_grad_(), noise(3, 5, seed=1).requires_grad_()
    gradient = noise(6, 5, seed=2)
    (u @ v).backward(gradient)
    for_u, for_v = linalg.carry_first(gradient, u.detach(), v.detach())
    assert_close(for_v, v.grad, rtol=1e-12, atol=1e-12)
    assert_close(for_u, u.grad, rtol=1e-12, atol=1e-12)


def test_second_moments_are_the_expectation_for_uncorrelated_gradients() -> None:
    u, v, scale = noise(6, 3), noise(3, 5, seed=1), noise(6, 5, seed=2).abs()
    draws = noise(40_000, 6, 5, seed=3) * scale
    for_u, for_v = linalg.carry_second(scale.square(), None, u, v)
    assert_close(for_v, (u.mT @ draws).square().mean(0), rtol=0.05, atol=0)
    assert_close(for_u, (draws @ v.mT).square().mean(0), rtol=0.05, atol=0)


def test_adams_step_is_at_most_the_learning_rate_after_the_carry() -> None:
    u, v = noise(6, 3), noise(3, 5, seed=1)
    steady = torch.ones(6, 5, dtype=torch.float64)  # the same gradient in every step: m^2 = v
    for_u, for_v = linalg.carry_second(steady, steady, u, v)
    for first, second in zip(linalg.carry_first(steady, u, v), (for_u, for_v), strict=True):
        assert bool((first.abs() <= second.sqrt() * (1 + 1e-12)).all())
    _, without = linalg.carry_second(steady, None, u, v)
    assert bool((for_v >= without).all())


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("ones", [False, True])
def test_a_batch_of_matrices_is_factorised_one_by_one(core: bool, ones: bool) -> None:
    matrices = noise(3, 6, 4)
    together = linalg.spectral_factors(matrices, 2, core=core, ones=ones)
    for i, matrix in enumerate(matrices):
        alone = linalg.spectral_factors(matrix, 2, core=core, ones=ones)
        product, expected = (functools.reduce(torch.matmul, f) for f in (together, alone))
        assert_close(product[i], expected, rtol=1e-10, atol=1e-10)
        spectrum = torch.linalg.svdvals(matrix)[:2]
        kept = torch.linalg.svdvals(expected)[:2]
        assert_close(kept, torch.ones_like(spectrum) if ones else spectrum, rtol=1e-9, atol=0)


def test_moments_of_three_factors_are_carried_by_the_chain_rule() -> None:
    factors = [noise(2, 6, 3), noise(2, 3, 4, seed=1), noise(2, 4, 5, seed=2)]
    leaves = [factor.requires_grad_() for factor in factors]
    gradient = noise(2, 6, 5, seed=3)
    functools.reduce(torch.matmul, leaves).backward(gradient)
    carried = linalg.carry_first(gradient, *(f.detach() for f in factors))
    for moment, leaf in zip(carried, leaves, strict=True):
        assert_close(moment, leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (2, 6, 6)])
def test_orthogonal_factors_have_the_mean_square_exactly(
    shape: tuple[int, ...], core: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.tensor([0.5, 3.0]) if len(shape) == 3 else torch.tensor(0.5)
    factors = linalg.orthogonal_factors(shape, 4, target, generator, core=core)
    product = functools.reduce(torch.matmul, factors)
    assert product.shape == shape
    assert_close(product.square().mean(dim=(-2, -1)), target, rtol=1e-5, atol=0)
    for factor in factors:
        small = factor.mT @ factor if factor.shape[-2] >= factor.shape[-1] else factor @ factor.mT
        unit = small[..., :1, :1] * torch.eye(4)
        assert_close(small, unit.expand_as(small), rtol=0, atol=1e-5)


def test_orthogonal_factors_favour_no_direction() -> None:
    """A bare QR makes the first entry negative in every draw."""
    drawn = [
        linalg.orthogonal_factors((4, 3), 2, 1.0, torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    for factors in zip(*drawn, strict=True):
        first = torch.stack(factors)[:, 0, 0]
        assert_close((first > 0).float().mean(), torch.tensor(0.5), rtol=0, atol=0.12)
