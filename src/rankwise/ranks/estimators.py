"""How many ranks a matrix has, measured on its singular values: estimators as pure functions.

M, N: rows and columns; K = min(M, N) singular values, largest first; B: any number of leading
dimensions, one matrix each. All of them return values between 1 and K, or 0 for a zero matrix, and
none depends on the scale of the matrix.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from rankwise import linalg
from rankwise.errors import FactorizeError, OptionError


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Singular values (..., K) of (..., M, N), largest first, computed in float32 or better.

    Raises:
        FactorizeError: values that are not finite, no values (meta device), or an SVD that failed.
    """
    if matrix.is_meta:
        raise FactorizeError("its weight is on the meta device, so there is nothing to measure")
    values = matrix.detach().to(linalg.working_dtype(matrix.dtype))
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise FactorizeError(f"{wrong} of {values.numel()} weights are not finite")
    try:
        return torch.linalg.svdvals(values)
    except RuntimeError as error:  # LinAlgError is one
        raise FactorizeError(f"the SVD did not converge: {error}") from error


def stable_rank(values: Tensor) -> Tensor:
    """||W||_F^2 / ||W||_2^2: the rank of a flat spectrum that is as high and holds as much.

    At most the rank, and moved little by small singular values.

    Args:
        values: (..., K) singular values.

    Returns:
        (...), float64.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 1.0, 0.0]))
        tensor(2.2500, dtype=torch.float64)
    """
    shares = _relative(values).square()
    return shares.sum(-1)


def stable_rank_scale(rows: int, columns: int) -> float:
    """Full rank over stable rank of an i.i.d. random matrix: (1 + sqrt(min / max))^2.

    The Frobenius norm of such a matrix is sigma sqrt(M N), its largest singular value
    sigma (sqrt(M) + sqrt(N)) (Marchenko-Pastur). So a trained matrix can be scaled without the
    weights it started from, as 2305.02538 does with the measured ratio. Exact in the limit; the
    measured ratio of 64 x 64 is 3.77, not 4.

    Example:
        >>> stable_rank_scale(64, 64)
        4.0
    """
    _check_sizes(rows, columns)
    return (1 + math.sqrt(min(rows, columns) / max(rows, columns))) ** 2


def scaled_stable_rank(values: Tensor, rows: int, columns: int) -> Tensor:
    """Stable rank times its scale, at most K: about K for random weights (2305.02538, section 3).

    Args:
        values: (..., K) singular values.
        rows: M.
        columns: N.

    Returns:
        (...), float64; a rank is its ceiling.
    """
    scaled = stable_rank(values) * stable_rank_scale(rows, columns)
    return scaled.clamp(max=float(min(rows, columns)))


def energy_rank(values: Tensor, energy: float, power: float = 2) -> Tensor:
    """The smallest rank whose truncation keeps this share of the energy (accumulative rank).

    With power 2 the error of the truncation is at most sqrt(1 - energy) of ||W||_F; power 1 is the
    share of the sum of the singular values.

    Args:
        values: (..., K) singular values, largest first.
        energy: in (0, 1]; 1 keeps every singular value above rounding.
        power: exponent of the singular values that are added up, above 0.

    Returns:
        (...), whole numbers.

    Raises:
        OptionError: energy or power out of range.

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 1.0, 1.0]), 0.75)
        tensor(1)
    """
    if not 0 < energy <= 1:
        raise OptionError(f"energy={energy!r} is outside (0, 1]: it is the share that is kept")
    if not (power > 0 and math.isfinite(power)):
        raise OptionError(f"power={power!r} must be above 0; 2 is energy, 1 the sum of the values")
    total = _relative(values).pow(power).cumsum(-1)
    kept = (total < energy * total[..., -1:]).sum(-1) + 1
    return torch.where(total[..., -1] > 0, kept, 0)


def entropy_rank(values: Tensor) -> Tensor:
    """The effective rank exp(H(p)) with p = s / sum s (Roy & Vetterli, EUSIPCO 2007).

    The number of equal singular values whose distribution has the same entropy.

    Args:
        values: (..., K) singular values.

    Returns:
        (...), float64.

    Example:
        >>> entropy_rank(torch.ones(5))
        tensor(5.0000, dtype=torch.float64)
    """
    relative = _relative(values)
    total = relative.sum(-1, keepdim=True)
    shares = relative / total.clamp(min=torch.finfo(relative.dtype).tiny)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def vbmf_rank(
    values: Tensor, rows: int, columns: int, noise_variance: float | None = None
) -> Tensor:
    """Rank by empirical variational Bayes matrix factorisation: components that stand out of noise.

    The matrix is taken as low rank plus i.i.d. Gaussian noise; the global solution is known in
    closed form (Nakajima et al., Global Analytic Solution of Fully-observed Variational Bayesian
    Matrix Factorization, JMLR 14, 2013): a component stays when its singular value is above
    sigma sqrt(M (1 + t) (1 + a / t)), with a = L / M the aspect ratio (L <= M here) and t the zero
    of Phi(t) + Phi(t / a), Phi(z) = log(z + 1) / z - 1/2.

    Args:
        values: (..., K) all singular values.
        rows: M.
        columns: N.
        noise_variance: of an entry of the noise, relative to the matrix as it is; None estimates
            it (`vbmf_noise_variance`).

    Returns:
        (...), whole numbers; 0 if everything is noise.

    Raises:
        OptionError: not all K singular values, or a variance that is not above 0.
    """
    long = _check_all(values, rows, columns)
    if noise_variance is None:
        variance = vbmf_noise_variance(values, rows, columns)
    elif noise_variance > 0 and math.isfinite(noise_variance):
        variance = values.new_full(values.shape[:-1], noise_variance, dtype=torch.float64)
    else:
        raise OptionError(f"noise_variance={noise_variance!r} must be above 0; None estimates it")
    threshold = variance.to(values.device) * long * _detectable(_aspect(rows, columns))
    return (values.double().square() > threshold[..., None]).sum(-1)


