"""Low-rank layers: drop-in stand-ins for dense ones, and which of them stands for what."""

from __future__ import annotations

from torch import nn

from rankwise.layers.base import INITS, LowRankLayer
from rankwise.layers.conv import LowRankConv2d
from rankwise.layers.linear import LowRankLinear

KINDS: dict[str, type[LowRankLayer]] = {c.kind: c for c in (LowRankLinear, LowRankConv2d)}

__all__ = ["INITS", "KINDS", "LowRankConv2d", "LowRankLayer", "LowRankLinear", "low_rank_class"]


def low_rank_class(module: nn.Module) -> type[LowRankLayer] | str:
    """The class that can stand for a dense layer, or the reason why none can."""
    # A subclass may have another forward (quantised, parametrised, adapted): only exact types, and
    # nn.MultiheadAttention's own projection class, whose forward is nn.Linear's.
    if type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return LowRankLinear
    if type(module) is nn.Conv2d:
        if module.groups != 1:
            return f"grouped convolution ({module.groups} groups)"
        return LowRankConv2d
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return f"{type(module).__name__} has a forward of its own"
    return f"{type(module).__name__} has no low-rank form here"
