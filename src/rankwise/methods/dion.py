"""Dion: distributed orthonormalised updates (Ahn et al., 2504.05295).

When: every step the basis moves by one power step.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: a quarter of the short side.
Action: of the momentum B = M + G, P = orth(B Z), R = B^T P, M <- B - (1 - mu) P R^T, Z <- R with
columns of norm 1; W <- W - lr sqrt(rows / columns) P Z^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    Choices,
    OrthonormalUpdate,
    fields,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class Dion(Method):
    """Orthonormal updates of low rank from a momentum with error feedback.

    The momentum takes the memory of a dense gradient. Give it plain SGD, without momentum, for
    the published rule; any other optimizer steps Z as if it were the gradient.
    """

    rank: float = fields.rank(0.25)
    mu: float = option(0.95, "decay of the momentum in the subspace", at_least=0, at_most=1)
    scale: float = fields.scale(1.0)
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
            scale=self.scale,
            update=OrthonormalUpdate(self.mu),
            rounding=self.rounding,
        )
