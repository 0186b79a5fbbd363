"""History: what the records of one run say; no line of them is trusted.

A file of records may come from anybody, from another version, or from a run that still writes it.
So every line is read by itself: what is no record is left out and counted, every text is made
printable, and whoever asks for a number gets one, or None.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.errors import CheckpointError, nearest

NAME = "records.jsonl"
LONGEST_LINE = 2**24  # bytes; a plan of ten thousand layers has 2**22
LONGEST_TEXT = 400
DEEPEST = 6  # brackets inside each other; records have three
_MOST_LISTED = 5

# What a line of this kind must hold to be of use.
_NEEDED: Mapping[str, tuple[str, type]] = {
    "start": ("recipe", dict),
    "plan": ("layers", list),
    "epoch": ("epoch", float),
    "stable ranks": ("values", dict),
    "gains": ("rows", list),
    "settled": ("layers", dict),
    "ranks": ("layers", dict),
    "switch": ("step", float),
    "resume": ("step", float),
}


def number(record: Any, key: str) -> float | None:
    """A number of a record; None if there is none, or it is no float."""
    value = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def finite(record: Any, key: str) -> float | None:
    """A number of a record that is neither infinite nor NaN."""
    value = number(record, key)
    return value if value is not None and math.isfinite(value) else None


def text(record: Any, key: str, default: str = "") -> str:
    """A text of a record."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return value if isinstance(value, str) else default


def mapping(record: Any, key: str) -> dict[str, Any]:
    """A table of a record; empty if there is none."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return value if isinstance(value, dict) else {}


def pair(record: Any, key: str) -> tuple[float, float] | None:
    """Two finite numbers of a record, before and after."""
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, list) or len(value) != 2:
        return None
    both = [finite({"": entry}, "") for entry in value]
    return None if None in both else (both[0] or 0.0, both[1] or 0.0)


def printable(value: str) -> str:
    """A text on one line without control characters, which a terminal or a reader might obey."""
    line = " ".join(value.split())
    line = "".join(c if c.isprintable() else "�" for c in line[: LONGEST_TEXT + 1])
    return line if len(line) <= LONGEST_TEXT else line[:LONGEST_TEXT] + "…"


@dataclass(frozen=True)
class History:
    """The records of one run.

    Attributes:
        path: the file.
        records: its lines, oldest first. Where a run was resumed from an earlier step than its
            records had reached, what it went through again is given once, as it came out last.
        skipped: lines that are no records, or lack what their kind must hold.
        torn: whether the last line is unfinished: the run writes it, or was cut off there.
        age: seconds since the file was last written.
    """

    path: Path
    records: Sequence[dict[str, Any]]
    skipped: int = 0
    torn: bool = False
    age: float = 0.0

    def all(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind, in order."""
        return [record for record in self.records if record["event"] == event]

    def last(self, event: str) -> dict[str, Any]:
        """The latest line of one kind; empty if there is none."""
        return next((r for r in reversed(self.records) if r["event"] == event), {})

    @property
    def name(self) -> str:
        """The run's folder."""
        return printable(self.path.resolve().parent.name) or "run"

    @cached_property
    def start(self) -> dict[str, Any]:
        """The first line: recipe, data, versions, hardware; empty if it is missing."""
        return self.last("start")

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe, as recorded."""
        return mapping(self.start, "recipe")

    @cached_property
    def finish(self) -> dict[str, Any]:
        """The closing figures; empty if the run has not ended."""
        return self.last("finish")

    def fact(self, name: str) -> str:
        """What the run's recipe, or its closing line, says of itself: model, method, seed."""
        for source in (self.recipe, self.finish):
            value = source.get(name)
            if isinstance(value, (str, int, float)):
                return str(value)
        return "unknown"

    @property
    def data(self) -> str:
        """Name of the data set."""
        return text(mapping(self.start, "data"), "name") or self.fact("data")

    @property
    def language(self) -> bool:
        """Whether the network writes text: perplexity tells more than accuracy."""
        task = text(mapping(self.start, "data"), "task") or text(self.finish, "task")
        return task in ("language modelling", "translation")

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of the epochs, in order."""
        return sorted(self.all("epoch"), key=lambda record: number(record, "epoch") or 0.0)

    @property
    def planned_epochs(self) -> float | None:
        """Epochs that the recipe asks for."""
        return finite(self.recipe, "epochs") or finite(self.finish, "epochs")

    @cached_property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in an epoch, from lines that name both; None if none does."""
        for record in (*reversed(self.epochs), *self.all("stable ranks")):
            step, epoch = finite(record, "step"), finite(record, "epoch")
            if step and epoch and step > 0 and epoch > 0:
                return step / epoch
        return None

    @property
    def unit(self) -> str:
        """What `when` counts in: epoch, or step where nothing tells how long an epoch is."""
        return "epoch" if self.steps_per_epoch else "step"

    def when(self, record: Mapping[str, Any]) -> float | None:
        """How far the run had come, in `unit`s; None for a line that does not say."""
        if self.steps_per_epoch is None:
            return finite(record, "step")
        epoch, step = finite(record, "epoch"), finite(record, "step")
        if epoch is not None:
            return epoch
        return None if step is None else step / self.steps_per_epoch

    @property
    def switches(self) -> list[float]:
        """When the structure changed."""
        return [x for r in self.all("switch") if (x := self.when(r)) is not None]

    def curve(self, key: str) -> list[tuple[float, float]]:
        """A figure of the epochs over time: loss, validation_accuracy, lr, step_ms."""
        found = ((number(r, "epoch"), number(r, key)) for r in self.epochs)
        return [(x, y) for x, y in found if x is not None and y is not None]

    @cached_property
    def stable_ranks(self) -> dict[str, list[tuple[float, float]]]:
        """Layer -> its scaled stable rank over time; NaN where it could not be measured."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for record in self.all("stable ranks"):
            when = self.when(record)
            if when is None:
                continue
            for name in record["values"]:
                value = number(record["values"], name)
                curves.setdefault(name, []).append((when, math.nan if value is None else value))
        return curves

    @property
    def state(self) -> str:
        """One line on a run that has not ended; empty for one that has."""
        if self.finish:
            return ""
        done, total = len(self.epochs), self.planned_epochs
        of = f" of {total:g}" if total else ""
        return (
            f"not finished: in progress, or interrupted; {done}{of} epochs so far, last line "
            f"written {_ago(self.age)} ago"
        )

    @property
    def doubts(self) -> list[str]:
        """What is missing or was left out, in words."""
        found = []
        if not self.start:
            found.append("the line with recipe and hardware is missing")
        if self.skipped:
            found.append(
                f"{self.skipped} line{'s' if self.skipped > 1 else ''} left out: no record"
            )
        if self.torn:
            found.append("the last line is unfinished, and left out")
        return found


def read(path: str | Path) -> History:
    """The records of a run.

    Args:
        path: the run's folder, or the file.

    Raises:
        CheckpointError: no such folder, or no records in it; names the runs that are near.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    try:
        content = file.read_bytes()
        age = max(0.0, time.time() - file.stat().st_mtime)
    except (OSError, ValueError) as error:
        raise CheckpointError(_missing(path)) from error
    *lines, rest = content.split(b"\n")
    kept: list[dict[str, Any]] = []
    skipped = 0
    unfinished = _record(rest) if rest.strip() else None
    for record in (*map(_record, filter(None, map(bytes.strip, lines))), unfinished):
        if record is None:
            skipped += 1
            continue
        if record["event"] == "resume":
            reached = number(record, "step") or 0.0
            kept = [r for r in kept if (number(r, "step") or 0.0) <= reached]
        kept.append(record)
    # The rest of a file that ends with a whole line is empty: counted above, but no line.
    skipped -= unfinished is None
    if not kept:
        raise CheckpointError(f"{file} holds no records: of its {skipped} lines none can be read")
    torn = bool(rest.strip()) and unfinished is None
    return History(file, tuple(kept), skipped, torn, age)


