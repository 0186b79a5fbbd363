"""The plan that a model carries out already, read from its low-rank layers."""

from __future__ import annotations

import math

from torch import nn

from rankwise import accounting, selection
from rankwise.layers import Form, LowRankLayer, low_rank_layers
from rankwise.layers.separable import LowRankSeparableConv2d
from rankwise.ranks.plan import LayerPlan, Others, Plan
from rankwise.ranks.shape import MatrixShape


def present(model: nn.Module) -> Plan:
    """The ranks a model has now, as the plan that would give them to the dense model.

    Args:
        model: a model with low-rank layers: a resumed run's, say.

    Returns:
        A plan of its low-rank layers, then of its dense ones; without FLOPs. The form is what any
        of the layers has.

    Example:
        >>> from rankwise import factorize
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> change = factorize(model, 16)
        >>> dict(present(model).ranks)
        {'1': 16}
    """
    total = accounting.parameters(model)
    lines, first = [], {}
    stored = trainable = 0
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        twin = first.setdefault(id(layer.u.weight), name)
        line = _line(name, layer, "" if twin == name else twin)
        lines.append(line)
        if not line.tied:
            stored += line.parameters[1]
            trainable += line.parameters[1] if line.trainable else 0
    for name, candidate in selection.survey(model).items():
        weight = candidate.module._parameters.get("weight")
        line = LayerPlan(
            name,
            type(candidate.module).__name__,
            MatrixShape(candidate.shape[0], math.prod(candidate.shape[1:])),
            reason=candidate.obstacle or "dense in this model",
            trainable=weight is not None and weight.requires_grad,
            tied=next((t for t in candidate.tied if any(t == done.name for done in lines)), ""),
        )
        lines.append(line)
        if not line.tied:
            stored += line.parameters[1]
            trainable += line.parameters[1] if line.trainable else 0
    form = Form(
        norm=any(layer.norm is not None for layer in layers.values()),
        core=any(layer.core is not None for layer in layers.values()),
        separable=any(isinstance(layer, LowRankSeparableConv2d) for layer in layers.values()),
        split={n: m.blocks for n, m in layers.items() if m.splits and m.blocks > 1} or False,
    )
    others = Others(stored=total.stored - stored, trainable=total.trainable - trainable)
    return Plan(tuple(lines), others, form, ("read from the model's low-rank layers",))


def _line(name: str, layer: LowRankLayer, tied: str) -> LayerPlan:
    u, v = (layer.to_factor(part, getattr(layer, part).weight) for part in ("u", "v"))
    shape = MatrixShape(
        u.shape[-2],
        v.shape[-1],
        norm=layer.norm is not None,
        core=layer.core is not None,
        blocks=layer.blocks,
    )
    learns = layer.u.weight.requires_grad
    kind = layer.dense_class.__name__
    return LayerPlan(name, kind, shape, layer.rank, trainable=learns, tied=tied)
