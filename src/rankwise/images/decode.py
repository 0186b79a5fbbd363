"""From the bytes of an image file to its pixels, through Pillow: any mode, no surprises.

Grey of 16 bits is scaled, transparent pixels are put on white, CMYK and the like become RGB as
Pillow converts them, EXIF's orientation is obeyed, of several frames the first is read.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from rankwise.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LARGEST_IMAGE = 64_000_000  # pixels; decoded at 3 bytes each before it is made small
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
# How the others become upright; from 5 on width and height change places.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)

# (width, height) -> the part that is kept: left, top, right, bottom
Box = tuple[float, float, float, float]
Crop = Callable[[int, int], Box]


def pillow() -> ModuleType:
    """The package that decodes.

    Raises:
        DataError: it is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            'reading image files needs Pillow: pip install "rankwise[images]"'
        ) from error
    return Image


def central(width: int, height: int, keep: float = 1.0) -> Box:
    """The square in the middle, as large as fits, or with a share of that side."""
    side = keep * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def decode(
    content: bytes, path: str, *, channels: int, size: int, crop: Crop = central
) -> np.ndarray:
    """Part of an image, scaled to a square.

    Args:
        content: of the file.
        path: how messages call it.
        channels: 1 for grey, 3 for colour.
        size: side of the result in pixels.
        crop: says from width and height, as the image is seen, which part is kept.

    Returns:
        (size, size, channels) uint8.

    Raises:
        DataError: it is damaged, of a kind that cannot be read, or enormous.
    """
    module = pillow()
    with _open(module, content, path) as image:
        try:
            turn = image.getexif().get(ORIENTATION, 1) if "exif" in image.info else 1
            seen = image.size if turn not in TURNS or turn < 5 else image.size[::-1]
            box = crop(*seen)
            if image.format == "JPEG":
                # It can be decoded at a fraction of its size; twice the target keeps it sharp.
                scale = 2 * size / min(box[2] - box[0], box[3] - box[1])
                image.draft(None, tuple(max(1, int(side * scale)) for side in image.size))
            mode = "L" if channels == 1 else "RGB"
            whole = _plain(module, image, mode)
            if turn in TURNS:
                whole = whole.transpose(module.Transpose[TURNS[turn]])
            pixels = np.asarray(_part(module, whole, seen, box, size, mode))
        except UNREADABLE as error:
            raise DataError(
                f"{path} is damaged or of a kind that cannot be read ({error}); remove or repair it"
            ) from error
    return pixels[..., None] if channels == 1 else pixels


def is_grey(content: bytes, path: str) -> bool:
    """Whether an image has one channel, and perhaps transparency, by its header."""
    with _open(pillow(), content, path) as image:
        return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def _open(module: ModuleType, content: bytes, path: str) -> Any:
    """The image without its pixels: only its header is parsed."""
    enormous = f"more than {LARGEST_IMAGE / 1e6:.0f} million pixels; remove it or make it smaller"
    try:
        image = module.open(io.BytesIO(content))
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise DataError(f"{path} has {enormous}") from error
    except UNREADABLE as error:
        raise DataError(f"{path} is not a readable image ({error}); remove or repair it") from error
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        raise DataError(f"{path} is {width:,}x{height:,}: {enormous}")
    return image


def _plain(module: ModuleType, image: Any, mode: str) -> Any:
    """All of it as L or RGB; as RGBA where it is transparent."""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no fixed range; save it with 8 or 16")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        scaled = (np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)
        return module.fromarray(scaled).convert(mode)
    transparent = image.mode in TRANSPARENT or "transparency" in image.info
    wanted = "RGBA" if transparent else mode
    return image if image.mode == wanted else image.convert(wanted)


def _part(
    module: ModuleType, whole: Any, seen: tuple[int, int], box: Box, size: int, mode: str
) -> Any:
    across, down = whole.width / seen[0], whole.height / seen[1]  # below 1 after a draft
    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    part = whole.resize((size, size), module.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    if part.mode != "RGBA":
        return part
    # What lies below transparent pixels is arbitrary, and often black.
    return module.alpha_composite(module.new("RGBA", part.size, "white"), part).convert(mode)
