"""Tracked subspace: GaLore whose basis moves a little every step (not published).

When: every step.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: one for all, as in GaLore.
Action: one power step on A = rho M P^T + (1 - rho) G with the optimizer's first moment M as left
factor, linear in G, so that it adds up over micro-batches and workers; moments turn with the basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    LIFT,
    ChannelResidual,
    Choices,
    fields,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class Tracked(Method):
    """GaLore with a basis that follows the momentum; needs an optimizer with a first moment."""

    rank: float = fields.rank(128)
    rho: float = option(0.9, "weight of the past in the basis", at_least=0, at_most=1)
    scale: float = fields.scale(0.25)
    residual: bool = option(False, "Fira's residual too; keeps the dense gradient until the step")
    rounding: str = fields.rounding()
    layers: Any = fields.layers()
    exclude: Any = fields.exclude()

    def __post_init__(self) -> None:
        validate(self)
        self.choices()

    def choices(self) -> Choices:
        """The engine's settings."""
        return Choices(
            rank=self.rank,
            every=0,
            moments="rotate",
            scale=self.scale,
            update=ChannelResidual() if self.residual else LIFT,
            track=self.rho,
            rounding=self.rounding,
        )
