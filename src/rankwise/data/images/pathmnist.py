"""PathMNIST (Kather et al. 2019; MedMNIST, Yang et al., arXiv 2110.14795): nine kinds of tissue.

Colon tissue under the microscope, in colour, 28x28 (or the larger editions): 89,996 images train,
10,004 validate, 7,180, from another hospital, test. Read from the published file, an npz archive
of plain arrays; pickled ones are refused.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from rankwise.data import places
from rankwise.data.images.arrays import Part, assemble, check_side
from rankwise.data.images.splits import Splits
from rankwise.data.parts import checksum_of
from rankwise.errors import DataError

CLASSES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)
FILE = "pathmnist.npz"
NAMES = (FILE, f"pathmnist/{FILE}")
OBTAIN = f"download {FILE} of MedMNIST from https://zenodo.org/records/10519652"
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
LARGEST = 4 * 2**30  # bytes of all arrays together


def load_pathmnist(path: str = "", *, size: int | None = None) -> Splits:
    """Read the published parts.

    Args:
        path: the file or its folder; without one the usual places are looked through, and
            ~/.medmnist, where the package medmnist puts it.
        size: side of the images in pixels; as they are where none is given.

    Raises:
        DataError: the file is missing, damaged or of another set.
    """
    if size is not None:
        check_side(size)
    place = Path(path).expanduser() if path else places.found(NAMES)
    if place is None:
        place = Path.home() / ".medmnist" / FILE
        if not place.is_file():
            raise places.missing("pathmnist", (*NAMES, str(place)), OBTAIN)
    if place.is_dir():
        place = place / FILE
    parts = _parts(place)
    contents = [array for part in parts for array in part]
    return assemble("pathmnist", CLASSES, parts, checksum=checksum_of(contents), size=size)


def _parts(place: Path) -> list[Part]:
    parts = []
    try:
        with zipfile.ZipFile(place) as archive:
            total = sum(info.file_size for info in archive.infolist())
        if total > LARGEST:
            raise ValueError(f"it holds {total / 2**30:.1f} GiB")
        with np.load(place, allow_pickle=False) as arrays:
            for part in ("train", "val", "test"):
                images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
                parts.append((images, labels.reshape(-1).astype(np.int64)))
    except UNREADABLE as error:
        raise DataError(f"pathmnist: {place} cannot be read ({error}); {OBTAIN}") from error
    for images, _ in parts:
        square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
        if not square or images.dtype != np.uint8:
            raise DataError(
                f"pathmnist: {place} holds images of {' x '.join(map(str, images.shape))} "
                f"{images.dtype}, not N x 28 x 28 x 3 bytes; it is another set of MedMNIST"
            )
    return parts
