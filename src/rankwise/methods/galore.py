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
    Choices,
    fields,
    projected,
)
from rankwise.options import validate


@projected
@dataclass
class GaLore(Method):
    """Any optimizer on projected gradients; the weights stay dense and of full rank.

    Deviations: the basis comes from the gradient accumulated over micro-batches and workers by
    warm subspace iteration (`basis="svd"` is the paper's), and matrices are refreshed in turn. A
    warm iteration G^T (G Q) shares G Q with the step's own projection, so that its basis serves
    from the next step on: a refresh costs a third less (docs/studies/low-rank-gradients.md).
    """

    rank: float = fields.rank(128)
    every: int = fields.every()
    scale: float = fields.scale(0.25, "factor on the update (the paper's alpha)")
    side: str = fields.side()
    basis: str = fields.basis()
    moments: str = fields.moments()
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
            side=self.side,
            basis=self.basis,
            moments=self.moments,
            scale=self.scale,
            stagger=self.stagger,
            rounding=self.rounding,
        )
