"""MNIST and Fashion-MNIST whole, from their published files: idx, compressed or plain.

LeCun, Cortes, Burges, The MNIST database of handwritten digits; Xiao, Rasul, Vollgraf,
Fashion-MNIST (arXiv 1708.07747): 60,000 and 10,000 grey images of 28x28 in ten classes. An idx
file is 0, 0, a type (8: bytes), the number of dimensions, each dimension as four bytes with the
highest first, and then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankwise.data import hub
from rankwise.data import places as usual
from rankwise.data.images.arrays import assemble
from rankwise.data.images.online import load_images
from rankwise.data.images.splits import Splits
from rankwise.data.parts import checksum_of
from rankwise.errors import DataError, OptionError, unknown

# Training images, training labels, test images, test labels; some copies write a dot for the dash.
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SIDE = 28
VALIDATION = 1 / 12  # of each class: 5,000 of 60,000, rounded in every class
LARGEST = 2**30  # bytes that one file's header may announce
BYTES = 8  # the type of every file of these sets


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published set: its classes, where torchvision keeps it, and how to get it.

    Attributes:
        classes: meaning of the labels.
        torchvision: folder below torchvision's `root`.
        obtain: what to do where it is missing.
        checksum: of the published files, as in `Splits`; empty where it is not pinned.
    """

    classes: tuple[str, ...]
    torchvision: str
    obtain: str
    checksum: str = ""


PUBLISHED: Mapping[str, Published] = {
    "fashion-mnist": Published(
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        torchvision="FashionMNIST",
        obtain="install the Debian package dataset-fashion-mnist, or download the files from "
        "https://github.com/zalandoresearch/fashion-mnist",
        checksum="14410854cf7a2894",
    ),
    "mnist": Published(
        classes=tuple("0123456789"),
        torchvision="MNIST",
        obtain="download the files, for example with "
        "torchvision.datasets.MNIST(root='data', download=True); or use mnist-5k, which needs no "
        "download",
    ),
}


def load_idx(name: str, *, progress: Callable[[int, int], None] | None = None) -> Splits:
    """Read a published set: a twelfth of each training class validates, the same one always.

    Args:
        name: `fashion-mnist` or `mnist`, alone or with `:` and a folder that holds the four
            files, or holds them where torchvision puts them. Without a folder, the usual places
            are looked through: `places`; then the Hub.
        progress: called with (images read, images in all) while the Hub's images are read.

    Returns:
        The splits; of Fashion-MNIST 55,000, 5,000 and 10,000 images (N, 1, 28, 28).

    Raises:
        OptionError: an unknown name, or `:` without a folder.
        DataError: files are missing, damaged or those of another set.
    """
    kind, colon, path = name.partition(":")
    if kind not in PUBLISHED:
        raise OptionError(unknown("data set", kind, PUBLISHED))
    if colon and not path:
        raise OptionError(f"data set '{name}' names no folder; write {kind}:PATH, or {kind} alone")
    try:
        found = _locate(kind, path)
    except DataError as absent:
        if path:
            raise
        return load_images(
            kind,
            PUBLISHED[kind].classes,
            size=SIDE,
            fraction=VALIDATION,
            absent=absent,
            give="give the folder of its files",
            progress=progress,
        )
    contents = [_read(file) for file in found]
    arrays = [_parse(*pair) for pair in zip(contents, found, strict=True)]
    checksum = checksum_of(contents)
    _check_identity(kind, checksum, found[0].parent)
    train = _labelled(arrays[0], arrays[1], found[:2])
    test = _labelled(arrays[2], arrays[3], found[2:])
    classes = PUBLISHED[kind].classes
    return assemble(kind, classes, [train, test], checksum=checksum, fraction=VALIDATION)


def places(name: str) -> list[Path]:
    """Folders that are looked through, in this order, when none is given.

    NAME, and torchvision's folder, below $RANKWISE_DATA; ~/.cache/rankwise/data (or what is below
    $XDG_CACHE_HOME); Debian's /usr/share/datasets; ./data.
    """
    return usual.places((name, str(Path(PUBLISHED[name].torchvision, "raw"))))


