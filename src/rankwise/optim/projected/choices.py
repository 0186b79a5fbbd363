"""What makes one method of projected gradients another: the engine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankwise.errors import OptionError
from rankwise.optim.projected.updates import LIFT, Update

MOMENTS = ("keep", "rotate", "reset")


def as_rank(value: Any) -> float:
    """Read a rank: a whole number from 1 up, or a fraction of the short side below 1.

    Raises:
        OptionError: neither.
    """
    try:
        rank = float(value)
    except (TypeError, ValueError):
        rank = 0.0
    if not 0 < rank < 1 and not (rank >= 1 and rank.is_integer()):
        raise OptionError(
            f"rank={value!r} is no rank: give a whole number such as 128, or a fraction of the "
            "short side such as 0.25"
        )
    return rank if rank < 1 else int(rank)


@dataclass(frozen=True)
class Choices:
    """What makes one method of another: basis x refresh x moments x residual.

    Attributes:
        rank: directions per matrix; below 1 a fraction of the short side.
        every: optimizer steps between refreshes of a basis; 0 keeps the first one.
        side: "short", "left", "right" or "both".
        basis: "power", "svd", "random" or "gaussian".
        moments: at a refresh "keep", "rotate" or "reset" them.
        scale: factor on the update.
        update: what becomes of the gradient outside the subspace.
        stagger: spread refreshes over steps, so that none is much slower than the others.
        track: rho of a tracked basis, which moves a little every step; None for none.
        lazy: double a matrix's period while the mean cosine of successive first vectors is at
            least this; None for a fixed period.
        bits: of a stored basis, 4 or 8; None for float32.
        rounding: of half-precision weights, "nearest", "stochastic" or "compensated".
        weight_bits: of the projected weights while training, 8; None leaves them as they are.
    """

    rank: float = 128
    every: int = 200
    side: str = "short"
    basis: str = "power"
    moments: str = "keep"
    scale: float = 0.25
    update: Update = LIFT
    stagger: bool = True
    track: float | None = None
    lazy: float | None = None
    bits: int | None = None
    rounding: str = "nearest"
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        as_rank(self.rank)

    def rank_of(self, weight: Tensor) -> int:
        """The rank of one matrix, at least 1."""
        short = min(weight.shape[0], weight.numel() // weight.shape[0])
        return max(1, round(self.rank * short)) if self.rank < 1 else int(self.rank)
