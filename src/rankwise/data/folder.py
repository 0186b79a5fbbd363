"""Images in folders: one folder a class, as photographs and benchmarks are usually kept."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rankwise.data.splits import Splits, normalised, stratified
from rankwise.errors import DataError, OptionError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_NAMES = ("val", "valid", "validation")
LARGEST_FILE = 256 * 2**20  # bytes
LARGEST_IMAGE = 64_000_000  # pixels; decoded at 3 bytes each before it is made small
LARGEST_SET = 4 * 2**30  # bytes of the decoded float32 images
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
PROBED = 16  # images whose mode decides between grey and colour

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class _File:
    path: Path
    label: int


def load_folder(
    root: str | Path, *, size: int = 32, progress: Callable[[int, int], None] | None = None
) -> Splits:
    """Read a folder of images into memory.

    Layouts: `train`, `val` and `test` with class folders inside; only `train` and `test`, then
    a tenth of each training class validates; or class folders directly, cut 80/10/10 within each
    class. The cut is the same always. Class folders are searched in depth; hidden entries and
    files without an image's suffix are passed over.

    Every image is scaled to `size` by its shorter side and cropped to the central square, on
    white where it is transparent. All are read as grey if 16 of them, evenly spaced, are.

    Args:
        root: the folder.
        size: side of the images in pixels, at least 1.
        progress: called with (images read, images in all) after each image.

    Raises:
        OptionError: `size` is below 1.
        DataError: no such folder, no classes, a class without images, an unreadable or enormous
            image, more than 4 GiB in all, or Pillow is missing.
    """
    if size < 1:
        raise OptionError(f"size={size}; images need a side of at least 1 pixel")
    pillow = _pillow()
    root = Path(root).expanduser()
    classes, parts = _layout(root)
    files = [file for part in parts for file in part]
    channels = 1 if _all_grey(pillow, files) else 3
    needed = 4 * len(files) * channels * size * size
    if needed > LARGEST_SET:
        raise DataError(
            f"{root}: {len(files):,} images of {channels}x{size}x{size} take "
            f"{needed / 2**30:.1f} GiB, and at most {LARGEST_SET / 2**30:.0f} GiB are read into "
            "memory; choose a smaller size or fewer images"
        )
    digest, images = hashlib.sha256(), np.empty((len(files), channels, size, size), np.uint8)
    for index, file in enumerate(files):
        content = _content(file.path)
        digest.update(f"{file.path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
        images[index] = _decode(pillow, content, file.path, channels, size)
        if progress is not None:
            progress(index + 1, len(files))
    labels = np.array([file.label for file in files], dtype=np.int64)
    cut = _cut(labels, [len(part) for part in parts], classes)
    train, validation, test = normalised([(images[part], labels[part]) for part in cut])
    return Splits(
        name=f"folder:{root}",
        classes=classes,
        train=train,
        validation=validation,
        test=test,
        checksum=digest.hexdigest()[:16],
    )


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            'reading image folders needs Pillow: pip install "rankwise[images]"'
        ) from error
    return Image


def _layout(root: Path) -> tuple[tuple[str, ...], list[list[_File]]]:
    """Class names, and the files of train (or of all), validation if there is one, and test."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; name a folder that holds one folder of images a class")
    folders = {path.name: path for path in _subfolders(root)}
    if "train" not in folders:
        if "test" in folders:
            raise DataError(
                f"{root} has test but no train; name the training folder train, or hold class "
                "folders only"
            )
        return _classes(root), [_files(root, _classes(root))]
    validation = [name for name in VALIDATION_NAMES if name in folders]
    if "test" not in folders or len(validation) > 1:
        raise DataError(
            f"{root} has train and {', '.join(sorted(set(folders) - {'train'})) or 'nothing else'}"
            f"; it needs a folder test, and at most one of {', '.join(VALIDATION_NAMES)} "
            "(without one, a tenth of train validates)"
        )
    classes = _classes(folders["train"])
    named = ["train", *validation, "test"]
    for name in named[1:]:
        foreign = sorted(set(_classes(folders[name])) - set(classes))
        if foreign:
            raise DataError(
                f"{folders[name]} has the class '{foreign[0]}', which {folders['train']} has not; "
                f"training knows {', '.join(classes)}"
            )
    return classes, [_files(folders[name], classes) for name in named]


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _subfolders(folder))
    if not names:
        raise DataError(
            f"{folder} holds no class folders; put the images of each class into a folder of its "
            "own, named after the class"
        )
    return names


