"""Data sets of the Hugging Face Hub, through the package datasets; no code of theirs is run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from rankwise.data.arrays import Part, assemble
from rankwise.data.parts import checksum_of
from rankwise.data.splits import Splits
from rankwise.errors import DataError
from rankwise.images.decode import decode, pillow

INSTALL = "pip install 'rankwise[datasets]'"


def available() -> bool:
    """Whether the package datasets is installed; it is not imported."""
    if "datasets" in sys.modules:
        return sys.modules["datasets"] is not None
    return importlib.util.find_spec("datasets") is not None


def load(name: str, repository: str, *configuration: str, instead: str) -> Any:
    """A data set's parts by name.

    Args:
        name: how messages call it.
        repository: OWNER/NAME on the Hub.
        configuration: which of its forms, if there are several.
        instead: what to do where there is no package or no network, as it follows on "or" and ",".

    Raises:
        DataError: the package is missing, or the Hub cannot be reached.
    """
    datasets = _package(name, repository, instead)
    try:
        # The data are Parquet files; no code of theirs is run.
        return datasets.load_dataset(repository, *configuration)
    except Exception as error:  # of network, cache and Parquet, each from a package of its own
        raise _unreadable(name, repository, error, instead) from error


def rows(
    name: str, repository: str, *configuration: str, part: str, skip: int, instead: str
) -> Iterator[Mapping[str, Any]]:
    """The rows of one part, streamed: read as they are asked for, never all at once.

    Args:
        name: how messages call it.
        repository: OWNER/NAME on the Hub.
        configuration: which of its forms.
        part: the Hub's name of the part.
        skip: rows to leave out at the beginning.
        instead: as of `load`.

    Raises:
        DataError: the package is missing, or the Hub cannot be reached, then or later.
    """
    datasets = _package(name, repository, instead)
    try:
        found = datasets.load_dataset(repository, *configuration, split=part, streaming=True)
        yield from found.skip(skip) if skip else found
    except Exception as error:  # as of `load`; of the network also long after the beginning
        raise _unreadable(name, repository, error, instead) from error


def _unreadable(name: str, repository: str, error: Exception, instead: str) -> DataError:
    why = " ".join(str(error).split())[:200]
    return DataError(
        f"{name} cannot be read from {repository} ({why}); where there is no network, {instead}"
    )


def _package(name: str, repository: str, instead: str) -> ModuleType:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{name} is read from the Hub ({repository}) by the package datasets, which is "
            f"missing: {INSTALL}; or {instead}"
        ) from error
    return datasets


@dataclass(frozen=True, kw_only=True)
class Images:
    """A set of images on the Hub.

    Attributes:
        repository: OWNER/NAME.
        configuration: which form, if there are several.
        image: column of the encoded images.
        label: column of the classes.
        parts: names of training part and test part.
        channels: 1 for grey, 3 for colour.
    """

    repository: str
    configuration: tuple[str, ...] = ()
    image: str = "image"
    label: str = "label"
    parts: tuple[str, str] = ("train", "test")
    channels: int = 3


IMAGES: Mapping[str, Images] = {
    "mnist": Images(repository="ylecun/mnist", channels=1),
    "fashion-mnist": Images(repository="zalando-datasets/fashion_mnist", channels=1),
    "cifar-10": Images(repository="uoft-cs/cifar10", image="img"),
    "cifar-100": Images(repository="uoft-cs/cifar100", image="img", label="fine_label"),
    "svhn": Images(repository="ufldl-stanford/svhn", configuration=("cropped_digits",)),
    "tiny-imagenet": Images(repository="zh-plus/tiny-imagenet", parts=("train", "valid")),
}


def load_images(
    name: str,
    classes: tuple[str, ...],
    *,
    size: int,
    fraction: float,
    absent: DataError,
    give: str,
    progress: Callable[[int, int], None] | None = None,
) -> Splits:
    """A set whose files were not found, decoded into memory; a part of its training validates.

    Args:
        name: of the set.
        classes: meaning of the labels.
        size: side of the images in pixels.
        fraction: of each training class that validates.
        absent: why its files were not found.
        give: what to name where there is no network, as in "give its folder".
        progress: called with (images read, images in all).

    Raises:
        DataError: `absent` where the Hub does not have it or the package that reads it is missing;
            or Pillow is missing, the Hub cannot be reached, or an image is damaged.
    """
    if name not in IMAGES or not available():
        raise absent
    pillow()
    instead = f"{give}: {absent}"
    entry = IMAGES[name]
    found = load(name, entry.repository, *entry.configuration, instead=instead)
    datasets = _package(name, entry.repository, instead)
    # Bytes instead of images: decoded here, as all others are.
    encoded = datasets.Image(decode=False)
    rows = [found[part].cast_column(entry.image, encoded) for part in entry.parts]
    total, done = sum(len(part) for part in rows), 0
    parts: list[Part] = []
    for part, called in zip(rows, entry.parts, strict=True):
        labels = np.asarray(part[entry.label], np.int64)
        images = np.empty((len(part), size, size, entry.channels), np.uint8)
        for index, content in enumerate(_contents(part, entry.image)):
            place = f"{entry.repository}, {called}, image {index}"
            images[index] = decode(content, place, channels=entry.channels, size=size)
            done += 1
            if progress is not None:
                progress(done, total)
        parts.append((images, labels))
    contents = [array for part in parts for array in part]
    return assemble(name, classes, parts, checksum=checksum_of(contents), fraction=fraction)


def _contents(part: Any, column: str) -> Iterator[bytes]:
    for row in part:
        yield row[column]["bytes"]
