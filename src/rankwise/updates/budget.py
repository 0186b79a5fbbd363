"""How many triplets all updates together may have at a step, and when they are shared out anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.errors import OptionError
from rankwise.method import Context


@dataclass(frozen=True)
class CubicBudget:
    """b(t): the first until t_i, the last from T - t_f on, a cubic fall between (2303.10512).

    Attributes:
        first: mean rank of a matrix at the start.
        last: and in the end.
        begins: t_i, the last step of the first budget.
        ends: T - t_f, the step of the last allocation.
        every: steps between allocations, dT.
    """

    first: int
    last: int
    begins: int
    ends: int
    every: int

    @classmethod
    def of(cls, method: Any, context: Context) -> CubicBudget:
        """What a method asks for, for the length of its run.

        Args:
            method: its fields `initial_rank`, `target_rank`, `warmup` (t_i) and `final` (t_f), both
                in steps or below 1 as fractions of the run, and `every` are read.
            context: of the run.

        Raises:
            OptionError: a budget that rises or has no step to fall, or a run of unknown length.
        """
        name, total = type(method).__name__, context.total_steps
        if total is None:
            raise OptionError(
                f"{name} spends a budget of ranks over the run and must know how long that is; "
                "pass rankwise.start(..., total_steps=epochs * len(loader))"
            )
        first, last = method.initial_rank, method.target_rank
        if last > first:
            raise OptionError(
                f"{name}: target_rank={last} is above initial_rank={first}, but ranks only fall; "
                "begin with more of them (1.5 times as many in the paper)"
            )
        before, after = (
            round(length * total) if length < 1 else round(length)
            for length in (method.warmup, method.final)
        )
        if before >= total - after:
            raise OptionError(
                f"{name}: warmup={method.warmup:g} and final={method.final:g} are {before} and "
                f"{after} of the {total} steps of the run, which leaves none for the budget to "
                "fall; lower one of them, or train longer"
            )
        return cls(first, last, before, total - after, method.every)

    def at(self, step: int, matrices: int) -> int:
        """Triplets that so many matrices share from an allocation after a step (1-based) on."""
        left = 1 - (step - self.begins) / (self.ends - self.begins)
        more = (self.first - self.last) * matrices
        return int(more * min(1.0, max(0.0, left)) ** 3 + self.last * matrices)

    def allocates(self, step: int) -> bool:
        """Whether the budget is shared out after a step."""
        return step == self.ends or (self.begins < step < self.ends and step % self.every == 0)