def _locate(name: str, given: str) -> list[Path]:
    """The four files, from the first place that has all of them."""
    if given:
        root = Path(given).expanduser()
        looked = [root, root / "raw", root / PUBLISHED[name].torchvision / "raw"]
        if not root.is_dir():
            looked = [root]
    else:
        looked = places(name)
    states = []
    for folder in looked:
        files = [_file(folder, stem) for stem in FILES]
        present = [file for file in files if file is not None]
        if len(present) == len(FILES):
            return present
        lacking = [stem for stem, file in zip(FILES, files, strict=True) if file is None]
        states.append(f"{folder} ({_state(folder, lacking)})")
    raise DataError(
        f"{name}: its files were looked for in {', '.join(states)}; {PUBLISHED[name].obtain}; "
        f"they are {', '.join(FILES)}, each plain or with .gz; put them into one of these folders, "
        f"or name another: {name}:PATH"
        + (
            ""
            if given
            else f", or RANKWISE_DATA in the environment; or read the Hub: {hub.INSTALL}"
        )
    )


def _state(folder: Path, lacking: list[str]) -> str:
    if not folder.is_dir():
        return "is no folder" if folder.exists() else "does not exist"
    return "has none of them" if len(lacking) == len(FILES) else f"lacks {', '.join(lacking)}"


def _file(folder: Path, stem: str) -> Path | None:
    names = (stem, stem.replace("-idx", ".idx"))
    paths = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path) -> bytearray:
    """The plain content of a file, and no more than its own header announces."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0":
                raise ValueError("it does not begin like an idx file")
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise ValueError("it ends within its header")
            expected = math.prod(_dimensions(sizes))
            if expected > LARGEST:
                raise ValueError(f"its header announces {expected / 2**30:,.1f} GiB")
            body = file.read(expected + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); get it anew") from error
    if len(body) != expected:
        held = f"{len(body):,}" if len(body) < expected else "more"
        raise DataError(
            f"{path} is damaged: its header announces {expected:,} values, it holds {held}; "
            "get it anew"
        )
    return bytearray(b"".join((head, sizes, body)))  # an array made of it can be written to


def _dimensions(sizes: bytes | bytearray) -> tuple[int, ...]:
    return tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))


def _parse(content: bytearray, path: Path) -> np.ndarray:
    """Values of a whole idx file, uint8: (N, 28, 28) or (N,)."""
    kind, count = content[2], content[3]
    shape = _dimensions(content[4 : 4 + 4 * count])
    wanted = (SIDE, SIDE) if "images" in path.name else ()
    if kind != BYTES or shape[1:] != wanted or count != 1 + len(wanted):
        like = " x ".join(("N", *map(str, wanted)))
        raise DataError(
            f"{path} holds {' x '.join(map(str, shape)) or 'no'} values of type {kind:#04x}, not "
            f"{like} bytes (type {BYTES:#04x}); it is a file of another set"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * count).reshape(shape)


def _labelled(
    images: np.ndarray, labels: np.ndarray, paths: list[Path]
) -> tuple[np.ndarray, np.ndarray]:  # -> (N, 28, 28, 1) uint8, (N,) int64
    if len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{paths[0]} holds {len(images):,} images and {paths[1].name} {len(labels):,} labels; "
            "they are not of one set: get both anew"
        )
    if labels.max() > 9:
        raise DataError(
            f"{paths[1]} holds the label {labels.max()}, and these sets have the classes 0 to 9; "
            "it is a file of another set"
        )
    return images[..., None], labels.astype(np.int64)


def _check_identity(name: str, checksum: str, folder: Path) -> None:
    # The two sets have the same file names and sizes, and are easily mistaken for each other.
    for other, published in PUBLISHED.items():
        if other != name and published.checksum == checksum:
            raise DataError(f"{folder} holds {other}, not {name}; write {other}:{folder}")
