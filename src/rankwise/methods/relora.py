"""ReLoRA (Lialin et al., ICLR 2024, arXiv 2307.05695): many low-rank updates, one behind the other.

When: every `restart_every` steps behind a dense warm-up. Where: updates of frozen weights.
How many ranks: one for all; the sum of the updates has more. Action: merge, begin anew, forget
moments, and let the learning rate rise from zero again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.method import NO_CHANGE, Change, Method
from rankwise.options import option, validate
from rankwise.selection import Layers
from rankwise.updates import Updates, fields
from rankwise.updates.resets import RESETS, kept_moments


@dataclass
class ReLoRA(Method):
    """Merge-and-restart. Much of its gain over LoRA is the dense warm-up, so give it one.

    In the paper 5,000 dense steps of 20,000, and a merge every 1,000 to 5,000. One mask resets all
    moments of a parameter, see `updates.resets`. V is drawn anew from (seed, step, layer), so that
    workers agree. The ramp behind a merge multiplies the user's own schedule (a cosine).
    """

    provides: ClassVar[frozenset[str]] = fields.PROVIDES
    conflicts = fields.CONFLICTS

    rank: int = fields.rank(128)
    alpha: float = fields.alpha(32.0)
    warmup_steps: int = option(0, "dense optimizer steps before the first update", at_least=0)
    warmup_epochs: float | None = option(None, "the same in epochs", at_least=0)
    restart_every: int = option(1000, "optimizer steps between merges", at_least=1)
    restart_warmup: int = option(100, "steps of the ramp of the rate behind a merge", at_least=0)
    reset: str = option("random", "which moments a merge forgets", choices=RESETS)
    reset_fraction: float = option(0.999, "share of them; random, magnitude", above=0, at_most=1)
    layers: Layers = fields.layers()
    exclude: Layers = fields.exclude()
    others: str = fields.others("all")
    init: str = fields.draw()
    split: bool = fields.split()
    dtype: str = fields.dtype()
    rounding: str = fields.rounding()

    def __post_init__(self) -> None:
        validate(self)

    def attach(self, context: Any) -> None:
        super().attach(context)
        self.updates = Updates.of(self, context)
        if self.warmup_epochs is not None:
            self.warmup_steps = context.steps(self.warmup_epochs, "warmup_epochs")

    @property
    def switch_step(self) -> int:
        """The optimizer step of the first merge."""
        return self.warmup_steps + self.restart_every

    def prepare(self, model: nn.Module) -> Change:
        if self.warmup_steps:
            self.updates.check(model)
            return NO_CHANGE
        return self.updates.open(model)

    def after_step(self, model: nn.Module, step: int) -> Change:
        if step == self.warmup_steps:
            return self.updates.open(model, step)
        if step < self.warmup_steps or (step - self.warmup_steps) % self.restart_every:
            return NO_CHANGE
        how = (self.reset, self.reset_fraction, self.context.generator(step, "reset"))
        heads = self.updates.restart(step)
        count = (step - self.warmup_steps) // self.restart_every
        return Change(rewritten={p: kept_moments(p, *how) for p in heads}, notes={"merges": count})

    def lr_scale(self, step: int) -> float:
        since = step - 1 - self.warmup_steps
        if since < self.restart_every or not self.restart_warmup:
            return 1.0
        return min(1.0, (since % self.restart_every + 1) / self.restart_warmup)

    def resume(self, model: nn.Module) -> Change:
        return self.updates.resume(model)

    def finalize(self, model: nn.Module) -> Change:
        return self.updates.close(model)
