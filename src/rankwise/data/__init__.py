"""The data sets that a recipe can name; they know nothing of rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankwise.data import cifar
from rankwise.data.cifar import load_cifar
from rankwise.data.folder import load_folder
from rankwise.data.idx import PUBLISHED, load_idx
from rankwise.data.limited import Limited
from rankwise.data.mnist import load_mnist
from rankwise.data.splits import DataSet, Examples, Split, Splits, batches, steps_per_epoch
from rankwise.data.text import TextSplit, TextSplits, load_text
from rankwise.errors import OptionError, unknown

__all__ = [
    "DATA",
    "DataSet",
    "Examples",
    "Limited",
    "Source",
    "Split",
    "Splits",
    "TextSplit",
    "TextSplits",
    "batches",
    "is_text",
    "load",
    "load_text",
    "steps_per_epoch",
]

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
}


def is_text(name: str) -> bool:
    """Whether a data set's name is that of a text, for `load_text`, and not of images."""
    kind, separator, _ = name.partition(":")
    entry = DATA.get(f"{kind}:PATH" if separator else name) or DATA.get(kind)
    return entry is not None and entry.task == "language modelling"


def load(name: str, *, size: int | None = None, progress: Progress | None = None) -> Splits:
    """Read images into memory, split and normalised by its training part.

    Args:
        name: a key of `DATA`; for a folder, `folder:` and its path; `fashion-mnist` and `mnist`
            may name the folder of their files in the same way.
        size: side in pixels that folder images are brought to; 32 when nothing is said.
        progress: called with (images read, images in all) while a folder is read.

    Raises:
        OptionError: an unknown name, or a size that the data set cannot have.
        DataError: the data are missing or malformed.
    """
    kind, _, path = name.partition(":")
    if kind == "folder":
        if not path:
            raise OptionError(f"data set '{name}' names no folder; write folder:PATH")
        return load_folder(path, size=32 if size is None else size, progress=progress)
    if is_text(name):
        raise OptionError(f"data set '{name}' is text, not images; read it with data.load_text")
    if kind in cifar.PUBLISHED:
        return load_cifar(kind, _path(name), size=32 if size is None else size, progress=progress)
    if name not in DATA and kind not in PUBLISHED:
        raise OptionError(unknown("data set", name, DATA))
    if size not in (None, 28):
        raise OptionError(f"{name}: size={size}, but its images are 28x28; leave size out")
    return load_idx(name) if kind in PUBLISHED else load_mnist()


def _path(name: str) -> str:
    kind, colon, path = name.partition(":")
    if colon and not path:
        raise OptionError(f"data set '{name}' names no folder; write {kind}:PATH, or {kind} alone")
    return path
