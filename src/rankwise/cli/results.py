"""`rankwise table`: recipes in all their forms, over seeds, in one table; resumable."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rankwise import distributed, recipes
from rankwise.cli import series
from rankwise.cli.rows import ROWS, Row
from rankwise.cli.screen import console, numbers
from rankwise.errors import OptionError, unknown
from rankwise.reports.words import short
from rankwise.training import Recipe, Result, records
from rankwise.training.task import Score

HEADINGS = ("row", "test", "− dense", "param.", "MB", "MACs", "step", "total")
Block = Mapping[str, Sequence[Result]]  # row -> its results over seeds


def table_command(asked: argparse.Namespace) -> int:
    """`rankwise table RECIPE ...`."""
    blocks = _jobs(asked)
    jobs = [job for block in blocks.values() for jobs in block.values() for job in jobs]
    try:
        distributed.initialize()
        if not asked.show:
            series.train_all(jobs, forgive=True)
        if distributed.worker() == 0:
            _print(blocks, asked)
    finally:
        distributed.shutdown()
    return 0


def _jobs(asked: argparse.Namespace) -> dict[str, dict[str, list[series.Job]]]:
    """Recipe -> row -> a job for each seed; whatever is wrong is said before the first begins."""
    rows = {name: ROWS[name] for name in series.words(asked.rows) if _known(name)}
    chosen = list(dict.fromkeys(n for word in asked.recipes for n in recipes.choose(word)))
    blocks: dict[str, dict[str, list[series.Job]]] = {}
    for name in chosen:
        recipe = series.read_recipe(name, asked)
        methods = [row.method for row in rows.values()] + [recipe.method]
        series.check_known(recipe.method_options, list(dict.fromkeys(methods)))
        block = blocks.setdefault(Path(name).stem, {})
        for label, row in rows.items():
            block[label] = [
                _job(Path(name).stem, label, row, recipe, seed)
                for seed in series.seeds(asked.seeds, recipe)
            ]
    return blocks


def _known(row: str) -> bool:
    if row not in ROWS:
        raise OptionError(unknown("row", row, ROWS))
    return True


def _job(name: str, label: str, row: Row, recipe: Recipe, seed: int) -> series.Job:
    given = dict(recipe.method_options) if row.inherits else {}
    first = given.pop("keep_first", None)
    if row.hybrid:
        if first is None:
            raise OptionError(
                f"row '{label}' keeps the first layers dense, and recipe {name} does not say how "
                "many; give --method.keep-first K, or leave the row out (--rows)"
            )
        given["keep_first"] = first
    each = series.variant(recipe, row.method, {**given, **row.options}, seed)
    place = Path(recipe.out or "runs/table") / name / f"{label}-{seed}"
    each = dataclasses.replace(each, out=str(place))
    return series.Job(f"{name}, {label}, seed {seed}", each)


def _print(
    blocks: Mapping[str, Mapping[str, Sequence[series.Job]]], asked: argparse.Namespace
) -> None:
    written = []
    for name, block in blocks.items():
        found = {label: _finished(jobs) for label, jobs in block.items()}
        lines = _lines(found, {label: len(jobs) for label, jobs in block.items()})
        caption = _caption(name, block, found)
        console.print()
        console.print(caption, style="bold", markup=False)
        if lines:
            console.print(_rich(lines))
        written += [f"**{caption}**", "", *_markdown(lines), ""]
    console.print(Text("\n" + "\n".join(NOTES), style="dim"))
    if asked.markdown:
        text = "\n".join([*written, *NOTES]) + "\n"
        try:
            Path(asked.markdown).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"--markdown {asked.markdown}: the table cannot be written: "
                f"{error.strerror or error}"
            ) from error


def _finished(jobs: Sequence[series.Job]) -> list[Result]:
    done = [records.finished(Path(job.recipe.out or ""), job.recipe) for job in jobs]
    return [Result.from_record(record) for record in done if record is not None]


def _caption(name: str, block: Mapping[str, Sequence[series.Job]], found: Block) -> str:
    recipe = next(iter(block.values()))[0].recipe
    wanted = sum(map(len, block.values()))
    done = sum(map(len, found.values()))
    missing = "" if done == wanted else f", {done} of {wanted} runs"
    return f"{name}: {recipe.model} on {recipe.data}, {recipe.epochs} epochs{missing}"


NOTES = (
    "test: accuracy in %, or perplexity of a language model; mean ± deviation over seeds. "
    "− dense: the difference, seed by seed.",
    "param.: stored, and their share of dense. MB: of 10^6 bytes, at 4 a parameter. MACs: of one "
    "forward, an image or a token (2 FLOPs each).",
    "step, total: time over dense's, of the training step in its last form and of the whole run.",
)


def _lines(found: Block, wanted: Mapping[str, int]) -> list[list[str]]:
    dense = {r.seed: r for r in found.get("dense", ())}
    lines = []
    for label, results in found.items():
        if results:
            whole = len(results) == wanted[label]
            name = label if whole else f"{label} ({len(results)} of {wanted[label]})"
            lines.append([name, *_cells(results, dense, label)])
    return lines


def _cells(results: Sequence[Result], dense: Mapping[int, Result], label: str) -> list[str]:
    pairs = [(r, dense[r.seed]) for r in results if r.seed in dense and label != "dense"]
    stored = statistics.fmean(r.parameters[0] for r in results)
    macs = statistics.fmean(r.flops for r in results) / 2
    share = step = total = ""
    if pairs:
        share = f" ({stored / statistics.fmean(d.parameters[0] for _, d in pairs):.2f})"
        step = _ratio([(_step(r), d.step_ms_dense) for r, d in pairs])
        total = _ratio([(r.seconds, d.seconds) for r, d in pairs])
    return [
        _spread([_quality(r) for r in results]),
        _spread([_quality(r) - _quality(d) for r, d in pairs], sign="+") if pairs else "",
        f"{short(stored)}{share}",
        f"{4 * stored / 1e6:.2f}",
        short(macs),
        step,
        total,
    ]


def _quality(result: Result) -> float:
    if result.task == "language modelling":
        return Score(result.test_loss, result.test_accuracy).perplexity
    return 100 * result.test_accuracy


def _step(result: Result) -> float | None:
    return result.step_ms_low_rank or result.step_ms_dense


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """The median over seeds: on a machine that others use, one run can be disturbed."""
    known = [own / base for own, base in pairs if own and base]
    return f"{statistics.median(known):.2f}" if known else ""


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _rich(lines: Sequence[Sequence[str]]) -> Table:
    table = numbers(*HEADINGS)
    for line in lines:
        table.add_row(*line)
    return table


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    return [*head, *("| " + " | ".join(line) + " |" for line in lines)]
