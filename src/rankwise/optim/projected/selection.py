"""Which weight matrices have their gradients projected: chosen by parameter, not by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import Parameter

from rankwise.errors import SelectionError, nearest
from rankwise.layers import adapted_layers

if TYPE_CHECKING:
    from rankwise.accounting import Trace

Weights = str | Iterable[str] | Callable[[str, Parameter], bool]


def select_matrices(
    model: nn.Module,
    rank_of: Callable[[Parameter], int],
    layers: Weights = "auto",
    exclude: Weights = (),
    *,
    trace: Trace | None = None,
) -> dict[str, Parameter]:
    """The weights to project: name -> parameter, each once however often it is tied.

    Args:
        model: any model.
        rank_of: the rank a matrix would get.
        layers: "auto", a glob over names of parameters or of the modules that own them
            ("blocks.*", "*.q_proj", "embed.weight"), several, or a predicate of (name, parameter).
            "auto" takes the weights of two or more dimensions of every layer but embeddings and
            the last layer in execution order, the classifier, where the rank is below both sides;
            the factors of low-rank updates are left to the optimizer unless they are named.
        exclude: globs or a predicate; what it matches is trained unprojected.
        trace: execution order; without it the order of definition.

    Raises:
        SelectionError: nothing matched, or nothing that a projection makes smaller; a factor of an
            update that is named, but no larger than the rank.
    """
    places = _places(model)
    factors = {p for layer in adapted_layers(model).values() for p in layer.heads.parameters()}
    obstacles = {p: _obstacle(p, owners) for p, owners in places.items()}
    known = {p: owners[0][0] for p, owners in places.items()}
    if layers == "auto":
        classifier = _last(model, places, trace)
        chosen = {
            p
            for p, owners in places.items()
            if not obstacles[p]
            and p is not classifier
            and p not in factors
            and all("weight" in key and not _embeds(m) for _, key, m in owners)
            and rank_of(p) < _short(p)
        }
        if not chosen:
            raise SelectionError(_nothing(model, places, rank_of, factors))
    else:
        chosen = _matching(places, layers, "layers")
    if exclude not in ("", ()):
        chosen -= _matching(places, exclude, "exclude")
    refused = {known[p]: obstacles[p] for p in chosen if obstacles[p]}
    selected = {known[p]: p for p in places if p in chosen and not obstacles[p]}
    for name, p in selected.items():
        if p in factors and rank_of(p) >= _short(p):
            raise SelectionError(
                f"{name}, a factor of shape {tuple(p.shape)} of a low-rank update, cannot be "
                f"projected to rank {rank_of(p)}: its short side is {_short(p)}, so nothing would "
                "become smaller; take a lower rank here, a higher one for the update, or leave the "
                "factors to the optimizer with exclude='*.heads.*'"
            )
    if not selected:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:4])
        raise SelectionError(
            f"no weight matrix of {type(model).__name__} is left to project with layers={layers!r} "
            f"and exclude={exclude!r}" + (f" ({why})" if why else "")
        )
    return selected


Places = dict[Parameter, list[tuple[str, str, nn.Module]]]


def _places(model: nn.Module) -> Places:
    """Trainable parameters of two or more dimensions: their names, own key and owner."""
    found: Places = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.dim() >= 2:
                full = f"{name}.{key}" if name else key
                found.setdefault(parameter, []).append((full, key, module))
    return found


def _short(parameter: Parameter) -> int:
    """The short side of a weight as a matrix."""
    return min(parameter.shape[0], parameter.numel() // parameter.shape[0])


def _obstacle(parameter: Parameter, owners: list[tuple[str, str, nn.Module]]) -> str:
    if not parameter.is_floating_point():
        return f"it is {parameter.dtype}; only real floating point can be projected"
    if any(getattr(module, "sparse", False) for _, _, module in owners):
        return "its gradient is sparse; build the embedding with sparse=False"
    return ""


def _embeds(module: nn.Module) -> bool:
    return "Embedding" in type(module).__name__


def _last(model: nn.Module, places: Places, trace: Trace | None) -> Parameter | None:
    """The weight of the last layer that owns one, wherever it is tied to."""
    bases = {f"{name}.base": name for name in adapted_layers(model)}
    modules = {bases.get(name, name): module for name, module in model.named_modules()}
    known = {*places, *(layer.base.weight for layer in adapted_layers(model).values())}
    if trace is not None:
        rank = {name: i for i, name in enumerate(trace.order)}
        called = [n for n in modules if n in rank]
        modules = {n: modules[n] for n in sorted(called, key=rank.__getitem__)} or modules
    last: Any = None
    for module in modules.values():
        own = [p for key, p in module._parameters.items() if p in known and "weight" in key]
        last = own[-1] if own else last
    return last


def _matching(places: Places, wanted: Any, what: str) -> set[Parameter]:
    if callable(wanted):
        return {p for p, owners in places.items() if wanted(owners[0][0], p)}
    patterns = wanted.split(",") if isinstance(wanted, str) else wanted
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise SelectionError(
            f"{what}={wanted!r} is no glob over names of parameters or layers, list of globs or "
            "predicate"
        )
    chosen: set[Parameter] = set()
    for pattern in (pattern.strip() for pattern in patterns):
        matched = {
            p
            for p, owners in places.items()
            for full, _, _ in owners
            if fnmatch.fnmatch(full, pattern) or fnmatch.fnmatch(full.rpartition(".")[0], pattern)
        }
        if not matched:
            names = [owners[0][0] for owners in places.values()]
            raise SelectionError(
                f"{what}={pattern!r} matches none of the {len(names)} trainable weight matrices; "
                f"{_suggest(pattern, names)}"
            )
        chosen |= matched
    return chosen


def _suggest(pattern: str, names: list[str]) -> str:
    core = pattern.strip("*.")
    close = [name for name in names if core and core in name]
    close = (close or nearest(pattern, names) or names)[:4]
    return f"the closest are {', '.join(map(repr, close))}" if close else "there are none"


def _nothing(
    model: nn.Module,
    places: Places,
    rank_of: Callable[[Parameter], int],
    factors: Collection[Parameter],
) -> str:
    rest = [(p, owners[0][0]) for p, owners in places.items() if p not in factors]
    shown = [f"{name} {tuple(p.shape)} at rank {rank_of(p)}" for p, name in rest[:4]]
    if factors:
        return (
            f"no weight matrix of {type(model).__name__} is left to project beside its low-rank "
            f"updates ({'; '.join(shown) or 'none is trained'}): frozen weights have no gradients, "
            "and embeddings, the classifier and the updates' factors are left to the optimizer; "
            "name them to project them (layers='*.heads.*' for the factors), or adapt fewer layers"
        )
    return (
        f"no weight matrix of {type(model).__name__} was selected by layers='auto' "
        f"({'; '.join(shown) or 'it has none that is trained'}): embeddings, the classifier and "
        "matrices whose short side is no longer than the rank are left to the optimizer; lower "
        "the rank, or name layers by a glob"
    )
