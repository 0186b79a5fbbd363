"""Which layers of a model can become low-rank, and why others cannot; changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from rankwise.errors import SelectionError
from rankwise.layers import (
    AdaptedLayer,
    Form,
    LowRankEmbedding,
    LowRankLayer,
    LowRankLinear,
    OpenAttention,
    OpenRecurrent,
    low_rank_class,
    recurrent_class,
)

if TYPE_CHECKING:
    from rankwise.accounting import Trace

# 8 bits are too coarse to hold factors.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Holders = dict[Parameter, list[tuple[str, str]]]  # parameter -> module and key of each user
# Both see the weight as the same matrix, so factors of the one serve the other.
_ALIKE = (LowRankLinear, LowRankEmbedding)


@dataclass(frozen=True)
class Candidate:
    """A layer that owns a weight matrix: whether and by what it can be replaced.

    Attributes:
        name: its first name in the model.
        module: the dense layer; of a home that is shut, the layer that it will have: its weight is
            a view of an attention's packed one, or a recurrent layer's own.
        shape: shape of the weight.
        obstacle: why it cannot be low-rank, or empty.
        tied: names of the other layers that use the same weight.
        home: name of the nn.MultiheadAttention, nn.LSTM or nn.GRU that is opened for it, or empty.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    obstacle: str = ""
    tied: tuple[str, ...] = ()
    home: str = ""


def survey(
    model: nn.Module,
    trace: Trace | None = None,
    *,
    form: Form | None = None,
    layers: Any = (),
) -> dict[str, Candidate]:
    """Every layer with a weight of two or more dimensions, in execution order where it is known.

    An nn.MultiheadAttention is listed as the projections it has when it is opened: `q`, `k`, `v`
    and `out_proj`, or `in_proj` and `out_proj` where the first three are asked for as one matrix.
    At the same rank the one matrix stores a third less (4 R E against 6 R E), at the same number
    of parameters its error is the same for random weights; apart, each gets the rank it needs, and
    attention to another sequence computes no projections for nothing. So apart is the default.
    An nn.LSTM or nn.GRU is listed as its matrices, `ih_l0`, `hh_l0` and so on.

    Args:
        model: any model.
        trace: order of one forward; without it the order of definition, with layers that
            the forward did not reach at the end.
        form: how layers are to be factorised; some layers have not every form.
        layers: names or globs that will be asked for; one that names an attention's `in_proj`
            lists it so.

    Raises:
        SelectionError: a lazy layer that has no shape yet.
    """
    holders = _holders(model)
    found, homes = _found(model, holders, layers)
    if trace is not None:
        rank = {name: i for i, name in enumerate(trace.order)}
        found = dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))
    candidates = {}
    for name, (module, shape) in found.items():
        home, closed = homes.get(name, ("", ""))
        weight: Any = module._parameters.get("weight")
        own = (name, home) if home else (name,)  # a shut attention holds its projections' weights
        users = [] if weight is None else [h for h in holders.get(weight, ()) if h[0] not in own]
        others = {n: found[n][0] if key == "weight" and n in found else key for n, key in users}
        tied = tuple(n for n, other in others.items() if isinstance(other, nn.Module))
        reason = closed or _obstacle(model, name, module, others, form or Form())
        candidates[name] = Candidate(name, module, shape, reason, tied, home)
    return candidates


def _holders(model: nn.Module) -> _Holders:
    holders: _Holders = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((name, key))
    return holders


def _found(
    model: nn.Module, holders: _Holders, layers: Any
) -> tuple[dict[str, tuple[nn.Module, tuple[int, ...]]], dict[str, tuple[str, str]]]:
    """Layers by name, with their weights' shapes; of which attention, and why that stays shut."""
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, LowRankLayer)
        for part in module.modules()
    }
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    homes: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            parts = _projections(model, name, module, holders, layers)
        elif recurrent_class(module) is not None:
            parts = _matrices(model, name, module)
        else:
            parts = {}
        for part, (layer, reason) in parts.items():
            found[part] = (layer, _weight_shape(part, layer))
            homes[part] = (name, reason)
        shape = () if id(module) in inside else _weight_shape(name, module)
        if len(shape) >= 2:
            found.setdefault(name, (module, shape))
    return found, homes


