"""Cuttlefish (Wang et al., MLSys 2023, arXiv 2305.02538): ranks, layers and switch by measurement.

When: once the stable ranks of the dense weights have settled. Where: weights W = U V whose low-rank
form is measurably faster. How many ranks: the scaled stable rank. Action: SVD split, training goes
on; optionally (ours) later re-truncation to the energy that is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.method import NO_CHANGE, Change, Method
from rankwise.options import option, validate
from rankwise.ranks import Plan, Rule, as_rule, factorize, fields
from rankwise.ranks.automatic.compat import COMPAT, with_fresh_optimizer
from rankwise.ranks.automatic.engine import Automatic


@dataclass
class Cuttlefish(Method):
    """Needs no rank, ratio, warm-up length or layer list; says what it decided and why.

    Deviations: slopes are relative, not in ranks an epoch, so that width does not matter; layers
    are chosen one by one at the ranks they get, not by stacks at ratio 1/4; moments are carried
    over. `compat` brings the published program's constants and habits back.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank weights"})
    conflicts: ClassVar[Mapping[str, str]] = fields.CONFLICTS

    ranks: Rule | float | str = fields.ranks("scaled-stable")
    layers: Any = fields.layers()
    exclude: Any = fields.exclude()
    keep_first: int = fields.keep_first()
    keep_last: int = fields.keep_last()
    split: bool = fields.split()
    norm: bool = option(False, "extra BatchNorm between the factors; changes the function")
    gains: Any = option("measure", "layer times: measure, none (low rank regardless), or a file")
    min_gain: float = option(1.1, "stay dense below this speed-up (compat: 1.5)", above=0)
    observe_every: int | None = option(
        None, "steps between two looks at the stable ranks (none: up to four an epoch)", at_least=1
    )
    latest: float = option(
        0.5, "part of the run after which to switch anyway (1: never)", above=0, at_most=1
    )
    compat: str = option("none", "a published program's habits", choices=("none", *COMPAT))
    lr_factor: float = option(1.0, "learning rate after the switch, times this", above=0)
    adapt: str = option("none", "ranks after the switch", choices=("none", "shrink"))
    adapt_every: int | None = option(None, "steps between two shrinks (none: an epoch)", at_least=1)
    adapt_energy: float = option(0.99, "energy kept by a shrink", above=0, at_most=1)

    def __post_init__(self) -> None:
        self.ranks = as_rule(self.ranks)
        validate(self)
        if self.norm:  # a feature of this instance, which decay of the factors does not go with
            vars(self)["provides"] = self.provides | {"norm between the factors"}
        self._found: Any = None  # an Automatic, from `prepare` on

    @property
    def plan(self) -> Plan | None:
        """The layers to watch; from the switch on, with their ranks."""
        return None if self._found is None else self._found.plan

    def prepare(self, model: nn.Module) -> Change:
        self._found = Automatic(model, self, self.context)
        return NO_CHANGE

    def resume(self, model: nn.Module) -> Change:
        return self.prepare(model)

    def before_step(self, model: nn.Module, step: int) -> None:
        self._found.survey(model)  # the first forward has shown the batch

    def after_step(self, model: nn.Module, step: int) -> Change:
        if self._found.due(model, step):
            change = factorize(model, self._found.decide(model, step))
            return with_fresh_optimizer(model, change) if self._found.family else change
        return self._found.adapt(model, step)

    def lr_scale(self, step: int) -> float:
        return self._found.lr_scale(step)

    def finalize(self, model: nn.Module) -> Change:
        self._found.end()
        return NO_CHANGE

    def detach(self) -> None:
        if self._found is not None:
            self._found.end(quiet=True)
        super().detach()

    def state_dict(self) -> dict[str, Any]:
        return self._found.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._found.load_state_dict(state_dict)
