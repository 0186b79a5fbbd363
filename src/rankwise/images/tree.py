"""A folder of files, or an archive that holds one: what is in it, and its content by name.

Names are relative, with `/` between their parts; what begins with a dot is not there. Nothing is
unpacked, and no name that leaves the archive is ever followed.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import Protocol

from rankwise.errors import DataError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
LARGEST_FILE = 256 * 2**20  # bytes
LARGEST_ARCHIVE = 4 * 2**30  # bytes of what a tar file holds; all of it is in memory at once

# What zipfile, tarfile and their decompressors raise at files that they cannot read: at encrypted
# ones RuntimeError, at a compression that they do not know NotImplementedError.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class Tree(Protocol):
    """Files by name, wherever they are kept."""

    @property
    def place(self) -> Path:
        """The folder or the archive."""
        ...

    def has_folder(self, name: str) -> bool:
        """Whether there is such a folder; the whole tree is the folder of the name ''."""
        ...

    def folders(self, name: str) -> list[str]:
        """Names of the folders directly in a folder, without what is above them, sorted."""
        ...

    def files(self, name: str, suffixes: Collection[str] = ()) -> Iterator[tuple[str, int]]:
        """Names and bytes of the files in a folder in depth, in the order of their names.

        Args:
            name: of the folder.
            suffixes: in small letters; others are passed over. None given: all files.
        """
        ...

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            DataError: it cannot be read, or is larger than `LARGEST_FILE`.
        """
        ...


def open_tree(path: str | Path) -> Tree:
    """The tree of a folder, or of a tar (also gz, xz, bz2) or zip archive.

    Raises:
        DataError: there is nothing, or an archive is damaged or too large.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; name a folder of images or an archive of one")
    if not path.name.lower().endswith(ARCHIVES):
        raise DataError(
            f"{path} is a file, not a folder; folders and archives ({', '.join(ARCHIVES)}) are read"
        )
    try:
        return Archive(path)
    except DAMAGED as error:
        raise DataError(f"{path} is damaged ({error}); get it anew") from error


def path_of(tree: Tree, name: str) -> str:
    """How messages call a file or a folder of a tree."""
    return f"{tree.place}/{name}" if name else str(tree.place)


class Folder:
    """A folder of the file system; links are followed, and end where they come back."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def has_folder(self, name: str) -> bool:
        """Whether there is such a folder."""
        return Path(path_of(self, name)).is_dir()

    def folders(self, name: str) -> list[str]:
        """Names of the folders directly in a folder."""
        return [entry.name for entry in self._entries(name) if _is(entry.is_dir)]

    def files(self, name: str, suffixes: Collection[str] = ()) -> Iterator[tuple[str, int]]:
        """Names and bytes of the files in a folder in depth."""
        return self._files(name, suffixes, frozenset())

    def read(self, name: str) -> bytes:
        """Content of a file."""
        path = Path(path_of(self, name))
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise DataError(_too_large(path, path.stat().st_size))
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    def _files(
        self, name: str, suffixes: Collection[str], above: frozenset[str]
    ) -> Iterator[tuple[str, int]]:
        real = os.path.realpath(path_of(self, name))
        if real in above:  # a link to a folder that holds it
            return
        prefix = f"{name}/" if name else ""
        for entry in self._entries(name):
            if _wanted(entry.name, suffixes) and _is(entry.is_file):
                yield prefix + entry.name, entry.stat().st_size
            elif _is(entry.is_dir):
                yield from self._files(prefix + entry.name, suffixes, above | {real})

    def _entries(self, name: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path_of(self, name)) as entries:
                return sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            raise DataError(f"{path_of(self, name)} cannot be read: {error}") from error


class Archive:
    """A tar or zip archive; a folder around everything is left out of the names.

    A tar file is read whole and once, as it has no directory; a zip file is read where asked.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._zip: zipfile.ZipFile | None = None
        self._contents: dict[str, bytes] = {}
        if place.name.lower().endswith(".zip"):
            self._zip = zipfile.ZipFile(place)
            sizes = {i.filename: i.file_size for i in self._zip.infolist() if not i.is_dir()}
        else:
            self._contents = _contents(place)
            sizes = {name: len(content) for name, content in self._contents.items()}
        shown = {name: size for name, size in sizes.items() if _inside(name)}
        around = _around(shown)
        self._kept = {name[len(around) :]: name for name in shown}
        ordered = sorted(self._kept, key=lambda name: name.split("/"))
        self._sizes = {name: shown[self._kept[name]] for name in ordered}
        self._children: dict[str, set[str]] = {"": set()}
        for name in ordered:
            parts = name.split("/")[:-1]
            for depth, part in enumerate(parts):
                self._children.setdefault("/".join(parts[:depth]), set()).add(part)
                self._children.setdefault("/".join(parts[: depth + 1]), set())

    @property
    def by_name(self) -> bool:
        """Whether one file can be read without the others: of zip archives."""
        return self._zip is not None

    def has_folder(self, name: str) -> bool:
        """Whether there is such a folder."""
        return name in self._children

    def folders(self, name: str) -> list[str]:
        """Names of the folders directly in a folder."""
        return sorted(self._children.get(name, ()))

    def files(self, name: str, suffixes: Collection[str] = ()) -> Iterator[tuple[str, int]]:
        """Names and bytes of the files in a folder in depth."""
        prefix = f"{name}/" if name else ""
        for each, size in self._sizes.items():
            if each.startswith(prefix) and _wanted(each, suffixes):
                yield each, size

    def read(self, name: str) -> bytes:
        """Content of a file."""
        path = path_of(self, name)
        kept = self._kept.get(name)
        if kept is None:
            raise DataError(f"{path} does not exist")
        if self._zip is None:
            return self._contents[kept]
        try:
            with self._zip.open(kept) as file:
                # One byte more than allowed: what a header says of a size need not be true.
                content = file.read(LARGEST_FILE + 1)
        except DAMAGED as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        if len(content) > LARGEST_FILE:
            raise DataError(_too_large(path, self._sizes[name]))
        return content


def _contents(place: Path) -> dict[str, bytes]:
    """Regular files of a tar archive; links are left out."""
    contents: dict[str, bytes] = {}
    total = 0
    with tarfile.open(place) as archive:
        for member in archive:
            if not member.isreg():
                continue
            total += member.size
            if total > LARGEST_ARCHIVE or member.size > LARGEST_FILE:
                raise DataError(
                    f"{place} holds more than fits in memory ({member.name} ends at "
                    f"{total / 2**30:.1f} GiB); unpack it and name the folder"
                )
            file = archive.extractfile(member)
            contents[member.name.removeprefix("./")] = b"" if file is None else file.read()
    return contents


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not name.startswith("/") and not any(part.startswith(".") for part in parts)


def _around(names: Collection[str]) -> str:
    """The folders that hold all the others: 'photos/' of photos/a/1.png and photos/b/1.png."""
    around = ""
    while True:
        rest = [name[len(around) :].split("/") for name in names]
        if not rest or len({parts[0] for parts in rest}) > 1 or min(map(len, rest)) < 3:
            return around
        around += rest[0][0] + "/"


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def _wanted(name: str, suffixes: Collection[str]) -> bool:
    return not suffixes or os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122


def _too_large(path: str | Path, size: int) -> str:
    return (
        f"{path} has {size / 2**20:,.0f} MiB, and files of up to {LARGEST_FILE / 2**20:.0f} MiB "
        "are read; remove it or make it smaller"
    )
