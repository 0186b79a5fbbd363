"""ImageNet (ILSVRC 2012, arXiv 1409.0575) and Tiny-ImageNet (200 classes, 64x64) in their folders.

The labels of the test parts are not public, so the published validation part tests, and a part of
training, the same one always, validates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankwise.data import hub, places
from rankwise.data.images.arrays import check_side
from rankwise.data.images.folder import Files, Listing, Progress, listed
from rankwise.data.images.online import load_images
from rankwise.data.images.splits import Splits
from rankwise.errors import DataError
from rankwise.images.tree import Tree, open_tree, path_of

ANNOTATIONS = "val/val_annotations.txt"  # Tiny-ImageNet: file TAB class TAB box, a line an image


@dataclass(frozen=True, kw_only=True)
class Published:
    """One of the two sets.

    Attributes:
        side: of the images in pixels, unless asked otherwise.
        keep: share of the shorter side that the central square has; training with
            random-resized-crop draws from the whole image.
        validation: of each training class.
        names: what its folder or archive may be called.
        obtain: what to do where it is missing.
    """

    side: int
    keep: float
    validation: float
    names: tuple[str, ...]
    obtain: str


PUBLISHED: Mapping[str, Published] = {
    "tiny-imagenet": Published(
        side=64,
        keep=1.0,
        validation=0.1,
        names=("tiny-imagenet-200", "tiny-imagenet-200.zip", "tiny-imagenet"),
        obtain="download http://cs231n.stanford.edu/tiny-imagenet-200.zip (it need not be "
        f"unpacked), or install the package that reads the Hub ({hub.INSTALL})",
    ),
    "imagenet": Published(
        side=224,
        keep=224 / 256,
        validation=0.02,
        names=("imagenet", "ILSVRC2012"),
        obtain="register at https://image-net.org, and unpack the archives of ILSVRC 2012 into "
        "train/CLASS and val/CLASS",
    ),
}


def find_imagenet(
    name: str, path: str = "", *, size: int | None = None, progress: Progress | None = None
) -> Splits | Files:
    """The image files of one of the sets, listed; from the Hub the images themselves.

    Args:
        name: a key of `PUBLISHED`.
        path: the folder or archive; without one the usual places are looked through, then, for
            Tiny-ImageNet, the Hub.
        size: side of the images in pixels.
        progress: called with (images read, images in all) while the Hub's images are read.

    Raises:
        DataError: the set is missing, or its folders are not those of this set.
    """
    published = PUBLISHED[name]
    size = published.side if size is None else size
    check_side(size)
    place = Path(path).expanduser() if path else places.found(published.names)
    if place is None:
        return load_images(
            name,
            tuple(str(number) for number in range(200)),
            size=size,
            fraction=published.validation,
            absent=places.missing(name, published.names, published.obtain),
            give="give its folder",
            progress=progress,
        )
    tree = open_tree(place)
    if not {"train", "val"} <= set(tree.folders("")):
        raise DataError(
            f"{name}: {place} does not hold the folders train and val; {published.obtain}"
        )
    return Files(
        tree=tree,
        listing=_listing(tree, name),
        name=name,
        size=size,
        fractions=(published.validation, 0.0),
        keep=published.keep,
    )


def _listing(tree: Tree, name: str) -> Listing:
    classes = tuple(tree.folders("train"))
    annotated = name == "tiny-imagenet" and any(
        each == ANNOTATIONS for each, _ in tree.files("val", (".txt",))
    )
    if annotated:
        train, test = listed(tree, classes, ["train"]), _annotated(tree, classes)
        return Listing(
            classes,
            train.names + test.names,
            np.concatenate([train.sizes, test.sizes]),
            np.concatenate([train.labels, test.labels]),
            (*train.parts, *test.parts),
        )
    if not classes or not tree.folders("val"):
        raise DataError(
            f"{name}: {path_of(tree, 'val' if classes else 'train')} holds no class folders; put "
            "the images of each class into a folder of its own, named like those of train"
        )
    return listed(tree, classes, ["train", "val"])


def _annotated(tree: Tree, classes: tuple[str, ...]) -> Listing:
    """The validation part of Tiny-ImageNet, whose classes stand in a table."""
    number = {name: label for label, name in enumerate(classes)}
    sizes = dict(tree.files("val", (".jpeg", ".jpg", ".png")))
    labels: dict[str, int] = {}
    for at, line in enumerate(tree.read(ANNOTATIONS).decode("utf-8", "replace").splitlines(), 1):
        file, _, rest = line.partition("\t")
        called, label = f"val/images/{file}", rest.partition("\t")[0]
        if label not in number or called not in sizes:
            raise DataError(
                f"{path_of(tree, ANNOTATIONS)}, line {at}: '{file}' of class '{label}'; there is "
                f"no such {'class in train' if called in sizes else 'file in val/images'}"
            )
        labels[called] = number[label]
    names = sorted(labels)
    return Listing(
        classes,
        names,
        np.array([sizes[name] for name in names]),
        np.array([labels[name] for name in names], np.int64),
        (len(names),),
    )
