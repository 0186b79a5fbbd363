"""Q-GaLore: lazy refreshes and low-bit bases (Zhang et al., 2407.08296).

When: every step; the period of a matrix doubles while its basis hardly turns.
Where: the weight matrices of all layers but embeddings and the classifier.
How many ranks: one for all, as in GaLore.
Action: GaLore with the basis in 4 bits. When the mean cosine between the first vectors of
successive bases is .4 or more over five refreshes, the matrix is refreshed half as often. With
weight_bits=8 the weights are stored in 8 bits, and updated with stochastic rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.method import Method
from rankwise.optim.projected import (
    Choices,
    fields,
    projected,
)
from rankwise.options import option, validate


@projected
@dataclass
class QGaLore(Method):
    """GaLore with fewer refreshes and a basis of 4 bits a number.

    For 8-bit states give it an 8-bit optimizer. Deviations: weights stay as they are unless
    weight_bits=8 asks for the paper's; scales per block of 256 without zero points, as weights
    are centred.
    """

    rank: float = fields.rank(128)
    every: int = fields.every()
    scale: float = fields.scale(0.25)
    similarity: float = option(0.4, "mean cosine that doubles the period", above=0, at_most=1)
    bits: int | None = option(4, "of the stored basis: 4 or 8; none for 32", at_least=4, at_most=8)
    basis: str = fields.basis()
    stagger: bool = fields.stagger()
    weight_bits: int | None = fields.weight_bits()
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
            basis=self.basis,
            scale=self.scale,
            stagger=self.stagger,
            lazy=self.similarity,
            bits=self.bits,
            weight_bits=self.weight_bits,
            rounding=self.rounding,
        )
