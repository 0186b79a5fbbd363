"""Walk a model and exchange its layers, dense <-> low-rank; read and impose structure as data.

Everything is keyed by module name. A module registered under several names is exchanged once
and set under all of them; a weight tied between layers stays tied.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rankwise.accounting import Trace

logger = logging.getLogger(__name__)

Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Candidate:
    """A layer that owns a weight matrix: whether and by what it can be replaced.

    Attributes:
        name: its first name in the model.
        module: the dense layer.
        shape: shape of the weight.
        obstacle: why it cannot be low-rank, or empty.
        tied: names of the other layers that use the same weight.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    obstacle: str = ""
    tied: tuple[str, ...] = ()


def survey(model: nn.Module, trace: Trace | None = None) -> dict[str, Candidate]:
    """Every layer with a weight of two or more dimensions, in execution order where it is known.

    Args:
        model: any model.
        trace: order of one forward; without it the order of definition, with layers that
            the forward did not reach at the end.
    """
    inside_low_rank = {
        id(part)
        for module in model.modules()
        if isinstance(module, LowRankLayer)
        for part in module.modules()
    }
    owners: dict[Parameter, list[str]] = {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, LowRankLayer) or weight is None or weight.dim() < 2:
            if "weight" in getattr(module, "parametrizations", ()):
                found[name] = module
            continue
        if id(module) not in inside_low_rank:
            found[name] = module
            owners.setdefault(weight, []).append(name)
    if trace is not None:
        rank = {name: i for i, name in enumerate(trace.order)}
        found = dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))
    candidates = {}
    for name, module in found.items():
        weight: Any = module.weight
        tied = tuple(n for n in owners.get(weight, ()) if n != name)
        candidates[name] = Candidate(
            name, module, tuple(weight.shape), _obstacle(name, module, tied, found), tied
        )
    return candidates


def _obstacle(
    name: str, module: nn.Module, tied: tuple[str, ...], found: Mapping[str, nn.Module]
) -> str:
    if not name:
        return "the model is this layer itself; wrap it, e.g. nn.Sequential(layer)"
    stand_in = low_rank_class(module)
    if isinstance(stand_in, str):
        return stand_in
    for other in tied:
        if low_rank_class(found[other]) is not stand_in:
            return (
                f"its weight is tied to {other} ({type(found[other]).__name__}), which stays dense"
            )
    return ""


def select(
    model: nn.Module,
    layers: Layers = "auto",
    exclude: Layers = (),
    *,
    keep_first: int = 1,
    keep_last: int = 1,
    trace: Trace | None = None,
) -> dict[str, str]:
    """Which layers are to become low-rank: name -> empty, or why it stays dense.

    Args:
        model: any model.
        layers: "auto", a glob over names ("blocks.*.fc?"), several ("a,b" or a list), or a
            predicate of (name, module). "auto" takes all that can be factorised but the first
            `keep_first` and last `keep_last` in execution order: stem and classifier.
        exclude: globs or a predicate; what it matches stays dense.
        keep_first: the papers' K; counts with layers="auto" only.
        keep_last: counts with layers="auto" only.
        trace: execution order; without it the order of definition.

    Raises:
        SelectionError: nothing matched; names the closest layers.
    """
    candidates = survey(model, trace)
    reasons = {name: c.obstacle for name, c in candidates.items()}
    if layers == "auto":
        chosen = _automatic(candidates, reasons, keep_first, keep_last)
    else:
        chosen = _matching(candidates, layers, what="layers")
        for name in reasons.keys() - chosen:
            reasons[name] = reasons[name] or "not selected"
    if exclude not in ("", ()):
        for name in _matching(candidates, exclude, what="exclude"):
            reasons[name] = "excluded"
    for name in chosen:
        waiting = [t for t in candidates[name].tied if reasons[t]]
        if not reasons[name] and waiting:
            reasons[name] = f"its weight is tied to {waiting[0]}, which stays dense"
    if not any(not reasons[name] for name in chosen):
        raise SelectionError(_nothing_selected(model, layers, {n: reasons[n] for n in chosen}))
    return reasons


