"""Optimizer moments of a dense weight, carried to the factors that take its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rankwise import linalg

if TYPE_CHECKING:
    from rankwise.layers.base import LowRankLayer


@dataclass(frozen=True, eq=False)
class FactorCarry:
    """Optimizer moments of a dense weight for the parameters of a low-rank layer, module order."""

    layer: LowRankLayer

    def first(self, moment: Tensor) -> tuple[Tensor | None, ...]:
        factors = self.layer.factors()
        return self._arrange(linalg.carry_first(self._matrix(moment), *factors), like=moment)

    def second(self, moment: Tensor, first: Tensor | None) -> tuple[Tensor | None, ...]:
        factors = self.layer.factors()
        m = None if first is None else self._matrix(first)
        return self._arrange(linalg.carry_second(self._matrix(moment), m, *factors), like=moment)

    def _matrix(self, moment: Tensor) -> Tensor:
        matrix = self.layer.as_matrix(moment, self.layer.blocks)
        return matrix.to(linalg.working_dtype(self.layer.u.weight.dtype))

    def _arrange(self, moments: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor | None, ...]:
        layer = self.layer
        known = {
            getattr(layer, part).weight: layer.from_factor(part, moment).to(like.dtype)
            for part, moment in zip(layer.parts, moments, strict=True)
        }
        return tuple(known.get(p) for p in layer.new_parameters())
