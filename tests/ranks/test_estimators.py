"""Rank estimators against brute force, closed forms, planted ranks and the model they come from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import FactorizeError, OptionError
from rankwise.ranks import estimators
from rankwise.ranks.estimators import (
    energy_rank,
    entropy_rank,
    scaled_stable_rank,
    singular_values,
    stable_rank,
    stable_rank_scale,
    vbmf_noise_variance,
    vbmf_rank,
)


def gaussian(rows: int, columns: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def planted(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """Rank `rank` with entries of variance about 1, plus noise of this standard deviation."""
    signal = gaussian(rows, rank, seed) @ gaussian(rank, columns, seed + 1) / rank**0.5
    return signal + gaussian(rows, columns, seed + 2, noise)


spectra = st.lists(st.floats(0, 1e3), min_size=1, max_size=12).map(
    lambda drawn: torch.tensor(sorted(drawn, reverse=True), dtype=torch.float64)
)
ESTIMATES = {
    "stable": stable_rank,
    "energy": lambda values: energy_rank(values, 0.9).double(),
    "sum": lambda values: energy_rank(values, 0.9, power=1).double(),
    "entropy": entropy_rank,
}


# What holds for all


@given(spectra)
def test_estimates_lie_between_one_and_the_number_of_nonzero_values(values: Tensor) -> None:
    values = torch.where(values > 1e-6 * values[0], values, 0.0)
    nonzero = int((values > 0).sum())
    for name, estimate in ESTIMATES.items():
        found = float(estimate(values))
        assert (1 if nonzero else 0) <= found * (1 + 1e-12), name
        assert found <= nonzero * (1 + 1e-9), name


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_scale_of_a_matrix_does_not_count(name: str, scale: float) -> None:
    values = torch.linspace(3, 0.1, 9)
    torch.testing.assert_close(ESTIMATES[name](values * scale), ESTIMATES[name](values))


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_flat_spectrum_has_as_many_ranks_as_values_and_a_zero_matrix_none(name: str) -> None:
    share = 0.9 if name in ("energy", "sum") else 1.0
    found = float(ESTIMATES[name](torch.full((20,), 7.0)))
    assert found == pytest.approx(20 * share)
    assert float(ESTIMATES[name](torch.zeros(5))) == 0


@pytest.mark.parametrize("name", ESTIMATES)
def test_leading_dimensions_are_matrices_of_their_own(name: str) -> None:
    weights = torch.stack([gaussian(6, 9, seed=i) for i in range(4)]).reshape(2, 2, 6, 9)
    values = singular_values(weights)
    assert values.shape == (2, 2, 6)
    each = torch.stack([ESTIMATES[name](singular_values(w)) for w in weights.reshape(4, 6, 9)])
    torch.testing.assert_close(ESTIMATES[name](values), each.reshape(2, 2))


# Singular values


def test_singular_values_are_computed_in_float32_or_better() -> None:
    weight = gaussian(12, 20)
    exact = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(singular_values(weight.double()), exact)
    assert singular_values(weight.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(
        singular_values(weight.bfloat16()).double(), exact, rtol=0.02, atol=0
    )


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(FactorizeError, match="2 of 12 weights are not finite"):
        singular_values(torch.tensor([math.nan, math.inf, *range(10)]).reshape(3, 4))
    with pytest.raises(FactorizeError, match="meta device"):
        singular_values(torch.empty(3, 4, device="meta"))


# Stable rank


def test_stable_rank_is_the_ratio_of_squared_norms() -> None:
    for shape in ((5, 9), (9, 5), (7, 7)):
        weight = gaussian(*shape).double()
        expected = weight.norm().square() / torch.linalg.matrix_norm(weight, 2).square()
        torch.testing.assert_close(stable_rank(singular_values(weight)), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "within"),
    [(64, 64, 0.09), (256, 256, 0.04), (256, 2304, 0.03), (128, 1152, 0.05), (1024, 256, 0.02)],
)
def test_random_weights_have_the_stable_rank_that_the_closed_form_says(
    rows: int, columns: int, within: float
) -> None:
    measured = [
        min(rows, columns) / float(stable_rank(singular_values(gaussian(rows, columns, seed))))
        for seed in range(8)
    ]
    mean = sum(measured) / len(measured)
    assert stable_rank_scale(rows, columns) * (1 - within) < mean < stable_rank_scale(rows, columns)
    assert stable_rank_scale(rows, columns) == stable_rank_scale(columns, rows)


def test_the_scale_of_small_squares_is_a_little_below_its_limit() -> None:
    measured = [
        64 / float(stable_rank(singular_values(gaussian(64, 64, seed)))) for seed in range(200)
    ]
    assert sum(measured) / len(measured) == pytest.approx(3.77, abs=0.02)
    assert stable_rank_scale(64, 64) == 4
    assert stable_rank_scale(64, 576) == pytest.approx(16 / 9)


def test_scaled_stable_rank_is_capped_at_full_rank() -> None:
    flat = torch.ones(10)
    assert float(scaled_stable_rank(flat, 10, 10)) == 10
    one = torch.tensor([1.0] + [0.0] * 9)
    assert float(scaled_stable_rank(one, 10, 10)) == pytest.approx(4)


# Energy


@given(spectra, st.floats(0.01, 1.0), st.sampled_from([1.0, 2.0]))
def test_energy_rank_is_the_first_that_keeps_enough(
    values: Tensor, energy: float, power: float
) -> None:
    rank = int(energy_rank(values, energy, power))
    if not values[0] > 0:
        assert rank == 0
        return
    shares = [(float(v) / float(values[0])) ** power for v in values]
    kept = [math.fsum(shares[:r]) for r in range(len(shares) + 1)]
    assert kept[rank] >= energy * kept[-1] * (1 - 1e-12)
    assert kept[rank - 1] < energy * kept[-1] * (1 + 1e-12)


@given(spectra, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_more_energy_never_takes_fewer_ranks(values: Tensor, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert int(energy_rank(values, low)) <= int(energy_rank(values, high))


def test_truncation_at_the_energy_rank_errs_by_no_more_than_the_rest() -> None:
    weight = planted(30, 50, 5, 0.3).double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for energy in (0.5, 0.9, 0.99, 1.0):
        rank = int(energy_rank(s, energy))
        error = (weight - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm() / weight.norm()
        assert error <= math.sqrt(1 - energy) + 1e-12
        short = rank - 1
        error = (weight - (u[:, :short] * s[:short]) @ vh[:short]).norm() / weight.norm()
        assert error > math.sqrt(1 - energy)


@pytest.mark.parametrize("energy", [0, -0.1, 1.1, math.nan])
def test_a_share_of_energy_is_above_zero_and_at_most_one(energy: float) -> None:
    with pytest.raises(OptionError, match="energy="):
        energy_rank(torch.ones(3), energy)
    with pytest.raises(OptionError, match="power="):
        energy_rank(torch.ones(3), 0.5, power=energy if energy != 1.1 else math.inf)


# Entropy


def test_entropy_rank_by_hand() -> None:
    shares = [0.5, 0.25, 0.25]
    entropy = -sum(p * math.log(p) for p in shares)
    found = entropy_rank(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert float(found) == pytest.approx(math.exp(entropy)) == pytest.approx(2**1.5)


# VBMF


@pytest.mark.parametrize("known", [True, False], ids=["known noise", "unknown noise"])
@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(80, 80, 8), (60, 200, 6), (200, 60, 6), (256, 288, 20)]
)
def test_vbmf_finds_a_planted_rank_under_noise(
    rows: int, columns: int, rank: int, noise: float, known: bool
) -> None:
    values = singular_values(planted(rows, columns, rank, noise))
    assert int(vbmf_rank(values, rows, columns, noise**2 if known else None)) == rank
    estimated = math.sqrt(float(vbmf_noise_variance(values, rows, columns)))
    assert estimated == pytest.approx(noise, rel=0.06)


@pytest.mark.parametrize("shape", [(50, 50), (40, 160), (256, 64)])
def test_vbmf_finds_nothing_in_pure_noise(shape: tuple[int, int]) -> None:
    for seed in range(5):
        values = singular_values(gaussian(*shape, seed=seed, std=0.02))
        assert int(vbmf_rank(values, *shape)) == 0
        assert int(vbmf_rank(values, *shape, noise_variance=0.02**2)) == 0


def test_vbmf_of_exactly_low_rank_and_zero_matrices() -> None:
    weight = (gaussian(40, 3) @ gaussian(3, 60, seed=1)).double()
    assert int(vbmf_rank(singular_values(weight), 40, 60)) == 3
    assert int(vbmf_rank(torch.zeros(40), 40, 60)) == 0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_vbmf_does_not_depend_on_the_scale(scale: float) -> None:
    values = singular_values(planted(40, 60, 4, 0.5).double())
    assert int(vbmf_rank(values * scale, 40, 60)) == int(vbmf_rank(values, 40, 60)) == 4
    torch.testing.assert_close(
        vbmf_noise_variance(values * scale, 40, 60) / scale**2, vbmf_noise_variance(values, 40, 60)
    )


def test_vbmf_counts_each_matrix_of_a_batch() -> None:
    weights = torch.stack([planted(30, 40, rank, 0.1, seed=rank) for rank in (2, 5)])
    assert vbmf_rank(singular_values(weights), 30, 40).tolist() == [2, 5]
    assert vbmf_rank(singular_values(weights), 30, 40, 0.01).tolist() == [2, 5]


def least_free_energy(gamma: float, short: int, long: int) -> float:
    """Of one component that is not zero, noise variance 1, by iterating the model's conditions.

    V = b a^T + noise, priors with variances c_a and c_b that are learned too: each update below
    sets one unknown to its optimum with the others held (Nakajima et al., 2013, sections 2 and 3).
    """
    a = b = math.sqrt(gamma)
    var_a = var_b = 0.1
    prior_a = prior_b = 1.0
    for _ in range(5000):
        var_a = 1 / (b * b + short * var_b + 1 / prior_a)
        a = var_a * gamma * b
        var_b = 1 / (a * a + long * var_a + 1 / prior_b)
        b = var_b * gamma * a
        prior_a, prior_b = a * a / long + var_a, b * b / short + var_b
    whole_a, whole_b = a * a + long * var_a, b * b + short * var_b
    return (
        long * math.log(prior_a / var_a)
        + short * math.log(prior_b / var_b)
        + whole_a / prior_a
        + whole_b / prior_b
        - (short + long)
        - 2 * a * b * gamma
        + whole_a * whole_b
    )


@pytest.mark.parametrize(("short", "long"), [(20, 20), (20, 50), (5, 80)])
def test_the_threshold_of_vbmf_is_where_a_component_first_lowers_the_free_energy(
    short: int, long: int
) -> None:
    """The component left out has free energy 0, so it stays where another has less than that."""
    threshold = math.sqrt(long * estimators._detectable(short / long))
    assert least_free_energy(threshold * 1.003, short, long) < 0
    assert least_free_energy(threshold * 0.997, short, long) > 0


@pytest.mark.parametrize(("short", "long"), [(20, 20), (20, 50)])
@pytest.mark.parametrize("above", [1.05, 1.5, 4.0])
def test_the_free_energy_of_a_component_is_that_of_the_model(
    short: int, long: int, above: float
) -> None:
    square = long * estimators._detectable(short / long) * above**2
    x = square / long
    expected = x - math.log(x) + least_free_energy(math.sqrt(square), short, long) / long
    squares, variance = (torch.tensor([v], dtype=torch.float64) for v in (square, 1.0))
    found = estimators._free_energy(squares, variance, long, short / long)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_noise_variance_is_the_minimum_of_the_free_energy() -> None:
    values = singular_values(planted(25, 40, 4, 0.7).double())
    found = vbmf_noise_variance(values, 25, 40)
    squares = values.square()
    around = found * torch.logspace(-1, 1, 4001, dtype=torch.float64)
    energies = estimators._free_energy(squares, around, 40, 25 / 40)
    least = estimators._free_energy(squares, found[None], 40, 25 / 40)
    assert float(least) <= float(energies.min()) + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_vbmf_is_defined_for_every_small_shape(rows: int, columns: int, seed: int) -> None:
    values = singular_values(gaussian(rows, columns, seed))
    assert 0 <= int(vbmf_rank(values, rows, columns)) <= min(rows, columns)


def test_vbmf_wants_all_singular_values_and_a_positive_variance() -> None:
    with pytest.raises(OptionError, match="give all 4"):
        vbmf_rank(torch.ones(3), 4, 5)
    with pytest.raises(OptionError, match="noise_variance="):
        vbmf_rank(torch.ones(4), 4, 5, noise_variance=0.0)
