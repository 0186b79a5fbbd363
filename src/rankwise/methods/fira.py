"""Fira: full-rank training under low-rank constraint (Chen et al., 2410.01623).

When: every step; the basis of a matrix is renewed every 200 steps.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: one for all, as in GaLore.
Action: GaLore's update plus phi o (G - P P^T G), phi_j = |N_j| / |R_j| per channel, whose norm may
grow by 1.01 a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    BASES,
    MOMENTS,
    ROUNDINGS,
    ChannelResidual,
    Choices,
    as_rank,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class Fira(Method):
    """GaLore and the rest of the gradient, at the gain that the optimizer showed in the subspace.

    Needs the dense gradient until the step: gradients take the memory they take without it.
    Deviation: warm subspace iteration as in GaLore here; the limiter counts norms in units of the
    learning rate, so that it does not slow a warm-up, and forgets steps without gradient.
    """

    rank: float = option(
        128, "directions per matrix; below 1 a fraction of its short side", above=0, parse=as_rank
    )
    every: int = option(200, "steps between refreshes of a basis; 0 keeps the first", at_least=0)
    scale: float = option(0.25, "factor on the update", above=0)
    growth: float = option(1.01, "by which the residual's norm may grow a step", above=1)
    basis: str = option("power", "how a basis is found", choices=BASES)
    moments: str = option("keep", "what a refresh does to moments", choices=MOMENTS)
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
            basis=self.basis,
            moments=self.moments,
            scale=self.scale,
            update=ChannelResidual(self.growth),
            stagger=self.stagger,
            rounding=self.rounding,
        )
