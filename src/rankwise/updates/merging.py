"""Fold open updates into the weights, without losing small ones in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from rankwise.layers import AdaptedLayer
from rankwise.optim.projected.rounding import stochastic_

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def merge_(
    layers: Mapping[str, AdaptedLayer],
    generator: torch.Generator,
    *,
    rounding: str = "stochastic",
    update_of: Callable[[str], Tensor] | None = None,
) -> None:
    """W <- W + open update, in float32; weights that layers share are written once.

    The heads stay as they are: `anchor_` or `restart_` them, or the update counts twice.

    Args:
        layers: name -> adapted layer.
        generator: of stochastic rounding.
        rounding: of half-precision weights, "stochastic" (right in the mean, however small the
            update) or "nearest".
        update_of: gives, by name, what to add instead of a layer's own open update.
    """
    written: set[Parameter] = set()
    for name, layer in layers.items():
        weight = layer.base.weight
        if weight in written:
            continue
        written.add(weight)
        update = layer.open_update() if update_of is None else update_of(name)
        if rounding == "stochastic" and weight.dtype in _HALF:
            stochastic_(weight, update.add_(weight).float(), generator)
        elif weight.dtype == update.dtype:
            weight.add_(update)
        else:
            weight.copy_(update.add_(weight))
