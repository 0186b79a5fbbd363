"""Training images varied at random: flipped, shifted, cut out and scaled.

What happens to an image follows from the run's seed, the pass and the number of the image, and
from nothing else: a resumed run sees what it would have seen, and workers that share a batch draw
what one worker would.

Shapes: `B` images of a batch, `C` channels, `H` height, `W` width, `D` random numbers of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.decode import Box

AREA = (0.08, 1.0)  # share of the image that is cut out
SHAPE = (3 / 4, 4 / 3)  # width over height of the cut
TRIES = 10
# Columns of what is drawn: the flip, the place down and across, and areas and shapes to be tried.
FLIP, DOWN, ACROSS, AREAS, SHAPES = 0, 1, 2, slice(3, 3 + TRIES), slice(3 + TRIES, 3 + 2 * TRIES)
DRAWN = 3 + 2 * TRIES


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
            drawn: (B, D) of `draws`.

        Returns:
            (B, C, H, W), float32 if it was scaled.
        """
        flipped = torch.from_numpy(drawn[:, FLIP] < 0.5)
        if self.resized:
            return _cut_and_scaled(images, drawn, flipped)
        if self.padding:
            images = _shifted(images, drawn, self.padding)
        return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)

    def box(self, drawn: np.ndarray, width: int, height: int) -> Box:
        """The part of one image that is cut out, of its (D,) numbers; `resized` only."""
        left, top, right, bottom = boxes(drawn[None], width, height)[0].tolist()
        return left, top, right, bottom

    def one(self, image: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """An image (H, W, C) varied by its (D,) numbers, after its `box` was cut out and scaled."""
        if self.padding:
            high, wide = image.shape[:2]
            around = np.pad(image, ((self.padding,) * 2, (self.padding,) * 2, (0, 0)))
            top, left = (_offset(drawn[at], self.padding) for at in (DOWN, ACROSS))
            image = around[top : top + high, left : left + wide]
        return image[:, ::-1] if drawn[FLIP] < 0.5 else image


AUGMENTS: Mapping[str, Augment | None] = {
    "none": None,
    "flip": Augment(),
    "crop-flip": Augment(padding=4),
    "random-resized-crop": Augment(resized=True),
}


def draws(draw: int, chosen: Tensor) -> np.ndarray:
    """Even random numbers from 0 to 1 for every image of a batch, (B, D) float64.

    Args:
        draw: the number of the pass, 0 to 2^64 - 1.
        chosen: (B,) numbers of the images.

    SplitMix64 (Steele et al., OOPSLA 2014), counted through by image and column.
    """
    counter = chosen.numpy().astype(np.uint64)[:, None] * np.uint64(DRAWN)
    counter = counter + np.arange(1, DRAWN + 1, dtype=np.uint64)
    z = np.array([draw], np.uint64) + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def boxes(drawn: np.ndarray, width: int, height: int) -> np.ndarray:
    """Left, top, right, bottom in whole pixels of what is cut out of B images: (B, 4) float64.

    The first of ten drawn parts that fits; otherwise the largest one in the middle whose shape is
    allowed.
    """
    area = (AREA[0] + drawn[:, AREAS] * (AREA[1] - AREA[0])) * width * height
    shape = np.exp(math.log(SHAPE[0]) + drawn[:, SHAPES] * math.log(SHAPE[1] / SHAPE[0]))
    wide, high = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
    fits = (wide >= 1) & (high >= 1) & (wide <= width) & (high <= height)
    row, first = np.arange(len(drawn)), fits.argmax(1)
    some = fits.any(1)
    middle = (
        min(width, round(height * SHAPE[1])),
        min(height, round(width / SHAPE[0])),
    )
    wide = np.where(some, wide[row, first], middle[0])
    high = np.where(some, high[row, first], middle[1])
    across = np.where(some, np.floor(drawn[:, ACROSS] * (width - wide + 1)), (width - wide) // 2)
    down = np.where(some, np.floor(drawn[:, DOWN] * (height - high + 1)), (height - high) // 2)
    return np.stack([across, down, across + wide, down + high], axis=1)


def _shifted(images: Tensor, drawn: np.ndarray, padding: int) -> Tensor:
    """(B, C, H, W) cut out of themselves with black around, in channels-last order."""
    count, channels, high, wide = images.shape
    around = F.pad(images.movedim(1, -1), (0, 0, padding, padding, padding, padding)).numpy()
    down, across = (_offset(drawn[:, at], padding)[:, None] for at in (DOWN, ACROSS))
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


def _offset(drawn: np.ndarray, padding: int) -> np.ndarray:
    return np.floor(drawn * (2 * padding + 1)).astype(np.int64)


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
