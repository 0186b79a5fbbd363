"""Which layers are to become low-rank, by the user's choice or by rules; changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from rankwise.candidates import Candidate, aliases, hidden, holds_matrices, survey, unlisted
from rankwise.errors import OptionError, SelectionError, nearest
from rankwise.layers import Form, LowRankLayer, low_rank_class

if TYPE_CHECKING:
    from rankwise.accounting import Trace

__all__ = ["Candidate", "Layers", "select", "survey", "unlisted"]

Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]


def select(
    model: nn.Module,
    layers: Layers = "auto",
    exclude: Layers = (),
    *,
    keep_first: int = 1,
    keep_last: int = 1,
    trace: Trace | None = None,
    form: Form | None = None,
) -> dict[str, str]:
    """Which layers are to become low-rank: name -> empty, or why it stays dense.

    Args:
        model: any model.
        layers: "auto", a glob over names ("blocks.*.fc?"), several ("a,b" or a list), or a
            predicate of (name, module). "auto" takes all that can be factorised but embeddings,
            layers whose parent reads the weight instead of calling them, and the first
            `keep_first` and last `keep_last` in execution order: stem and classifier.
        exclude: globs or a predicate; what it matches stays dense.
        keep_first: the papers' K; counts with layers="auto" only. Where a model begins with
            embeddings, they are together its first layer. With 1 or more, convolutions that are
            the first to meet another input of the model (a second tower's patches) stay as well.
        keep_last: counts with layers="auto" only.
        trace: execution order; without it the order of definition.
        form: how layers are to be factorised.

    Raises:
        SelectionError: nothing matched; names the closest layers.
        OptionError: `keep_first` or `keep_last` is no count.
    """
    for option, count in (("keep_first", keep_first), ("keep_last", keep_last)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise OptionError(f"{option}={count!r} is no number of layers; give 0 or more")
    candidates = survey(model, trace, form=form, layers=() if callable(layers) else layers)
    reasons = {name: c.obstacle for name, c in candidates.items()}
    if layers == "auto":
        found = _automatic(model, candidates, keep_first, keep_last, trace)
        reasons = {name: reasons[name] or found.get(name, "") for name in reasons}
        chosen = set(candidates)
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
    model: nn.Module,
    candidates: Mapping[str, Candidate],
    first: int,
    last: int,
    trace: Trace | None,
) -> dict[str, str]:
    """Why layers stay dense that nobody named: the first reason that holds for each."""
    embeddings = {
        name
        for name, c in candidates.items()
        if isinstance(c.module, (nn.Embedding, nn.EmbeddingBag))
    }
    # What the forward never called has no place in its order: it must not pass for the classifier.
    order = [
        name
        for name, candidate in candidates.items()
        if name in embeddings or _counts(candidate.module)
        if trace is None or name in trace.calls
    ]
    reasons = dict.fromkeys(embeddings, "an embedding; name it to make it low-rank")
    for name, candidate in candidates.items():
        read = trace is not None and name in trace.reads and name not in embeddings
        if not candidate.home and (read or _read_by_attention(model, candidate)):
            reasons[name] = "its parent reads the weight as a matrix"
    body = [name for name in order if name not in embeddings]
    begins = int(bool(order) and order[0] in embeddings)  # the embeddings are the first layer
    ends = int(_ends_with_an_embedding(trace, embeddings))
    for name in body[: max(0, first - begins)]:
        reasons.setdefault(name, f"among the first {first} (keep_first)")
    for name in trace.stems if trace is not None and first else ():
        if name in candidates and isinstance(candidates[name].module, _ConvNd):
            reasons.setdefault(name, "the first layer to meet an input (keep_first)")
    for name in body[max(0, len(body) - max(0, last - ends)) :]:
        reasons.setdefault(name, f"among the last {last} (keep_last)")
    return reasons


def _counts(module: nn.Module) -> bool:
    """Whether a layer has a place in the order: also a stem or head of a class of its own."""
    own = isinstance(module, (nn.Linear, _ConvNd)) and not type(module).__module__.startswith(
        "torch.nn.modules"
    )
    return own or isinstance(low_rank_class(module), type)


def _read_by_attention(model: nn.Module, candidate: Candidate) -> bool:
    """Whether it is the output of an attention that stays shut, which multiplies by its weight."""
    if type(candidate.module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return False
    parent = model.get_submodule(candidate.name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _ends_with_an_embedding(trace: Trace | None, embeddings: set[str]) -> bool:
    """Whether the head is an embedding's weight, read after every layer has been called."""
    if trace is None:
        return False
    calls = sum(len(each) for each in trace.calls.values())
    return any(trace.reads.get(name) == calls for name in embeddings)


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
    known = aliases(model, candidates)
    chosen: set[str] = set()
    for pattern in patterns:
        names = {first for name, first in known.items() if fnmatch.fnmatch(name, pattern)}
        if not names:
            matched = {n: m for n, m in everything.items() if fnmatch.fnmatch(n, pattern)}
            raise SelectionError(
                f"{what}={pattern!r} matches none of the {len(candidates)} layers with a weight "
                f"matrix; {_instead(matched, candidates)}{_in_lists(model)}"
                f"{_suggest(pattern, candidates)}"
            )
        chosen |= names
    return chosen


def _instead(matched: Mapping[str, nn.Module], candidates: Mapping[str, Candidate]) -> str:
    """What the first module that a pattern did match is, if it is no layer to be chosen."""
    for name, module in matched.items():
        kind = f"{name} ({type(module).__name__})"
        if isinstance(module, LowRankLayer):
            return f"{name} is low-rank already; "
        if name and any(c.startswith(f"{name}.") for c in candidates):
            return f"{kind} holds layers: name them, as in {f'{name}.*'!r}; "
        if name and holds_matrices(module):
            return f"{kind} has no low-rank form here; "
    for name, module in matched.items():
        if name:
            return f"{name} ({type(module).__name__}) has no weight matrix; "
    return ""


def _in_lists(model: nn.Module) -> str:
    """Modules that torch does not see: a likely reason why a name is not found."""
    for place, kind in hidden(model).items():
        return f"{place} holds {kind}, which torch does not see: use nn.ModuleList or ModuleDict; "
    return ""


def _suggest(pattern: str, names: Iterable[str]) -> str:
    known = list(names)
    close = [n for n in known if pattern.strip("*.") and pattern.strip("*.") in n]
    close = (close or nearest(pattern, known) or known)[:4]
    return f"the closest are {', '.join(repr(n) for n in close)}" if close else "there are none"


def _nothing_selected(model: nn.Module, layers: Any, reasons: Mapping[str, str]) -> str:
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    kept = not reasons or any("keep_" in reason for reason in reasons.values())
    way = "name layers by a glob, or lower keep_first / keep_last" if kept else "name other layers"
    return (
        f"no layer of {type(model).__name__} was selected by layers={layers!r}"
        + (f" ({why})" if why else "")
        + f"; {_in_lists(model)}{way}"
    )
