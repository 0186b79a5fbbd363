"""When a basis is renewed, from what, and what the optimizer's moments do then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise import sharding
from rankwise.errors import LifeCycleError
from rankwise.linalg import working_dtype
from rankwise.method import Context
from rankwise.onednn import matmul
from rankwise.optim.projected import moments as moment_rules
from rankwise.optim.projected import subspace
from rankwise.optim.projected.choices import Choices
from rankwise.optim.projected.matrix import ProjectedMatrix

NEVER = 2**62
_COLD_STEPS = 3  # of subspace iteration from a random start; one is enough from a warm one


class Bases:
    """Finds, renews and replaces the bases of projected matrices.

    Attributes:
        step: finished optimizer steps.
        turns: name -> position among the matrices that take turns in being refreshed.
        failing: names of matrices that have begun to keep their old basis, not yet reported.
    """

    def __init__(self, choices: Choices, context: Context) -> None:
        self.choices, self.context = choices, context
        self.step = 0
        self.turns: dict[str, int] = {}
        self.failing: list[str] = []

    # ------------------------------------------------------------------ the optimizer's side

    def options(self, matrix: ProjectedMatrix) -> Mapping[str, Any]:
        """The options of the proxy's group."""
        source = self.context.options
        return (source.group(matrix.proxy) if source is not None else None) or {}

    def moments(self, matrix: ProjectedMatrix) -> Mapping[str, Any]:
        """The optimizer's state of the proxy; empty before its first step."""
        source = self.context.options
        return {} if source is None else source.state(matrix.proxy)

    def first_moment(self, matrix: ProjectedMatrix) -> Tensor | None:
        """The moment that follows the gradient; optimizers that maximise keep its negative."""
        moment = moment_rules.first_moment(self.moments(matrix))
        negated = moment is not None and self.options(matrix).get("maximize")
        return -moment if negated and moment is not None else moment

    def learning_rate(self, matrix: ProjectedMatrix) -> float:
        """The rate of the step under way."""
        return self.context.learning_rate(matrix.proxy)

    def decoupled(self, matrix: ProjectedMatrix) -> bool:
        """Whether weight decay acts on the weight itself."""
        source = self.context.options
        return source is not None and source.decoupled_decay(matrix.proxy)

    # ------------------------------------------------------------------ refreshes

    def keeps_full(self) -> bool:
        """Whether the dense gradient is needed at the step."""
        return self.choices.update.keeps_full

    def _due(self, matrix: ProjectedMatrix) -> bool:
        return not matrix.identity and matrix.next_refresh <= self.step

    def waits(self, matrix: ProjectedMatrix) -> bool:
        """Whether the dense gradient is held until somebody looks."""
        return self.keeps_full() or self._due(matrix)

    def sketch(self, matrix: ProjectedMatrix, full: Tensor) -> Tensor | None:
        """G^T M, or G M^T for a left basis, with the first moment M of the last step."""
        if self.choices.track is None or matrix.identity:
            return None
        moment = self.first_moment(matrix)
        if moment is None:
            return None
        side, gradient = matrix.sides[0], full.flatten(1)
        facing = matrix.facing(side, gradient)
        return matmul(facing.mT, matrix.facing(side, moment.to(gradient.dtype)))

    def gram(self, matrix: ProjectedMatrix) -> Tensor | None:
        """M^T M (R, R) of the first moment M that sketches of this step were made with."""
        moment = self.first_moment(matrix)
        if moment is None:
            return None
        facing = matrix.facing(matrix.sides[0], moment)
        return self.total(matrix)(matmul(facing.mT, facing))

    def check_momentum(self, matrix: ProjectedMatrix) -> None:
        """Refuse to track by an optimizer without momentum.

        Raises:
            LifeCycleError: after its first step of a matrix it keeps no first moment.
        """
        if not matrix.identity and self.first_moment(matrix) is None:
            raise LifeCycleError(
                f"a tracked basis follows the optimizer's first moment, but it keeps none for "
                f"{matrix.name}; give SGD a momentum, take Adam or Lion, or choose GaLore"
            )

    def track(self, matrix: ProjectedMatrix, sketch: Tensor, gram: Tensor) -> None:
        """Move a tracked basis by one step, the moments with it."""
        side = matrix.sides[0]
        new = subspace.tracked_step(
            self.total(matrix)(sketch), matrix.basis(side), gram, self.choices.track or 0.0
        )
        self.replace_basis(matrix, {side: new})

    def before_projection(self, matrix: ProjectedMatrix, full: Tensor) -> None:
        """Find a first basis, or a new one if it is due and not found by a warm power step."""
        if matrix.identity:
            return
        if not matrix.has_basis():
            for side in matrix.sides:
                matrix.set_basis(side, self._drawn(matrix, side), self.choices.bits)
        if self._due(matrix) and not self._shares(matrix):
            self._refresh(matrix, full.flatten(1))

    def _shares(self, matrix: ProjectedMatrix) -> bool:
        """Whether a refresh is G^T (G Q) with the projection G Q of the step under way."""
        return matrix.period > 0 and len(matrix.sides) == 1 and self.choices.basis == "power"

    def after_projection(self, matrix: ProjectedMatrix, full: Tensor, small: Tensor) -> None:
        """The second half of a warm power step, G^T (G Q); its basis serves from the next step."""
        matrix.power = None
        if matrix.identity or not (self._due(matrix) and self._shares(matrix)):
            return
        gradient, side = full.flatten(1), matrix.sides[0]
        if not self._fit(matrix, gradient):
            self._failed(matrix)
            return
        wide = working_dtype(gradient.dtype)
        facing = matrix.facing(side, gradient.to(wide))
        matrix.power = matmul(facing.mT, matrix.facing(side, small.to(wide)))

    def renew(self, matrix: ProjectedMatrix) -> None:
        """Finish a power step that was begun: the step it shared its projection with is done."""
        if matrix.power is None:
            return
        product, matrix.power = self.total(matrix)(matrix.power), None
        self._adopt(matrix, {matrix.sides[0]: subspace.orthonormal(product)}, first=False)

    def _drawn(self, matrix: ProjectedMatrix, side: str) -> Tensor:
        generator = self.context.generator(self.step + 1, f"{matrix.name}/{side}")
        orthogonal = self.choices.basis != "gaussian"
        return subspace.random_basis(
            matrix.size(side), matrix.rank, generator, orthogonal=orthogonal
        )

    def _refresh(self, matrix: ProjectedMatrix, gradient: Tensor) -> None:
        first = matrix.period == 0
        bases = self._find(matrix, gradient, _COLD_STEPS if first else 1)
        if bases is None:
            self._failed(matrix)
            return
        self._adopt(matrix, bases, first)

    def _adopt(self, matrix: ProjectedMatrix, bases: Mapping[str, Tensor], first: bool) -> None:
        old = matrix.basis(matrix.sides[0])
        if not self.replace_basis(matrix, bases):
            return
        if self.choices.lazy is not None and not first:
            self._adapt_period(matrix, old)
        every = self.choices.every if self.choices.track is None else 0
        matrix.period = matrix.period or every or NEVER
        matrix.next_refresh = self.step + matrix.period
        if first and self.choices.stagger and every:
            matrix.next_refresh = self.step + self._first_wait(matrix)

    def _first_wait(self, matrix: ProjectedMatrix) -> int:
        """1 ... every: matrices take turns, so that each step refreshes as few as possible."""
        every = self.choices.every
        return max(1, every - self.turns[matrix.name] * every // len(self.turns))

    def _adapt_period(self, matrix: ProjectedMatrix, old: Tensor) -> None:
        """Q-GaLore (2407.08296): a basis that hardly moves is looked for half as often."""
        matrix.similar.append(subspace.similarity(old, matrix.basis(matrix.sides[0])))
        if len(matrix.similar) == 5:
            if sum(matrix.similar) / 5 >= (self.choices.lazy or 0.0):
                matrix.period *= 2
            matrix.similar.clear()

    def _find(
        self, matrix: ProjectedMatrix, gradient: Tensor, steps: int
    ) -> dict[str, Tensor] | None:
        kind, total = self.choices.basis, self.total(matrix)
        if kind in ("random", "gaussian"):
            return {side: self._drawn(matrix, side) for side in matrix.sides}
        if not self._fit(matrix, gradient):
            return None
        if kind == "svd":
            vectors = subspace.leading(gradient, matrix.rank)
            return None if vectors is None else {side: vectors[side] for side in matrix.sides}
        found: dict[str, Tensor] = {}
        for side in matrix.sides:
            facing, basis = matrix.facing(side, gradient), matrix.basis(side)
            found[side] = subspace.power_step(facing, basis, steps=steps, total=total)
        return found

    def _fit(self, matrix: ProjectedMatrix, gradient: Tensor) -> bool:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norm = self.total(matrix)(torch.linalg.vector_norm(gradient, dtype=wide).square())
        return bool(torch.isfinite(norm)) and bool(norm > 0)

    def replace_basis(self, matrix: ProjectedMatrix, bases: Mapping[str, Tensor]) -> bool:
        """Use new bases, moments following as chosen; False, and counted, if not finite."""
        if not all(bool(torch.isfinite(b).all()) for b in bases.values()):
            self._failed(matrix)
            return False
        matrix.failing = False
        state = self.moments(matrix)
        rule = self.choices.moments if state and matrix.period else "keep"
        old = {side: matrix.basis(side) for side in bases} if rule == "rotate" else {}
        for side, basis in bases.items():
            matrix.set_basis(side, basis, self.choices.bits)
        if rule == "reset":
            moment_rules.reset_(state, matrix.name)
        elif rule == "rotate":
            cosines = {side: matmul(old[side].mT, matrix.basis(side)) for side in bases}
            squares = {side: c.square() for side, c in cosines.items()}
            moment_rules.rotate_(
                state, self.options(matrix), _turner(cosines), _turner(squares), matrix.name
            )
        return True

    def total(self, matrix: ProjectedMatrix) -> Callable[[Tensor], Tensor]:
        """How products over the rows of a sharded weight are added up."""
        weight = matrix.weight
        group = sharding.row_group(weight) if sharding.is_sharded(weight) else None
        if group is None:
            return subspace.alone

        def add_up(part: Tensor) -> Tensor:
            dist.all_reduce(part, group=group)
            return part

        return add_up

    def _failed(self, matrix: ProjectedMatrix) -> None:
        matrix.failures += 1
        if not matrix.failing:
            matrix.failing = True
            self.failing.append(matrix.name)


def _turner(turns: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def turn(moment: Tensor) -> Tensor:
        for side, by in turns.items():
            by = by.to(moment.dtype)
            moment = matmul(by.mT, moment) if side == "left" else matmul(moment, by)
        return moment

    return turn
