"""Texts of many documents that are streamed, never whole in memory: C4, CNN/DailyMail, files.

C4 (Raffel et al., arXiv 1910.10683) has 365 million pages; CNN/DailyMail (Hermann et al.,
1506.03340) 287,000 articles. A document is a line of JSON in files, gzipped or not, or a row of the
Hugging Face Hub.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data import hub
from rankwise.errors import DataError

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
Reader = Callable[[int], Iterator[str]]  # called with the number of documents to skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """A set of documents on the Hub.

    Attributes:
        repository: OWNER/NAME.
        configuration: which form.
        column: of the text, on the Hub and in files.
        test: the Hub's test part; None where there is none.
    """

    repository: str
    configuration: str
    column: str
    test: str | None


PUBLISHED: Mapping[str, Published] = {
    "c4": Published(repository="allenai/c4", configuration="en", column="text", test=None),
    "cnn-dailymail": Published(
        repository="abisee/cnn_dailymail", configuration="3.0.0", column="article", test="test"
    ),
}


@dataclass(frozen=True)
class Documents:
    """Three readers. Where two are the same, the parts follow each other in it.

    Attributes:
        train: all documents that train, from a number on.
        held: documents at the beginning of `train` that do not train.
        validation: those that choose.
        test: those that are looked at once, behind `tested` others.
        tested: documents of `test` that validate.
    """

    train: Reader
    held: int
    validation: Reader
    test: Reader
    tested: int


def find_documents(name: str, path: str, held: int) -> Documents:
    """The parts of a name of `PUBLISHED`.

    Without a test part the documents behind those that validate test; files without a validation
    part give up their first documents for both.

    Args:
        name: a key of `PUBLISHED`.
        path: a file, or a folder with files *train*, *validation* and perhaps *test*; without, the
            Hub.
        held: documents that validate, and as many that test.

    Raises:
        DataError: there are no such files, the package datasets is missing, or the Hub cannot be
            reached.
    """
    entry = PUBLISHED[name]
    parts = _in_files(Path(path), entry) if path else _on_hub(name, entry)
    train, validation, test = (parts.get(part) for part in ("train", "validation", "test"))
    assert train is not None
    first = 0 if validation is not None else held if test is not None else 2 * held
    validation = train if validation is None else validation
    if test is None:
        return Documents(train, first, validation, validation, held)
    return Documents(train, first, validation, test, 0)


def _on_hub(name: str, entry: Published) -> dict[str, Reader]:
    def reader(part: str) -> Reader:
        def read(skip: int) -> Iterator[str]:
            where = (name, entry.repository, entry.configuration)
            instead = f"give the folder of its files: {name}:PATH"
            for row in hub.rows(*where, part=part, skip=skip, instead=instead):
                yield row[entry.column]

        return read

    parts = ("train", "validation", *((entry.test,) if entry.test else ()))
    return {part: reader(part) for part in parts}


def _in_files(place: Path, entry: Published) -> dict[str, Reader]:
    place = place.expanduser()
    found = [place] if place.is_file() else sorted(p for p in place.glob("*") if _is_lines(p))
    if not found:
        raise DataError(
            f"{place} holds no documents: give a file of JSON lines, or a folder of them "
            f"({', '.join(ENDINGS)}), each line with a key {entry.column!r} or 'text'"
        )
    parts: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for path in found:
        named = (part for part in ("validation", "test") if part in path.name)
        parts[next(named, "train")].append(path)
    if not parts["train"]:
        raise DataError(
            f"{place} has files of validation or test alone; those that train are missing"
        )
    return {part: _reader(paths, entry.column) for part, paths in parts.items() if paths}


def _is_lines(path: Path) -> bool:
    return path.is_file() and path.name.endswith(ENDINGS)


def _reader(paths: list[Path], column: str) -> Reader:
    def read(skip: int) -> Iterator[str]:
        lines = itertools.chain.from_iterable(map(_lines, paths))
        # What is skipped is not parsed.
        for path, number, line in itertools.islice(lines, skip, None):
            yield _text(path, number, line, column)

    return read


def _lines(path: Path) -> Iterator[tuple[Path, int, str]]:
    opened: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield path, number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _text(path: Path, number: int, line: str, column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is no JSON: {error}") from error
    text = row.get(column, row.get("text")) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"{path}, line {number} has no text: a line is an object with a key {column!r} or "
            "'text'"
        )
    return text
