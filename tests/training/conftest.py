"""Small data sets of every kind."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COUNTS = {"cat": 12, "dog": 20, "eel": 2}


def picture(seed: int, side: int = 24, channels: int = 3) -> Image.Image:
    """Noise on a slope: no two alike, and no symmetry that could hide a mistake."""
    values = np.random.default_rng(seed).integers(0, 160, (side, side, channels), dtype=np.uint8)
    values += np.linspace(0, 95, side, dtype=np.uint8)[:, None, None]
    return Image.fromarray(values.squeeze() if channels == 1 else values)


def png(seed: int, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    picture(seed, side).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    return png


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder(cat=12, dog=20)`: a folder of images per class, every fourth one folder deeper."""

    def make(side: int = 24, **counts: int) -> Path:
        root = tmp_path / "images"
        for label, (name, count) in enumerate((counts or COUNTS).items()):
            (root / name / "deeper").mkdir(parents=True)
            for number in range(count):
                place = root / name / ("deeper" if number % 4 == 3 else "") / f"{number:03d}.png"
                place.write_bytes(png(1000 * label + number, side))
        return root

    return make


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """A training run of a model so small that a step takes milliseconds."""
    from kind_edge.model.spec import ModelSpec
    from kind_edge.training.config import TrainConfig

    def make(num_classes: int = 3, **changes: Any) -> TrainConfig:
        shape = {"image_size": 16, "channels": 3, "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
        spec = ModelSpec(**{**shape, "num_classes": num_classes, "learngene_rank": 4, "tailor_rank": 2, **changes})
        return TrainConfig(spec, "files", images=24, batch_size=6, warmup_steps=1, ema_decay=0.5)

    return make
