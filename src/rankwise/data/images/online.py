"""Image sets of the Hugging Face Hub, decoded here as all others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.data import hub
from rankwise.data.images.arrays import Part, assemble
from rankwise.data.images.splits import Splits
from rankwise.data.parts import checksum_of
from rankwise.errors import DataError
from rankwise.images.decode import decode, pillow


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
    if name not in IMAGES or not hub.available():
        raise absent
    pillow()
    instead = f"{give}: {absent}"
    entry = IMAGES[name]
    found = hub.load(name, entry.repository, *entry.configuration, instead=instead)
    datasets = hub.package(name, entry.repository, instead)
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
