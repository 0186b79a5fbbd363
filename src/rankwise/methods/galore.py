"""GaLore: optimizer state and gradients in a slowly changing subspace (Zhao et al., 2403.03507).

When: every step; the basis of a matrix is renewed every 200 steps.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: one for all, 128 / 256 / 256 / 512 for LLaMA 60M / 130M / 350M / 1B (d/4 to d/3).
Action: R = P^T G (or G Q on the shorter side); the optimizer steps R; W moves by scale * lift(N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    BASES,
    MOMENTS,
    ROUNDINGS,
    SIDES,
    Choices,
    as_rank,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class GaLore(Method):
    """Any optimizer on projected gradients; the weights stay dense and of full rank.

    Deviations: the basis comes from the gradient accumulated over micro-batches and workers by
    warm subspace iteration (`basis="svd"` is the paper's), and matrices are refreshed in turn.
    """

    rank: float = option(
        128, "directions per matrix; below 1 a fraction of its short side", above=0, parse=as_rank
    )
    every: int = option(200, "steps between refreshes of a basis; 0 keeps the first", at_least=0)
    scale: float = option(0.25, "factor on the update (the paper's alpha)", above=0)
    side: str = option("short", "which side is projected", choices=SIDES)
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
            side=self.side,
            basis=self.basis,
            moments=self.moments,
            scale=self.scale,
            stagger=self.stagger,
            rounding=self.rounding,
        )
