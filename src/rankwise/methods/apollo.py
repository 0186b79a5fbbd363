"""APOLLO: SGD-like memory, AdamW-like steps (Zhu et al., 2412.05270).

When: every step; the random projection of a matrix is drawn anew every 200 steps.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: d/4 for APOLLO, 1 for APOLLO-Mini.
Action: R = P G with Gaussian P; W <- W - lr sqrt(scale) s o G, where s_j = |N_j| / |R_j| per
channel, or one number per matrix in Mini; the norm of the update may grow by 1.01 a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rankwise.method import Method
from rankwise.optim.choices import Choices, as_rank
from rankwise.optim.projected_method import CONFLICTS, PROVIDES, projected
from rankwise.optim.rounding import ROUNDINGS
from rankwise.optim.updates import GradientScaling
from rankwise.options import option, validate


@projected
@dataclass
class Apollo(Method):
    """The raw gradient, each channel scaled by what the optimizer did in a random subspace.

    Needs the dense gradient until the step. Deviation: the optimizer's bias correction is part of
    s, and the limiter counts norms in units of the learning rate.
    """

    provides: ClassVar[frozenset[str]] = PROVIDES
    conflicts: ClassVar[Mapping[str, str]] = CONFLICTS

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


@projected
@dataclass
class ApolloMini(Method):
    """APOLLO with one random direction per matrix and one scale for all its channels."""

    provides: ClassVar[frozenset[str]] = PROVIDES
    conflicts: ClassVar[Mapping[str, str]] = CONFLICTS

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
