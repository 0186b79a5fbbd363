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
    BASES,
    MOMENTS,
    ROUNDINGS,
    Choices,
    SignResidual,
    as_rank,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class Frugal(Method):
    """The optimizer in a random subspace, signSGD without state on its complement.

    Needs the dense gradient until the step. A new subspace starts with moments of zero.
    """

    rank: float = option(
        0.25, "directions per matrix; below 1 a fraction of its short side", above=0, parse=as_rank
    )
    every: int = option(200, "steps between refreshes of a basis; 0 keeps the first", at_least=0)
    sign_rate: float = option(1.0, "rate of the sign step, times the learning rate", at_least=0)
    scale: float = option(1.0, "factor on the update in the subspace", above=0)
    basis: str = option("random", "how a basis is found", choices=BASES)
    moments: str = option("reset", "what a refresh does to moments", choices=MOMENTS)
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
            update=SignResidual(self.sign_rate),
            stagger=self.stagger,
            rounding=self.rounding,
        )
