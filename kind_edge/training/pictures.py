"""From the bytes of an image file to pixels of one size and one mode: the same bytes give the same pixels.

Everything that a file can hold is converted on purpose: photographs are turned the way their camera was held; what is
transparent lies on white; 16 bits become 8 by scale, not by cutting off; of an animation the first frame counts.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({"avif", "bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"})
"""Of file names, in lower case and without the dot."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for: formats that are pixels and start no other program."""

_BACKGROUND = (255, 255, 255, 255)
_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_NO_KNOWN_WHITE = ("I", "F")
# What Pillow's readers raise of broken files, besides OSError.
_BROKEN = (
    ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class UnreadablePictureError(Exception):
    """One file is no picture; the message says why, in a few words."""


class Picture(NamedTuple):
    pixels: NDArray[np.uint8]  # [ch, size, size]
    enlarged: bool


def decode(content: bytes, size: int, channels: int) -> Picture:
    """The centre square of a picture, at `size` x `size` pixels, as grey (1 channel) or red, green, blue (3).

    Resampled with Pillow's bicubic filter, which averages over all covered pixels when it makes a picture smaller.

    Raises:
        UnreadablePictureError: broken, cut short, of an unknown format, or without a known white level.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_readable()) as opened:
            opened.draft(None, (2 * size, 2 * size))  # a JPEG much larger than that is not decoded in full
            upright = ImageOps.exif_transpose(opened)
            picture = _plain(upright).convert("L" if channels == 1 else "RGB")
    except UnreadablePictureError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePictureError("no image format that is known" if content else "empty") from error
    except (OSError, *_BROKEN) as error:
        raise UnreadablePictureError(" ".join(str(error).split())[:120] or type(error).__name__) from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.uint8).reshape(size, size, channels)
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), side < size)


@cache
def _readable() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _plain(picture: Image.Image) -> Image.Image:
    """Eight bits per channel and nothing transparent."""
    if picture.mode in _16_BIT:
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode in _NO_KNOWN_WHITE:
        raise UnreadablePictureError(f"mode {picture.mode}: 32-bit values have no known white; save with 8 or 16 bits")
    if picture.has_transparency_data:
        opaque = Image.new("RGBA", picture.size, _BACKGROUND)
        return Image.alpha_composite(opaque, picture.convert("RGBA"))
    return picture.convert("RGB") if picture.mode not in ("1", "L", "RGB") else picture
