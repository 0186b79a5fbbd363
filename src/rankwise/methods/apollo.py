"""APOLLO: SGD-like memory, AdamW-like steps (Zhu et al., 2412.05270).

When: every step; the random projection of a matrix is drawn anew every 200 steps.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: d/4; one for APOLLO-Mini, which is `apollo_mini`.
Action: R = P G with Gaussian P; W <- W - lr sqrt(scale) s o G, where s_j = |N_j| / |R_j| per
channel, the norm of the update may grow by 1.01 a step.
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
class Apollo(Method):
    """The raw gradient, each channel scaled by what the optimizer did in a random subspace.

    Needs the dense gradient until the step. Deviation: the optimizer's bias correction is part of
    s, and the limiter counts norms in units of the learning rate.
    """

    rank: float = fields.rank(0.25)
    every: int = fields.every()
    scale: float = fields.scale(1.0, "the update is multiplied by its square root")
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
            update=GradientScaling("channel", self.growth),
            stagger=self.stagger,
            rounding=self.rounding,
        )
