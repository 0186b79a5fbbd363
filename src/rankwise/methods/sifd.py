"""SI&FD (Khodak et al., ICLR 2021, arXiv 2105.01029): spectral initialisation, Frobenius decay.

When: before the first step; the decay every step. Where: weights W = U V, or U C V with a core;
attention heads, which are such products already. How many ranks: a rule, or the ranks at which the
model has a given share of the dense one's parameters. Action: factorise by the SVD of the dense
initialisation; decay the product in place of weight decay on its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.errors import OptionError
from rankwise.layers import INITS
from rankwise.method import Change, Method
from rankwise.optim.decay import RunDecay
from rankwise.optim.heads import FORMS, balance_heads, kept_dense
from rankwise.options import option, validate
from rankwise.ranks import Budget, Plan, Rule, as_rule, factorize, fields, plan


@dataclass
class SIFD(Method):
    """Factorised from the start, with initialisation and decay of the dense layers it replaces.

    The paper's rank of a convolution is its scale times O k, ours a ratio of the full rank
    k min(I, O) (separable) or min(I k^2, O); at a given share of parameters both are scaled until
    the model has it. Its recipe: SGD 0.1, momentum 0.9, weight decay 1e-4, 200 epochs.
    Spectral factors start with less variance than the dense weight: right where a normalisation
    follows, slow where none does (docs/studies/loralinear.md); there take init="variance".
    """

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank weights", "decay of the factors"})
    conflicts: ClassVar[Mapping[str, str]] = {
        **fields.CONFLICTS,
        "decay of the factors": "the factors would decay twice",
    }

    ranks: Rule | float | str | None = option(
        None,
        "rank rule: 0.25 (ratio of full rank), 32 (rank), budget=0.3; 0.25 if nothing is said",
        parse=lambda value: None if value in (None, "none", "None") else as_rule(value),
    )
    target_ratio: float | None = option(
        None, "instead of ranks: the model's parameters over dense", above=0, at_most=1
    )
    layers: Any = fields.layers()
    exclude: Any = fields.exclude()
    keep_first: int = fields.keep_first()
    keep_last: int = fields.keep_last()
    core: bool = fields.core()
    separable: bool = fields.separable()
    split: bool = fields.split()
    init: str = option("spectral", "initialisation of the factors", choices=INITS)
    decay: str = option("frobenius", "frobenius, kronecker, l2, none, or a sum: frobenius+0.1*l2")
    strength: float | None = option(
        None, "lambda of the decay; without it each layer's own weight decay", at_least=0
    )
    attention: str = option("none", "heads as products, too: none, qk, ov, qk+ov", choices=FORMS)

    def __post_init__(self) -> None:
        validate(self)
        if self.ranks is not None and self.target_ratio is not None:
            raise OptionError("SIFD: give ranks or target_ratio, not both")
        self.ranks = None if self.ranks is None else as_rule(self.ranks)
        self.plan: Plan | None = None
        self._decay = RunDecay(self.decay, self.strength, self.attention)

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        return self._decay.roles()

    def prepare(self, model: nn.Module) -> Change:
        rule = as_rule(0.25 if self.ranks is None else self.ranks)
        if self.target_ratio is not None:
            rule = Budget(self.target_ratio, multiple=1)
        choice = self.choice()
        choice["exclude"] = kept_dense(model, self.attention, self.layers, self.exclude)
        self.plan = plan(model, rule, **choice)
        change = factorize(model, self.plan, init=self.init, context=self.context)
        if self.init == "spectral":
            change |= balance_heads(model, self.attention)
        return change | self._decay.take(model)

    def amend(self, model: nn.Module, change: Change) -> Change:
        return self._decay.amend(change)

    def before_step(self, model: nn.Module, step: int) -> None:
        self._decay.step(model, self.context)

    def on_change(self, model: nn.Module, change: Change) -> None:
        self._decay.forget()