def _projections(
    model: nn.Module, name: str, attention: Any, holders: _Holders, layers: Any
) -> dict[str, tuple[nn.Module, str]]:
    """The layers that an attention would have if opened, or that they cannot be had, and why."""
    prefix = f"{name}." if name else ""
    fused = asks_for_fused(name, layers) and attention.in_proj_weight is not None
    names = ("in_proj",) if fused else ("q", "k", "v")
    reason = _shut(model, name, attention, holders)
    plain = not any(_unusual(p) for p in attention._parameters.values() if p is not None)
    opened: Any = (
        OpenAttention.of(attention, fused=fused, view=True)
        if plain
        else OpenAttention.like(attention, fused=fused)
    )
    parts = {prefix + n: (getattr(opened, n), reason) for n in names}
    if not reason and not isinstance(attention.out_proj, LowRankLayer):
        parts[f"{prefix}out_proj"] = (attention.out_proj, "")
    return parts


def _matrices(model: nn.Module, name: str, recurrent: Any) -> dict[str, tuple[nn.Module, str]]:
    """The matrices of a recurrent layer as layers, or that they cannot be had, and why."""
    kind: Any = recurrent_class(recurrent)
    hollow = kind.like(recurrent)
    held = {part: recurrent._parameters.get(f"weight_{part}") for part in hollow.matrices}
    reason = _sealed(name, recurrent, type(recurrent).__name__) or _adapted(model, f"{name}.ih_l0")
    if not reason and any(weight is None for weight in held.values()):
        reason = "weights of its recurrent layer are computed from others (weight norm or the like)"
    for weight in held.values() if not reason else ():
        reason = reason or _unusual(weight)
    opened = hollow if reason else kind.of(recurrent)
    prefix = f"{name}." if name else ""
    return {prefix + part: (getattr(opened, part), reason) for part in opened.matrices}


def _sealed(name: str, module: nn.Module, what: str) -> str:
    """Why a module cannot be exchanged for one that holds the same matrices as layers, or empty."""
    if not name:
        return f"the model is this {what} itself; put it into a module that calls it"
    if "forward" in module.__dict__:
        return f"the forward of its {what} was replaced on the instance"
    return ""


def asks_for_fused(attention: str, layers: Any) -> bool:
    """Whether names or globs ask for an attention's input projections as one matrix, `in_proj`."""
    patterns = layers.split(",") if isinstance(layers, str) else layers
    return isinstance(patterns, Iterable) and any(
        isinstance(pattern, str)
        and pattern.strip().endswith("in_proj")
        and fnmatch.fnmatch(f"{attention}.in_proj".lstrip("."), pattern.strip())
        for pattern in patterns
    )


def _shut(model: nn.Module, name: str, attention: Any, holders: _Holders) -> str:
    reason = _sealed(name, attention, "attention")
    if reason:
        return reason
    packed = {k: p for k, p in attention._parameters.items() if p is not None}
    for key, parameter in packed.items():
        if _unusual(parameter):
            return _unusual(parameter)
        users = [h for h in holders[parameter] if h != (name, key)]
        if users:
            return f"the {key} of its attention is tied to {'.'.join(users[0]).lstrip('.')}"
    return _adapted(model, name)


def _weight_shape(name: str, module: nn.Module) -> tuple[int, ...]:
    weight: Any = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        raise SelectionError(
            f"{name or 'the model'} ({type(module).__name__}) has no shape yet; run one forward "
            "first, so that it knows its inputs"
        )
    if weight is not None:
        return tuple(weight.shape)
    # Weight norm, pruning and the like compute the weight; reading it could update their state.
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if isinstance(module, _ConvNd) and not module.transposed:
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return _quantised_shape(module)


def _quantised_shape(module: Any) -> tuple[int, ...]:
    """(O, I) of a layer that holds its weight packed, as far as it says so."""
    packed = any(
        not b.is_floating_point() and b.dim() > 1 for b in module._buffers.values() if b is not None
    )
    if not packed and ".quantized." not in f"{type(module).__module__}.":
        return ()
    for rows, columns in (
        ("out_features", "in_features"),
        ("outfeatures", "infeatures"),
        ("out_channels", "in_channels"),
        ("num_embeddings", "embedding_dim"),
    ):
        sizes = [getattr(module, rows, None), getattr(module, columns, None)]
        shape = tuple(size for size in sizes if isinstance(size, int))
        if len(shape) == len(sizes):
            return shape
    return ()


