"""What low rank costs: a weight as one matrix or as several blocks, and numbers as functions of R.

M, N: rows and columns of one block; B: blocks; R: rank of each block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a layer costs dense, and low-rank as linear R + quadratic R^2.

    The unit is that of whoever counts: numbers, FLOPs or bytes.

    Attributes:
        dense: of the dense layer.
        linear: of one unit of rank.
        quadratic: of the map between the factors, for each R^2.
    """

    dense: int
    linear: int
    quadratic: int = 0

    def at(self, rank: int) -> int:
        """Of the low-rank layer at this rank."""
        return rank * (self.linear + self.quadratic * rank)

    def of(self, rank: int | None) -> int:
        """Of the layer with this rank, None for dense."""
        return self.dense if rank is None else self.at(rank)

    @property
    def break_even(self) -> int | None:
        """The smallest rank that costs as much as dense; None if rank costs nothing."""
        if self.linear <= 0 and self.quadratic <= 0:
            return None
        if self.quadratic == 0:
            return max(1, -(-self.dense // self.linear))
        # The positive root of q R^2 + l R = d; integers, because d may be beyond a float's digits.
        discriminant = self.linear**2 + 4 * self.quadratic * self.dense
        rank = max(1, (math.isqrt(discriminant) - self.linear) // (2 * self.quadratic))
        return rank if self.at(rank) >= self.dense else rank + 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.dense + other.dense, self.linear + other.linear, self.quadratic + other.quadratic
        )

    def __mul__(self, factor: int) -> Cost:
        return Cost(self.dense * factor, self.linear * factor, self.quadratic * factor)


@dataclass(frozen=True)
class MatrixShape:
    """A weight as the matrix that is factorised, or as several of them, all of one shape.

    Attributes:
        rows: M of one block: out_features, or out_channels (times the kernel's height in the
            separable form).
        columns: N of one block: in_features, or in_channels times the kernel's area (its width).
        norm: a BatchNorm over the codes, which stores two numbers for each.
        core: a square map between the factors, W = U C V.
        blocks: groups of a convolution, parts of a fused projection: each has its own factors.
    """

    rows: int
    columns: int
    norm: bool = False
    core: bool = False
    blocks: int = 1

    @property
    def full_rank(self) -> int:
        """The highest rank of a block, min(M, N)."""
        return min(self.rows, self.columns)

    @property
    def dense(self) -> int:
        """Numbers the dense weight stores."""
        return self.blocks * self.rows * self.columns

    @property
    def stored(self) -> Cost:
        """Numbers stored, dense and by rank."""
        each = self.rows + self.columns + (2 if self.norm else 0)
        return Cost(self.dense, self.blocks * each, self.blocks if self.core else 0)

    def cost(self, rank: int) -> int:
        """Numbers the low-rank weight stores: B (R (M + N) + R^2 with a core)."""
        return self.stored.at(rank)

    @property
    def work(self) -> Cost:
        """FLOPs for one position (a token, an output pixel), dense and by rank, 2 a multiply-add.

        Right for layers that see one matrix at every position; a convolution in two steps works
        on different grids, so the plan counts those on the layer itself.
        """
        each = 2 * self.blocks * (self.rows + self.columns)
        return Cost(2 * self.dense, each, 2 * self.blocks if self.core else 0)

    def flops(self, rank: int) -> int:
        """FLOPs of the low-rank weight for one position."""
        return self.work.at(rank)

    @property
    def break_even(self) -> int:
        """The smallest rank that does not make the layer smaller."""
        return self.stored.break_even or 1

    def __str__(self) -> str:
        blocks = f"{self.blocks} of " if self.blocks > 1 else ""
        return f"{blocks}{self.rows}×{self.columns}"
