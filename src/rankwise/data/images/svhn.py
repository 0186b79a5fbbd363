"""SVHN (Netzer et al. 2011): house numbers, 73,257 and 26,032 digits of 32x32 in colour.

The cropped digits are read from the published MATLAB files, version 5, by what the format's
description says of arrays of numbers; nothing else in such a file is looked at. The 531,131 easier
digits of the extra part are not read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rankwise.data import hub, places
from rankwise.data.images.arrays import Part, assemble, check_side
from rankwise.data.images.folder import Progress
from rankwise.data.images.online import load_images
from rankwise.data.images.splits import Splits
from rankwise.data.parts import checksum_of
from rankwise.errors import DataError

CLASSES = tuple("0123456789")
FILES = ("train_32x32.mat", "test_32x32.mat")
NAMES = ("svhn", "SVHN", "")  # folders that hold them; torchvision's is the root itself
SIDE = 32
VALIDATION = 0.1  # of each training class
LARGEST = 2**30  # bytes of an array
OBTAIN = (
    f"download {' and '.join(FILES)} from http://ufldl.stanford.edu/housenumbers, or install the "
    f"package that reads the Hub ({hub.INSTALL})"
)

HEADER = 128  # bytes before the first element
COMPRESSED, MATRIX = 15, 14  # types of elements
# Types of elements that are numbers.
NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}


def load_svhn(path: str = "", *, size: int = SIDE, progress: Progress | None = None) -> Splits:
    """Read the cropped digits; a tenth of each training class validates, the same one always.

    Args:
        path: the folder of the two files; without one the usual places are looked through, then
            the Hub.
        size: side of the images in pixels.
        progress: called with (images read, images in all) while the Hub's images are read.

    Raises:
        DataError: a file is missing, damaged or of another set.
    """
    check_side(size)
    looked = [Path(path).expanduser()] if path else places.places(NAMES)
    folder = next((p for p in looked if all((p / file).is_file() for file in FILES)), None)
    if folder is None:
        if path:
            raise DataError(f"svhn: {path} does not hold {' and '.join(FILES)}; {OBTAIN}")
        return load_images(
            "svhn",
            CLASSES,
            size=size,
            fraction=VALIDATION,
            absent=places.missing("svhn", [f"svhn/{file}" for file in FILES], OBTAIN),
            give="give the folder of its files",
            progress=progress,
        )
    parts, contents = [], []
    for file in FILES:
        contents.append(_content(folder / file))
        parts.append(_part(contents[-1], folder / file))
    return assemble(
        "svhn", CLASSES, parts, checksum=checksum_of(contents), size=size, fraction=VALIDATION
    )


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path} is larger than {LARGEST / 2**30:.0f} GiB; it is another file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _part(content: bytes, path: Path) -> Part:
    try:
        arrays = dict(_arrays(content))
    except (ValueError, struct.error, zlib.error, OverflowError) as error:
        raise DataError(f"{path} is damaged or no MATLAB file of version 5 ({error})") from error
    images, labels = arrays.get("X"), arrays.get("y")
    if images is None or labels is None:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'no arrays'}, not X and y: another file"
        )
    if images.dtype != np.uint8 or images.shape[:3] != (SIDE, SIDE, 3) or images.ndim != 4:
        raise DataError(
            f"{path}: X is {' x '.join(map(str, images.shape))} of {images.dtype}, not "
            f"{SIDE} x {SIDE} x 3 x N bytes; it is a file of another set"
        )
    # The digit 0 is the class 10.
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.reshape(-1).astype(
        np.int64
    ) % 10


def _arrays(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the arrays of numbers in a file."""
    if len(content) < HEADER or content[HEADER - 2 : HEADER] not in (b"IM", b"MI"):
        raise ValueError("its header is missing")
    order = "<" if content[HEADER - 2 : HEADER] == b"IM" else ">"
    for kind, body in _elements(content[HEADER:], order):
        if kind == COMPRESSED:
            unpacked = zlib.decompressobj().decompress(body, LARGEST + 1)
            if len(unpacked) > LARGEST:
                raise ValueError(f"an array of more than {LARGEST / 2**30:.0f} GiB")
            (kind, body), *_ = _elements(unpacked, order)
        if kind == MATRIX:
            yield _array(body, order)


def _array(body: memoryview | bytes, order: str) -> tuple[str, np.ndarray]:
    parts = list(_elements(body, order))
    if len(parts) < 4 or parts[3][0] not in NUMBERS:
        raise ValueError("an array of something else than numbers")
    shape = np.frombuffer(parts[1][1], f"{order}i4")
    name = bytes(parts[2][1]).decode("ascii", "replace")
    values = np.frombuffer(parts[3][1], order + NUMBERS[parts[3][0]])
    return name, values.reshape(tuple(shape.tolist()), order="F")


def _elements(content: memoryview | bytes, order: str) -> Iterator[tuple[int, memoryview]]:
    """Types and bodies of the elements that follow each other."""
    view, at = memoryview(content), 0
    while at + 8 <= len(view):
        kind, length = struct.unpack_from(f"{order}II", view, at)
        start = at + 8
        if kind >> 16:  # up to four bytes, inside the head
            kind, length, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + length > len(view):
            raise ValueError(f"an element of {length:,} bytes ends behind the end")
        yield kind, view[start : start + length]
        # All but compressed ones are filled up to eight bytes.
        end = max(start + length, at + 8)
        at = end if kind == COMPRESSED else end + -end % 8
