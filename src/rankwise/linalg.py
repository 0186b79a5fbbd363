"""Pure matrix functions. M, N: rows and columns; R: rank; W = U V with U (M, R), V (R, N)."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.errors import FactorizeError


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 input: decompositions in less lose the small directions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def spectral_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation W ~ U V, its singular values split evenly between the two.

    With all of them in one factor the two would get gradients of different size, and weight
    decay would shrink the product unevenly.

    Args:
        weight: (M, N), any floating dtype; computed in float32 or better.
        rank: 1 ... min(M, N).

    Returns:
        U (M, R) and V (R, N) in the working dtype, with U^T U = V V^T.

    Raises:
        FactorizeError: values that are not finite, or a decomposition that failed.
    """
    matrix = weight.to(working_dtype(weight.dtype))
    if matrix.is_meta:
        return matrix.new_empty(matrix.shape[0], rank), matrix.new_empty(rank, matrix.shape[1])
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        raise FactorizeError(f"{bad} of {matrix.numel()} weights are not finite")
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError as error:  # LinAlgError is one
        raise FactorizeError(f"the SVD did not converge: {error}") from error
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def carry_first(moment: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """First moments of the factors from that of W: dL/dU = G V^T and dL/dV = U^T G are linear in G.

    Args:
        moment: (M, N) first moment of W.
        u: (M, R) factor.
        v: (R, N) factor.

    Returns:
        Moments of V (R, N) and of U (M, R).
    """
    return u.mT @ moment, moment @ v.mT


def carry_second(
    moment: Tensor, first: Tensor | None, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Second moments of the factors from that of W, entries of G taken as uncorrelated.

    Then E[(G V^T)^2] = E[G^2] (V o V)^T. Correlated gradients make that too small, and Adam's
    step m / sqrt(v) with it too large (4 lr at the first step was seen), so the square of the
    carried first moment is the lower bound.

    Args:
        moment: (M, N) second moment of W.
        first: (M, N) first moment of W, if the optimizer keeps one.
        u: (M, R) factor.
        v: (R, N) factor.

    Returns:
        Moments of V (R, N) and of U (M, R).
    """
    second_v, second_u = u.square().mT @ moment, moment @ v.square().mT
    if first is None:
        return second_v, second_u
    first_v, first_u = carry_first(first, u, v)
    return torch.maximum(second_v, first_v.square()), torch.maximum(second_u, first_u.square())


def variance_factors(
    shape: tuple[int, int], rank: int, variance: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random factors whose product has entries of the given variance, whatever the rank.

    An entry of U V is a sum of R products, so Var_W = R Var_U Var_V; both factors get the
    standard deviation (Var_W / R)^(1/4).

    Returns:
        U (M, R) and V (R, N), float32 on the CPU.
    """
    std = (variance / rank) ** 0.25
    u = torch.randn(shape[0], rank, generator=generator, device="cpu") * std
    v = torch.randn(rank, shape[1], generator=generator, device="cpu") * std
    return u, v
