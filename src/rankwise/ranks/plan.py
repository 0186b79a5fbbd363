"""The plan: which layers become low-rank, with which rank, what that saves, and why others stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise import accounting, selection, surgery
from rankwise.errors import OptionError
from rankwise.method import NO_CHANGE, Change, Context
from rankwise.ranks.registry import as_rule
from rankwise.ranks.rules import Rule
from rankwise.ranks.shape import MatrixShape

if TYPE_CHECKING:
    from rankwise.accounting import Trace


@dataclass(frozen=True)
class LayerPlan:
    """One layer's line of the plan.

    Attributes:
        name: module name.
        kind: class of the dense layer.
        rows: O.
        columns: I (times the kernel's area).
        rank: None if it stays dense.
        reason: why it stays dense.
        parameters: numbers its weight stores: dense, planned.
        flops: of one forward of the sample, dense and planned; None without a sample, for a layer
            that it did not call, and where they are not those of one matrix product.
    """

    name: str
    kind: str
    rows: int
    columns: int
    rank: int | None
    reason: str
    parameters: tuple[int, int]
    flops: tuple[int, int] | None


@dataclass(frozen=True)
class Plan:
    """What `factorize` would do; print it, pass it to `factorize`, store `ranks`.

    Attributes:
        layers: every layer with a weight matrix, in execution order where known.
        parameters: of the whole model: dense, planned.
        flops: forward FLOPs of the whole model on the sample: dense, planned; None without one.
        norm: whether a BatchNorm goes between the factors.
        notes: what the reader should know.
    """

    layers: tuple[LayerPlan, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None = None
    norm: bool = False
    notes: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        ranks = {layer.name: layer.rank for layer in self.layers if layer.rank is not None}
        object.__setattr__(self, "ranks", ranks)

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, header first: for any kind of printer."""
        head = (
            "layer",
            "kind",
            "shape",
            "rank",
            "parameters",
            "ratio",
            "FLOPs",
            "stays dense because",
        )
        return [head, *(_row(layer) for layer in self.layers)]

    def summary(self) -> str:
        """One line: how many layers, parameters and FLOPs before and after."""
        before, after = self.parameters
        text = (
            f"{len(self.ranks)} of {len(self.layers)} layers low-rank; parameters {before:,} -> "
            f"{after:,} ({after / before:.1%})"
        )
        if self.flops is not None and self.flops[0]:
            text += f"; forward FLOPs {_short(self.flops[0])} -> {_short(self.flops[1])}"
            text += f" ({self.flops[1] / self.flops[0]:.1%})"
        return text

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = (0, 1, 7)
        lines = [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        ]
        return "\n".join(
            [lines[0], "-" * len(lines[0]), *lines[1:], "", self.summary(), *self.notes]
        )


def _row(layer: LayerPlan) -> tuple[str, ...]:
    full = min(layer.rows, layer.columns)
    dense, planned = layer.parameters
    low = layer.rank is not None
    flops = "" if layer.flops is None else _short(layer.flops[0])
    if layer.flops is not None and low:
        flops += f" -> {_short(layer.flops[1])}"
    return (
        layer.name,
        layer.kind,
        f"{layer.rows}×{layer.columns}",
        f"{layer.rank} of {full}" if low else "dense",
        f"{dense:,} -> {planned:,}" if low else f"{dense:,}",
        f"{planned / dense:.2f}" if low else "",
        flops,
        layer.reason,
    )


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def plan(
    model: nn.Module,
    rule: Rule | int | float | str,
    sample: Any = None,
    *,
    layers: selection.Layers = "auto",
    exclude: selection.Layers = (),
    keep_first: int = 1,
    keep_last: int = 1,
    norm: bool = False,
    trace: Trace | None = None,
) -> Plan:
    """Decide, without touching the model, which layers become low-rank and at which rank.

    Args:
        model: any model, also on the meta device.
        rule: ranks.Ratio(0.25), ranks.Budget(0.3), ...; or 32 (a rank), 0.25 (a ratio).
        sample: example input (tensor, tuple of arguments, or dict of keywords): gives the execution
            order and FLOPs. One forward in evaluation mode is run on it.
        layers: "auto", glob(s) over layer names, or a predicate of (name, module).
        exclude: glob(s) or a predicate; these stay dense.
        keep_first: with layers="auto", layers at the beginning that stay dense (the papers' K).
        keep_last: with layers="auto", layers at the end that stay dense.
        norm: count a BatchNorm between the factors.
        trace: an execution already recorded, instead of `sample`.

    Returns:
        The plan; `print` it.

    Raises:
        SelectionError: nothing selected.
        PlanError: a rank out of range or a budget out of reach.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> dict(plan(model, 16).ranks)
        {'1': 16}
    """
    rule = as_rule(rule)
    if trace is None and sample is not None:
        trace = accounting.trace(model, sample)
    candidates = selection.survey(model, trace)
    reasons = selection.select(
        model, layers, exclude, keep_first=keep_first, keep_last=keep_last, trace=trace
    )
    shapes = {n: _matrix(c.shape, norm) for n, c in candidates.items()}
    # Layers tied to each other hold one weight: it is counted and decided once.
    leader = {n: min((n, *c.tied), key=list(candidates).index) for n, c in candidates.items()}
    chosen = {n: shapes[n] for n, reason in reasons.items() if not reason and leader[n] == n}
    total = accounting.parameters(model).stored
    decided = rule.assign(chosen, total - sum(s.dense for s in chosen.values()))
    lines, saved = [], 0
    for name, candidate in candidates.items():
        decision = decided.get(leader[name])
        rank = decision.rank if decision and not reasons[name] else None
        reason = reasons[name] or (decision.reason if decision else "")
        lines.append(_line(name, candidate, shapes[name], rank, reason, trace))
        if leader[name] == name:
            saved += lines[-1].parameters[0] - lines[-1].parameters[1]
    flops = _flops(model, lines, sample, trace)
    return Plan(tuple(lines), (total, total - saved), flops, norm, _notes(model, candidates, trace))


def _notes(
    model: nn.Module, candidates: Mapping[str, selection.Candidate], trace: Trace | None
) -> tuple[str, ...]:
    notes = []
    if trace is None:
        notes.append("layers in order of definition; with sample=, in order of execution")
    others = [f"{n} ({kind})" for n, kind in selection.unlisted(model, candidates).items()]
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        notes.append(f"matrices with no low-rank form here: {', '.join(others[:4])}{more}")
    return tuple(notes)


def _matrix(shape: tuple[int, ...], norm: bool) -> MatrixShape:
    return MatrixShape(shape[0], math.prod(shape[1:]), norm)


def _line(
    name: str,
    candidate: selection.Candidate,
    shape: MatrixShape,
    rank: int | None,
    reason: str,
    trace: Trace | None,
) -> LayerPlan:
    planned = shape.dense if rank is None else shape.cost(rank)
    calls = () if trace is None else trace.calls.get(name, ())
    flops = None
    if calls and isinstance(candidate.module, (nn.Linear, nn.modules.conv._ConvNd)):
        transposed = getattr(candidate.module, "transposed", False)  # (I, O, K...): per input
        touched = sum(math.prod(c.input if transposed else c.output) for c in calls)
        positions = touched // candidate.shape[0]
        each = planned if rank is None else rank * (shape.rows + shape.columns)
        flops = (2 * positions * shape.dense, 2 * positions * each)
    kind = type(candidate.module).__name__
    return LayerPlan(
        name, kind, shape.rows, shape.columns, rank, reason, (shape.dense, planned), flops
    )


def _flops(
    model: nn.Module, lines: list[LayerPlan], sample: Any, trace: Trace | None
) -> tuple[int, int] | None:
    if trace is None:
        return None
    pairs = [line.flops for line in lines if line.flops is not None]
    saved = sum(dense - planned for dense, planned in pairs)
    # Without the sample itself only the layers of the table are counted; attention's products of
    # activations are then missing from both numbers.
    before = sum(dense for dense, _ in pairs) if sample is None else accounting.flops(model, sample)
    return before, before - saved


def factorize(
    model: nn.Module,
    rule: Rule | Plan | Mapping[str, int] | int | float | str,
    sample: Any = None,
    *,
    init: str = "spectral",
    norm: bool = False,
    context: Context | None = None,
    **choice: Any,
) -> Change:
    """Make a model's layers low-rank, in place.

    Args:
        model: any model.
        rule: a rank rule (see `plan`), a plan, or a mapping of layer name -> rank.
        sample: as in `plan`.
        init: "spectral" (best approximation of the present weights) or "variance" (fresh random
            factors of the same variance).
        norm: BatchNorm between the factors; changes the function.
        context: source of random numbers for `init="variance"`; seed 0 without it.
        **choice: `layers`, `exclude`, `keep_first`, `keep_last`, `trace` as in `plan`.

    Returns:
        What changed; an optimizer that already exists follows it with `rankwise.rebind`.

    Raises:
        SelectionError: nothing selected.
        PlanError: a rank out of range.
        FactorizeError: weights that are not finite.
        OptionError: unknown `init`, or a choice beside a plan that has made it.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> change = factorize(model, 16)
        >>> model[1]
        LowRankLinear(
          in_features=64, out_features=64, rank=16
          (v): Linear(in_features=64, out_features=16, bias=False)
          (u): Linear(in_features=16, out_features=64, bias=True)
        )
    """
    if isinstance(rule, (Plan, Mapping)) and choice:
        raise OptionError(
            f"{', '.join(choice)}: the {type(rule).__name__} given has chosen the layers already; "
            "leave it out, or give a rank rule"
        )
    if isinstance(rule, Plan):
        if norm and not rule.norm:
            raise OptionError("norm=True: the plan was made without; make it with norm=True")
        norm, ranks = rule.norm, rule.ranks
    elif isinstance(rule, Mapping):
        ranks = rule
    else:
        ranks = plan(model, rule, sample, norm=norm, **choice).ranks
    if not ranks:
        surgery.logger.warning(
            "no layer gains from low rank under this plan; the model stays dense"
        )
        return NO_CHANGE
    source = context or Context()

    def make(name: str, dense: nn.Module, stand_in: type[Any], rank: int) -> Any:
        return stand_in.from_dense(
            dense, rank, init=init, norm=norm, generator=source.generator(0, name)
        )

    return surgery.factorize_layers(model, ranks, make)