def _obstacle(
    model: nn.Module,
    name: str,
    module: Any,
    others: Mapping[str, nn.Module | str],
    form: Form,
) -> str:
    if not name:
        return "the model is this layer itself; wrap it, e.g. nn.Sequential(layer)"
    weight = module._parameters.get("weight")
    if weight is None:
        if not isinstance(module, (nn.Linear, _ConvNd)):
            return (
                f"{type(module).__name__} holds its weight quantised; factorise or adapt before "
                "quantising"
            )
        return "its weight is computed from other parameters (weight norm, pruning or the like)"
    reason = _unusual(weight) or _adapted(model, name)
    if reason:
        return reason
    stand_in = low_rank_class(module, form)
    if isinstance(stand_in, str):
        return stand_in
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance; factors would not have it"
    if form.norm and _in_a_recurrence(model, name):
        return "codes of a recurrent layer are made step by step: no BatchNorm over them (norm)"
    for place, other in others.items():
        if isinstance(other, str):
            return f"its weight is also {f'{place}.{other}'.lstrip('.')}, which stays dense"
        theirs = low_rank_class(other, form)
        if theirs is not stand_in and not {theirs, stand_in} <= set(_ALIKE):
            return f"its weight is tied to {place} ({type(other).__name__}), which stays dense"
    return ""


def _in_a_recurrence(model: nn.Module, name: str) -> bool:
    home = model.get_submodule(name.rpartition(".")[0])
    return isinstance(home, OpenRecurrent) or recurrent_class(home) is not None


def _unusual(weight: Any) -> str:
    """Why a parameter is not the plain matrix of numbers that can be decomposed, or empty."""
    if type(weight) is not Parameter:
        kind = type(weight).__name__
        return (
            f"its weight is a {kind}, no plain tensor (quantised or sharded); load the model in "
            "float32 or bfloat16, and factorise or adapt it before sharding"
        )
    if weight.layout != torch.strided:
        return f"its weight is stored sparse ({weight.layout})"
    if weight.dtype not in _DTYPES:
        return (
            f"its weight is {weight.dtype}; only real floating point can be factorised or adapted: "
            "load the model in float32 or bfloat16"
        )
    return ""


def _adapted(model: nn.Module, name: str) -> str:
    """Whether an adapter of peft owns the layer: it would write merged updates into the weight."""
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), AdaptedLayer):
            return f"{owner} has a low-rank update; rankwise.to_dense(model) merges it"
        kinds = type(model.get_submodule(owner)).__mro__
        if any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in kinds):
            return f"it belongs to the adapter {owner}; merge or unload the adapter first"
    return ""


def aliases(model: nn.Module, candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """Every name of every candidate, also those of modules registered twice: name -> first name."""
    first = {id(c.module): n for n, c in candidates.items() if not c.home}
    homes: dict[int, list[str]] = {}
    for name, candidate in candidates.items():
        if candidate.home:
            homes.setdefault(id(model.get_submodule(candidate.home)), []).append(name)
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in first:
            names[name] = first[id(module)]
        for part in homes.get(id(module), ()):
            names[f"{name}.{part.rpartition('.')[2]}".lstrip(".")] = part
    return names


def unlisted(model: nn.Module, candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """Matrices that no candidate covers (an LSTM's, a plain list's): name -> class or kind."""
    listed = {id(c.module) for c in candidates.values()}
    listed |= {id(model.get_submodule(c.home)) for c in candidates.values() if c.home}
    inside = {id(p) for m in model.modules() if isinstance(m, LowRankLayer) for p in m.modules()}
    found = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and id(module) not in listed | inside and holds_matrices(module)
    }
    return found | hidden(model)


def holds_matrices(module: nn.Module) -> bool:
    """Whether a module owns matrices under other names than `weight`."""
    return any(
        key != "weight" and p is not None and sum(size > 1 for size in p.shape) > 1
        for key, p in module._parameters.items()
    )


def hidden(model: nn.Module) -> dict[str, str]:
    """Modules that torch does not see, in plain lists, tuples and dicts: attribute -> kind."""
    registered = {id(module) for module in model.modules()}
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value
            if key.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            if any(isinstance(m, nn.Module) and id(m) not in registered for m in held):
                place = f"{name}.{key}".lstrip(".")
                found[place] = f"modules in a plain {type(value).__name__}"
    return found
