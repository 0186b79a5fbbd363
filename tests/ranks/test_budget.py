"""Budgets are reached as tightly as ranks allow, whatever they count."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankwise.errors import PlanError
from rankwise.ranks import Budget, MatrixShape, Rule


def shapes(*sizes: tuple[int, int], norm: bool = False) -> dict[str, MatrixShape]:
    return {f"layer{i}": MatrixShape(*size, norm) for i, size in enumerate(sizes)}


def decided(rule: Rule, *sizes: tuple[int, int], others: int = 0) -> list[int | None]:
    return [d.rank for d in rule.assign(shapes(*sizes), others).values()]


def total(chosen: dict[str, MatrixShape], rule: Rule, others: int = 0) -> int:
    """Parameters of the model after the rule."""
    found = rule.assign(chosen, others)
    return others + sum(cost(shape, found[name].rank) for name, shape in chosen.items())


def cost(shape: MatrixShape, rank: int | None) -> int:
    return shape.rows * shape.columns if rank is None else shape.cost(rank)


sizes = st.tuples(st.integers(1, 80), st.integers(1, 80))
drawn_shapes = st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=6).map(
    lambda drawn: {f"layer{i}": MatrixShape(*size, n) for i, (size, n) in enumerate(drawn)}
)
# Budget


@given(drawn_shapes, st.integers(0, 500), st.floats(0.02, 0.999), st.sampled_from([1, 3, 8]))
@settings(max_examples=150)
def test_a_budget_is_reached_within_one_step(
    chosen: dict[str, MatrixShape], others: int, fraction: float, multiple: int
) -> None:
    rule = Budget(fraction, multiple=multiple)
    target = int(fraction * (others + sum(s.dense for s in chosen.values())))
    try:
        found = rule.assign(chosen, others)
    except PlanError:
        # Out of reach: even the smallest ranks (or dense, where there is none) are too many.
        smallest = sum(min(s.dense, s.cost(multiple)) for s in chosen.values())
        assert others + smallest > target
        return
    spent = others + sum(cost(s, found[n].rank) for n, s in chosen.items())
    assert spent <= target
    steps = []
    for name, shape in chosen.items():
        rank = found[name].rank
        if rank is not None:
            assert rank % multiple == 0
            raised = rank + multiple
            after = shape.cost(raised) if raised < shape.full_rank else shape.dense
            steps.append(min(after, shape.dense) - cost(shape, rank))
    assert steps, "all dense, although the budget is below dense"
    assert target - spent < min(steps)


@given(drawn_shapes, st.integers(0, 300), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
@settings(max_examples=60)
def test_a_larger_budget_never_gives_a_smaller_model_by_more_than_a_step(
    chosen: dict[str, MatrixShape], others: int, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    try:
        small = total(chosen, Budget(low, multiple=1), others)
    except PlanError:
        return
    large = total(chosen, Budget(high, multiple=1), others)
    step = max(shape.cost(1) for shape in chosen.values())
    assert large > small - step


def test_ranks_grow_with_the_budget_layer_by_layer_when_shapes_agree() -> None:
    sizes = [(64, 64)] * 4
    last = [0] * 4
    for fraction in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        now = [r or 64 for r in decided(Budget(fraction, multiple=1), *sizes)]
        assert all(a <= b for a, b in zip(last, now, strict=True))
        assert max(now) - min(now) <= 1 or 64 in now
        last = now


def test_a_budget_shares_one_ratio_of_ranks() -> None:
    found = decided(Budget(0.3, multiple=1), (256, 256), (128, 512), (512, 64))
    shares = [(r or 0) / full for r, full in zip(found, (256, 128, 64), strict=True)]
    assert max(shares) - min(shares) < 0.03


def test_a_budget_of_all_is_the_dense_model() -> None:
    assert decided(Budget(1.0), (64, 64), (32, 32)) == [None, None]
    assert decided(Budget(10**9), (64, 64)) == [None]


def test_a_number_is_a_budget_of_the_whole_model() -> None:
    chosen = shapes((64, 64), (64, 64))
    assert total(chosen, Budget(6000, multiple=1), others=1000) in range(6000 - 127, 6001)
    assert total(chosen, Budget(0.5, multiple=1), others=1000) <= (8192 + 1000) // 2


@given(st.integers(1, 31), st.floats(0.3, 0.95))
def test_the_fraction_is_of_the_dense_model_also_beside_overrides(
    rank: int, fraction: float
) -> None:
    chosen = shapes((64, 64), (64, 64), (64, 64))
    assume(fraction * 3 * 64 * 64 >= (rank + 2) * 128 + 1)
    rule = Budget(fraction, multiple=1, overrides={"layer0": rank})
    target = int(fraction * 3 * 64 * 64)
    spent = total(chosen, rule)
    assert spent <= target
    free = [d.rank for n, d in rule.assign(chosen).items() if n != "layer0"]
    assert target - spent < 128 or free == [None, None]


def test_a_budget_that_overrides_alone_break_is_out_of_reach() -> None:
    with pytest.raises(PlanError, match="out of reach"):
        Budget(0.5, overrides={"*": None}).assign(shapes((64, 64)))


def test_a_budget_out_of_reach_says_what_is_the_least() -> None:
    chosen = shapes((64, 64))
    with pytest.raises(
        PlanError, match=r"410 .* out of reach.* 1,034 \(dense 4,106\).*multiple=1.* to 0\.252"
    ):
        Budget(0.1).assign(chosen, 10)
    assert Budget(0.252).assign(chosen, 10)["layer0"].rank == 8
    with pytest.raises(PlanError, match=r"select more layers, or raise it to 0\.034"):
        Budget(0.01, multiple=1).assign(chosen, 10)
    assert Budget(0.034, multiple=1).assign(chosen, 10)["layer0"].rank == 1
