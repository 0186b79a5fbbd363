"""Random numbers of an image, and what they do to it: where it is cut, shifted, mirrored.

Shapes: `B` images, `C` channels, `H` height, `W` width, `D` random numbers of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from rankwise.images.decode import Box, central, decode
from rankwise.images.tree import Tree, path_of

AREA = (0.08, 1.0)  # share of the image that is cut out
SHAPE = (3 / 4, 4 / 3)  # width over height of the cut
TRIES = 10
# Columns of what is drawn: the flip, the place down and across, and areas and shapes to be tried.
FLIP, DOWN, ACROSS, AREAS, SHAPES = 0, 1, 2, slice(3, 3 + TRIES), slice(3 + TRIES, 3 + 2 * TRIES)
DRAWN = 3 + 2 * TRIES


def draws(draw: int, chosen: np.ndarray) -> np.ndarray:
    """Even random numbers from 0 to 1 for every image of a batch, (B, D) float64.

    Args:
        draw: the number of the pass, 0 to 2^64 - 1.
        chosen: (B,) numbers of the images.

    SplitMix64 (Steele et al., OOPSLA 2014), counted through by image and column.
    """
    counter = chosen.astype(np.uint64)[:, None] * np.uint64(DRAWN)
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


def offset(drawn: np.ndarray, padding: int) -> np.ndarray:
    """Pixels from the edge of the padded image, 0 to twice the padding, all equally likely."""
    return np.floor(drawn * (2 * padding + 1)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class How:
    """What an image file becomes.

    Attributes:
        size: side in pixels.
        channels: 1 for grey, 3 for colour.
        keep: share of the shorter side that the central square has.
        padding: black pixels around the square, of which a part of its size is cut out at random.
        resized: cut out a random part of the whole picture instead of the central square.
    """

    size: int
    channels: int
    keep: float = 1.0
    padding: int = 0
    resized: bool = False


def picture(tree: Tree, name: str, how: How, drawn: np.ndarray | None = None) -> np.ndarray:
    """One image of a tree: (size, size, channels) uint8.

    Args:
        tree: where it is.
        name: of its file.
        how: what it becomes.
        drawn: (D,) random numbers that vary it; it stays as it is without them.

    Raises:
        DataError: it cannot be read.
    """
    crop = partial(central, keep=how.keep)
    if how.resized and drawn is not None:
        crop = partial(box, drawn)
    content, path = tree.read(name), path_of(tree, name)
    pixels = decode(content, path, channels=how.channels, size=how.size, crop=crop)
    return pixels if drawn is None else shifted(pixels, drawn, how.padding)


def box(drawn: np.ndarray, width: int, height: int) -> Box:
    """The part of one image that is cut out, by its (D,) numbers."""
    left, top, right, bottom = boxes(drawn[None], width, height)[0].tolist()
    return left, top, right, bottom


def shifted(image: np.ndarray, drawn: np.ndarray, padding: int) -> np.ndarray:
    """An image (H, W, C), cut out of itself with black around, and mirrored or not."""
    if padding:
        high, wide = image.shape[:2]
        around = np.pad(image, ((padding,) * 2, (padding,) * 2, (0, 0)))
        top, left = (offset(drawn[at], padding) for at in (DOWN, ACROSS))
        image = around[top : top + high, left : left + wide]
    return image[:, ::-1] if drawn[FLIP] < 0.5 else image
