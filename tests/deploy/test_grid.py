"""Every image lands in its cell, enlarged without smoothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kind_edge.deploy.grid import save_grid
from kind_edge.errors import UsageError


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_lands_in_its_cell(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), np.uint8)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png")).reshape(2 * (12 + 2) + 2, 3 * (18 + 2) + 2, channels)
    for number, image in enumerate(images):
        top, left = 2 + number // 3 * 14, 2 + number % 3 * 20
        np.testing.assert_array_equal(pixels[top : top + 12 : 3, left : left + 18 : 3], image)
        np.testing.assert_array_equal(pixels[top + 2 : top + 12 : 3, left + 2 : left + 18 : 3], image)
    assert (pixels[16:28, 42:60] == 255).all()  # the empty cell
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_labels_stand_left_of_their_rows(tmp_path: Path) -> None:
    images = np.zeros((4, 28, 28, 1), np.uint8)
    save_grid(images, tmp_path / "plain.png", columns=2)
    save_grid(images, tmp_path / "named.png", columns=2, labels=["ankle boot", "bag"])
    plain, named = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "named.png"))
    assert plain.shape[0] == named.shape[0] >= 2 * 84
    margin = named[:, : named.shape[1] - plain.shape[1]]
    assert all(half.min() < 128 for half in np.array_split(margin, 2))


def test_refusals(tmp_path: Path) -> None:
    images = np.zeros((4, 2, 2, 1), np.uint8)
    for wrong in (images[0], images.astype(np.float32), images[:0], np.zeros((1, 2, 2, 4), np.uint8)):
        with pytest.raises(UsageError, match="a grid takes uint8"):
            save_grid(wrong, tmp_path / "x.png", columns=2)
    with pytest.raises(UsageError, match="columns: got 0"):
        save_grid(images, tmp_path / "x.png", columns=0)
    with pytest.raises(UsageError, match="one for each of the 2 rows"):
        save_grid(images, tmp_path / "x.png", columns=2, labels=["a"])
    assert list(tmp_path.iterdir()) == []
