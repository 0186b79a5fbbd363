"""Which layers can become low-rank, which are to, and why others stay dense; changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from rankwise.errors import OptionError, SelectionError, nearest
from rankwise.layers import LowRankLayer, low_rank_class

if TYPE_CHECKING:
    from rankwise.accounting import Trace

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

    Raises:
        SelectionError: a lazy layer that has no shape yet.
    """
    inside_low_rank = {
        id(part)
        for module in model.modules()
        if isinstance(module, LowRankLayer)
        for part in module.modules()
    }
    holders: dict[Parameter, list[tuple[str, str]]] = {}
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((name, key))
        shape = () if id(module) in inside_low_rank else _weight_shape(name, module)
        if len(shape) >= 2:
            found[name] = (module, shape)
    if trace is not None:
        rank = {name: i for i, name in enumerate(trace.order)}
        found = dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))
    candidates = {}
    for name, (module, shape) in found.items():
        weight = module._parameters.get("weight")
        users = [] if weight is None else [h for h in holders[weight] if h != (name, "weight")]
        others = {n: found[n][0] if key == "weight" and n in found else key for n, key in users}
        tied = tuple(n for n, other in others.items() if isinstance(other, nn.Module))
        candidates[name] = Candidate(name, module, shape, _obstacle(name, module, others), tied)
    return candidates


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
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return ()


def _obstacle(name: str, module: nn.Module, others: Mapping[str, nn.Module | str]) -> str:
    if not name:
        return "the model is this layer itself; wrap it, e.g. nn.Sequential(layer)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (weight norm, pruning or the like)"
    stand_in = low_rank_class(module)
    if isinstance(stand_in, str):
        return stand_in
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; only real floating point can be factorised"
    for place, other in others.items():
        if isinstance(other, str):
            return f"its weight is also {f'{place}.{other}'.lstrip('.')}, which stays dense"
        if low_rank_class(other) is not stand_in:
            return f"its weight is tied to {place} ({type(other).__name__}), which stays dense"
    return ""


def unlisted(model: nn.Module, candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """Modules that hold matrices other than one weight (LSTM, attention): name -> class."""
    listed = {id(c.module) for c in candidates.values()}
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and id(module) not in listed and _holds_matrices(module)
    }


def _holds_matrices(module: nn.Module) -> bool:
    return any(
        key != "weight" and p is not None and p.dim() > 1 for key, p in module._parameters.items()
    )


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
        OptionError: `keep_first` or `keep_last` is no count.
    """
    for option, count in (("keep_first", keep_first), ("keep_last", keep_last)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise OptionError(f"{option}={count!r} is no number of layers; give 0 or more")
    candidates = survey(model, trace)
    reasons = {name: c.obstacle for name, c in candidates.items()}
    if layers == "auto":
        chosen = _automatic(candidates, reasons, keep_first, keep_last, trace)
    else:
        chosen = _matching(model, candidates, layers, what="layers")
        for name in reasons.keys() - chosen:
            reasons[name] = reasons[name] or "not selected"
    if exclude not in ("", ()):
        for name in _matching(model, candidates, exclude, what="exclude"):
            reasons[name] = "excluded"
    for name in chosen:
        waiting = [t for t in candidates[name].tied if reasons[t]]
        if not reasons[name] and waiting:
            reasons[name] = f"its weight is tied to {waiting[0]}, which stays dense"
    if all(reasons[name] for name in chosen):
        why = {name: reason for name, reason in reasons.items() if name in chosen}
        raise SelectionError(_nothing_selected(model, layers, why))
    return reasons


def _automatic(
    candidates: Mapping[str, Candidate],
    reasons: dict[str, str],
    first: int,
    last: int,
    trace: Trace | None,
) -> set[str]:
    for name, candidate in candidates.items():
        if type(candidate.module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            # nn.MultiheadAttention reads this layer's weight as a matrix instead of calling it, so
            # factors would be multiplied out at every step: right, but slower than dense.
            reasons[name] = reasons[name] or "its parent reads the weight as a matrix"
    # What the forward never called has no place in its order: it must not pass for the classifier.
    order = [
        name
        for name, candidate in candidates.items()
        if isinstance(low_rank_class(candidate.module), type)
        and (trace is None or name in trace.calls)
    ]
    for name in order[:first]:
        reasons[name] = reasons[name] or f"among the first {first} (keep_first)"
    for name in order[max(0, len(order) - last) :]:
        reasons[name] = reasons[name] or f"among the last {last} (keep_last)"
    return set(candidates)


def _matching(
    model: nn.Module, candidates: Mapping[str, Candidate], layers: Layers, *, what: str
) -> set[str]:
    if callable(layers):
        return {name for name, c in candidates.items() if layers(name, c.module)}
    patterns = layers.split(",") if isinstance(layers, str) else layers
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise SelectionError(
            f"{what}={layers!r} is no glob over layer names, list of globs or predicate"
        )
    patterns = [pattern.strip() for pattern in patterns]
    everything = dict(model.named_modules(remove_duplicate=False))
    first = {id(c.module): name for name, c in candidates.items()}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {n: m for n, m in everything.items() if fnmatch.fnmatch(n, pattern)}
        names = {first[id(m)] for m in matched.values() if id(m) in first}
        if not names:
            raise SelectionError(
                f"{what}={pattern!r} matches none of the {len(candidates)} layers with a weight "
                f"matrix; {_instead(matched)}{_suggest(pattern, candidates)}"
            )
        chosen |= names
    return chosen


def _instead(matched: Mapping[str, nn.Module]) -> str:
    for name, module in matched.items():
        if isinstance(module, LowRankLayer):
            return f"{name} is low-rank already; "
        if name and _holds_matrices(module):
            return f"{name} ({type(module).__name__}) has no low-rank form here; "
    return ""


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