def _automatic(
    candidates: Mapping[str, Candidate], reasons: dict[str, str], first: int, last: int
) -> set[str]:
    for name, candidate in candidates.items():
        if type(candidate.module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            # nn.MultiheadAttention reads this layer's weight as a matrix instead of calling it, so
            # factors would be multiplied out at every step: right, but slower than dense.
            reasons[name] = reasons[name] or "its parent reads the weight as a matrix"
    order = [n for n in candidates if isinstance(low_rank_class(candidates[n].module), type)]
    for name in order[:first]:
        reasons[name] = reasons[name] or f"among the first {first} (keep_first)"
    for name in order[len(order) - last :] if last else ():
        reasons[name] = reasons[name] or f"among the last {last} (keep_last)"
    return set(candidates)


def _matching(candidates: Mapping[str, Candidate], layers: Layers, *, what: str) -> set[str]:
    if callable(layers):
        return {name for name, c in candidates.items() if layers(name, c.module)}
    patterns = [p.strip() for p in layers.split(",")] if isinstance(layers, str) else list(layers)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = set(fnmatch.filter(candidates, pattern))
        if not matched:
            raise SelectionError(
                f"{what}={pattern!r} matches none of the {len(candidates)} layers with a weight "
                f"matrix; {_suggest(pattern, candidates)}"
            )
        chosen |= matched
    return chosen


def _suggest(pattern: str, names: Iterable[str]) -> str:
    known = list(names)
    close = [n for n in known if pattern.strip("*.") and pattern.strip("*.") in n]
    close = (close or nearest(pattern, known) or known)[:4]
    return f"the closest are {', '.join(repr(n) for n in close)}" if close else "there are none"


def _nothing_selected(model: nn.Module, layers: Layers, reasons: Mapping[str, str]) -> str:
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    return (
        f"no layer of {type(model).__name__} was selected by layers={layers!r}"
        + (f" ({why})" if why else "")
        + "; name layers by a glob, or lower keep_first / keep_last"
    )


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
        getattr(new, attribute).update(getattr(old, attribute))
    for alias in names_of(model, old):
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
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
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


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
            layer.v, layer.norm, layer.u.weight = twin.v, twin.norm, twin.u.weight
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
    """
    made: dict[Parameter, Any] = {}
    changes = [NO_CHANGE]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLayer)}
    for name, layer in layers.items():
        if not name:
            raise SelectionError("the model itself is the low-rank layer; call its to_dense()")
        dense = layer.to_dense()
        twin = made.setdefault(layer.u.weight, dense)
        if twin is not dense:
            dense.weight = twin.weight
        replace(model, name, dense)
        gone = layer.new_parameters()
        fresh = () if twin is not dense else (dense.weight,)
        replaced = {gone[0]: Successors(fresh)} | {p: Successors(()) for p in gone[1:]}
        if dense.bias is not layer.u.bias:
            replaced |= (
                {layer.u.bias: Successors((dense.bias,))} if layer.u.bias is not None else {}
            )
        changes.append(Change(replaced=replaced, modules={name: (layer, dense)}))
    return merge(changes)


def read_plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The structure of a model as data: name -> spec of its low-rank layer; JSON-able."""
    return {n: m.spec() for n, m in model.named_modules() if isinstance(m, LowRankLayer)}


@torch.no_grad()
def impose_plan(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> Change:
    """Give a freshly built dense model the structure that `read_plan` returned, values aside.

    Layers that already have the structure are left; low-rank layers that the plan does not
    name are an error, because their weights would not load.

    Raises:
        PlanError: the plan is of another model: names, kinds or shapes differ.
    """
    present, ranks = read_plan(model), {}
    for name, spec in plan.items():
        if name not in present:
            _check_spec(model, name, spec)
            ranks[name] = int(spec["rank"])
        elif present[name] != spec:
            raise PlanError(f"{name} is {present[name]} in the model, {dict(spec)} in the plan")
    extra = sorted(present.keys() - plan.keys())
    if extra:
        raise PlanError(
            f"{extra[0]} is low-rank in the model but dense in the plan; build it dense"
        )
    return factorize_layers(
        model, ranks, lambda name, dense, stand_in, _: stand_in.from_spec(dense, plan[name])
    )


def _check_spec(model: nn.Module, name: str, spec: Mapping[str, Any]) -> None:
    if spec.get("kind") not in KINDS:
        raise PlanError(f"{name}: {unknown('kind of layer', str(spec.get('kind')), KINDS)}")
    candidates = survey(model)
    if name not in candidates:
        raise PlanError(f"the plan is of another model: {unknown('layer', name, candidates)}")
    shape = list(candidates[name].shape)
    if shape != list(spec["shape"]):
        raise PlanError(
            f"the plan is of another model: {name} is {shape} here, {list(spec['shape'])} there"
        )
