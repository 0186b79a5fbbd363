"""Bases of gradient subspaces: how they are found, turned and stored. Pure functions on matrices.

A basis Q (D, R) spans R directions of the rows of G (B, D): the projection is G Q, the way back
(G Q) Q^T. A basis for the other side is found from G^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.linalg import working_dtype
from rankwise.onednn import matmul

# Adds up, over the workers that hold parts of the rows of G, what each one computed.
Total = Callable[[Tensor], Tensor]

BASES = ("power", "svd", "random", "gaussian")


def alone(part: Tensor) -> Tensor:
    """The total of a matrix that is held in one piece."""
    return part


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of the columns (D, R), by Householder QR in float32."""
    return torch.linalg.qr(columns.to(working_dtype(columns.dtype)))[0]


def power_step(gradient: Tensor, basis: Tensor, *, steps: int = 1, total: Total = alone) -> Tensor:
    """One warm step of subspace iteration, Q <- orth(G^T (G Q)).

    From a basis that is near, one step comes within .4 % of the optimal energy, for the cost of
    one to two and a half projections; the SVD it replaces costs tens of them.

    Args:
        gradient: G (B, D), or the rows of it that this worker holds.
        basis: Q (D, R), of any dtype.
        steps: how many; more from a cold start.
        total: adds up the products of workers that hold different rows.

    Returns:
        (D, R), orthonormal, in the working dtype.
    """
    g = gradient.to(working_dtype(gradient.dtype))
    q = basis.to(g.dtype)
    for _ in range(steps):
        q = orthonormal(total(matmul(g.mT, matmul(g, q))))
    return q


def tracked_step(
    sketch: Tensor, basis: Tensor, gram: Tensor, rho: float, *, total: Total = alone
) -> Tensor:
    """A power step on A = rho M Q^T + (1 - rho) G, with the first moment M as the left factor.

    A^T M = rho Q (M^T M) + (1 - rho) G^T M is linear in G, so that G^T M adds up over
    micro-batches and workers, and no full gradient is kept.

    Args:
        sketch: G^T M (D, R), summed over micro-batches.
        basis: Q (D, R).
        gram: M^T M (R, R), of the first moment in this basis before the step.
        rho: weight of the past, 0 ... 1.
        total: adds up the products of workers that hold different rows.
    """
    wide = working_dtype(sketch.dtype)
    power = torch.addmm(sketch.to(wide), basis.to(wide), gram.to(wide), beta=1 - rho, alpha=rho)
    return orthonormal(total(power))


def leading(gradient: Tensor, rank: int) -> dict[str, Tensor] | None:
    """The first R singular vectors of G (M, N): "left" (M, R) and "right" (N, R).

    None if the decomposition fails. One decomposition gives both sides, so that their signs
    agree.
    """
    g = gradient.to(working_dtype(gradient.dtype))
    try:
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
    except RuntimeError:  # LinAlgError is one: it did not converge
        return None
    return {"left": u[:, :rank].contiguous(), "right": vh[:rank].mT.contiguous()}


def random_basis(
    size: int, rank: int, generator: torch.Generator, *, orthogonal: bool = True
) -> Tensor:
    """R random directions of a space of dimension D, as (D, R) in float32 on the CPU.

    Orthonormal, or with independent entries of variance 1/R, which keep the expected norm of what
    they project (APOLLO, 2412.05270).
    """
    drawn = torch.randn(size, rank, generator=generator, device="cpu")
    return orthonormal(drawn) if orthogonal else drawn.div_(rank**0.5)


def similarity(old: Tensor, new: Tensor) -> float:
    """|cos| of the angle between the first vectors of two bases (Q-GaLore, 2407.08296)."""
    first, second = old[:, 0].float(), new[:, 0].float()
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0).abs())


@dataclass(frozen=True, eq=False)
class LowBitBasis:
    """A basis stored as whole numbers of 4 or 8 bits, with one scale per vector.

    Attributes:
        codes: uint8; two numbers of 4 bits share a byte.
        scales: (R,), float32: what the step from one code to the next is worth.
        bits: 4 or 8.
        shape: (D, R).
    """

    codes: Tensor
    scales: Tensor
    bits: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, basis: Tensor, bits: int) -> LowBitBasis:
        """Round a basis (D, R) to the nearest codes."""
        highest = 2 ** (bits - 1) - 1
        wide = basis.float()
        scales = wide.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny) / highest
        codes = (wide / scales).round_().add_(highest).to(torch.uint8).flatten()
        if bits == 4:
            codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
            codes = codes[0::2] | (codes[1::2] << 4)
        return cls(codes, scales, bits, (basis.shape[0], basis.shape[1]))

    def dequantize(self) -> Tensor:
        """The basis as (D, R) in float32."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=1).flatten()
        rows, columns = self.shape
        wide = codes[: rows * columns].view(rows, columns).float()
        return wide.sub_(2 ** (self.bits - 1) - 1).mul_(self.scales)
