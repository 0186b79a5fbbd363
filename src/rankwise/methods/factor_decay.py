"""Frobenius decay (Khodak et al., ICLR 2021, arXiv 2105.01029) beside any low-rank weights.

When: every step. Where: weights W = U V, and attention heads if asked for. How many ranks: those of
the method beside it. Action: decay of the product in place of weight decay on its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.method import Change, Method
from rankwise.optim.decay import RunDecay
from rankwise.optim.heads import FORMS
from rankwise.options import option, validate


@dataclass
class FactorDecay(Method):
    """(lambda / 2) |U V|_F^2 instead of the weight decay that its factors would get.

    Composes as `[Pufferfish(...), FactorDecay()]`; factors are taken out of the optimizer's weight
    decay when they are made. Coupled for SGD and Adam, decoupled for AdamW, as their own decay.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"decay of the factors"})
    needs: ClassVar[Mapping[str, str]] = {
        "low-rank weights": "it decays the product of their factors"
    }
    conflicts: ClassVar[Mapping[str, str]] = {
        "decay of the factors": "the factors would decay twice",
        "norm between the factors": "a BatchNorm takes the scale out again that the decay acts on",
    }

    decay: str = option("frobenius", "frobenius, kronecker, l2, or a sum: frobenius+0.1*l2")
    strength: float | None = option(
        None, "lambda; without it each layer's own weight decay", at_least=0
    )
    attention: str = option("none", "also decay attention heads' products: qk, ov", choices=FORMS)

    def __post_init__(self) -> None:
        validate(self)
        self._decay = RunDecay(self.decay, self.strength, self.attention)
        if self.attention != "none":  # heads are factors already
            vars(self)["needs"] = {}

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        return self._decay.roles()

    def prepare(self, model: nn.Module) -> Change:
        return self._decay.take(model)

    def amend(self, model: nn.Module, change: Change) -> Change:
        return self._decay.amend(change)

    def before_step(self, model: nn.Module, step: int) -> None:
        self._decay.step(model, self.context)

    def on_change(self, model: nn.Module, change: Change) -> None:
        self._decay.forget()
