"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 60,000 colour images of 32x32 in 10 or 100 classes.

Read from the binary version, from a copy with one folder of image files a class, or from the Hub.
The published python version consists of pickles, which run code when they are read: it is refused.
In a binary file each image is one byte for its class (CIFAR-100: two, the coarse one first), then
1,024 bytes for each of red, green and blue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankwise.data import hub, places
from rankwise.data.images import folder
from rankwise.data.images.arrays import assemble, check_side
from rankwise.data.images.online import load_images
from rankwise.data.images.splits import Splits
from rankwise.data.parts import checksum_of
from rankwise.errors import DataError
from rankwise.images.tree import Tree, open_tree, path_of

SIDE = 32
PIXELS = 3 * SIDE * SIDE
ROWS = 10_000  # images in a file; CIFAR-100's training file holds five times as many
VALIDATION = 0.1  # of each training class: 5,000 of 50,000


@dataclass(frozen=True, kw_only=True)
class Published:
    """One of the two sets.

    Attributes:
        classes: meaning of the labels.
        coarse: bytes before the label.
        train: files of the training part, without .bin.
        test: file of the test part.
        binary: folder in the published archive.
        archive: its name.
        md5: of that archive, as published.
    """

    classes: tuple[str, ...]
    coarse: int
    train: tuple[str, ...]
    test: str
    binary: str
    archive: str
    md5: str


_TEN = "airplane automobile bird cat deer dog frog horse ship truck"
_HUNDRED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

PUBLISHED: Mapping[str, Published] = {
    "cifar-10": Published(
        classes=tuple(_TEN.split()),
        coarse=0,
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        binary="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar-100": Published(
        classes=tuple(_HUNDRED.split()),
        coarse=1,
        train=("train",),
        test="test",
        binary="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
    ),
}


def names(name: str) -> tuple[str, ...]:
    """What the set's folder or archive may be called."""
    published = PUBLISHED[name]
    return name, published.binary, published.archive


def find_cifar(
    name: str, path: str = "", *, size: int = SIDE, progress: folder.Progress | None = None
) -> Splits | folder.Files:
    """One of the sets: a tenth of each training class validates, the same one always.

    Args:
        name: a key of `PUBLISHED`.
        path: the folder or archive; without one the usual places are looked through, then the Hub.
        size: side of the images in pixels.
        progress: called with (images read, images in all) while the Hub's images are read.

    Returns:
        The images; where they are in image files, those, listed.

    Raises:
        DataError: files are missing, damaged or those of another set.
    """
    published = PUBLISHED[name]
    check_side(size)
    place = Path(path).expanduser() if path else places.found(names(name))
    if place is None:
        return load_images(
            name,
            published.classes,
            size=size,
            fraction=VALIDATION,
            absent=places.missing(name, names(name), obtain(name)),
            give="give the folder or archive",
            progress=progress,
        )
    if place.name == published.archive and place.is_file():
        _check_archive(place, published.md5)
    tree = open_tree(place)
    if {"train", "test"} <= set(tree.folders("")):
        return _from_images(tree, name, size)
    wanted = [f"{stem}.bin" for stem in (*published.train, published.test)]
    held = {each.rpartition("/")[2]: each for each, _ in tree.files("")}
    if set(wanted) <= set(held):
        return _from_binary(tree, [held[each] for each in wanted], name, size)
    pickles = all(stem in held for stem in (*published.train, published.test))
    raise DataError(
        f"{name}: {place} "
        + ("is the python version: pickles, which run code when they are read; " if pickles else "")
        + f"holds neither {', '.join(wanted)} nor the folders train and test with one folder of "
        f"images a class; {obtain(name)}"
    )


def obtain(name: str) -> str:
    """What to do where a set is missing."""
    return (
        f"download https://www.cs.toronto.edu/~kriz/{PUBLISHED[name].archive}, or install the "
        f"package that reads the Hub ({hub.INSTALL})"
    )


def _check_archive(place: Path, md5: str) -> None:
    with place.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise DataError(f"{place} is damaged: its MD5 is {found}, published is {md5}; get it anew")


def _from_images(tree: Tree, name: str, size: int) -> folder.Files:
    classes = PUBLISHED[name].classes
    foreign = set(tree.folders("train")) ^ set(classes)
    if foreign:
        raise DataError(
            f"{name}: {path_of(tree, 'train')} has not the folders {', '.join(classes[:3])}, ... "
            f"of its {len(classes)} classes; '{min(foreign)}' is missing or too many. Other sets "
            f"are read as folder:{tree.place}"
        )
    return folder.Files(
        tree=tree,
        listing=folder.listing(tree),
        name=name,
        size=size,
        fractions=(VALIDATION, 0.0),
    )


def _from_binary(tree: Tree, files: list[str], name: str, size: int) -> Splits:
    published = PUBLISHED[name]
    contents = [tree.read(each) for each in files]
    images, labels = [], []
    for each, content in zip(files, contents, strict=True):
        row = published.coarse + 1 + PIXELS
        rows = ROWS * (5 if each.endswith("train.bin") else 1)
        if len(content) != rows * row:
            raise DataError(
                f"{path_of(tree, each)} has {len(content):,} bytes, not {rows:,} images of "
                f"{row:,}; it is damaged or of another set: {obtain(name)}"
            )
        values = np.frombuffer(content, np.uint8).reshape(rows, row)
        labels.append(values[:, published.coarse].astype(np.int64))
        pixels = values[:, published.coarse + 1 :].reshape(rows, 3, SIDE, SIDE)
        images.append(pixels.transpose(0, 2, 3, 1))
    train = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
    test = np.ascontiguousarray(images[-1]), labels[-1]
    return assemble(
        name,
        published.classes,
        [train, test],
        checksum=checksum_of(contents),
        size=size,
        fraction=VALIDATION,
    )
