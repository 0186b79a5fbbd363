"""The data sets that a recipe can name, and the reading of those of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, overload

from rankwise.data.images import cifar, folder, idx, imagenet
from rankwise.data.images.augment import AUGMENTS
from rankwise.data.images.cifar import find_cifar
from rankwise.data.images.folder import Files, find_folder
from rankwise.data.images.idx import load_idx
from rankwise.data.images.imagenet import find_imagenet
from rankwise.data.images.mnist import load_mnist
from rankwise.data.images.pathmnist import load_pathmnist
from rankwise.data.images.splits import Splits
from rankwise.data.images.stream import StreamedSplits, stream
from rankwise.data.images.svhn import load_svhn
from rankwise.data.texts.documents import PUBLISHED
from rankwise.errors import OptionError, unknown

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of the registry: what the data are, in a line, and for which task."""

    description: str
    task: str = "classification"


DATA: dict[str, Source] = {
    "mnist-5k": Source(
        description="5,000 MNIST digits, 28x28 grey: 4,000 train, 500 validation, 500 test"
    ),
    "fashion-mnist": Source(
        description="70,000 pieces of clothing, 28x28 grey, from the published files (or :PATH): "
        "55,000 train, 5,000 validation, 10,000 test"
    ),
    "mnist": Source(
        description="all 70,000 MNIST digits, 28x28 grey, from the published files (or :PATH); "
        "a twelfth of each training class validates"
    ),
    "cifar-10": Source(
        description="CIFAR-10, 60,000 images of 32x32 in colour, from the published binary files "
        "or folders of images (or :PATH); a tenth of each training class validates"
    ),
    "cifar-100": Source(description="CIFAR-100, the same with 100 classes, read alike (or :PATH)"),
    "svhn": Source(
        description="SVHN, 99,289 house numbers of 32x32 in colour, from the published .mat files "
        "(or :PATH); a tenth of each training class validates"
    ),
    "tiny-imagenet": Source(
        description="Tiny-ImageNet, 110,000 images of 64x64 in 200 classes, from its folder or zip "
        "file (or :PATH); a tenth of training validates, the validation part tests"
    ),
    "imagenet": Source(
        description="ImageNet (ILSVRC 2012) in folders train/CLASS and val/CLASS (or :PATH), 224 "
        "pixels; a fiftieth of training validates, the validation part tests"
    ),
    "pathmnist": Source(
        description="PathMNIST, 107,180 images of tissue in 9 classes, 28x28 in colour, from "
        "pathmnist.npz (or :PATH), in its published parts"
    ),
    "folder:PATH": Source(
        description="any folder of images with one sub-folder a class, with or without train/test, "
        "or a tar or zip archive of it"
    ),
    "shakespeare": Source(
        description="42 works of Shakespeare, 5.1 MB: the last ones in the alphabet held out",
        task="language modelling",
    ),
    "text:PATH": Source(
        description="any text file: 80 % train, then 10 % validation, then 10 % test",
        task="language modelling",
    ),
    "wikitext-2": Source(
        description="WikiText-2 in its published parts, from the Hugging Face Hub (or :PATH); "
        "2.1 million words to train with tokens=words",
        task="language modelling",
    ),
    "c4": Source(
        description="C4, English web pages, streamed from the Hugging Face Hub or from JSON lines "
        "(:PATH); a pass is tokens_per_epoch tokens",
        task="language modelling",
    ),
    "cnn-dailymail": Source(
        description="articles of CNN and Daily Mail, streamed alike (or :PATH)",
        task="language modelling",
    ),
    "pairs:PATH": Source(
        description="translation: a file with a source, a tab and its target per line, or a folder "
        "of train.de, train.en, val.de, ... with languages=de-en",
        task="translation",
    ),
    "multi30k": Source(
        description="29,000 descriptions of pictures, German to English, in lower case, from the "
        "Hugging Face Hub (or :PATH)",
        task="translation",
    ),
}


