"""How the optimizer's step on a proxy becomes the step of the weight.

All forms share the projection; they differ in what they do with the gradient outside the
subspace. `begin` is called with the gradient accumulated and clipped, before the optimizer's step;
`apply` after it. The proxy then holds -lr N, N being the optimizer's direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rankwise.errors import LifeCycleError
from rankwise.linalg import working_dtype
from rankwise.onednn import add_product_, matmul
from rankwise.optim.projected.gradient import LowRankGrad
from rankwise.optim.projected.matrix import ProjectedMatrix
from rankwise.optim.projected.subspace import Total, alone, orthonormal


class Optimizing(Protocol):
    """What an update asks of the engine: the optimizer's options and moments, and new bases."""

    def learning_rate(self, matrix: ProjectedMatrix) -> float:
        """The rate of the step under way."""
        ...

    def options(self, matrix: ProjectedMatrix) -> Mapping[str, Any]:
        """The options of the proxy's group."""
        ...

    def first_moment(self, matrix: ProjectedMatrix) -> Tensor | None:
        """The proxy's moment that follows the gradient, or None."""
        ...

    def replace_basis(self, matrix: ProjectedMatrix, bases: Mapping[str, Tensor]) -> bool:
        """Use new bases, moments following; False and counted if they are not finite."""
        ...

    def total(self, matrix: ProjectedMatrix) -> Callable[[Tensor], Tensor]:
        """How products over the rows of a sharded weight are added up."""
        ...


@dataclass(frozen=True)
class Step:
    """One matrix at its step.

    Attributes:
        matrix: which.
        held: its gradient; `full` agrees with `small`.
        target: the weight (M, N), to be changed in place.
        keep: factor on the weight, 1 - lr * decay where the decay is decoupled.
        scale: the method's factor on the update.
        rate: the learning rate of this step.
        sign: 1, or -1 where the optimizer maximises.
        total: adds up sums over the rows of a sharded weight.
    """

    matrix: ProjectedMatrix
    held: LowRankGrad
    target: Tensor
    keep: float
    scale: float
    rate: float
    sign: float = 1.0
    total: Total = alone


