"""APOLLO-Mini: one random direction per matrix, one scale for all its channels (2412.05270).

When: every step; the random direction of a matrix is drawn anew every 200 steps.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: 1.
Action: R = p G with Gaussian p; W <- W - lr sqrt(128) s G, where s = |N| / |R|; the norm of the
update may grow by 1.01 a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    Choices,
    GradientScaling,
    fields,
    projected,
)
from rankwise.options import validate


@projected
@dataclass
class ApolloMini(Method):
    """APOLLO with one random direction per matrix and one scale for all its channels."""

    rank: float = fields.rank(1)
    every: int = fields.every()
    scale: float = fields.scale(128.0, "the update is multiplied by its square root")
    growth: float = fields.growth(1.01)
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
            basis="gaussian",
            scale=self.scale,
            update=GradientScaling("tensor", self.growth),
            stagger=self.stagger,
            rounding=self.rounding,
        )