def is_text(name: str) -> bool:
    """Whether a data set's name is that of a text, for `load_text`, and not of images."""
    return _task(name) == "language modelling"


def is_stream(name: str) -> bool:
    """Whether a data set's name is that of documents that are streamed, for `load_stream`."""
    return name.partition(":")[0] in PUBLISHED


def is_pairs(name: str) -> bool:
    """Whether a data set's name is that of a text in pairs, for `load_pairs`."""
    return _task(name) == "translation"


def _task(name: str) -> str | None:
    kind, separator, _ = name.partition(":")
    entry = DATA.get(f"{kind}:PATH" if separator else name) or DATA.get(kind)
    return None if entry is None else entry.task


@overload
def load(
    name: str,
    *,
    size: int | None = None,
    augment: str = "none",
    streamed: Literal[False] = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Splits: ...


@overload
def load(
    name: str,
    *,
    size: int | None = None,
    augment: str = "none",
    streamed: bool | None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Splits | StreamedSplits: ...


def load(
    name: str,
    *,
    size: int | None = None,
    augment: str = "none",
    streamed: bool | None = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Splits | StreamedSplits:
    """Read images into memory, or stream them; split and normalised by the training part.

    Args:
        name: a key of `DATA`; for a folder, `folder:` and its path; published sets may name the
            place of their files in the same way.
        size: side in pixels that images are brought to; when nothing is said, 32 for a folder, and
            for others their own.
        augment: a key of `AUGMENTS`: how training images vary from pass to pass.
        streamed: decode image files while they are used: never, always, or (None) where they do
            not fit into memory.
        workers: processes that decode streamed images; by default one a core, and at most eight.
        progress: called with (images read, images in all) while image files are read into memory.

    Raises:
        OptionError: an unknown name, a size that the data set cannot have, or nothing to stream.
        DataError: the data are missing or malformed.
    """
    if augment not in AUGMENTS:
        raise OptionError(unknown("augment", augment, AUGMENTS))
    varied = AUGMENTS[augment]
    found = _find(name, size, progress)
    if isinstance(found, Files):
        if streamed or (streamed is None and found.needed > folder.LARGEST_SET):
            return stream(found, workers=workers, augment=varied)
        found = folder.read(found, progress)
    elif streamed:
        raise OptionError(f"{name} is not read from image files, so there is nothing to stream")
    return replace(found, train=replace(found.train, augment=varied))


def _find(name: str, size: int | None, progress: Progress | None) -> Splits | Files:
    kind, _, _ = name.partition(":")
    if kind == "folder":
        if not name.partition(":")[2]:
            raise OptionError(f"data set '{name}' names no folder; write folder:PATH")
        return find_folder(_path(name), size=32 if size is None else size)
    for kind_of, loader in ((is_text, "load_text"), (is_pairs, "load_pairs")):
        if kind_of(name):
            raise OptionError(f"data set '{name}' is text, not images; read it with data.{loader}")
    if kind in cifar.PUBLISHED:
        side = cifar.SIDE if size is None else size
        return find_cifar(kind, _path(name), size=side, progress=progress)
    if kind == "svhn":
        return load_svhn(_path(name), size=32 if size is None else size, progress=progress)
    if kind in imagenet.PUBLISHED:
        return find_imagenet(kind, _path(name), size=size, progress=progress)
    if kind == "pathmnist":
        return load_pathmnist(_path(name), size=size)
    if name not in DATA and kind not in idx.PUBLISHED:
        raise OptionError(unknown("data set", name, DATA))
    if size not in (None, 28):
        raise OptionError(f"{name}: size={size}, but its images are 28x28; leave size out")
    return load_idx(name, progress=progress) if kind in idx.PUBLISHED else load_mnist()


def _path(name: str) -> str:
    kind, colon, path = name.partition(":")
    if colon and not path:
        raise OptionError(f"data set '{name}' names no folder; write {kind}:PATH, or {kind} alone")
    return path