class Lift:
    """GaLore (2403.03507): W <- W + scale * lift(proxy); the rest of the gradient is dropped."""

    keeps_full = False

    def begin(self, engine: Optimizing, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        """Nothing to prepare."""

    def apply(self, step: Step) -> None:
        """Lift the proxy into the weight: one GEMM."""
        step.matrix.lift_into(step.target, step.matrix.proxy, step.scale, step.keep)


@dataclass(frozen=True)
class ChannelResidual:
    """Fira (2410.01623): the residual G - lift(R) moves W too, at the optimizer's gain per channel.

    The gain is |N_j| / |R_j|, the norm over channel j; the residual's norm may grow by the factor
    `growth` a step.
    """

    growth: float = 1.01
    keeps_full = True

    def begin(self, engine: Optimizing, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        """Nothing to prepare."""

    def apply(self, step: Step) -> None:
        """Turn the dense gradient into the scaled residual, in place, and apply both parts."""
        matrix, held = step.matrix, step.held
        matrix.lift_into(step.target, matrix.proxy, step.scale, step.keep)
        if held.full is None or held.small is None or step.rate == 0:
            return  # full rank: nothing is outside
        rest = held.full.flatten(1)
        matrix.lift_into(rest, held.small, -1.0)
        rest.mul_(_gain(step, held.small, matrix.channels()))
        limit_growth_(rest, matrix.memory, self.growth, step.rate, step.total)
        step.target.add_(rest, alpha=-step.scale * step.sign)


@dataclass(frozen=True)
class GradientScaling:
    """APOLLO (2412.05270): the whole gradient, scaled by the gain seen in the projected space.

    Attributes:
        per: "channel", or "tensor" (APOLLO-Mini).
        growth: by which the update's norm may grow a step; 0 for no limit.
    """

    per: str = "channel"
    growth: float = 1.01
    keeps_full = True

    def begin(self, engine: Optimizing, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        """Nothing to prepare."""

    def apply(self, step: Step) -> None:
        """Scale the dense gradient in place and subtract it, times the root of the scale."""
        matrix, held = step.matrix, step.held
        assert held.small is not None
        if step.rate == 0:
            step.target.mul_(step.keep)
            return
        whole = held.small.clone() if held.full is None else held.full.flatten(1)
        sides = matrix.channels()
        if held.full is None:  # full rank: the channels of the short side's choice
            sides = 1 if matrix.shape[0] >= matrix.shape[1] else 0
        whole.mul_(_gain(step, held.small, None if self.per == "tensor" else sides))
        if self.growth:
            limit_growth_(whole, matrix.memory, self.growth, step.rate, step.total)
        if step.keep != 1.0:
            step.target.mul_(step.keep)
        step.target.add_(whole, alpha=-(step.scale**0.5) * step.sign)


@dataclass(frozen=True)
class SignResidual:
    """FRUGAL (2411.07837): signSGD, which keeps no state, on the complement of the subspace.

    Attributes:
        rate: learning rate of the sign step, as a multiple of the group's.
    """

    rate: float = 1.0
    keeps_full = True

    def begin(self, engine: Optimizing, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        """Nothing to prepare."""

    def apply(self, step: Step) -> None:
        """Lift the proxy, and step by the signs of the residual."""
        matrix, held = step.matrix, step.held
        matrix.lift_into(step.target, matrix.proxy, step.scale, step.keep)
        if held.full is None or held.small is None:
            return
        rest = held.full.flatten(1)
        matrix.lift_into(rest, held.small, -1.0)
        step.target.add_(rest.sign_(), alpha=-step.rate * self.rate * step.sign)


@dataclass(frozen=True)
class ErrorFeedback:
    """LDAdam (2410.16103): a new basis every step; what the projections lose is added to the next.

    With A = G + E: one power step on rho lift(m) + (1 - rho) A, moments turned, R = project(A),
    E <- A - lift(R) + b1 / (1 - b1) * (what the turn lost of the first moment).
    """

    rho: float = 0.908
    keeps_full = True

    def begin(self, engine: Optimizing, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        """Find the basis of this step, and give the optimizer the gradient in it."""
        if held.full is None or held.small is None:
            return
        total = _add_memory(matrix, held, "error")
        side, past = matrix.sides[0], engine.first_moment(matrix)
        wide = total if total.dtype in (torch.float32, torch.float64) else total.float()
        facing, basis = matrix.facing(side, wide), matrix.basis(side)
        factor = matmul(facing, basis)
        # A copy: replacing the basis turns the optimizer's own moments.
        moment = None if past is None else matrix.facing(side, past.clone())
        if moment is not None:
            factor.mul_(1 - self.rho).add_(moment, alpha=self.rho)
        power = matmul(facing.mT, factor)
        if moment is not None:
            past = matmul(moment.mT, factor)
            add_product_(power, basis, past, beta=1 - self.rho, alpha=self.rho)
        new = orthonormal(engine.total(matrix)(power))
        kept = engine.replace_basis(matrix, {side: new})
        held.small.copy_(matrix.project(total))
        matrix.lift_into(total, held.small, -1.0)
        beta = float(engine.options(matrix).get("betas", (0.0,))[0])
        if kept and moment is not None and beta > 0:
            new = matrix.basis(side)
            lost = matmul(moment, basis.mT)
            add_product_(lost, matmul(moment, matmul(basis.mT, new)), new.mT, alpha=-1.0)
            total.add_(matrix.facing(side, lost).to(total.dtype), alpha=beta / (1 - beta))

    def apply(self, step: Step) -> None:
        """Lift the proxy into the weight."""
        step.matrix.lift_into(step.target, step.matrix.proxy, step.scale, step.keep)


@dataclass(frozen=True)
class OrthonormalUpdate:
    """Dion (2504.05295): an orthonormal update of rank R from a momentum with error feedback.

    B = M + G; P = orth(B Z), R = B^T P, M <- B - (1 - mu) P R^T, Z <- R with columns of norm 1;
    W moves by sqrt(M / N) lr P Z^T. The optimizer sees Z as the gradient: give it SGD without
    momentum of its own.
    """

    mu: float = 0.95
    keeps_full = True

    def begin(self, engine: Optimizing, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        """Update the momentum, and give the optimizer the normalised factor."""
        if held.small is None:
            return
        if held.full is None:
            raise LifeCycleError(
                f"{matrix.name} of {matrix.shape[0]}×{matrix.shape[1]} has full rank {matrix.rank} "
                "here: there is nothing to compress; lower the rank or exclude it"
            )
        total = _add_memory(matrix, held, "momentum")
        side = matrix.sides[0]
        facing = matrix.facing(side, total.to(working_dtype(total.dtype)))
        factor = matrix.memory.get("factor")
        if factor is None:
            factor = matmul(facing, matrix.basis(side))
        new = orthonormal(engine.total(matrix)(matmul(facing.mT, factor.to(facing.dtype))))
        engine.replace_basis(matrix, {side: new})
        small = matrix.project(total)
        matrix.lift_into(total, small, -(1 - self.mu))
        facing = matrix.facing(side, small)
        unit = facing / _norm(facing, 0, engine.total(matrix)).clamp_min(1e-30)
        matrix.memory["factor"] = unit.clone()
        held.small.copy_(matrix.facing(side, unit))

    def apply(self, step: Step) -> None:
        """Lift the proxy, times sqrt(rows / columns)."""
        rows, columns = step.matrix.shape
        scale = step.scale * (rows / columns) ** 0.5
        step.matrix.lift_into(step.target, step.matrix.proxy, scale, step.keep)


LIFT = Lift()
Update = Lift | ChannelResidual | GradientScaling | SignResidual | ErrorFeedback | OrthonormalUpdate


def _add_memory(matrix: ProjectedMatrix, held: LowRankGrad, key: str) -> Tensor:
    """The memory with the gradient added, (M, N); the dense gradient is let go."""
    assert held.full is not None
    known = matrix.memory.get(key)
    matrix.memory[key] = held.full.flatten(1) if known is None else known.add_(held.full.flatten(1))
    held.full = held.seen = None
    return matrix.memory[key]


def _norm(matrix: Tensor, dim: int | None, total: Total) -> Tensor:
    """The 2-norm of a matrix, of its columns (dim 0) or rows (1); rows may be spread."""
    # float32: half-precision squares overflow.
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norm = torch.linalg.vector_norm(matrix, dim=dim, keepdim=dim is not None, dtype=wide)
    return norm if dim == 1 or total is alone else total(norm.square_()).sqrt_()


def _gain(step: Step, small: Tensor, dim: int | None) -> Tensor:
    # A channel without gradient has no gain.
    above = _norm(step.matrix.proxy.detach(), dim, step.total)
    below = _norm(small, dim, step.total)
    return (above / below).masked_fill_(~(below > 0), 0)


def limit_growth_(
    update: Tensor, memory: dict[str, Tensor], growth: float, rate: float, total: Total = alone
) -> None:
    """Keep the update's norm from growing by more than a factor a step, in units of the rate.

    A norm of zero or one that is not finite is not remembered: the limiter would never let the
    update grow again.
    """
    norm = _norm(update, None, total) / rate
    last = memory.get("norm", torch.zeros_like(norm))
    last = torch.where(last > 0, last, norm)
    limiter = (norm / last.clamp_min(1e-30) / growth).clamp_min(1.0)
    update.div_(limiter)
    fit = torch.isfinite(norm) & (norm > 0)
    memory["norm"] = torch.where(fit, norm / limiter, last)
