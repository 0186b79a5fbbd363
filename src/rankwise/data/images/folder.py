"""Images in folders: one folder a class, as photographs and benchmarks are usually kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from rankwise.data.images.arrays import check_side
from rankwise.data.images.splits import Splits, normalised, stratified
from rankwise.errors import DataError
from rankwise.images.decode import SUFFIXES, central, decode, is_grey, pillow
from rankwise.images.tree import Tree, open_tree, path_of
from rankwise.images.variation import How

VALIDATION_NAMES = ("val", "valid", "validation")
LARGEST_SET = 4 * 2**30  # bytes of the decoded images
PROBED = 16  # images whose mode decides between grey and colour

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files and their classes.

    Attributes:
        classes: meaning of the labels.
        names: of N files in their tree.
        sizes: (N,) bytes of each.
        labels: (N,) int64.
        parts: how many of them train, (validate,) test; or all of them, uncut.
    """

    classes: tuple[str, ...]
    names: list[str]
    sizes: np.ndarray
    labels: np.ndarray
    parts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """Listed image files and how they are read.

    Attributes:
        tree: where they are.
        listing: which, and of which class.
        name: how the records call the set.
        size: side of the images in pixels.
        fractions: of each class that validate and test, where the listing has no such parts.
        keep: share of the shorter side that the central square has.
    """

    tree: Tree
    listing: Listing
    name: str
    size: int
    fractions: tuple[float, float] = (0.1, 0.1)
    keep: float = 1.0

    @cached_property
    def channels(self) -> int:
        """1 if some images, evenly spaced, are grey; otherwise 3."""
        names = self.listing.names
        chosen = np.linspace(0, len(names) - 1, min(PROBED, len(names))).astype(int)
        probed = [names[int(index)] for index in chosen]
        grey = all(is_grey(self.tree.read(name), path_of(self.tree, name)) for name in probed)
        return 1 if grey else 3

    @property
    def how(self) -> How:
        """What an image becomes."""
        return How(size=self.size, channels=self.channels, keep=self.keep)

    @property
    def needed(self) -> int:
        """Bytes of all images, decoded."""
        return len(self.listing.names) * self.channels * self.size**2

    def decoded(self, content: bytes, name: str) -> np.ndarray:
        """The central square of an image: (size, size, channels) uint8."""
        square = partial(central, keep=self.keep)
        path = path_of(self.tree, name)
        return decode(content, path, channels=self.channels, size=self.size, crop=square)


def find_folder(root: str | Path, *, size: int = 32) -> Files:
    """The images of a folder, listed.

    Layouts: `train`, `val` and `test` with class folders inside; only `train` and `test`, then
    a tenth of each training class validates; or class folders directly, cut 80/10/10 within each
    class. The cut is the same always. Class folders are searched in depth; hidden entries and
    files without an image's suffix are passed over. A tar or zip archive of such a folder is read
    as it is.

    Every image is scaled to `size` by its shorter side and cropped to the central square, on
    white where it is transparent, upright as its EXIF data say. All are read as grey if 16 of
    them, evenly spaced, are.

    Args:
        root: the folder or the archive.
        size: side of the images in pixels, at least 1.

    Raises:
        OptionError: `size` is below 1.
        DataError: no such folder, no classes, a class without images, or Pillow is missing.
    """
    check_side(size)
    pillow()
    tree = open_tree(root)
    return Files(tree=tree, listing=listing(tree), name=f"folder:{tree.place}", size=size)


