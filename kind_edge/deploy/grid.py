"""Pictures of pictures: a grid of generated images as one PNG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kind_edge.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_TILE_PIXELS = 96
"""Tiny images are enlarged to about this height, so that a 28-pixel digit can be judged on a screen."""

_INK = 32


def save_grid(
    images: npt.NDArray[np.uint8],
    path: Path | str,
    columns: int,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write uint8 images [n, H, W, ch] (ch 1 or 3) row by row into a PNG on white, `columns` in a row.

    Every pixel becomes `scale` x `scale` pixels, never smoothed; None enlarges small images to about 96 pixels.
    `labels` names the rows, at their left. The file appears whole or not at all. Raises `UsageError` for shapes that do
    not fit.
    """
    _check(images, columns, labels)
    if scale is None:
        scale = max(1, round(_TILE_PIXELS / images.shape[1]))
    image = draw_grid(images, columns, scale, labels)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".png", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            image.save(file, format="PNG", optimize=True)
        mask = os.umask(0o077)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def draw_grid(images: npt.NDArray[np.uint8], columns: int, scale: int, labels: Sequence[str] | None) -> Image:
    """The grid as a Pillow image, mode L or RGB."""
    from PIL import Image, ImageDraw, ImageFont

    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = tiles.shape
    padding = max(2, min(height, width) // 24)
    font = ImageFont.load_default(max(11, min(18, height // 5)))
    left = padding
    if labels:
        left += max(round(font.getlength(label)) for label in labels) + 2 * padding + 4
    rows = -(-count // columns)
    size = (rows * (height + padding) + padding, left + columns * (width + padding))
    canvas = np.full((*size, channels), 255, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        top, start = padding + row * (height + padding), left + column * (width + padding)
        canvas[top : top + height, start : start + width] = tile
    image = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    draw: Any = ImageDraw.Draw(image)
    ink = _INK if channels == 1 else (_INK,) * 3
    for row, label in enumerate(labels or ()):
        middle = padding + row * (height + padding) + height / 2
        draw.text((left - 2 * padding - 2, middle), label, fill=ink, font=font, anchor="rm")
    return image


def _check(images: npt.NDArray[np.uint8], columns: int, labels: Sequence[str] | None) -> None:
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or not images.size:
        raise UsageError(
            f"a grid takes uint8 [n, height, width, 1 or 3], n at least 1; got {images.dtype} {images.shape}"
        )
    if columns < 1:
        raise UsageError(f"columns: got {columns}, want at least 1")
    rows = -(-len(images) // columns)
    if labels is not None and len(labels) != rows:
        raise UsageError(f"labels: got {len(labels)}, want one for each of the {rows} rows")
