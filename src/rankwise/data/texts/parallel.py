"""Where pairs of lines are read from: tab-separated files, folders in two languages, Multi30k.

Multi30k (Elliott et al., arXiv 1605.00459): 31,014 descriptions of pictures in English and German.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rankwise.data import hub
from rankwise.errors import DataError, OptionError, unknown

MULTI30K = "multi30k"
HUB = "bentrevett/multi30k"
HELD_OUT = 0.1  # share of a file that validates, and share that tests
LARGEST = 2**30  # bytes of a file
# What the parts are called in the files of common sets, the first that is there.
PARTS = {
    "training": ("train",),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "test2016", "test_2016_flickr"),
}

Pairs = list[tuple[str, str]]


def read_pairs(name: str, languages: str | None) -> list[Pairs]:
    """Training, validation and test part of a name of `load_pairs`, as written.

    Raises:
        OptionError: an unknown name, no path, or languages that are missing or make no sense.
        DataError: a file is missing or malformed, the package datasets is missing, or the Hub
            cannot be reached.
    """
    kind, _, path = name.partition(":")
    both = None if languages is None else _both(languages)
    if kind == MULTI30K:
        # The published programs translate from German, in lower case.
        both = both or ("de", "en")
        parts = _folder(Path(path), both) if path else _from_hub(both)
        return [[(source.lower(), target.lower()) for source, target in part] for part in parts]
    if kind != "pairs":
        raise OptionError(unknown("text in pairs", name, ("pairs:PATH", MULTI30K)))
    if not path:
        raise OptionError(f"data set '{name}' names no file or folder; write pairs:PATH")
    if Path(path).expanduser().is_dir():
        return _folder(Path(path), both)
    if both is not None:
        raise OptionError(
            f"languages={languages}: {path} is no folder; in a file the source comes first in "
            "every line, so leave it out"
        )
    return _cut(_file(Path(path)))


def _both(languages: str) -> tuple[str, str]:
    source, dash, target = languages.partition("-")
    if not (source and dash and target) or "-" in target or source == target:
        raise OptionError(
            f"languages={languages!r}: write source and target with a dash between, as in de-en"
        )
    return source, target


def _file(path: Path) -> Pairs:
    pairs: Pairs = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        source, tab, target = line.partition("\t")
        if not tab or "\t" in target:
            raise DataError(
                f"{path}, line {number}: {line.count(chr(9))} tabs, not 1; per line it must hold "
                "a source, a tab and its target"
            )
        pairs.append((source, target))
    return pairs


def _cut(pairs: Pairs) -> list[Pairs]:
    held = round(HELD_OUT * len(pairs))
    first, second = len(pairs) - 2 * held, len(pairs) - held
    return [pairs[:first], pairs[first:second], pairs[second:]]


def _folder(folder: Path, both: tuple[str, str] | None) -> list[Pairs]:
    folder = folder.expanduser()
    if both is None:
        endings = sorted({p.suffix[1:] for p in folder.glob("train.*")})
        shown = ", ".join(endings) or "none"
        raise OptionError(
            f"pairs:{folder}: a folder does not say which language is the source; set languages, "
            f"as in de-en (files of the training part are there for: {shown})"
        )
    return [_side_by_side(folder, names, both) for names in PARTS.values()]


def _side_by_side(folder: Path, names: Sequence[str], both: tuple[str, str]) -> Pairs:
    for name in names:
        paths = [folder / f"{name}.{language}" for language in both]
        if all(path.is_file() for path in paths):
            break
    else:
        wanted = " or ".join(f"{name}.{both[0]} and {name}.{both[1]}" for name in names)
        raise DataError(f"{folder} must hold {wanted}")
    sides = [_lines(path) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"{paths[0]} has {len(sides[0]):,} lines and {paths[1].name} has {len(sides[1]):,}; "
            "line by line they must be translations of each other"
        )
    return list(zip(*sides, strict=True))


def _lines(path: Path) -> list[str]:
    path = path.expanduser()
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise DataError(
                f"{path} has {size / 2**30:.1f} GiB, and files of up to {LARGEST / 2**30:.0f} GiB "
                "are read into memory; cut it"
            )
        text = path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start:,}); convert it") from error
    # Not splitlines: other marks than these may stand within a line.
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _from_hub(both: tuple[str, str]) -> list[Pairs]:
    instead = f"give the folder of its files: {MULTI30K}:PATH"
    loaded = hub.load(MULTI30K, HUB, instead=instead)
    return [_columns(loaded[part], both) for part in ("train", "validation", "test")]


def _columns(rows: Any, both: tuple[str, str]) -> Pairs:
    known: Iterable[str] = getattr(rows, "column_names", None) or rows.keys()
    for language in both:
        if language not in known:
            raise OptionError(unknown(f"language of {MULTI30K}", language, known))
    return list(zip(*(rows[language] for language in both), strict=True))
