"""Pufferfish (Wang et al., MLSys 2021, arXiv 2103.03936): train dense, then switch to SVD factors.

When: once, after the warm-up. Where: weights W = U V of all but the first K layers and the
classifier. How many ranks: one ratio for all. Action: SVD split, training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from rankwise.errors import OptionError
from rankwise.method import NO_CHANGE, Change, Method
from rankwise.options import option, validate
from rankwise.ranks import Plan, Rule, as_rule, factorize, plan

if TYPE_CHECKING:
    from rankwise.accounting import Trace


@dataclass
class Pufferfish(Method):
    """Dense warm-up of E epochs, then a truncated SVD of every chosen layer at one fixed ratio.

    Deviation: the optimizer's moments are carried over to the factors; the published program
    makes a fresh optimizer at the switch. K counts weight layers in execution order.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank weights"})
    conflicts: ClassVar[Mapping[str, str]] = {
        "low-rank weights": "both decide which layers are low-rank and at which rank"
    }

    ranks: Rule | float | str = option(
        0.25, "rank rule: 0.25 (ratio of full rank), 32 (rank), budget=0.3", parse=as_rule
    )
    warmup_epochs: float | None = option(None, "dense epochs before the switch (E)", above=0)
    warmup_steps: int | None = option(None, "the same in optimizer steps", at_least=1)
    layers: Any = option("auto", "which layers: auto, or globs over names, comma between")
    exclude: Any = option((), "globs over names that stay dense")
    keep_first: int = option(1, "layers=auto: first layers that stay dense (K)", at_least=0)
    keep_last: int = option(1, "layers=auto: last layers that stay dense", at_least=0)
    norm: bool = option(False, "extra BatchNorm between the factors; changes the function")
    lr_factor: float = option(1.0, "learning rate after the switch, times this", above=0)

    def __post_init__(self) -> None:
        self.ranks = as_rule(self.ranks)
        validate(self)
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise OptionError("Pufferfish: give warmup_epochs or warmup_steps, not both")
        self.plan: Plan | None = None
        self._seen: Trace | None = None

    @property
    def switch_step(self) -> int:
        """The optimizer step after which the layers are factorised."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            return max(1, self.context.steps(self.warmup_epochs, "Pufferfish: warmup_epochs"))
        if self.context.total_steps is None:
            raise OptionError(
                "Pufferfish does not know when to switch: give warmup_epochs or warmup_steps, or "
                "rankwise.start(..., total_steps=...) for the paper's 80 of 300 epochs"
            )
        return max(1, round(self.context.total_steps * 80 / 300))

    def prepare(self, model: nn.Module) -> Change:
        self._decide(model)
        _ = self.switch_step  # an unknown length is an error now, not after hours
        return NO_CHANGE

    def before_step(self, model: nn.Module, step: int) -> None:
        if step <= self.switch_step and self._seen is not self.context.trace:
            self._decide(model)  # the first forward has shown the order of execution

    def after_step(self, model: nn.Module, step: int) -> Change:
        if step != self.switch_step:
            return NO_CHANGE
        change = factorize(model, self.plan or self._decide(model))
        return change | Change(notes={"lr_factor": self.lr_factor})

    def lr_scale(self, step: int) -> float:
        return self.lr_factor if step > self.switch_step else 1.0

    def _decide(self, model: nn.Module) -> Plan:
        self.plan = plan(model, as_rule(self.ranks), **self.choice())
        self._seen = self.context.trace
        return self.plan
