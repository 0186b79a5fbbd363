"""Records of a run: a file with one JSON object per line, written as things happen.

Lines have a key `event`: start, plan, epoch, switch, finalize, resume, finish.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rankwise.errors import CheckpointError, OptionError
from rankwise.training.recipe import Recipe

NAME = "records.jsonl"


class Records:
    """Appends lines, each on disk before the next thing happens.

    A torn last line, left by a crash, is cut off before the first one is added.

    Raises:
        CheckpointError: the folder or file cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error

    def append(self, event: str, **values: Any) -> dict[str, Any]:
        """Write one line and return it."""
        record = {"event": event, **values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        return record

    def _failure(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"records cannot be written to {self.path}: {error.strerror or error}; make room or "
            f"choose another folder (--out); what was saved continues with --resume"
        )

    def close(self) -> None:
        """Close the file; a line that a full disk left in its buffer is given up."""
        try:
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError:
            # The first error is the one to read.
            if error is None:
                raise


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a torn last line is left out.

    Where a run was resumed from an earlier step than its records had reached, the lines that it
    went through again are given once, as they came out last.

    Args:
        path: the file, or the run's folder.

    Raises:
        CheckpointError: there is no such file, or a line in its midst is no record.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"records {path} cannot be read: {error}") from error
    kept: list[dict[str, Any]] = []
    # What follows the last newline is empty, or torn.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number} is no record: {error}") from error
        if not isinstance(record, dict) or "event" not in record:
            raise CheckpointError(f"{path}, line {number} is no record: it has no 'event'")
        if record["event"] == "resume":
            kept = [r for r in kept if r.get("step", 0) <= record["step"]]
        kept.append(record)
    return kept


def last(records: list[dict[str, Any]], event: str) -> dict[str, Any] | None:
    """The latest line of one kind."""
    return next((r for r in reversed(records) if r["event"] == event), None)


def recipe_of(directory: Path) -> Recipe | None:
    """The recipe of the run that a folder holds; None if it holds none."""
    if not (directory / NAME).exists():
        return None
    start = last(read(directory), "start")
    return None if start is None else Recipe.from_mapping(start["recipe"])


def place(recipe: Recipe, *, again: bool = False) -> Path:
    """The folder a run goes to: `recipe.out`, or the first free runs/MODEL-METHOD-SEED[-N].

    Args:
        recipe: of the run.
        again: a folder that holds a run of the same recipe counts as free.

    Raises:
        OptionError: `recipe.out` holds another run.
    """

    def free(directory: Path) -> bool:
        held = recipe_of(directory)
        return held is None or (again and not held.difference(recipe))

    if recipe.out is not None:
        if not free(Path(recipe.out)):
            raise OptionError(
                f"{recipe.out} already holds a run; continue it with --resume {recipe.out}, or "
                "choose another --out"
            )
        return Path(recipe.out)
    # Names of other libraries' networks hold characters that no folder should, and overrides.
    model = re.sub(r"[^\w.-]+", "-", recipe.model)[:80]
    stem = f"{model}-{recipe.method}-{recipe.seed}"
    numbered = (Path("runs") / (f"{stem}-{n}" if n > 1 else stem) for n in range(1, 1_000_000))
    return next(directory for directory in numbered if free(directory))


def finished(directory: Path, recipe: Recipe) -> Mapping[str, Any] | None:
    """The `finish` line of a folder, if its run is complete and of the same recipe."""
    held = recipe_of(directory)
    if held is None or held.difference(recipe):
        return None
    return last(read(directory), "finish")


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
