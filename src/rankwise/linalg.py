"""Pure matrix functions. M, N: rows and columns; R: rank; W = U V with U (M, R), V (R, N)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rankwise.errors import FactorizeError


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 input: decompositions in less lose the small directions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def spectral_factors(
    weight: Tensor, rank: int, *, core: bool = False, ones: bool = False
) -> tuple[Tensor, ...]:
    """The best rank-R approximation W ~ U V, its singular values split evenly between the two.

    With all of them in one factor the two would get gradients of different size, and weight
    decay would shrink the product unevenly.

    Args:
        weight: (..., M, N), any floating dtype; computed in float32 or better.
        rank: 1 ... min(M, N).
        core: three factors U C V, C diagonal, with a third power of the singular values each.
        ones: set the singular values that are kept to 1 (2209.13569): U and V are semi-orthogonal.

    Returns:
        U (..., M, R) and V (..., R, N) in the working dtype, with U^T U = V V^T; with a core
        C (..., R, R) between them. Where a singular value is exactly 0, U has zeros and V a unit
        vector, so that the product can still learn.

    Raises:
        FactorizeError: values that are not finite, or a decomposition that failed.
    """
    matrix = weight.to(working_dtype(weight.dtype))
    if not matrix.is_meta and not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        raise FactorizeError(f"{bad} of {matrix.numel()} weights are not finite")
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError as error:  # LinAlgError is one
        raise FactorizeError(f"the SVD did not converge: {error}") from error
    s = s[..., :rank]
    share = torch.ones_like(s) if ones else s.pow(1 / 3) if core else s.sqrt()
    # Zero in every factor would be zero in every gradient, for good: a zero matrix could not learn.
    other = torch.where(share > 0, share, 1)
    u, v = u[..., :rank] * share[..., None, :], other[..., :, None] * vh[..., :rank, :]
    return (u, torch.diag_embed(other), v) if core else (u, v)


def carry_first(moment: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """First moments of the factors of a product from that of the product: linear in G = dL/dW.

    A factor F in W = L F R has the gradient dL/dF = L^T G R^T: G V^T for U and U^T G for V.

    Args:
        moment: (..., M, N) first moment of W.
        factors: U (..., M, R), V (..., R, N), or with others between them.

    Returns:
        Moments in the order and shapes of the factors.
    """
    return tuple(_between(left, moment, right) for left, right in _surroundings(factors))


def carry_second(moment: Tensor, first: Tensor | None, *factors: Tensor) -> tuple[Tensor, ...]:
    """Second moments of the factors from that of W, entries of G taken as uncorrelated.

    Then E[(L^T G R^T)^2] = (L o L)^T E[G^2] (R o R)^T. Correlated gradients make that too small,
    and Adam's step m / sqrt(v) with it too large (4 lr at the first step was seen), so the square
    of the carried first moment is the lower bound.

    Args:
        moment: (..., M, N) second moment of W.
        first: (..., M, N) first moment of W, if the optimizer keeps one.
        factors: U (..., M, R), V (..., R, N), or with others between them.

    Returns:
        Moments in the order and shapes of the factors.
    """
    squares = [
        tuple(None if side is None else side.square() for side in sides)
        for sides in _surroundings(factors)
    ]
    second = tuple(_between(left, moment, right) for left, right in squares)
    if first is None:
        return second
    firsts = carry_first(first, *factors)
    return tuple(torch.maximum(s, f.square()) for s, f in zip(second, firsts, strict=True))


def _surroundings(factors: tuple[Tensor, ...]) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each factor the products of those to its left and to its right; None for nothing."""
    return [(_product(factors[:i]), _product(factors[i + 1 :])) for i in range(len(factors))]


def _product(factors: tuple[Tensor, ...]) -> Tensor | None:
    return functools.reduce(torch.matmul, factors) if factors else None


def _between(left: Tensor | None, moment: Tensor, right: Tensor | None) -> Tensor:
    moment = moment if left is None else left.mT @ moment
    return moment if right is None else moment @ right.mT