def _files(folder: Path, classes: tuple[str, ...]) -> list[_File]:
    files = []
    for label, name in enumerate(classes):
        inside = folder / name
        if not inside.is_dir():
            continue
        found = [_File(path, label) for path in _images(inside, frozenset())]
        if not found:
            raise DataError(
                f"class folder {inside} holds no images ({', '.join(SUFFIXES)}); "
                "add some or remove the folder"
            )
        files.extend(found)
    return files


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that holds it
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _images(path, above | {real})
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def _cut(labels: np.ndarray, lengths: list[int], classes: tuple[str, ...]) -> list[np.ndarray]:
    """Indices of train, validation and test, from the parts that the folder already has."""
    bounds = np.cumsum([0, *lengths])
    parts = [np.arange(a, b) for a, b in pairwise(bounds)]
    if len(parts) == 3:
        return parts
    fractions = (0.1, 0.1) if len(parts) == 1 else (0.1,)
    return [*stratified(labels[parts[0]], fractions, classes), *parts[1:]]


def _all_grey(pillow: ModuleType, files: list[_File]) -> bool:
    chosen = np.linspace(0, len(files) - 1, min(PROBED, len(files))).astype(int)
    for index in chosen:
        path = files[index].path
        with _open(pillow, _content(path), path) as image:
            if image.mode not in ("1", "L", "LA") and not image.mode.startswith("I;16"):
                return False
    return True


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataError(
                f"{path} has {path.stat().st_size / 2**20:,.0f} MiB, and images of up to "
                f"{LARGEST_FILE / 2**20:.0f} MiB are read; remove it or make it smaller"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open(pillow: ModuleType, content: bytes, path: Path) -> Any:
    """The image without its pixels: only its header is parsed."""
    enormous = f"more than {LARGEST_IMAGE / 1e6:.0f} million pixels; remove it or make it smaller"
    try:
        with warnings.catch_warnings():
            # Pillow warns at its own limit, which lies above ours.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            image = pillow.open(io.BytesIO(content))
    except pillow.DecompressionBombError as error:
        raise DataError(f"{path} has {enormous}") from error
    except UNREADABLE as error:
        raise DataError(f"{path} is not a readable image ({error}); remove or repair it") from error
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        raise DataError(f"{path} is {width:,}x{height:,}: {enormous}")
    return image


def _decode(
    pillow: ModuleType, content: bytes, path: Path, channels: int, size: int
) -> np.ndarray:  # -> (C, size, size) uint8
    with _open(pillow, content, path) as image:
        try:
            # A JPEG can be decoded at a fraction of its size; twice the target keeps it sharp.
            image.draft(None, (2 * size, 2 * size))
            pixels = np.asarray(_small(pillow, image, channels, size))
        except UNREADABLE as error:
            raise DataError(
                f"{path} is damaged or of a kind that cannot be read ({error}); remove or repair it"
            ) from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _small(pillow: ModuleType, image: Any, channels: int, size: int) -> Any:
    mode = "L" if channels == 1 else "RGB"
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no fixed range; save it with 8 or 16")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        image = pillow.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return _square(pillow, image.convert(mode), size)
    # What lies below transparent pixels is arbitrary, and often black.
    image = _square(pillow, image.convert("RGBA"), size)
    return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image).convert(mode)


def _square(pillow: ModuleType, image: Any, size: int) -> Any:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), pillow.Resampling.BILINEAR, box=box, reducing_gap=3.0)
