"""Rules keep their promises: rounding, break-even guard, budgets; the plan says what is done."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from rankwise import accounting, ranks
from rankwise.errors import OptionError, PlanError, SelectionError
from rankwise.method import Context
from rankwise.ranks import Budget, Fixed, Ratio, Rule, as_rule, factorize, plan
from rankwise.ranks.rules import MatrixShape

NAN, INF = float("nan"), float("inf")


def shapes(*sizes: tuple[int, int], norm: bool = False) -> dict[str, MatrixShape]:
    return {f"layer{i}": MatrixShape(*size, norm) for i, size in enumerate(sizes)}


def decided(rule: Rule, *sizes: tuple[int, int], others: int = 0) -> list[int | None]:
    return [d.rank for d in rule.assign(shapes(*sizes), others).values()]


def total(chosen: dict[str, MatrixShape], rule: Rule, others: int = 0) -> int:
    """Parameters of the model after the rule."""
    found = rule.assign(chosen, others)
    return others + sum(cost(shape, found[name].rank) for name, shape in chosen.items())


def cost(shape: MatrixShape, rank: int | None) -> int:
    return shape.rows * shape.columns if rank is None else rank * shape.per_rank


sizes = st.tuples(st.integers(1, 80), st.integers(1, 80))
drawn_shapes = st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=6).map(
    lambda drawn: {f"layer{i}": MatrixShape(*size, n) for i, (size, n) in enumerate(drawn)}
)
rules = st.one_of(
    st.builds(Fixed, st.integers(1, 80), allow_growth=st.booleans()),
    st.builds(
        Ratio,
        st.floats(0.01, 1.0),
        multiple=st.sampled_from([1, 2, 8]),
        allow_growth=st.booleans(),
    ),
)


# What holds for every rule


@given(drawn_shapes)
def test_break_even_is_the_first_rank_that_saves_nothing(chosen: dict[str, MatrixShape]) -> None:
    for shape in chosen.values():
        assert shape.break_even * shape.per_rank >= shape.dense
        assert (shape.break_even - 1) * shape.per_rank < shape.dense
        assert shape.break_even <= shape.full_rank


@given(rules, drawn_shapes)
def test_a_layer_gets_smaller_or_stays_dense_with_a_reason(
    rule: Rule, chosen: dict[str, MatrixShape]
) -> None:
    if isinstance(rule, Fixed):
        assume(rule.rank <= max(s.full_rank for s in chosen.values()))
    for name, decision in rule.assign(chosen).items():
        assert (decision.rank is None) == bool(decision.reason)
        if decision.rank is not None:
            assert 1 <= decision.rank <= chosen[name].full_rank
            assert rule.allow_growth or cost(chosen[name], decision.rank) < chosen[name].dense


@pytest.mark.parametrize(
    ("size", "norm", "last"),
    # 16×16: 8 x 32 = 256 is no saving, nor is 2 x 9 = 18 for 6×3; with norm 18×9 has 6 x 29 > 162.
    [((16, 16), False, 7), ((6, 3), False, 1), ((16, 16), True, 7), ((18, 9), True, 5)],
)
def test_the_guard_draws_the_line_exactly(size: tuple[int, int], norm: bool, last: int) -> None:
    one = shapes(size, norm=norm)
    assert Fixed(last).assign(one)["layer0"].rank == last
    refused = Fixed(last + 1).assign(one)["layer0"]
    assert refused.rank is None
    assert f"break-even {last + 1}" in refused.reason
    assert Fixed(last + 1, allow_growth=True).assign(one)["layer0"].rank == last + 1


@pytest.mark.parametrize(
    "rule",
    [
        Fixed(4),
        Ratio(0.25),
        Ratio(1.0, multiple=1, allow_growth=True),
        Ratio(0.3, overrides={"layer?": 3, "*": None, "x": 0.5}),
        Budget(0.3),
        Budget(120_000, multiple=4),
    ],
)
def test_repr_builds_an_equal_rule(rule: Rule) -> None:
    assert eval(repr(rule), dict(vars(ranks))) == rule


def test_repr_is_the_shortest_call() -> None:
    assert repr(Ratio(0.25, multiple=8)) == "Ratio(0.25)"
    assert repr(Fixed(8, allow_growth=True)) == "Fixed(8, allow_growth=True)"


# Fixed and Ratio


def test_a_fixed_rank_leaves_smaller_layers_dense_and_refuses_a_rank_above_all() -> None:
    assert decided(Fixed(8), (64, 64), (4, 64), (64, 10)) == [8, None, 8]
    with pytest.raises(PlanError, match=r"rank 65 is above .* layer0 \(64×64\), full rank 64"):
        decided(Fixed(65), (64, 64), (4, 64))


@pytest.mark.parametrize(
    ("ratio", "multiple", "size", "rank"),
    [
        (0.25, 8, (64, 64), 16),
        (0.25, 8, (100, 100), 24),  # 25 -> 24
        (0.29, 8, (100, 100), 32),  # 29 -> 32
        (0.01, 8, (512, 512), 8),  # never below one multiple
        (0.01, 1, (64, 64), 1),
        (0.25, 1, (10, 784), 2),
        (0.25, 8, (10, 784), 8),
        (0.3, 3, (64, 64), 18),
        (1.0, 8, (100, 30), 30),  # full rank stays full rank
        (0.9, 64, (20, 30), 20),
    ],
)
def test_a_ratio_is_of_the_full_rank_rounded_to_a_multiple(
    ratio: float, multiple: int, size: tuple[int, int], rank: int
) -> None:
    assert decided(Ratio(ratio, multiple=multiple, allow_growth=True), size) == [rank]


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.integers(1, 16), drawn_shapes)
def test_a_larger_ratio_never_gives_a_smaller_rank(
    one: float, other: float, multiple: int, chosen: dict[str, MatrixShape]
) -> None:
    low, high = (
        Ratio(ratio, multiple=multiple, allow_growth=True).assign(chosen)
        for ratio in sorted((one, other))
    )
    for name, shape in chosen.items():
        rank = low[name].rank
        assert rank is not None
        assert rank <= (high[name].rank or 0)
        assert rank % multiple == 0 or rank == shape.full_rank


# Overrides


def test_overrides_are_ranks_ratios_or_dense_and_the_first_match_counts() -> None:
    sizes = [(64, 64)] * 5
    rule = Ratio(0.25, overrides={"layer0": 4, "layer1": 0.1, "layer2": None, "layer[0-3]": 9})
    assert decided(rule, *sizes) == [4, 6, None, 9, 16]
    assert rule.assign(shapes(*sizes))["layer2"].reason == "dense by override"


def test_overrides_too_stop_at_break_even_unless_growth_is_allowed() -> None:
    assert decided(Ratio(0.25, overrides={"*": 32}), (64, 64)) == [None]
    assert decided(Ratio(0.25, overrides={"*": 32}, allow_growth=True), (64, 64)) == [32]
    assert decided(Ratio(0.25, overrides={"*": 1.0}, allow_growth=True), (64, 30)) == [30]


def test_an_override_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(SelectionError, match=r"'layr1' matches no selected layer.*'layer1'"):
        decided(Ratio(0.25, overrides={"layr1": 4}), (64, 64), (64, 64))


def test_an_override_above_the_full_rank_names_layer_and_shape() -> None:
    with pytest.raises(PlanError, match=r"rank 31 for layer0 \(64×30\) is above its full rank 30"):
        decided(Ratio(0.25, overrides={"*": 31}), (64, 30))


@pytest.mark.parametrize("value", [0, -3, 0.0, -0.5, 1.5, NAN, INF, True, "8", [8]])
def test_an_override_that_is_neither_rank_nor_ratio_is_refused(value: Any) -> None:
    with pytest.raises(PlanError, match=r"for 'fc' is no rank"):
        Ratio(0.25, overrides={"fc": value})


def test_overrides_map_patterns() -> None:
    with pytest.raises(PlanError, match="must map layer globs to ranks"):
        Fixed(4, overrides=[("fc", 4)])  # pyright: ignore[reportArgumentType]


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
        smallest = sum(min(s.dense, multiple * s.per_rank) for s in chosen.values())
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
            after = raised * shape.per_rank if raised < shape.full_rank else shape.dense
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
    step = max(shape.per_rank for shape in chosen.values())
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


# Bad values

WRONG: Any = {
    Fixed: (0, -1, 2.5, 4.0, True, None, "8", NAN),
    Ratio: (0, 0.0, -0.1, 1.5, NAN, INF, True, None, "0.5"),
    Budget: (0, 0.0, -5, 1.5, NAN, INF, True, None, "0.5"),
}


@pytest.mark.parametrize(("kind", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_a_value_that_makes_no_rule_is_refused_and_shown(kind: Any, value: Any) -> None:
    with pytest.raises(PlanError, match=re.escape(repr(value))):
        kind(value)


@pytest.mark.parametrize("multiple", [0, -8, 1.5, 8.0, True, "8", None])
def test_a_multiple_is_a_whole_number(multiple: Any) -> None:
    for kind in (Ratio, Budget):
        with pytest.raises(PlanError, match="multiples of a whole number"):
            kind(0.5, multiple=multiple)


def test_a_budget_lets_no_layer_grow() -> None:
    with pytest.raises(PlanError, match="drop allow_growth"):
        Budget(0.5, allow_growth=True)


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        (32, Fixed(32)),
        (0.25, Ratio(0.25)),
        ("32", Fixed(32)),
        ("0.25", Ratio(0.25)),
        (" 0.25 ", Ratio(0.25)),
        ("rank=32", Fixed(32)),
        ("ratio=0.25", Ratio(0.25)),
        ("ratio = 1", Ratio(1)),
        ("budget=0.3", Budget(0.3)),
        ("budget=1_000_000", Budget(1_000_000)),
        (Budget(0.3), Budget(0.3)),
    ],
)
def test_a_rule_can_be_written_in_short(written: Any, rule: Rule) -> None:
    assert as_rule(written) == rule


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("budgte=0.3", "did you mean 'budget'"),
        ("a=b=3", "unknown rank rule 'a=b'"),
        ("budget=", "'' is no number"),
        ("auto", "'auto' is no number"),
        ("", "'' is no number"),
        (None, "None is no rank rule"),
        (True, "True is no rank rule"),
        ([8], r"\[8\] is no rank rule"),
    ],
)
def test_what_is_no_rule_is_refused_with_examples(written: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        as_rule(written)


@pytest.mark.parametrize("written", ["0", "nan", "inf", "1.5", "budget=-1", "rank=0.5", 0, -1.0])
def test_numbers_out_of_range_are_refused(written: Any) -> None:
    with pytest.raises(PlanError):
        as_rule(written)


# The plan


class Small(nn.Module):
    """Convolutions that go down and up again, an embedding of positions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.position = nn.Embedding(64, 16)
        self.fc = nn.Linear(16, 10)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.body(self.grouped(self.down(x)).relu()).relu())
        places = torch.arange(x[0, 0].numel(), device=x.device)
        return self.fc(x.flatten(2).mT + self.position(places)).mean(1)


