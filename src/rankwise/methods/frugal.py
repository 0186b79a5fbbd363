"""FRUGAL: a stateful subspace, signSGD elsewhere (Zmushko et al., 2411.07837).

When: every step; the subspace of a matrix is drawn anew every 200 steps.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: a quarter of the short side (density .25).
Action: the optimizer steps P^T G; the rest of the gradient moves W by its sign times the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    Choices,
    SignResidual,
    fields,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class Frugal(Method):
    """The optimizer in a random subspace, signSGD without state on its complement.

    Needs the dense gradient until the step. A new subspace starts with moments of zero.
    """

    rank: float = fields.rank(0.25)
    every: int = fields.every()
    sign_rate: float = option(1.0, "rate of the sign step, times the learning rate", at_least=0)
    scale: float = fields.scale(1.0, "factor on the update in the subspace")
    basis: str = fields.basis("random")
    moments: str = fields.moments("reset")
    stagger: bool = fields.stagger()
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
            every=self.every,
            basis=self.basis,
            moments=self.moments,
            scale=self.scale,
            update=SignResidual(self.sign_rate),
            stagger=self.stagger,
            rounding=self.rounding,
        )