def vbmf_noise_variance(values: Tensor, rows: int, columns: int) -> Tensor:
    """The noise variance that minimises the free energy of empirical variational Bayes.

    Args:
        values: (..., K) all singular values.
        rows: M.
        columns: N.

    Returns:
        (...), float64; 0 for a zero matrix.

    Raises:
        OptionError: not all K singular values.
    """
    long = _check_all(values, rows, columns)
    flat = values.detach().double().cpu().reshape(-1, values.shape[-1])
    found = [_noise_variance(each, long, _aspect(rows, columns)) for each in flat]
    return flat.new_tensor(found).reshape(values.shape[:-1])


def _noise_variance(values: Tensor, long: int, aspect: float) -> float:
    if not values[0] > 0:
        return 0.0
    short, squares = len(values), (values / values[0]).square()
    highest = float(squares.mean()) / long
    # At most this many components can be told from noise, whatever its variance.
    most = min(math.ceil(short / (1 + aspect)) - 1, short)
    tail = squares[most:]
    lowest = max(float(tail[0]) / (long * _detectable(aspect)), float(tail.mean()) / long)
    # A matrix of exactly low rank has no noise but rounding.
    lowest = max(lowest, highest * 1e-14)
    if lowest >= highest:
        return highest * float(values[0]) ** 2
    low, high = math.log(lowest), math.log(highest)
    # The free energy has a kink and perhaps a minimum between any two singular values: a dense
    # grid finds the right one, repeated grids its bottom.
    points = min(max(256, 2 * short), 2048)
    best = low
    for _ in range(6):
        grid = torch.linspace(low, high, points, dtype=torch.float64, device=squares.device)
        best = float(grid[_free_energy(squares, grid.exp(), long, aspect).argmin()])
        width = (high - low) / (points - 1)
        low, high, points = max(low, best - width), min(high, best + width), 32
    return math.exp(best) * float(values[0]) ** 2


def _free_energy(squares: Tensor, variance: Tensor, long: int, aspect: float) -> Tensor:
    """Twice the free energy over L, up to a constant, at each of the variances."""
    lowest_square = torch.finfo(squares.dtype).tiny
    energies = []
    for some in variance.split(max(1, 2**22 // len(squares))):
        x = squares.clamp(min=lowest_square) / (long * some[:, None])
        centred = x - (1 + aspect)
        tau = (centred + (centred.square() - 4 * aspect).clamp(min=0).sqrt()) / 2
        gain = torch.log1p(tau) + aspect * torch.log1p(tau / aspect) - tau
        stays = x > _detectable(aspect)
        energies.append((x - x.log() + torch.where(stays, gain, 0.0)).sum(-1))
    return torch.cat(energies)


@cache
def _detectable(aspect: float) -> float:
    """Where a squared singular value, over M sigma^2, stands out of noise: (1 + t) (1 + a / t)."""

    def balance(tau: float) -> float:
        return sum(math.log1p(z) / z - 0.5 for z in (tau, tau / aspect))

    low, high = 1e-9 * aspect, 3.0  # decreasing: 1 near 0, negative beyond 2.5129 sqrt(a)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if balance(middle) > 0 else (low, middle)
    return (1 + low) * (1 + aspect / low)


def _relative(values: Tensor) -> Tensor:
    """Over the largest one, in float64: squares then neither overflow nor vanish."""
    values = values.detach().double()
    largest = values.amax(-1, keepdim=True)
    return torch.where(largest > 0, values / largest.clamp(min=torch.finfo(values.dtype).tiny), 0.0)


def _aspect(rows: int, columns: int) -> float:
    return min(rows, columns) / max(rows, columns)


def _check_sizes(rows: int, columns: int) -> None:
    if min(rows, columns) < 1:
        raise OptionError(f"a matrix of {rows}×{columns} has no rank")


def _check_all(values: Tensor, rows: int, columns: int) -> int:
    _check_sizes(rows, columns)
    if values.shape[-1:] != (min(rows, columns),):
        raise OptionError(
            f"{tuple(values.shape)} are not the singular values of a {rows}×{columns} matrix: "
            f"give all {min(rows, columns)}"
        )
    return max(rows, columns)
