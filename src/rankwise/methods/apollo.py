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
    ROUNDINGS,
    Choices,
    GradientScaling,
    as_rank,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class Apollo(Method):
    """The raw gradient, each channel scaled by what the optimizer did in a random subspace.

    Needs the dense gradient until the step. Deviation: the optimizer's bias correction is part of
    s, and the limiter counts norms in units of the learning rate.
    """

    rank: float = option(
        0.25, "directions per matrix; below 1 a fraction of its short side", above=0, parse=as_rank
    )
    every: int = option(200, "steps between refreshes of a basis; 0 keeps the first", at_least=0)
    scale: float = option(1.0, "the update is multiplied by its square root", above=0)
    growth: float = option(
        1.01, "by which the update's norm may grow a step; 0: no limit", at_least=0
    )
    stagger: bool = option(True, "refresh matrices in turn instead of all in one step")
    rounding: str = option("nearest", "of half-precision weights", choices=ROUNDINGS)
    layers: Any = option("auto", "which weights: auto, or globs over names, comma between")
    exclude: Any = option((), "globs over names that are trained unprojected")

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