def _record(line: bytes) -> dict[str, Any] | None:
    """One line as a record; None if it is none."""
    if len(line) > LONGEST_LINE:
        return None
    try:
        record = _clean(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    key, kind = _NEEDED.get(record["event"], ("event", str))
    fits = number(record, key) is not None if kind is float else isinstance(record.get(key), kind)
    return record if fits else None


def _clean(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return printable(value)
    if not isinstance(value, (dict, list)):
        return value
    if depth == DEEPEST:
        return None
    if isinstance(value, list):
        return [_clean(entry, depth + 1) for entry in value]
    return {printable(key): _clean(entry, depth + 1) for key, entry in value.items()}


def _missing(path: Path) -> str:
    if path.is_dir():
        inside = sorted(p.parent.name for p in _runs(path))
        if inside:
            more = f" and {len(inside) - _MOST_LISTED} more" if len(inside) > _MOST_LISTED else ""
            return (
                f"{path} is no run itself, but holds {', '.join(inside[:_MOST_LISTED])}{more}; "
                f"name them: rankwise report {path / '*'}"
            )
        return f"{path} holds no run: there is no {NAME} in it{_near(path)}"
    if path.exists():
        return f"{path} cannot be read; name a run's folder, or its {NAME}"
    return f"there is no run {path}{_near(path)}"


def _near(path: Path) -> str:
    """The runs beside a path, and those in `runs`, whose names come closest."""
    found = {p.parent.name: p.parent for p in (*_runs(path.parent), *_runs(Path("runs")))}
    close = nearest(path.name, found)
    if close:
        return f"; did you mean {', '.join(str(found[name]) for name in close)}?"
    return f"; runs near: {', '.join(sorted(found)[:_MOST_LISTED])}" if found else ""


def _runs(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.glob(f"*/{NAME}")
    except OSError:
        return


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{seconds:.0f} s"
