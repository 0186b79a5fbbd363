"""Walk a model and exchange its layers, dense <-> low-rank.

Everything is keyed by module name. A module registered under several names is exchanged once
and set under all of them; a weight tied between layers stays tied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import Parameter

from rankwise.candidates import Candidate, aliases, survey
from rankwise.errors import (
    FactorizeError,
    PlanError,
    RankwiseError,
    SelectionError,
    nearest,
    unknown,
)
from rankwise.layers import (
    AdaptedLayer,
    Form,
    LowRankLayer,
    OpenAttention,
    low_rank_class,
    recurrent_class,
)
from rankwise.layers.attention import RowCarry
from rankwise.method import NO_CHANGE, Carry, Change, Successors, merge

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_OURS = (LowRankLayer, AdaptedLayer, OpenAttention)


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
    _move_hooks(old, new)
    for alias in names_of(model, old):
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        if isinstance(new, _OURS):
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


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    for attribute in _HOOKS:
        # The dicts themselves, not their entries: the user's handles must still remove the hooks.
        hooks = getattr(old, attribute)
        hooks.update(getattr(new, attribute))
        setattr(new, attribute, hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


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


def return_to_fast_path(model: nn.Module) -> None:
    """Let torch's fused encoder kernels run again where `replace` had turned them off."""
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
    places = _put_back(model, change)
    try:
        yield
    finally:
        for parent, leaf, new in reversed(places):
            setattr(parent, leaf, new)


def _put_back(model: nn.Module, change: Change) -> list[tuple[nn.Module, str, nn.Module]]:
    """Set the old modules again, the last exchange first; where the new ones were, in that order.

    Exchanges may be nested: an attention that was opened holds layers that were factorised.
    """
    places = []
    for old, new in reversed(list(change.modules.values())):
        for alias in names_of(model, new):
            parent, _, leaf = alias.rpartition(".")
            places.append((model.get_submodule(parent), leaf, new))
            setattr(places[-1][0], leaf, old)
    return places


@contextmanager
def whole_or_not(model: nn.Module, change: Change) -> Iterator[None]:
    """Take a change back if what has to follow it in a `with` block fails."""
    try:
        yield
    except BaseException:
        if change:
            _put_back(model, change)
            return_to_fast_path(model)
            for name, module in model.named_modules(remove_duplicate=False):
                if isinstance(module, _OURS):
                    _leave_fast_path(model, name)
        raise


New = LowRankLayer | AdaptedLayer
Make = Callable[[str, nn.Module, type[Any], int], New]


def factorize_layers(
    model: nn.Module, ranks: Mapping[str, int], make: Make, form: Form | None = None
) -> Change:
    """Replace each named layer by what `make(name, dense, class, rank)` returns for it.

    Attentions and recurrent layers whose matrices are named are opened first. Of layers that share
    a weight, one is made; the others get its factors.

    Args:
        model: changed in place; as before if this fails.
        ranks: name -> rank; a layer registered under several names has any of them.
        make: builds the low-rank layer; embeddings come first.
        form: in which classes are looked up.

    Raises:
        SelectionError: a name that is no layer.
        FactorizeError: a layer that cannot be factorised, named.
        PlanError: two ranks for one layer, or for layers that share a weight.
    """
    candidates = survey(model, form=form, layers=list(ranks))
    ranks = _by_first_name(model, ranks, candidates)
    for name in ranks:
        _check_named(name, ranks, candidates)
    opened = open_homes(model, _to_open(ranks, candidates))
    with whole_or_not(model, opened):
        new = _make_all(model, ranks, make, form)
    return merge([opened, *(_exchange(model, name, layer) for name, layer in new.items())])


def _by_first_name(
    model: nn.Module, ranks: Mapping[str, int], candidates: Mapping[str, Candidate]
) -> dict[str, int]:
    known, named = aliases(model, candidates), {}
    result: dict[str, int] = {}
    for name, rank in ranks.items():
        first = known.get(name, name)
        if first in result and result[first] != rank:
            raise PlanError(
                f"{named[first]} and {name} are one layer, but are given the ranks "
                f"{result[first]} and {rank}; give one"
            )
        result[first], named[first] = rank, name
    return result


def _check_named(name: str, ranks: Mapping[str, int], candidates: Mapping[str, Candidate]) -> None:
    if name not in candidates:
        raise SelectionError(f"{unknown('layer', name, nearest(name, candidates) or candidates)}")
    candidate = candidates[name]
    if candidate.obstacle:
        raise FactorizeError(f"{name} cannot be low-rank: {candidate.obstacle}")
    for other in candidate.tied:
        if other not in ranks:
            raise FactorizeError(
                f"{name}: its weight is tied to {', '.join(candidate.tied)}; "
                "factorise all of them or none, or the tie would be lost"
            )
        if ranks[other] != ranks[name]:
            first, second = sorted((name, other), key=list(ranks).index)
            raise PlanError(
                f"{second} shares its weight but not its rank with {first} "
                f"({ranks[second]}, {ranks[first]})"
            )


def _to_open(ranks: Iterable[str], candidates: Mapping[str, Candidate]) -> dict[str, bool]:
    """Homes of named layers; of attentions, whether their input projections are one matrix."""
    homes = {candidates[name].home for name in ranks} - {""}
    return {home: f"{home}.in_proj" in candidates for home in sorted(homes)}


