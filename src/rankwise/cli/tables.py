"""Tables: the plan before training, the comparison after it, and lists."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from rankwise.cli.screen import numbers
from rankwise.ranks import Gains, LayerPlan, Plan
from rankwise.ranks.naming import pattern, together
from rankwise.reports.words import short
from rankwise.training.report import Result
from rankwise.training.task import TASKS, Score


def plan(plan: Plan) -> RenderableType:
    """The layers, their ranks, what that saves, and (below) why the others stay dense.

    In a long plan the equal layers of repeated blocks share a row.
    """
    gain = ("gain",) if plan.timed else ()
    table = numbers("layer", "shape", "rank", "break-even", "parameters", "ratio", "FLOPs", *gain)
    reasons: list[str] = []
    groups = _rows(plan.layers)
    for name, layer in groups:
        rank = f"{layer.rank} of {layer.shape.full_rank}"
        if layer.rank is None:
            if layer.reason not in reasons:
                reasons.append(layer.reason)
            rank = f"dense ({reasons.index(layer.reason) + 1})"
        low = layer.rank is not None
        table.add_row(
            name,
            str(layer.shape),
            rank,
            str(layer.break_even),
            _pair(layer.parameters, low),
            f"{layer.parameters[1] / layer.parameters[0]:.2f}" if low else "",
            _pair(layer.flops, low),
            *("" if layer.gain is None else f"{layer.gain:.2f}×" for _ in gain),
            style="cyan" if low else "dim",
        )
    why = [f"({n}) {reason or 'no rule was asked'}" for n, reason in enumerate(reasons, start=1)]
    if len(groups) < len(plan.layers):
        why.append("n×: so many equal layers; the numbers are those of one")
    return Group(
        table,
        Text("\n".join(why), style="dim"),
        Text("\n".join((plan.summary(), *plan.notes)), style="bold"),
    )


def gains(gains: Gains) -> RenderableType:
    """Measured times of the layers, those of one shape in a row, and of all of them."""
    head, *rows = gains.rows()
    table = numbers(*head)
    for row in rows:
        # "16: 0.31 ms 1.92×" over two lines, and the input below the layer's shape.
        table.add_row(row[0], *(c.replace(" ms ", " ms\n").replace(", ", "\n") for c in row[1:]))
    return Group(table, Text("\n".join(gains.notes()), style="dim"))


LONG = 40  # layers from which on equal ones share a row


def _rows(layers: Sequence[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    """What to call each row, and its layer; the first one of several equal."""
    if len(layers) < LONG:
        return [(layer.name, layer) for layer in layers]
    groups: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        same = (pattern(layer.name), layer.kind, layer.shape, layer.rank)
        groups.setdefault((*same, layer.reason, layer.flops, layer.ms), []).append(layer)
    return [(together([each.name for each in group]), group[0]) for group in groups.values()]


def _pair(counts: tuple[int, int] | None, low: bool) -> str:
    if counts is None:
        return ""
    return f"{short(counts[0])}→{short(counts[1])}" if low else short(counts[0])


def comparison(results: Sequence[Result]) -> RenderableType:
    """One row a method, over its seeds, with the ratio to dense below each number."""
    methods = list(dict.fromkeys(result.method for result in results))
    groups = {name: [r for r in results if r.method == name] for name in methods}
    dense = groups.get("dense")
    columns = _columns(results[0].task)
    table = numbers("method", *(column.heading for column in columns))
    for name, runs in groups.items():
        table.add_row(name, *(_cell(column, runs, dense) for column in columns), end_section=True)
    notes = [_conditions(results)]
    if dense is None:
        notes.append("no ratios: dense is not among the methods (--methods dense,...)")
    else:
        notes.append("×: ratio to dense of the same recipe; step times are medians")
    return Group(table, Text("\n".join(notes), style="dim"))


Value = Callable[[Result], float | None]


@dataclass(frozen=True)
class Column:
    """One figure of a run: its heading, how to read and to write it."""

    heading: str
    value: Value
    write: Callable[[Sequence[float]], str]
    dense: Value | None = None  # the figure of the dense run to set it against; None: the same one


def _columns(task: str) -> list[Column]:
    unit = TASKS[task].unit
    quality = [Column("test %", lambda r: 100 * r.test_accuracy, _spread)]
    speed: list[Column] = []
    if task in ("language modelling", "translation"):
        quality = [
            Column("test per-\nplexity", lambda r: _test(r).perplexity, _spread),
            Column("bits\n/ token", lambda r: _test(r).bits, _fine_spread),
        ]
        if task == "translation":
            quality.append(Column("test\nBLEU", lambda r: r.test_bleu, _spread))
        speed = [
            Column("tokens\n/ s", lambda r: r.units_per_second, _count),
            Column("states\nMiB", lambda r: _mebibytes(r.state_bytes), _mean),
        ]
    return [
        *quality,
        Column("stored\nparam.", lambda r: r.parameters[0], _count),
        Column("trainable\nparam.", lambda r: r.parameters[1], _count),
        Column(f"FLOPs\n/ {unit}", lambda r: r.flops, _count),
        Column("ms/step\ndense", lambda r: r.step_ms_dense, _milliseconds),
        # A low-rank step is set against the dense one of the dense run.
        Column(
            "ms/step\nlow-rank",
            lambda r: r.step_ms_low_rank,
            _milliseconds,
            lambda r: r.step_ms_dense,
        ),
        *speed,
        Column("total\ntime", lambda r: r.seconds, _seconds),
    ]


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _test(result: Result) -> Score:
    return Score(result.test_loss, result.test_accuracy)


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _fine_spread(values: Sequence[float]) -> str:
    return _spread(values, 3)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}"


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f} s"


def _milliseconds(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}"


def _count(values: Sequence[float]) -> str:
    return short(statistics.fmean(values))


def _cell(column: Column, runs: Sequence[Result], dense: Sequence[Result] | None) -> str:
    own = [v for r in runs if (v := column.value(r)) is not None]
    if not own:
        return "–"
    text = column.write(own)
    base = [v for r in dense or () if (v := (column.dense or column.value)(r)) is not None]
    if any(base) and runs is not dense:
        text += f"\n{statistics.fmean(own) / statistics.fmean(base):.2f}×"
    return text


def _conditions(results: Sequence[Result]) -> str:
    first = results[0]
    seeds = list(dict.fromkeys(r.seed for r in results))
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± deviation over seeds {seeds}"
    return f"{first.model} on {first.data}, {first.epochs} epochs, {named}"


def paper(cls: type[Any]) -> str:
    """The arXiv id that a method's documentation cites."""
    text = f"{inspect.getdoc(inspect.getmodule(cls))} {inspect.getdoc(cls)}"
    found = re.search(r"\b\d{4}\.\d{5}\b", text)
    return f"arXiv {found[0]}" if found else ""
