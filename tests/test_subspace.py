"""Bases, moments and rounding: the pure parts of projected gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import LifeCycleError
from rankwise.optim.projected import moments, rounding, subspace


def decaying(rows: int, columns: int, seed: int = 0, ratio: float = 0.7) -> Tensor:
    """A matrix whose singular values fall by the ratio."""
    g = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, size, generator=g))[0]
    v = torch.linalg.qr(torch.randn(columns, size, generator=g))[0]
    return u * ratio ** torch.arange(size) @ v.T


def energy(gradient: Tensor, basis: Tensor) -> float:
    return float((gradient @ basis).square().sum())


@given(rows=st.integers(3, 30), columns=st.integers(3, 30), seed=st.integers(0, 99))
def test_three_cold_steps_come_near_the_best_basis(rows: int, columns: int, seed: int) -> None:
    rank = min(rows, columns, 3)
    gradient = decaying(rows, columns, seed)
    start = subspace.random_basis(columns, rank, torch.Generator().manual_seed(seed + 1))
    basis = subspace.power_step(gradient, start, steps=3)
    best = subspace.leading(gradient, rank)
    assert best is not None
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
    assert energy(gradient, basis) > 0.9 * energy(gradient, best["right"])
    assert energy(gradient, basis) <= energy(gradient, best["right"]) * (1 + 1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(12, 8), (8, 12), (8, 8)])
def test_the_exact_basis_gives_the_best_approximation_from_either_side(
    rows: int, columns: int
) -> None:
    gradient = decaying(rows, columns)
    bases = subspace.leading(gradient, 3)
    assert bases is not None
    left, right = bases["left"], bases["right"]
    values = torch.linalg.svdvals(gradient)
    lost = values[3:].square().sum().sqrt()
    for part in (left @ left.T @ gradient, gradient @ right @ right.T):
        torch.testing.assert_close((gradient - part).norm(), lost, rtol=1e-4, atol=1e-6)
    core = left.T @ gradient @ right  # signs of the two sides agree
    torch.testing.assert_close(core, torch.diag(values[:3]), rtol=1e-4, atol=1e-5)


def test_a_decomposition_that_fails_is_none() -> None:
    assert subspace.leading(torch.full((4, 3), float("nan")), 2) is None


def test_bases_come_in_float32_from_half_precision_and_in_float64_from_double() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        gradient = decaying(12, 8).to(dtype)
        basis = subspace.power_step(gradient, torch.eye(8)[:, :3])
        assert basis.dtype == expected
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=expected))


def test_random_bases_are_drawn_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    a = subspace.random_basis(20, 4, torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    b = subspace.random_basis(20, 4, torch.Generator().manual_seed(0))
    assert torch.equal(a, b)
    torch.testing.assert_close(a.T @ a, torch.eye(4), rtol=0, atol=1e-5)


def test_gaussian_projections_keep_the_expected_norm() -> None:
    gradient = decaying(40, 30)
    g = torch.Generator().manual_seed(0)
    kept = [
        energy(gradient, subspace.random_basis(30, 5, g, orthogonal=False)) for _ in range(2000)
    ]
    assert sum(kept) / 2000 == pytest.approx(float(gradient.square().sum()), rel=0.05)


@given(
    rows=st.integers(1, 33),
    rank=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_a_low_bit_basis_is_within_half_a_code(rows: int, rank: int, bits: int, seed: int) -> None:
    basis = torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed))
    stored = subspace.LowBitBasis.of(basis, bits)
    error = (stored.dequantize() - basis).abs()
    assert bool((error <= stored.scales / 2 * (1 + 1e-4)).all())
    assert stored.codes.numel() == (-(-rows * rank // 2) if bits == 4 else rows * rank)
    assert torch.equal(stored.dequantize().abs().amax(0) > 0, basis.abs().amax(0) > 0)


# ---------------------------------------------------------------- moments


def rotation(size: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g))[0]


def adam_state(gradients: list[Tensor], amsgrad: bool = False) -> tuple[dict[str, Any], Any]:
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.Adam([parameter], amsgrad=amsgrad)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer.state[parameter], optimizer.param_groups[0]


def samples(count: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=g) for _ in range(count)]


def test_first_moments_turn_linearly() -> None:
    """Turned moments are those of the turned gradients."""
    turn = rotation(4)
    state, group = adam_state(samples(5))
    expected, _ = adam_state([g @ turn for g in samples(5)])
    moments.rotate_(state, group, lambda m: m @ turn, lambda v: v @ turn.square(), "w")
    torch.testing.assert_close(state["exp_avg"], expected["exp_avg"])


@pytest.mark.parametrize("seed", range(4))
def test_a_turn_that_only_swaps_directions_is_exact_for_second_moments(seed: int) -> None:
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    turn = torch.eye(4)[:, order] * signs
    state, group = adam_state(samples(5), amsgrad=True)
    expected, _ = adam_state([g @ turn for g in samples(5)], amsgrad=True)
    moments.rotate_(state, group, lambda m: m @ turn, lambda v: v @ turn.square(), "w")
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], expected[key], rtol=1e-4, atol=1e-6)


def test_second_moments_of_a_constant_gradient_turn_by_its_square() -> None:
    """No variance: what the mean says is all; squares of the cosines alone would be wrong."""
    turn, gradient = rotation(4), samples(1)[0]
    state, group = adam_state([gradient] * 400)
    moments.rotate_(state, group, lambda m: m @ turn, lambda v: v @ turn.square(), "w")
    scale = 1 - 0.999**400
    torch.testing.assert_close(
        state["exp_avg_sq"] / scale, (gradient @ turn).square(), rtol=1e-3, atol=1e-5
    )
    assert bool((state["exp_avg_sq"] >= 0).all())


def test_moments_of_unknown_form_are_refused_not_guessed() -> None:
    state = {"state1": torch.zeros(4, 4, dtype=torch.uint8), "absmax1": torch.zeros(1)}
    for call in (
        lambda: moments.rotate_(state, {}, lambda m: m, lambda v: v, "w"),
        lambda: moments.reset_(state, "w"),
    ):
        with pytest.raises(LifeCycleError, match=r"'state1'.*w.*moments='keep'"):
            call()


def test_reset_zeroes_moments_and_keeps_the_count() -> None:
    state, _ = adam_state(samples(3))
    moments.reset_(state, "w")
    assert float(state["step"]) == 3
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0 + 1 / 1024 / 4, -3.14159, 1e-3, 0.0, 65000.0])
    g = torch.Generator().manual_seed(0)
    total, count = torch.zeros(5, dtype=torch.float64), 4000
    for _ in range(count):
        target = torch.empty(5, dtype=dtype)
        rounding.stochastic_(target, exact.clone(), g)
        total += target.double()
        spacing = torch.finfo(dtype).eps * exact.abs()
        assert bool(((target.float() - exact).abs() <= spacing).all())
    torch.testing.assert_close((total / count).float(), exact, rtol=3e-4, atol=1e-8)


def test_stochastic_rounding_leaves_what_is_not_finite() -> None:
    exact = torch.tensor([float("inf"), float("-inf"), float("nan")])
    target = torch.empty(3, dtype=torch.bfloat16)
    rounding.stochastic_(target, exact.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(target.isnan(), exact.isnan())
    assert target[:2].tolist() == [float("inf"), float("-inf")]


def test_compensated_rounding_adds_up_what_nearest_loses() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16)
    lost, nearest = torch.zeros(3, dtype=torch.bfloat16), weight.clone()
    for _ in range(1000):
        rounding.compensated_(weight, weight.float() + lost.float() + 1e-4, lost)
        nearest += 1e-4
    torch.testing.assert_close(weight.float(), torch.full((3,), 1.1), rtol=0, atol=5e-3)
    assert torch.equal(nearest, torch.ones(3, dtype=torch.bfloat16)), "which is why"
