"""Walk a model and exchange its layers, dense <-> low-rank; read and impose structure as data.

Everything is keyed by module name. A module registered under several names is exchanged once
and set under all of them; a weight tied between layers stays tied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter

from rankwise.errors import (
    FactorizeError,
    PlanError,
    RankwiseError,
    SelectionError,
    nearest,
    unknown,
)
from rankwise.layers import KINDS, LowRankLayer, low_rank_class
from rankwise.method import NO_CHANGE, Change, Successors, merge
from rankwise.selection import Candidate, survey

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)


def names_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every name under which a module is registered."""
    return [n for n, m in model.named_modules(remove_duplicate=False) if m is module]


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` was, under all of its names; hooks move along.

    Raises:
        SelectionError: no such module, or the model itself.
    """
    if not name:
        raise SelectionError("cannot replace the model itself; wrap it, e.g. nn.Sequential(layer)")
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        modules = [n for n, _ in model.named_modules()]
        raise SelectionError(
            unknown("module", name, nearest(name, modules) or modules[:8])
        ) from error
    for attribute in _HOOKS:
        # The dicts themselves, not their entries: the user's handles must still remove the hooks.
        hooks = getattr(old, attribute)
        hooks.update(getattr(new, attribute))
        setattr(new, attribute, hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
    for alias in names_of(model, old):
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        if isinstance(new, LowRankLayer):
            _leave_fast_path(model, alias)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _leave_fast_path(model: nn.Module, name: str) -> None:
    # In evaluation the encoder's fused kernel reads weights of its children instead of calling
    # them: it would multiply the factors out at every forward. An activation it does not know
    # is torch's own way of keeping a layer off that path.
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        module = model.get_submodule(parent)
        for kind, switches in _FAST_PATH.items():
            for switch in switches if isinstance(module, kind) else ():
                module.__dict__.setdefault(_KEPT, {}).setdefault(switch, getattr(module, switch))
                setattr(module, switch, False)


def _return_to_fast_path(model: nn.Module) -> None:
    for module in model.modules():
        for switch, value in module.__dict__.pop(_KEPT, {}).items():
            setattr(module, switch, value)


_FAST_PATH: dict[type[nn.Module], tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu",),
    nn.TransformerEncoder: ("enable_nested_tensor", "use_nested_tensor"),
}
_KEPT = "_rankwise_fast_path"  # in the parent: its switches as they were before


@contextmanager
def undone(model: nn.Module, change: Change) -> Iterator[None]:
    """The model as it was before a structural change, for the length of a `with` block."""
    places = {name: names_of(model, new) for name, (_, new) in change.modules.items()}

    def put(which: int) -> None:
        for name, aliases in places.items():
            for alias in aliases:
                parent, _, leaf = alias.rpartition(".")
                setattr(model.get_submodule(parent), leaf, change.modules[name][which])

    put(0)
    try:
        yield
    finally:
        put(1)


def factorize_layers(
    model: nn.Module,
    ranks: Mapping[str, int],
    make: Callable[[str, nn.Module, type[LowRankLayer], int], LowRankLayer],
) -> Change:
    """Replace each named layer by what `make(name, dense, class, rank)` returns for it.

    Raises:
        SelectionError: a name that is no layer.
        FactorizeError: a layer that cannot be factorised, named.
    """
    candidates = survey(model)
    for name in ranks:
        if name not in candidates:
            raise SelectionError(
                f"{unknown('layer', name, nearest(name, candidates) or candidates)}"
            )
        if candidates[name].obstacle:
            raise FactorizeError(f"{name} cannot be low-rank: {candidates[name].obstacle}")
        if any(t not in ranks for t in candidates[name].tied):
            raise FactorizeError(
                f"{name}: its weight is tied to {', '.join(candidates[name].tied)}; "
                "factorise all of them or none, or the tie would be lost"
            )
    made: dict[Parameter, LowRankLayer] = {}
    new: dict[str, LowRankLayer] = {}
    for name, rank in ranks.items():
        dense: Any = candidates[name].module
        stand_in = low_rank_class(dense)
        assert isinstance(stand_in, type)
        try:
            layer = make(name, dense, stand_in, rank)
        except RankwiseError as error:
            raise type(error)(f"{name} {tuple(dense.weight.shape)}: {error}") from error
        twin = made.setdefault(dense.weight, layer)
        if twin is not layer:
            if twin.rank != rank:
                raise PlanError(f"{name} shares its weight but not its rank ({rank}, {twin.rank})")
            layer.v, layer.norm, layer.core = twin.v, twin.norm, twin.core
            layer.u.weight = twin.u.weight
        new[name] = layer
    return merge([_exchange(model, name, layer) for name, layer in new.items()])


def _exchange(model: nn.Module, name: str, layer: LowRankLayer) -> Change:
    dense: Any = model.get_submodule(name)
    replace(model, name, layer)
    successors = Successors(layer.new_parameters(), layer.moments())
    return Change(replaced={dense.weight: successors}, modules={name: (dense, layer)})


def to_dense(model: nn.Module) -> Change:
    """Multiply every low-rank layer out: the same function, all methods' traces gone.

    Optimizer moments do not survive (a product has no unique counterpart of its factors').

    Raises:
        SelectionError: the model itself is the low-rank layer.
    """
    made: dict[Parameter, Any] = {}
    changes = [NO_CHANGE]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLayer)}
    for name, layer in layers.items():
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
    _return_to_fast_path(model)
    return merge(changes)


def _return(layer: LowRankLayer, dense: Any, *, with_weight: bool) -> dict[Parameter, Successors]:
    """Whom the factors' and the bias's places go to; a twin's factors have theirs already."""
    replaced: dict[Parameter, Successors] = {}
    new_bias = () if dense.bias is layer.u.bias else (dense.bias,)
    if new_bias and layer.u.bias is not None:
        replaced[layer.u.bias], new_bias = Successors(new_bias), ()
    gone = layer.new_parameters()
    if with_weight:
        replaced[gone[0]] = Successors((dense.weight, *new_bias))
        replaced |= {p: Successors(()) for p in gone[1:]}
    elif new_bias:
        replaced[gone[-1]] = Successors(new_bias)
    return replaced


def read_plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The structure of a model as data: name -> spec of its low-rank layer; JSON-able."""
    return {n: m.spec() for n, m in model.named_modules() if isinstance(m, LowRankLayer)}


@torch.no_grad()
def impose_plan(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> Change:
    """Give a freshly built dense model the structure that `read_plan` returned, values aside.

    Layers that already have the structure are left; low-rank layers that the plan does not
    name are an error, because their weights would not load.

    Raises:
        PlanError: the plan is malformed or of another model: names, kinds or shapes differ.
    """
    if not isinstance(plan, Mapping):
        raise PlanError(f"a plan maps layer names to specs, this is a {type(plan).__name__}")
    present, candidates, ranks = read_plan(model), survey(model), {}
    wanted = {name: _read_spec(name, spec) for name, spec in plan.items()}
    for name, spec in wanted.items():
        if name not in present:
            _check_spec(name, spec, candidates)
            ranks[name] = spec["rank"]
        elif present[name] != spec:
            raise PlanError(f"{name} is {present[name]} in the model, {spec} in the plan")
    extra = sorted(present.keys() - plan.keys())
    if extra:
        raise PlanError(
            f"{extra[0]} is low-rank in the model but dense in the plan; build it dense"
        )

    def make(name: str, dense: nn.Module, stand_in: type[LowRankLayer], rank: int) -> LowRankLayer:
        layer = stand_in.from_spec(dense, wanted[name])
        if layer.spec() != wanted[name]:
            raise PlanError(f"the plan asks for {wanted[name]}; this builds {layer.spec()}")
        return layer

    try:
        return factorize_layers(model, ranks, make)
    except FactorizeError as error:
        raise PlanError(f"the plan is of another model: {error}") from error


def _read_spec(name: str, spec: Any) -> dict[str, Any]:
    fields = {"kind": str, "shape": (list, tuple), "rank": int, "norm": bool}
    if not isinstance(spec, Mapping):
        raise PlanError(f"{name}: a spec maps {', '.join(fields)} to values; this is {spec!r}")
    for field, kinds in fields.items():
        if not isinstance(spec.get(field), kinds) or (kinds is int and spec[field] is True):
            raise PlanError(
                f"{name}: the spec's {field} is {spec.get(field, 'missing')!r}; a spec looks like "
                "{'kind': 'linear', 'shape': [64, 32], 'rank': 8, 'norm': False}"
            )
    # Structures saved before there were cores and blocks name neither.
    spec = {"core": False, "blocks": 1, **spec, "shape": list(spec["shape"])}
    if not isinstance(spec["core"], bool) or type(spec["blocks"]) is not int:
        raise PlanError(
            f"{name}: core={spec['core']!r} is no bool or blocks={spec['blocks']!r} no int"
        )
    return spec


def _check_spec(name: str, spec: Mapping[str, Any], candidates: Mapping[str, Candidate]) -> None:
    if spec["kind"] not in KINDS:
        raise PlanError(f"{name}: {unknown('kind of layer', spec['kind'], KINDS)}")
    if name not in candidates:
        known = nearest(name, candidates) or candidates
        raise PlanError(f"the plan is of another model: {unknown('layer', name, known)}")
    shape = list(candidates[name].shape)
    if shape != spec["shape"]:
        raise PlanError(
            f"the plan is of another model: {name} is {shape} here, {spec['shape']} there"
        )
