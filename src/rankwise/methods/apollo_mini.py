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
    ROUNDINGS,
    Choices,
    GradientScaling,
    as_rank,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class ApolloMini(Method):
    """APOLLO with one random direction per matrix and one scale for all its channels."""

    rank: float = option(
        1, "directions per matrix; below 1 a fraction of its short side", above=0, parse=as_rank
    )
    every: int = option(200, "steps between refreshes of a basis; 0 keeps the first", at_least=0)
    scale: float = option(128.0, "the update is multiplied by its square root", above=0)
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
            update=GradientScaling("tensor", self.growth),
            stagger=self.stagger,
            rounding=self.rounding,
        )
