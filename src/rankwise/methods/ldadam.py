"""LDAdam: Adam from low-dimensional gradient statistics (Robert et al., 2410.16103).

When: every step the basis moves by one power step, and the moments turn with it.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: one for all, as in GaLore.
Action: the optimizer steps the projection of A = G + E; E, what the projection and the turn of the
first moment lost, is added to the next gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    Choices,
    ErrorFeedback,
    fields,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class LDAdam(Method):
    """A new basis every step, with error feedback; errors take the memory of a dense gradient."""

    rank: float = fields.rank(128)
    rho: float = option(0.908, "weight of the momentum in the basis", at_least=0, at_most=1)
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
            moments="rotate",
            scale=self.scale,
            update=ErrorFeedback(self.rho),
            rounding=self.rounding,
        )