def variance_factors(
    shape: tuple[int, ...],
    rank: int,
    variance: float | Tensor,
    generator: torch.Generator,
    *,
    core: bool = False,
) -> tuple[Tensor, ...]:
    """Random factors whose product has entries of the given variance, whatever the rank.

    An entry of U V is a sum of R products, so Var_W = R Var_U Var_V; both factors get the
    standard deviation (Var_W / R)^(1/4). With a core it is a sum of R^2 products of three, and
    each gets (Var_W / R^2)^(1/6).

    Args:
        shape: (..., M, N).
        rank: R.
        variance: of an entry of the product, one for all or one for each matrix (...).
        generator: source of the numbers.
        core: three factors instead of two.

    Returns:
        U (..., M, R), V (..., R, N), with a core C (..., R, R) between them; float32, on the
        generator's device.
    """
    target = torch.as_tensor(variance, dtype=torch.float64, device=generator.device)[
        ..., None, None
    ]
    std = (target / rank**2) ** (1 / 6) if core else (target / rank) ** 0.25
    shapes = _factor_shapes(shape, rank, core=core)
    drawn = (torch.randn(s, generator=generator, device=generator.device) for s in shapes)
    return tuple(factor * std.float() for factor in drawn)


def orthogonal_factors(
    shape: tuple[int, ...],
    rank: int,
    mean_square: float | Tensor,
    generator: torch.Generator,
    *,
    core: bool = False,
) -> tuple[Tensor, ...]:
    """Semi-orthogonal factors, scaled so that the product's entries have the given mean square.

    For Q_U (M, R) with orthonormal columns and Q_V (R, N) with orthonormal rows, the product has
    the Frobenius norm sqrt(R) at every draw, so s = sqrt(mean_square M N / R) gives
    ||s Q_U Q_V||_F^2 = mean_square M N exactly; each factor carries sqrt(s). With a core, an
    orthogonal (R, R) between them, each carries s^(1/3).

    Args:
        shape: (..., M, N).
        rank: R.
        mean_square: of the product's entries, one for all or one for each matrix (...).
        generator: source of the numbers.
        core: three factors instead of two.

    Returns:
        As `variance_factors`.
    """
    target = torch.as_tensor(mean_square, dtype=torch.float64, device=generator.device)[
        ..., None, None
    ]
    scale = (target * (shape[-2] * shape[-1] / rank)).sqrt() ** (1 / 3 if core else 0.5)
    factors = []
    for rows, columns in (s[-2:] for s in _factor_shapes(shape, rank, core=core)):
        tall = torch.randn(
            (*shape[:-2], max(rows, columns), min(rows, columns)),
            generator=generator,
            device=generator.device,
        )
        q, r = torch.linalg.qr(tall)
        # Without the signs of R's diagonal the draw would not be uniform over orthogonal matrices.
        q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
        factors.append((q if rows >= columns else q.mT) * scale.float())
    return tuple(factors)


def _factor_shapes(shape: tuple[int, ...], rank: int, *, core: bool) -> tuple[tuple[int, ...], ...]:
    *batch, rows, columns = shape
    outer = (*batch, rows, rank), (*batch, rank, columns)
    return (outer[0], (*batch, rank, rank), outer[1]) if core else outer


# How many vectors are iterated at once: as fast as one, because reading the matrix takes the time,
# and their span holds the largest singular vector long before a single one turns to it.
POWER_BLOCK = 4
COLD_ITERATIONS, WARM_ITERATIONS = 20, 2


@torch.no_grad()
def spectral_norms(
    weight: Tensor, start: Tensor | None = None, *, iterations: int | None = None
) -> tuple[Tensor, Tensor]:
    """Largest singular values by block power iteration, from the vectors of an earlier call.

    Never above the true value but for rounding. From random vectors 20 iterations come within .2 %
    of it on average, rarely 2 %, even for random matrices, whose largest values lie close together;
    from the vectors of slightly different matrices 2 are enough.

    Args:
        weight: (B, M, N), any floating dtype; computed in float32 or better.
        start: (B, N, K) vectors to begin with, or (N, K) for all; 4 random ones without it, always
            the same.
        iterations: 20 without `start`, 2 with it.

    Returns:
        Values (B,) in float64, nan where the matrix holds values that are not finite, and vectors
        (B, N, K) to go on from, right singular vectors in falling order as far as they are known.

    Example:
        >>> spectral_norms(torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None])[0]
        tensor([3.0000], dtype=torch.float64)
    """
    if iterations is None:
        iterations = COLD_ITERATIONS if start is None else WARM_ITERATIONS
    start = starting_vectors(weight) if start is None else start
    images, grams = power_iterations(weight, start, iterations)
    values, rotation = ritz(grams[:, -1])
    return values, rotated(images, rotation)


