"""Any file becomes the same pixels every time, every mode on purpose, and a broken file one named error."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kind_edge.training.pictures import UnreadablePictureError, decode

# What Pillow says of files that are broken on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@given(seed=st.integers(0, 2**32 - 1), side=st.integers(1, 20), channels=st.sampled_from([1, 3]))
def test_a_square_of_the_wanted_size_passes_untouched(seed: int, side: int, channels: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    found = decode(encoded(Image.fromarray(values.squeeze(2) if channels == 1 else values)), side, channels)
    assert np.array_equal(found.pixels, values.transpose(2, 0, 1))
    assert found.pixels.flags.c_contiguous
    assert not found.enlarged


def in_mode(mode: str) -> Image.Image:
    """A black picture whose last pixel is white, or transparent where the mode can be."""
    if mode == "I;16":
        return Image.fromarray(np.array([[0, 65535], [257 * 100, 65535]], dtype=np.uint16))
    if mode in ("RGBA", "LA", "P"):
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 255))
        image.putpixel((1, 1), (0, 255, 0, 0))  # what is green there nobody may see
        return image.quantize(4) if mode == "P" else image.convert(mode)
    image = Image.new("L", (2, 2))
    image.putpixel((1, 1), 255)
    return image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_converted_on_purpose(mode: str, channels: int) -> None:
    kind = "tiff" if mode == "CMYK" else "png"
    pixels = decode(encoded(in_mode(mode), kind), 2, channels).pixels
    assert pixels.shape == (channels, 2, 2)
    assert (pixels[:, 0, 0] == 0).all()
    assert (pixels[:, 1, 1] == 255).all()
    if mode == "I;16":  # scaled, not cut off at 255
        assert (pixels[:, 1, 0] == 100).all()


def test_the_centre_is_kept_and_the_camera_held_upright() -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8, 1] = 255  # the middle third is green
    assert decode(encoded(Image.fromarray(wide)), 4, 3).pixels[1].min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = decode(encoded(Image.fromarray(GREY), exif=exif), 8, 1).pixels[0]
    assert np.array_equal(turned, np.rot90(GREY, -1))


def test_making_smaller_averages_and_making_larger_is_counted() -> None:
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    small = decode(encoded(Image.fromarray(board.astype(np.uint8))), 8, 1)
    assert abs(small.pixels.astype(int) - 127).max() < 20
    assert decode(encoded(Image.fromarray(GREY)), 16, 1).enlarged


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "no image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no image format"),  # would start Ghostscript
        (encoded(Image.fromarray(GREY))[:-30], ""),
        (encoded(Image.new("F", (4, 4)), "tiff"), "no known white"),
    ],
)
def test_what_is_no_picture_says_why(content: bytes, words: str) -> None:
    with pytest.raises(UnreadablePictureError, match=words or "."):
        decode(content, 8, 3)


@given(data=st.data(), kind=st.sampled_from(["png", "jpeg", "gif", "webp", "tiff", "bmp"]))
def test_damage_never_raises_anything_else(data: st.DataObject, kind: str, make_png: Callable[..., bytes]) -> None:
    content = bytearray(encoded(Image.open(io.BytesIO(make_png(1))), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 300)))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        found = decode(bytes(content[:cut] if data.draw(st.booleans()) else content), 8, 3)
    except UnreadablePictureError:
        return
    assert found.pixels.shape == (3, 8, 8)
