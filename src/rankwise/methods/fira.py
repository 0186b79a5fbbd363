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
    ChannelResidual,
    Choices,
    fields,
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

    rank: float = fields.rank(128)
    every: int = fields.every()
    scale: float = fields.scale(0.25)
    growth: float = option(1.01, "by which the residual's norm may grow a step", above=1)
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
            basis=self.basis,
            moments=self.moments,
            scale=self.scale,
            update=ChannelResidual(self.growth),
            stagger=self.stagger,
            rounding=self.rounding,
        )
