"""Factorised from the first step (the plain low-rank network of every paper's baseline).

When: before the first step. Where: weights W = U V. How many ranks: a rule. Action: factorise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.layers import INITS
from rankwise.method import Change, Method
from rankwise.options import option, validate
from rankwise.ranks import RULE_HELP, Plan, Rule, as_rule, factorize, plan


@dataclass
class Factorized(Method):
    """Low-rank layers from the start, by the SVD of the dense initialisation or drawn at random.

    Spectral initialisation is that of Khodak et al., ICLR 2021 (2105.01029, section 3); its
    product starts with a smaller variance than the dense layer's, the more so the lower the rank.
    `variance` keeps the variance at every rank and ignores the model's present weights.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank weights"})
    conflicts: ClassVar[Mapping[str, str]] = {
        "low-rank weights": "both decide which layers are low-rank and at which rank"
    }

    ranks: Rule | float | str = option(0.25, RULE_HELP, parse=as_rule)
    layers: Any = option("auto", "which layers: auto, or globs over names, comma between")
    exclude: Any = option((), "globs over names that stay dense")
    keep_first: int = option(1, "layers=auto: first layers that stay dense (K)", at_least=0)
    keep_last: int = option(1, "layers=auto: last layers that stay dense", at_least=0)
    init: str = option("spectral", "initialisation of the factors", choices=INITS)

    def __post_init__(self) -> None:
        self.ranks = as_rule(self.ranks)
        validate(self)
        self.plan: Plan | None = None

    def prepare(self, model: nn.Module) -> Change:
        self.plan = plan(model, as_rule(self.ranks), **self.choice())
        return factorize(model, self.plan, init=self.init, context=self.context)
