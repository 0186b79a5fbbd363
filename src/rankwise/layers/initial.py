"""Initialisations of factors, by name: what each draws, and the variance of the product.

M, N: the weight as a matrix, R: rank, F: fan-in of the dense layer (I of a linear one).

| name            | factors                                     | variance of the product          |
|-----------------|---------------------------------------------|----------------------------------|
| `spectral`      | truncated SVD, singular values split evenly | that of the singular values kept |
| `spectral_ones` | the same, singular values set to 1          | R / (M N), grows with R          |
| `variance`      | normal, all of one standard deviation       | the dense weight's, at any R     |
| `orthogonal`    | semi-orthogonal times one scale             | the dense weight's mean square   |
| `loralinear`    | both U(-1/sqrt R, 1/sqrt R)                 | 1 / (9 R), whatever the fan-in   |
| `default`       | what two default torch layers start with    | 1 / (9 F), a third of a dense's  |

With a core (W = U C V) `spectral` gives each factor a third power, `spectral_ones` an identity;
`loralinear` gives 1 / (27 R) and `default` 1 / (27 F), as a third map of the same kind does. Torch
counts the outputs of a transposed convolution as its fan-in F; there `default` gives R / (9 I F),
with I of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise import linalg
from rankwise.errors import FactorizeError, OptionError, unknown

if TYPE_CHECKING:
    from rankwise.layers.base import LowRankLayer

Factors = tuple[Tensor, ...]


def initial_factors(
    layer: LowRankLayer, dense: Any, init: str, generator: torch.Generator | None
) -> Factors | None:
    """Factors for a low-rank layer that takes a dense one's place; None on the meta device.

    `loralinear` draws the dense layer's bias anew too, in place, within 1 / sqrt(F).

    Raises:
        OptionError: unknown `init`.
        FactorizeError: weights that are not finite, or without variance where it is to be kept.
    """
    if init not in INITS:
        raise OptionError(unknown("initialisation", str(init), INITS))
    matrix = layer.as_matrix(dense.weight.detach(), layer.blocks)
    if matrix.is_meta:
        return None
    return _DRAW[init](layer, dense, matrix, generator or torch.default_generator)


def _spectral(layer: Any, dense: Any, matrix: Tensor, source: torch.Generator) -> Factors:
    return linalg.spectral_factors(matrix, layer.rank, core=layer.core is not None)


def _spectral_ones(layer: Any, dense: Any, matrix: Tensor, source: torch.Generator) -> Factors:
    return linalg.spectral_factors(matrix, layer.rank, core=layer.core is not None, ones=True)


def _variance(layer: Any, dense: Any, matrix: Tensor, source: torch.Generator) -> Factors:
    variance = _positive(matrix.float().var(dim=(-2, -1), correction=0), "variance")
    core = layer.core is not None
    return linalg.variance_factors(tuple(matrix.shape), layer.rank, variance, source, core=core)


def _orthogonal(layer: Any, dense: Any, matrix: Tensor, source: torch.Generator) -> Factors:
    size = _positive(matrix.float().square().mean(dim=(-2, -1)), "mean square")
    core = layer.core is not None
    return linalg.orthogonal_factors(tuple(matrix.shape), layer.rank, size, source, core=core)


def _positive(values: Tensor, what: str) -> Tensor:
    if not bool(((values > 0) & torch.isfinite(values)).all()):
        worst = next(float(v) for v in values.flatten() if not 0 < float(v) < float("inf"))
        raise FactorizeError(
            f"the weights have {what} {worst}; to keep it, it must be finite and > 0"
        )
    return values


def _loralinear(layer: Any, dense: Any, matrix: Tensor, source: torch.Generator) -> Factors:
    with torch.no_grad():
        bias = getattr(dense, "bias", None)
        if bias is not None:
            bias.copy_(_uniform(bias.shape, layer.fan_in**-0.5, source))
    bound = layer.rank**-0.5
    shapes = {p: layer.to_factor(p, getattr(layer, p).weight).shape for p in layer.parts}
    return tuple(_uniform(shape, bound, source) for shape in shapes.values())


def _default(layer: Any, dense: Any, matrix: Tensor, source: torch.Generator) -> Factors:
    drawn = {}
    for part in reversed(layer.parts):
        # torch takes the bound from the map's own shape, so it is drawn in that shape.
        weight = torch.empty(getattr(layer, part).weight.shape, device=source.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=source)
        drawn[part] = layer.to_factor(part, weight)
    return tuple(drawn[part] for part in layer.parts)


def _uniform(shape: torch.Size, bound: float, source: torch.Generator) -> Tensor:
    drawn = torch.empty(shape, device=source.device)
    return drawn.uniform_(-bound, bound, generator=source)


_DRAW: dict[str, Callable[[Any, Any, Tensor, torch.Generator], Factors]] = {
    "spectral": _spectral,
    "spectral_ones": _spectral_ones,
    "variance": _variance,
    "orthogonal": _orthogonal,
    "loralinear": _loralinear,
    "default": _default,
}
INITS = tuple(_DRAW)