def open_homes(model: nn.Module, fused: Mapping[str, bool]) -> Change:
    """Give every named nn.MultiheadAttention, nn.LSTM or nn.GRU matrices that are layers.

    The function stays. An attention's packed weight is cut; a recurrent layer's parameters are its
    children's as they are.

    Args:
        model: changed in place.
        fused: name -> whether queries, keys and values of an attention are projected by one layer.
    """
    changes = [NO_CHANGE]
    for name, one in fused.items():
        shut = model.get_submodule(name)
        recurrent = recurrent_class(shut)
        opened = OpenAttention.of(shut, fused=one) if recurrent is None else recurrent.of(shut)
        replace(model, name, opened)
        replaced = {
            old: Successors(new, RowCarry(tuple(len(p) for p in new)))
            for old, new in cut(opened, shut).items()
        }
        changes.append(Change(replaced=replaced, modules={name: (shut, opened)}))
    return merge(changes)


def cut(opened: Any, shut: Any) -> Mapping[Parameter, tuple[Parameter, ...]]:
    """Parameters of a home that is shut, and the parts that they are cut into where it is open."""
    return opened.parts(shut) if isinstance(opened, OpenAttention) else {}


def _make_all(
    model: nn.Module, ranks: Mapping[str, int], make: Make, form: Form | None
) -> dict[str, New]:
    made: dict[Parameter, New] = {}
    new: dict[str, New] = {}
    # Of a head and an embedding the latter knows of padding, so it makes the factors of both.
    order = sorted(ranks, key=lambda n: not isinstance(model.get_submodule(n), nn.Embedding))
    for name in order:
        dense: Any = model.get_submodule(name)
        stand_in = low_rank_class(dense, form)
        assert isinstance(stand_in, type)
        twin = made.get(dense.weight)
        try:
            if twin is None:
                layer = made[dense.weight] = make(name, dense, stand_in, ranks[name])
            else:
                layer = twin.for_tied(dense, stand_in)
        except RankwiseError as error:
            raise type(error)(f"{name} {tuple(dense.weight.shape)}: {error}") from error
        new[name] = layer
    return {name: new[name] for name in ranks}


def _exchange(model: nn.Module, name: str, layer: New) -> Change:
    dense: Any = model.get_submodule(name)
    replace(model, name, layer)
    return layer.taken_from(dense) | Change(modules={name: (dense, layer)})


Fill = Callable[[str, Any, Any], Mapping[str, Carry]]


def change_ranks(model: nn.Module, ranks: Mapping[str, int], fill: Fill | None = None) -> Change:
    """Exchange low-rank layers for ones of another rank; the dense weight is not formed.

    Layers that share their factors go on sharing them. Biases stay, hooks move along. Of an adapted
    layer the heads are exchanged, under names of their own: fc.heads.0.

    Args:
        model: changed in place; as before if this fails.
        ranks: name of a low-rank or adapted layer -> rank; of layers that share factors all.
        fill: `fill(name, old, new)` writes the factors of the new layer, and says for each part
            how its moments are carried over; without it both are left for a state dict to fill.

    Raises:
        SelectionError: the model itself is the low-rank layer.
        PlanError: two ranks for layers that share their factors, or a rank out of range.
    """
    made: dict[Parameter, tuple[str, Any]] = {}
    exchanged: dict[str, tuple[Any, Any]] = {}
    replaced: dict[Parameter, Successors] = {}
    for name, rank in _of_heads(model, ranks).items():
        if not name:
            raise SelectionError(
                "the model itself is the low-rank layer; wrap it, e.g. nn.Sequential(layer)"
            )
        old: Any = model.get_submodule(name)
        first, twin = made.setdefault(old.u.weight, (name, None))
        if twin is not None and twin.rank != rank:
            raise PlanError(
                f"{name} shares its factors but not its rank with {first} ({rank}, {twin.rank})"
            )
        new = old.with_rank(rank)
        exchanged[name] = (old, new)
        if twin is not None:
            new.v, new.norm, new.core, new.u.weight = twin.v, twin.norm, twin.core, twin.u.weight
            continue
        made[old.u.weight] = (name, new)
        carries = {} if fill is None else fill(name, old, new)
        carry = {getattr(old, part).weight: each for part, each in carries.items()}
        pairs = zip(old.new_parameters(), new.new_parameters(), strict=True)
        replaced |= {a: Successors((b,), carry.get(a)) for a, b in pairs}
    for name, (old, new) in exchanged.items():
        replace(model, name, new)
        for part in old.parts:
            _move_hooks(getattr(old, part), getattr(new, part))
    return Change(replaced=replaced, modules=exchanged)


def _of_heads(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """The same ranks, by the low-rank layers that an adapted one consists of."""
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        if not isinstance(module, AdaptedLayer):
            found[name] = rank
            continue
        prefix = f"{name}." if name else ""
        parts = {"heads": module.heads, "merged": module.merged or ()}
        found |= {f"{prefix}{of}.{i}": rank for of, held in parts.items() for i in range(len(held))}
    return found
