"""Images that a published file holds as numbers: checked, scaled, cut and normalised alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from rankwise.data.images.splits import Splits, normalised, stratified
from rankwise.errors import DataError, OptionError

AT_ONCE = 4_096  # images scaled in one call

# Images (N, H, W, C) uint8 and labels (N,) int64.
Part = tuple[np.ndarray, np.ndarray]


def assemble(
    name: str,
    classes: tuple[str, ...],
    parts: Sequence[Part],
    *,
    checksum: str,
    size: int | None = None,
    fraction: float = 0.1,
) -> Splits:
    """The splits of training, (validation,) and test part.

    Args:
        name: how the records call the set.
        classes: meaning of the labels.
        parts: in this order; without one for validation, it is cut from the first.
        checksum: of what was read.
        size: side that images are scaled to; as they are where none is given.
        fraction: of each training class that validates, if no part of the set does.

    Raises:
        DataError: images and labels do not go together, or a label has no class.
    """
    for images, labels in parts:
        if len(images) != len(labels) or not len(labels):
            raise DataError(
                f"{name}: {len(images):,} images and {len(labels):,} labels in one part; they are "
                "not of one set: get it anew"
            )
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(
                f"{name}: labels from {labels.min()} to {labels.max()}, and the set has the "
                f"classes 0 to {len(classes) - 1}; it is another set"
            )
    if len(parts) == 2:
        (images, labels), test = parts
        first, held = stratified(labels, (fraction,), classes)
        parts = [(images[first], labels[first]), (images[held], labels[held]), test]
    train, validation, test = normalised([(scaled(each, size), labels) for each, labels in parts])
    return Splits(
        name=name,
        classes=classes,
        train=train,
        validation=validation,
        test=test,
        checksum=checksum,
    )


def check_side(size: int) -> None:
    """Refuse a side below one pixel.

    Raises:
        OptionError: `size` is below 1.
    """
    if size < 1:
        raise OptionError(f"size={size}; images need a side of at least 1 pixel")


def scaled(images: np.ndarray, size: int | None) -> np.ndarray:
    """(N, H, W, C) uint8 brought to a side, each output pixel a mean of all that it covers."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    made = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
    for start in range(0, len(images), AT_ONCE):
        some = torch.from_numpy(images[start : start + AT_ONCE]).movedim(-1, 1)
        small = F.interpolate(some, (size, size), mode="bilinear", antialias=True)
        made[start : start + AT_ONCE] = small.movedim(1, -1).numpy()
    return made
