"""Rules that give every layer its rank: fixed, a ratio of the full rank, a parameter budget.

M, N: the layer's weight as a matrix; R: rank. A low-rank layer stores R (M + N) numbers, so it is
smaller than dense below the break-even rank M N / (M + N). That guard is the same for all rules.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from rankwise.errors import OptionError, PlanError, SelectionError, nearest, unknown


@dataclass(frozen=True)
class MatrixShape:
    """A weight as a matrix: `rows` = O, `columns` = I (times the kernel's area)."""

    rows: int
    columns: int
    norm: bool = False

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.columns)

    @property
    def dense(self) -> int:
        """Numbers the dense weight stores."""
        return self.rows * self.columns

    @property
    def per_rank(self) -> int:
        """Numbers that one unit of rank stores; a BatchNorm over the codes adds two."""
        return self.rows + self.columns + (2 if self.norm else 0)

    @property
    def break_even(self) -> int:
        """The smallest rank that does not make the layer smaller."""
        return -(-self.dense // self.per_rank)


@dataclass(frozen=True)
class Decision:
    """Rank of one layer; None leaves it dense, for the reason given."""

    rank: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Rule(ABC):
    """Maps the selected layers to ranks; every rule knows overrides and the break-even guard.

    Attributes:
        overrides: glob over layer names -> rank (int), ratio of the full rank (float), or None for
            dense. Goes before the rule; the first pattern that matches counts.
        allow_growth: lift the guard that leaves layers dense which low rank would make larger.
    """

    name: ClassVar[str]

    overrides: Mapping[str, int | float | None] = field(default_factory=dict)
    allow_growth: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise PlanError(f"overrides={self.overrides!r} must map layer globs to ranks")
        for pattern, value in self.overrides.items():
            if value is not None and not _is_rank_or_ratio(value):
                raise PlanError(
                    f"overrides: {value!r} for {pattern!r} is no rank (an int from 1), no ratio of "
                    "the full rank (a float in (0, 1]) and not None (dense)"
                )

    def __repr__(self) -> str:
        """The shortest call that builds this rule."""
        own = [f for f in fields(self) if f.name not in ("overrides", "allow_growth")]
        shown = [repr(getattr(self, own[0].name))]
        for extra in (*own[1:], *(f for f in fields(self) if f not in own)):
            value = getattr(self, extra.name)
            if value != extra.default and value != {}:
                shown.append(f"{extra.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @abstractmethod
    def ranks(self, shapes: Mapping[str, MatrixShape], others: int, dense: int) -> dict[str, int]:
        """Ranks before the guard.

        Args:
            shapes: the layers to decide, those with an override left out.
            others: parameters that the model will have outside these weights.
            dense: parameters of the dense model.
        """

    def assign(self, shapes: Mapping[str, MatrixShape], others: int = 0) -> dict[str, Decision]:
        """Decide every layer.

        Args:
            shapes: layer name -> its weight's shape, selected layers only.
            others: number of parameters of the model outside these weights.

        Raises:
            PlanError: a rank outside 1 ... full rank, or an unreachable budget.
            SelectionError: an override that matches no selected layer.
        """
        fixed = self._overridden(shapes)
        free = {name: shape for name, shape in shapes.items() if name not in fixed}
        taken = sum(
            shapes[name].dense if d.rank is None else d.rank * shapes[name].per_rank
            for name, d in fixed.items()
        )
        decided = dict(fixed)
        dense = others + sum(shape.dense for shape in shapes.values())
        for name, rank in self.ranks(free, others + taken, dense).items():
            decided[name] = self._guard(rank, free[name])
        return {name: decided[name] for name in shapes}

    def _guard(self, rank: int, shape: MatrixShape) -> Decision:
        if rank > shape.full_rank:
            return Decision(None, f"rank {rank} is above its full rank {shape.full_rank}")
        if rank >= shape.break_even and not self.allow_growth:
            return Decision(
                None, f"rank {rank} would not make it smaller (break-even {shape.break_even})"
            )
        return Decision(rank, "")

    def _overridden(self, shapes: Mapping[str, MatrixShape]) -> dict[str, Decision]:
        decided: dict[str, Decision] = {}
        for pattern, value in self.overrides.items():
            matched = fnmatch.filter(shapes, pattern)
            if not matched:
                close = nearest(pattern, shapes) or list(shapes)[:4]
                raise SelectionError(
                    f"overrides: {pattern!r} matches no selected layer; the closest are {close}"
                )
            for name in matched:
                decided.setdefault(name, self._override(name, value, shapes[name]))
        return decided

    def _override(self, name: str, value: float | None, shape: MatrixShape) -> Decision:
        if value is None:
            return Decision(None, "dense by override")
        rank = value if isinstance(value, int) else max(1, round(value * shape.full_rank))
        if rank > shape.full_rank:
            raise PlanError(
                f"overrides: rank {rank} for {name} ({shape.rows}×{shape.columns}) is above its "
                f"full rank {shape.full_rank}"
            )
        return self._guard(rank, shape)


@dataclass(frozen=True, repr=False)
class Fixed(Rule):
    """The same rank for every layer; layers whose full rank is smaller stay dense.

    Args:
        rank: at least 1.
    """

    name: ClassVar[str] = "rank"
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_whole(self.rank, at_least=1):
            raise PlanError(f"rank {self.rank!r} is no rank; it must be a whole number, 1 or more")

    def ranks(self, shapes: Mapping[str, MatrixShape], others: int, dense: int) -> dict[str, int]:
        if not shapes:
            return {}
        largest = max(shapes, key=lambda n: shapes[n].full_rank)
        if self.rank > shapes[largest].full_rank:
            shape = shapes[largest]
            raise PlanError(
                f"rank {self.rank} is above the full rank of every selected layer; the largest is "
                f"{largest} ({shape.rows}×{shape.columns}), full rank {shape.full_rank}"
            )
        return dict.fromkeys(shapes, self.rank)


@dataclass(frozen=True, repr=False)
class Ratio(Rule):
    """R = ratio x min(M, N), the meaning of Pufferfish and Cuttlefish (2103.03936, 2305.02538).

    This is a ratio of ranks, not of parameters: a square layer keeps 2 x ratio of its
    parameters, a 3x3 convolution c -> c about 10/9 x ratio. The plan prints both.

    Args:
        ratio: above 0, at most 1.
        multiple: ranks are rounded to the nearest multiple of it (8 suits vector units and tensor
            cores); 1 for none. Full rank stays full rank.
    """

    name: ClassVar[str] = "ratio"
    ratio: float
    multiple: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.ratio) or not 0 < self.ratio <= 1:
            raise PlanError(
                f"ratio {self.ratio!r} is outside (0, 1]: it multiplies a layer's full rank"
            )
        _check_multiple(self.multiple)

    def ranks(self, shapes: Mapping[str, MatrixShape], others: int, dense: int) -> dict[str, int]:
        return {
            name: _rounded(self.ratio * shape.full_rank, self.multiple, shape.full_rank)
            for name, shape in shapes.items()
        }


@dataclass(frozen=True, repr=False)
class Budget(Rule):
    """The largest common rank ratio whose model stays within a number of parameters.

    Bisection on the ratio, then single steps of rank while one still fits, so that what is left
    over is less than the cheapest step.

    Args:
        parameters: fraction of the dense model's parameters (a float up to 1.0), or their number
            (an int); all of the model counts, not only the selected layers.
        multiple: ranks are multiples of it.
    """

    name: ClassVar[str] = "budget"
    parameters: float
    multiple: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_rank_or_ratio(self.parameters):
            raise PlanError(
                f"budget {self.parameters!r} is neither a fraction of the dense model's parameters "
                "(a float in (0, 1]) nor their number (an int from 1)"
            )
        if self.allow_growth:
            raise PlanError("a budget never lets a layer grow; drop allow_growth")
        _check_multiple(self.multiple)

    def ranks(self, shapes: Mapping[str, MatrixShape], others: int, dense: int) -> dict[str, int]:
        target = (
            int(self.parameters * dense) if isinstance(self.parameters, float) else self.parameters
        )
        if target >= dense:
            return {name: shape.full_rank for name, shape in shapes.items()}
        steps = {name: _ladder(shape, self.multiple) for name, shape in shapes.items()}
        least = others + sum(_cost(steps[n][0], shapes[n]) for n in shapes)
        if least > target:
            smaller = "allow smaller ranks (multiple=1), " if self.multiple > 1 else ""
            enough = math.ceil(1000 * least / dense) / 1000
            raise PlanError(
                f"a budget of {target:,} parameters is out of reach: with every selected layer at "
                f"its smallest rank the model still has {least:,} (dense {dense:,}); select more "
                f"layers, {smaller}or raise it to {enough:.3f}"
            )
        return self._fill(shapes, steps, target - others)

    @staticmethod
    def _fill(
        shapes: Mapping[str, MatrixShape], steps: Mapping[str, list[int]], room: int
    ) -> dict[str, int]:
        def at(scale: float) -> dict[str, int]:
            """Index on each layer's ladder: the highest step at or below the common ratio."""
            return {
                name: max(0, bisect_right(ladder, scale * shapes[name].full_rank) - 1)
                for name, ladder in steps.items()
            }

        def spent(index: Mapping[str, int]) -> int:
            return sum(_cost(steps[n][i], shapes[n]) for n, i in index.items())

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(at(middle)) <= room else (low, middle)
        index = at(low)
        left = room - spent(index)
        # Layers that the common ratio would raise next go first; each pass raises one step each.
        while True:
            order = sorted(
                (n for n in steps if index[n] + 1 < len(steps[n])),
                key=lambda n: steps[n][index[n] + 1] / shapes[n].full_rank,
            )
            for name in order:
                price = _cost(steps[name][index[name] + 1], shapes[name]) - _cost(
                    steps[name][index[name]], shapes[name]
                )
                if price <= left:
                    index[name] += 1
                    left -= price
                    break
            else:
                return {name: steps[name][i] for name, i in index.items()}


def _ladder(shape: MatrixShape, multiple: int) -> list[int]:
    """Ranks a layer may take, ascending: multiples below break-even, then full (stays dense)."""
    below = [r for r in range(multiple, shape.full_rank, multiple) if r < shape.break_even]
    return [*below, shape.full_rank]


def _cost(rank: int, shape: MatrixShape) -> int:
    return min(rank * shape.per_rank, shape.dense)


def _rounded(rank: float, multiple: int, full: int) -> int:
    if rank >= full:
        return full
    return max(1, min(full, max(multiple, multiple * round(rank / multiple))))


def _check_multiple(multiple: int) -> None:
    if not _is_whole(multiple, at_least=1):
        raise PlanError(
            f"multiple={multiple!r}: ranks can be rounded to multiples of a whole number, 1 or more"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_rank_or_ratio(value: Any) -> bool:
    """An int counts, a float is a fraction: 1 and 1.0 differ."""
    return _is_whole(value, at_least=1) or (isinstance(value, float) and 0 < value <= 1)


RULES: dict[str, type[Rule]] = {cls.name: cls for cls in (Fixed, Ratio, Budget)}


def as_rule(value: Any) -> Rule:
    """A rule from what a user wrote: 32 is a rank, 0.25 a ratio, "budget=0.3" a budget.

    Raises:
        OptionError: unknown rule or unreadable number.

    Example:
        >>> as_rule("budget=0.3")
        Budget(0.3)
    """
    if isinstance(value, Rule):
        return value
    if isinstance(value, str):
        kind, _, number = value.rpartition("=")
        parsed = _number(number.strip(), value)
        if kind:
            if kind.strip() not in RULES:
                raise OptionError(unknown("rank rule", kind.strip(), RULES))
            make: Any = RULES[kind.strip()]
            return make(parsed)
        value = parsed
    if isinstance(value, int) and not isinstance(value, bool):
        return Fixed(value)
    if isinstance(value, float):
        return Ratio(value)
    raise OptionError(
        f"{value!r} is no rank rule; give a rank (32), a ratio of the full rank (0.25), "
        "'budget=0.3', or a rule of rankwise.ranks"
    )


def _number(text: str, whole: str) -> int | float:
    try:
        with suppress(ValueError):
            return int(text)
        return float(text)
    except ValueError as error:
        raise OptionError(
            f"rank rule {whole!r}: {text!r} is no number; write 32, 0.25, rank=32, ratio=0.25 or "
            "budget=0.3"
        ) from error