def test_the_lines_of_the_plan_add_up_to_the_models_flops_before_and_after() -> None:
    model, x = Small(), torch.zeros(2, 3, 8, 8)
    decided = plan(model, Ratio(0.25, multiple=1), x, keep_first=0, keep_last=0)
    assert decided.flops is not None
    assert decided.flops[0] == accounting.flops(model, x)
    lines = {line.name: line.flops for line in decided.layers}
    assert sum(pair[0] for pair in lines.values() if pair) == decided.flops[0]
    assert lines["unused"] is None  # not called
    assert lines["position"] is None  # a look-up
    factorize(model, decided)
    assert decided.flops[1] == accounting.flops(model, x)
    assert decided.parameters[1] == accounting.parameters(model).stored


def test_the_plan_changes_nothing() -> None:
    model, x = Small(), torch.zeros(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    plan(model, 0.25, x)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_printed_table_names_every_layer_its_rank_or_its_reason() -> None:
    decided = plan(Small(), Ratio(0.25), torch.zeros(1, 3, 8, 8), layers="body,fc")
    text = str(decided)
    lines = {line.split()[0]: line for line in text.splitlines()[2:] if line}
    assert "8 of 32" in lines["body"]
    assert "4,608 -> 2,496" not in lines["body"]
    assert "4,608 -> 1,408  " in lines["body"]  # 8 x (144 + 32)
    assert "0.31" in lines["body"]
    assert "would not make it smaller (break-even" in lines["fc"]
    assert "grouped convolution (4 groups)" in lines["grouped"]
    assert "not selected" in lines["down"]
    assert decided.summary() in text
    assert "1 of 7 layers low-rank" in decided.summary()


def test_a_plan_without_a_sample_says_that_the_order_is_of_definition() -> None:
    assert any("order of definition" in note for note in plan(Small(), 0.25).notes)
    assert not plan(Small(), 0.25, torch.zeros(1, 3, 8, 8)).notes


def test_a_plan_in_which_no_layer_gains_is_a_report_not_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    decided = plan(model, 4, keep_first=0, keep_last=0)
    assert dict(decided.ranks) == {}
    assert all("break-even 4" in line.reason for line in decided.layers)
    assert not factorize(model, decided)
    assert "stays dense" in caplog.text


def test_the_order_of_a_plan_is_that_of_the_execution() -> None:
    names = [line.name for line in plan(Small(), 0.25, torch.zeros(1, 3, 8, 8)).layers]
    assert names == ["down", "grouped", "body", "up", "position", "fc", "unused"]


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("norm", [False, True])
def test_a_budget_holds_for_the_model_that_comes_out(fraction: float, norm: bool) -> None:
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    dense = accounting.parameters(model).stored
    factorize(model, Budget(fraction, multiple=1), keep_first=0, keep_last=0, norm=norm)
    after = accounting.parameters(model).stored
    assert math.floor(fraction * dense) - 98 < after <= fraction * dense


def test_variance_init_repeats_and_follows_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        model: Any = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        factorize(model, {"0": 4, "1": 4}, init="variance", context=Context(seed=seed))
        assert not torch.equal(model[0].v.weight, model[1].v.weight)
        return model[0].v.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("rank", [0, 33, "8", 2.0, True, NAN])
def test_a_mapping_of_ranks_is_checked_layer_by_layer(rank: Any) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))
    with pytest.raises(PlanError, match=r"^0 \(64, 32\): rank .* 1 to 32"):
        factorize(model, {"0": rank})


def test_a_mapping_with_an_unknown_layer_names_the_closest() -> None:
    model = nn.ModuleDict({"query": nn.Linear(32, 64)})
    with pytest.raises(SelectionError, match="did you mean 'query'"):
        factorize(model, {"quary": 2})
