"""Ranks from a budget: of parameters, of forward FLOPs, or of training memory."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from rankwise.errors import PlanError, unknown
from rankwise.ranks.rules import Bounds, Costs, Decision, Question, Rule, is_rank_or_ratio
from rankwise.ranks.shape import Cost, MatrixShape

RESOURCES = ("parameters", "flops", "memory")


@dataclass(frozen=True, repr=False)
class Budget(Rule):
    """The largest common rank ratio whose model stays within a limit.

    Bisection on the ratio, then single steps of rank while one still fits, so that what is left
    over is less than the cheapest step. All of the model counts, not only the selected layers.

    Args:
        limit: fraction of what the dense model has (a float up to 1.0), or a number (an int).
        of: what is limited.

            - "parameters": numbers stored.
            - "flops": of one forward of the sample, matrix products only (so a sample is needed).
            - "memory": bytes of training. Every parameter with its gradient and the optimizer's
              moments, all in the parameter's dtype, plus what low-rank layers save for the
              backward pass of the sample beyond what dense ones save: the codes between the
              factors. Without a sample that last part is left out.
        moments: numbers the optimizer keeps for each parameter: 2 for Adam, 1 for SGD with
            momentum. Counts for memory only.
    """

    name: ClassVar[str] = "budget"
    limit: float
    _: KW_ONLY
    of: str = "parameters"
    moments: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in RESOURCES:
            raise PlanError(
                f"a budget of={self.of!r}: {unknown('budget', str(self.of), RESOURCES)}"
            )
        if not is_rank_or_ratio(self.limit):
            raise PlanError(
                f"budget {self.limit!r} is neither a fraction of the dense model's {self.of} "
                "(a float in (0, 1]) nor their number (an int from 1)"
            )
        if not isinstance(self.moments, int) or isinstance(self.moments, bool) or self.moments < 0:
            raise PlanError(f"moments={self.moments!r} must be a whole number, 0 or more")
        if self.allow_growth:
            raise PlanError("a budget never lets a layer grow; drop allow_growth")

    @property
    def needs_sample(self) -> bool:
        return self.of == "flops"

    def ranks(self, asked: Question) -> Mapping[str, int | Decision]:
        costs = asked.costs(self.of)
        dense = costs.dense
        target = int(self.limit * dense) if isinstance(self.limit, float) else self.limit
        taken = costs.others + sum(costs.layers[n].of(rank) for n, rank in asked.fixed.items())
        ladders = {
            name: Ladder(shape, asked.bounds[name], costs.layers[name])
            for name, shape in asked.shapes.items()
        }
        least = taken + sum(ladder.prices[0] for ladder in ladders.values())
        if least > target:
            raise PlanError(self._out_of_reach(target, least, costs))
        steps = _fill(ladders, target - taken)
        return {name: ladders[name].decide(step) for name, step in steps.items()}

    def _out_of_reach(self, target: int, least: int, costs: Costs) -> str:
        smaller = "allow smaller ranks (multiple=1), " if self.multiple > 1 else ""
        smaller += "lower the floor, " if self.floor is not None else ""
        enough = math.ceil(1000 * least / costs.dense) / 1000
        return (
            f"a budget of {target:,} {costs.unit} is out of reach: with every selected layer at "
            f"its smallest rank the model still has {least:,} (dense {costs.dense:,}); select more "
            f"layers, {smaller}or raise it to {enough:.3f}"
        )


class Ladder:
    """The choices of one layer, cheapest first: its ranks that cost less than dense, then dense."""

    def __init__(self, shape: MatrixShape, bounds: Bounds, cost: Cost) -> None:
        # Not what the guard would leave dense all the same, nor what saves nothing here.
        limit = shape.break_even
        if cost.break_even is not None or not cost.dense:
            limit = min(limit, cost.break_even or 1)
        self.ranks: list[int | None] = [rank for rank in bounds.steps() if rank < limit]
        if bounds.high == bounds.full or not self.ranks:
            self.ranks.append(None)
        self.prices = [cost.of(rank) for rank in self.ranks]
        # Places on the scale of ratios that the layers share; dense is full rank.
        self.ratios = [(rank or bounds.full) / bounds.full for rank in self.ranks]

    def decide(self, step: int) -> int | Decision:
        """What the layer gets at a step of the ladder."""
        rank = self.ranks[step]
        if rank is not None:
            return rank
        if len(self.ranks) == 1:
            return Decision(None, "no rank allowed to it would lower what the budget counts")
        return Decision(None, "the budget leaves room for it dense")


def _fill(ladders: Mapping[str, Ladder], room: int) -> dict[str, int]:
    """The highest steps of all ladders that fit, near one ratio of ranks for all."""

    def at(ratio: float) -> dict[str, int]:
        return {n: max(0, bisect_right(ladder.ratios, ratio) - 1) for n, ladder in ladders.items()}

    def spent(steps: Mapping[str, int]) -> int:
        return sum(ladders[name].prices[step] for name, step in steps.items())

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) <= room else (low, middle)
    steps = at(low)
    left = room - spent(steps)
    # Layers that the common ratio would raise next go first; each pass raises one step each.
    while True:
        order = sorted(
            (n for n, step in steps.items() if step + 1 < len(ladders[n].ranks)),
            key=lambda n: ladders[n].ratios[steps[n] + 1],
        )
        for name in order:
            prices, step = ladders[name].prices, steps[name]
            if prices[step + 1] - prices[step] <= left:
                left -= prices[step + 1] - prices[step]
                steps[name] = step + 1
                break
        else:
            return steps
