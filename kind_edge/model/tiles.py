"""Pictures decoded in overlapping pieces, one after the other: less memory, as much of a picture.

Symbols: B images, ch x h x w latents, C x H x W pixels, f pixels per latent along a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_OVERLAP = 0.25
"""Of a tile, as diffusers has it."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tiles:
    """`count` overlapping tiles along a side, each `size` latents long, from `starts`.

    `weights` [count, size * f]: how much of a pixel comes from which tile; over all tiles they add up to 1, and where
    two tiles overlap the one fades into the other.
    """

    count: int
    size: int
    starts: tuple[int, ...]
    weights: Floats


def tiles_of(side: int, count: int, pixels_per_latent: int) -> Tiles:
    """`count` equal tiles along a side of `side` latents that overlap by about a quarter and meet its ends."""
    size = min(side, int(np.ceil(side / (count - _OVERLAP * (count - 1)))))
    starts = np.linspace(0, side - size, count).round().astype(int) if count > 1 else np.zeros(1, int)
    weights = np.ones((count, size * pixels_per_latent), np.float32)
    for i in range(count - 1):
        both = max(0, int(starts[i] + size - starts[i + 1])) * pixels_per_latent
        ramp = (np.arange(both, dtype=np.float32) + np.float32(0.5)) / np.float32(max(both, 1))
        weights[i, len(weights[i]) - both :] *= 1 - ramp
        weights[i + 1, :both] *= ramp
    return Tiles(count, size, tuple(int(start) for start in starts), weights)


def in_tiles(decode: Callable[[Floats], Floats], latent: Floats, tiles: Tiles) -> Floats:
    """Latents [B, ch, h, w] to images [B, C, H, W], tile by tile; `decode` takes tiles, where there are several."""
    if tiles.count == 1:
        return decode(latent)
    image: Floats | None = None
    for i, top in enumerate(tiles.starts):
        for j, left in enumerate(tiles.starts):
            part = decode(np.ascontiguousarray(latent[:, :, top : top + tiles.size, left : left + tiles.size]))
            f = part.shape[-1] // tiles.size
            if image is None:
                image = np.zeros((*part.shape[:2], latent.shape[2] * f, latent.shape[3] * f), np.float32)
            place = image[:, :, top * f : (top + tiles.size) * f, left * f : (left + tiles.size) * f]
            place += part * tiles.weights[i][:, None] * tiles.weights[j]
    assert image is not None
    return image
