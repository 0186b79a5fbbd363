"""Pufferfish (Wang et al., MLSys 2021, arXiv 2103.03936): train dense, then switch to SVD factors.

When: once, after the warm-up. Where: weights W = U V of all but the first K layers and the
classifier. How many ranks: one ratio for all. Action: SVD split, training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.errors import OptionError
from rankwise.method import NO_CHANGE, Change, Method
from rankwise.options import option, validate
from rankwise.ranks import Later, Plan, Rule, as_rule, factorize, fields, plan, present


@dataclass
class Pufferfish(Method):
    """Dense warm-up of E epochs, then a truncated SVD of every chosen layer at one fixed ratio.

    Deviation: the optimizer's moments are carried over to the factors; the published program
    makes a fresh optimizer at the switch. K counts weight layers in execution order.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank weights"})
    conflicts: ClassVar[Mapping[str, str]] = fields.CONFLICTS

    ranks: Rule | float | str = fields.ranks()
    warmup_epochs: float | None = option(None, "dense epochs before the switch (E)", above=0)
    warmup_steps: int | None = option(None, "the same in optimizer steps", at_least=1)
    layers: Any = fields.layers()
    exclude: Any = fields.exclude()
    keep_first: int = fields.keep_first()
    keep_last: int = fields.keep_last()
    split: bool = fields.split()
    norm: bool = option(False, "extra BatchNorm between the factors; changes the function")
    lr_factor: float = option(1.0, "learning rate after the switch, times this", above=0)

    def __post_init__(self) -> None:
        self.ranks = as_rule(self.ranks)
        validate(self)
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise OptionError("Pufferfish: give warmup_epochs or warmup_steps, not both")
        if self.norm:  # a feature of this instance, which decay of the factors does not go with
            vars(self)["provides"] = self.provides | {"norm between the factors"}
        self.plan: Plan | None = None
        self._seen: Any = None

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
        _ = self.switch_step  # an unknown length is an error now, not after hours
        if self.context.trace is not None or not as_rule(self.ranks).needs_sample:
            self._decide(model)
        return NO_CHANGE

    def resume(self, model: nn.Module) -> Change:
        found = present(model)
        self.plan = found if found.ranks else None  # None: before the switch
        return NO_CHANGE

    def before_step(self, model: nn.Module, step: int) -> None:
        if step <= self.switch_step and self._seen is not self.context.trace:
            self._decide(model)  # the first forward has shown the order of execution

    def after_step(self, model: nn.Module, step: int) -> Change:
        if step != self.switch_step:
            return NO_CHANGE
        decided = self.plan
        if decided is None or decided.provisional:
            decided = self._decide(model, now=True)
        return factorize(model, decided) | Change(notes={"lr_factor": self.lr_factor})

    def lr_scale(self, step: int) -> float:
        return self.lr_factor if step > self.switch_step else 1.0

    def _decide(self, model: nn.Module, *, now: bool = False) -> Plan:
        rule = as_rule(self.ranks)
        if rule.reads_weights and not now:
            rule = Later.of(rule, f"after step {self.switch_step}")
        self.plan, self._seen = plan(model, rule, **self.choice()), self.context.trace
        return self.plan
