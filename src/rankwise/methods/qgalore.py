"""Q-GaLore: lazy refreshes and low-bit bases (Zhang et al., 2407.08296).

When: every step; the period of a matrix doubles while its basis hardly turns.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: one for all, as in GaLore.
Action: GaLore with the basis in 4 bits. When the mean cosine between the first vectors of
successive bases is .4 or more over five refreshes, the matrix is refreshed half as often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    BASES,
    ROUNDINGS,
    Choices,
    as_rank,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class QGaLore(Method):
    """GaLore with fewer refreshes and a basis of 4 bits a number.

    For 8-bit states give it an 8-bit optimizer. Not here: weights of 8 bits; bfloat16 weights
    with rounding="stochastic" are the nearest to it.
    """

    rank: float = option(
        128, "directions per matrix; below 1 a fraction of its short side", above=0, parse=as_rank
    )
    every: int = option(200, "steps between refreshes of a basis; 0 keeps the first", at_least=0)
    scale: float = option(0.25, "factor on the update", above=0)
    similarity: float = option(0.4, "mean cosine that doubles the period", above=0, at_most=1)
    bits: int | None = option(4, "of the stored basis: 4 or 8; none for 32", at_least=4, at_most=8)
    basis: str = option("power", "how a basis is found", choices=BASES)
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
            scale=self.scale,
            stagger=self.stagger,
            lazy=self.similarity,
            bits=self.bits,
            rounding=self.rounding,
        )
