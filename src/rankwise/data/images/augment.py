"""Training images varied at random: flipped, shifted, cut out and scaled.

What happens to an image follows from the run's seed, the pass and the number of the image, and
from nothing else: a resumed run sees what it would have seen, and workers that share a batch draw
what one worker would.

Shapes: `B` images of a batch, `C` channels, `H` height, `W` width, `D` random numbers of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.images.variation import ACROSS, DOWN, FLIP, boxes, offset


@dataclass(frozen=True, kw_only=True)
class Augment:
    """One way of varying images; half of them are always mirrored, left to right.

    Attributes:
        padding: black pixels put around an image, of which a part of its own size is cut out.
        resized: cut out a part of 8 to 100 % of the area, 3:4 to 4:3 wide, and scale it to the
            image's size (Szegedy et al., arXiv 1409.4842; the constants are torchvision's).
    """

    padding: int = 0
    resized: bool = False

    def __call__(self, images: Tensor, drawn: np.ndarray) -> Tensor:
        """A batch, varied.

        Args:
            images: (B, C, H, W) uint8 or float32.
            drawn: (B, D) of `images.variation.draws`.

        Returns:
            (B, C, H, W), float32 if it was scaled.
        """
        flipped = torch.from_numpy(drawn[:, FLIP] < 0.5)
        if self.resized:
            return _cut_and_scaled(images, drawn, flipped)
        if self.padding:
            images = _shifted(images, drawn, self.padding)
        return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


AUGMENTS: Mapping[str, Augment | None] = {
    "none": None,
    "flip": Augment(),
    "crop-flip": Augment(padding=4),
    "random-resized-crop": Augment(resized=True),
}


def _shifted(images: Tensor, drawn: np.ndarray, padding: int) -> Tensor:
    """(B, C, H, W) cut out of themselves with black around, in channels-last order."""
    count, channels, high, wide = images.shape
    around = F.pad(images.movedim(1, -1), (0, 0, padding, padding, padding, padding)).numpy()
    down, across = (offset(drawn[:, at], padding)[:, None] for at in (DOWN, ACROSS))
    # A row of a result is one piece of memory, so all rows are gathered by where they begin.
    high_around, wide_around = around.shape[1:3]
    first = np.arange(count)[:, None] * high_around + down + np.arange(high)  # (B, H)
    pieces = np.lib.stride_tricks.as_strided(
        around,
        shape=(count * high_around * wide_around - wide + 1, wide * channels),
        strides=(channels * around.itemsize, around.itemsize),
        writeable=False,
    )
    rows = pieces[(first * wide_around + across).reshape(-1)]
    return torch.from_numpy(rows.reshape(count, high, wide, channels)).movedim(-1, 1)


def _cut_and_scaled(images: Tensor, drawn: np.ndarray, flipped: Tensor) -> Tensor:
    """One bilinear sampling for box, scale and flip; a cut is never larger than its image."""
    _, _, high, wide = images.shape
    left, top, right, bottom = torch.from_numpy(boxes(drawn, wide, high)).unbind(1)
    scale = torch.zeros(len(images), 2, 3, dtype=torch.float64)
    scale[:, 0, 0] = (right - left) / wide * torch.where(flipped, -1.0, 1.0)
    scale[:, 0, 2] = (left + right) / wide - 1
    scale[:, 1, 1] = (bottom - top) / high
    scale[:, 1, 2] = (top + bottom) / high - 1
    grid = F.affine_grid(scale.float(), list(images.shape), align_corners=False)
    return F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
