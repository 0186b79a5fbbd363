"""What of a model is low-rank, and what is adapted, by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rankwise.layers.adapted import AdaptedLayer
from rankwise.layers.base import LowRankLayer


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Layers that have a product in place of their weight; not the heads of updates."""
    return {n: m for n, m in _outside_updates(model) if isinstance(m, LowRankLayer)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Layers with an open low-rank update."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def _outside_updates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    heads = {
        id(part)
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer)
        for part in (*layer.heads, *(layer.merged or ()))
    }
    return ((n, m) for n, m in model.named_modules() if id(m) not in heads)