def starting_vectors(weight: Tensor, seed: int = 0, columns: int | None = None) -> Tensor:
    """Random vectors (N, K) to begin with, on the weight's device, in the dtype of computation.

    Drawn on the CPU from the seed alone, so that workers and resumed runs draw the same.

    Args:
        weight: (B, M, N).
        seed: of the numbers.
        columns: K; without it 4, or M or N if that is less.
    """
    rows, size = weight.shape[-2:]
    count = min(POWER_BLOCK, rows, size) if columns is None else columns
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(weight.device, working_dtype(weight.dtype))


def power_iterations(weight: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """V <- W^T orth(W orth(V)), so many times; nothing waits for the device.

    Args:
        weight: (B, M, N).
        start: (B, N, K), or (N, K) for all.
        iterations: 1 or more.

    Returns:
        Images V (B, N, K), whose singular values are the estimates (Rayleigh-Ritz), and their Gram
        matrices (B, 2, K, K) in float64, one iteration ago and now; with one iteration the first
        is that of `start`. Both for `ritz`.
    """
    matrix = weight.to(working_dtype(weight.dtype))
    # Vectors lie in rows: a CPU multiplies them with the matrix several times faster than columns.
    rows = start.to(matrix.dtype).mT.expand(matrix.shape[0], -1, -1)
    grams = [_gram(rows)]
    for _ in range(iterations):
        left = _orthonormal(rows, grams[-1]) @ matrix.mT
        rows = _orthonormal(left, _gram(left)) @ matrix
        grams.append(_gram(rows))
    return rows.mT, torch.stack(grams[-2:], dim=1)


def _gram(rows: Tensor) -> Tensor:
    # Few rows, so that float64 costs nothing; in float32 small ones would drown in rounding.
    wide = rows.double()
    return wide @ wide.mT


def _orthonormal(rows: Tensor, gram: Tensor) -> Tensor:
    """Orthonormal rows with the span of these, by the Cholesky factor of their Gram matrix.

    Batched, and unlike QR or an eigendecomposition never a loop or a wait on a GPU. Rows that
    depend on the others become zero, and say nothing then.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    limits = torch.finfo(gram.dtype)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    factor, _ = torch.linalg.cholesky_ex(gram + eye * (8 * limits.eps * trace + limits.tiny))
    return torch.linalg.solve_triangular(factor, rows.double(), upper=False).to(rows.dtype)


def ritz(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of the largest singular values from Gram matrices of images.

    Args:
        grams: (B, K, K), of `power_iterations`; on a GPU this waits for them.

    Returns:
        Values (B,), nan where a Gram matrix is not finite, and what turns the images into unit
        vectors in falling order (B, K, K), see `rotated`; zero where there is nothing to turn.
    """
    finite = torch.isfinite(grams).all(-1).all(-1)
    squares, turn = torch.linalg.eigh(torch.where(finite[:, None, None], grams, 0.0))
    lengths = squares.clamp_min(0).sqrt().flip(-1)
    known = lengths > torch.finfo(grams.dtype).eps ** 0.5 * lengths[:, :1]
    rotation = turn.flip(-1) * torch.where(known, 1 / lengths, 0.0)[:, None, :]
    return torch.where(finite, lengths[:, 0], torch.nan), rotation


def rotated(images: Tensor, rotation: Tensor) -> Tensor:
    """Unit vectors (B, N, K) in falling order of their singular values, from images and `ritz`."""
    return images @ rotation.to(images.device, images.dtype)
