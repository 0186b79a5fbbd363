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
from rankwise.ranks import Plan, Rule, as_rule, factorize, fields, plan


@dataclass
class Factorized(Method):
    """Low-rank layers from the start, by the SVD of the dense initialisation or drawn at random.

    Spectral initialisation is that of Khodak et al., ICLR 2021 (2105.01029, section 3); its
    product starts with a smaller variance than the dense layer's, the more so the lower the rank.
    `variance` keeps the variance at every rank and ignores the model's present weights.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank weights"})
    conflicts: ClassVar[Mapping[str, str]] = fields.CONFLICTS

    ranks: Rule | float | str = fields.ranks()
    layers: Any = fields.layers()
    exclude: Any = fields.exclude()
    keep_first: int = fields.keep_first()
    keep_last: int = fields.keep_last()
    core: bool = fields.core()
    separable: bool = fields.separable()
    split: bool = fields.split()
    init: str = option("spectral", "initialisation of the factors", choices=INITS)

    def __post_init__(self) -> None:
        self.ranks = as_rule(self.ranks)
        validate(self)
        self.plan: Plan | None = None

    def prepare(self, model: nn.Module) -> Change:
        self.plan = plan(model, as_rule(self.ranks), **self.choice())
        return factorize(model, self.plan, init=self.init, context=self.context)