def read(files: Files, progress: Progress | None = None) -> Splits:
    """Decode listed files into memory, cut and normalised.

    Args:
        files: what to read.
        progress: called with (images read, images in all) after each image.

    Raises:
        DataError: an image cannot be read, or all together are too large.
    """
    names, labels = files.listing.names, files.listing.labels
    if files.needed > LARGEST_SET:
        raise DataError(
            f"{files.tree.place}: {len(names):,} images of "
            f"{files.channels}x{files.size}x{files.size} take {files.needed / 2**30:.1f} GiB, and "
            f"at most {LARGEST_SET / 2**30:.0f} GiB are read into memory; stream them, or choose a "
            "smaller size or fewer images"
        )
    digest = hashlib.sha256()
    images = np.empty((len(names), files.size, files.size, files.channels), np.uint8)
    for index, name in enumerate(names):
        content = files.tree.read(name)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
        images[index] = files.decoded(content, name)
        if progress is not None:
            progress(index + 1, len(names))
    parts = [(images[part], labels[part]) for part in cut(files.listing, files.fractions)]
    train, validation, test = normalised(parts)
    return Splits(
        name=files.name,
        classes=files.listing.classes,
        train=train,
        validation=validation,
        test=test,
        checksum=digest.hexdigest()[:16],
    )


def listing(tree: Tree) -> Listing:
    """The image files of a tree by class: of train, validation if there is one, and test.

    Raises:
        DataError: no classes, a class without images, parts that do not go together.
    """
    folders = tree.folders("")
    if "train" not in folders:
        if "test" in folders:
            raise DataError(
                f"{tree.place} has test but no train; name the training folder train, or hold "
                "class folders only"
            )
        return listed(tree, _classes(tree, ""), [""])
    validation = [name for name in VALIDATION_NAMES if name in folders]
    if "test" not in folders or len(validation) > 1:
        others = sorted(set(folders) - {"train"})
        raise DataError(
            f"{tree.place} has train and {', '.join(others) or 'nothing else'}"
            f"; it needs a folder test, and at most one of {', '.join(VALIDATION_NAMES)} "
            "(without one, a tenth of train validates)"
        )
    return listed(tree, _classes(tree, "train"), ["train", *validation, "test"])


def listed(tree: Tree, classes: tuple[str, ...], folders: Sequence[str]) -> Listing:
    """The images of some folders, each with a folder for every class or for some of them.

    Raises:
        DataError: a class without images, or one that the first folder has not.
    """
    names, sizes, labels, parts = [], [], [], []
    for folder in folders:
        foreign = sorted(set(tree.folders(folder)) - set(classes))
        if foreign:
            raise DataError(
                f"{path_of(tree, folder)} has the class '{foreign[0]}', which "
                f"{path_of(tree, folders[0])} has not; training knows {', '.join(classes)}"
            )
        before = len(names)
        for label, name in enumerate(classes):
            inside = f"{folder}/{name}" if folder else name
            if not tree.has_folder(inside):
                continue
            found = list(tree.files(inside, SUFFIXES))
            if not found:
                raise DataError(
                    f"class folder {path_of(tree, inside)} holds no images "
                    f"({', '.join(SUFFIXES)}); add some or remove the folder"
                )
            names += [each for each, _ in found]
            sizes += [bytes_ for _, bytes_ in found]
            labels += [label] * len(found)
        parts.append(len(names) - before)
    return Listing(classes, names, np.array(sizes), np.array(labels, np.int64), tuple(parts))


def cut(files: Listing, fractions: tuple[float, float]) -> list[np.ndarray]:
    """Indices of train, validation and test, from the parts that the files already have.

    Raises:
        DataError: a class is too small to be cut.
    """
    bounds = np.cumsum([0, *files.parts])
    parts = [np.arange(a, b) for a, b in pairwise(bounds)]
    if len(parts) == 3:
        return parts
    wanted = fractions if len(parts) == 1 else fractions[:1]
    return [*stratified(files.labels[parts[0]], wanted, files.classes), *parts[1:]]


def _classes(tree: Tree, folder: str) -> tuple[str, ...]:
    names = tuple(tree.folders(folder))
    if not names:
        raise DataError(
            f"{path_of(tree, folder)} holds no class folders; put the images of each class into a "
            "folder of its own, named after the class"
        )
    return names
