"""Make everything dense again: products multiplied out, updates merged, homes closed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from rankwise.errors import SelectionError
from rankwise.layers import (
    LowRankLayer,
    OpenAttention,
    OpenRecurrent,
    adapted_layers,
    low_rank_layers,
)
from rankwise.method import NO_CHANGE, Change, Successors, merge
from rankwise.surgery import cut, replace, return_to_fast_path


def to_dense(model: nn.Module) -> Change:
    """Multiply low-rank layers out, merge updates, close what was opened: the same function.

    Optimizer moments do not survive (a product has no unique counterpart of its factors').

    Raises:
        SelectionError: the model itself is the low-rank layer.
    """
    made: dict[Parameter, Any] = {}
    changes = [merge_updates(model)]
    for name, layer in low_rank_layers(model).items():
        if not name:
            raise SelectionError("the model itself is the low-rank layer; call its to_dense()")
        dense = layer.to_dense()
        twin = made.setdefault(layer.u.weight, dense)
        replace(model, name, dense)
        changes.append(
            Change(
                replaced=_return(layer, dense, with_weight=twin is dense),
                modules={name: (layer, dense)},
            )
        )
        dense.weight = twin.weight
    changes += [_close(model, name, home) for name, home in _homes(model).items()]
    return_to_fast_path(model)
    return merge(changes)


def merge_updates(model: nn.Module) -> Change:
    """Fold every low-rank update into its weight and put the dense layer back.

    Attentions and recurrent layers that were opened for updates, and hold nothing else that is
    low-rank, are closed.

    Raises:
        SelectionError: the model itself is the adapted layer.
    """
    changes, merged, names = [NO_CHANGE], set[Parameter](), list[str]()
    for name, layer in adapted_layers(model).items():
        if not name:
            raise SelectionError("the model itself is the adapted layer; call its to_dense()")
        weight, update = layer.base.weight, layer.open_update()
        if weight not in merged:  # of tied layers
            merged.add(weight)
            with torch.no_grad():
                weight.copy_(weight.to(update.dtype) + update)
        dense = layer.to_dense()
        replace(model, name, dense)
        changes.append(layer.given_back() | Change(modules={name: (layer, dense)}))
        names.append(name)
    for name, home in _homes(model).items():
        inside = any(merged_name.startswith(f"{name}.") for merged_name in names)
        if inside and not low_rank_layers(home):
            changes.append(_close(model, name, home))
    return merge(changes)


def _homes(model: nn.Module) -> dict[str, OpenAttention | OpenRecurrent]:
    kinds = (OpenAttention, OpenRecurrent)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _close(model: nn.Module, name: str, opened: OpenAttention | OpenRecurrent) -> Change:
    if not name:
        raise SelectionError(f"the model itself is the opened {opened.kind}; call its close()")
    closed = opened.close()
    replace(model, name, closed)
    replaced: dict[Parameter, Successors] = {}
    for packed, (first, *others) in cut(opened, closed).items():
        replaced[first] = Successors((packed,))
        replaced |= {part: Successors(()) for part in others}
    return Change(replaced=replaced, modules={name: (opened, closed)})


def _return(layer: LowRankLayer, dense: Any, *, with_weight: bool) -> dict[Parameter, Successors]:
    """Whom the factors' and the bias's places go to; a twin's factors have theirs already."""
    replaced: dict[Parameter, Successors] = {}
    bias: Any = getattr(dense, "bias", None)
    new_bias: tuple[Any, ...] = () if bias is layer.u.bias else (bias,)
    if new_bias and layer.u.bias is not None:
        replaced[layer.u.bias], new_bias = Successors(new_bias), ()
    gone = layer.new_parameters()
    if with_weight:
        replaced[gone[0]] = Successors((dense.weight, *new_bias))
        replaced |= {p: Successors(()) for p in gone[1:]}
    elif new_bias:
        replaced[gone[-1]] = Successors(new_bias)
    return replaced
