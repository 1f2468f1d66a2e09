"""Models that come with the package, by name. Needs no torch."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from kind_edge.errors import InputError, nearest

DEFAULT_MODEL = "fashion-mnist"


def models_folder() -> Path:
    return Path(str(importlib.resources.files("kind_edge"))) / "models"


def shipped_models() -> tuple[str, ...]:
    folder = models_folder()
    return tuple(sorted(path.parent.name for path in folder.glob("*/config.json")))


def find_model(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: a path as it is, or a shipped model by name."""
    path = Path(name_or_path)
    shipped = str(name_or_path) in shipped_models()
    if path.is_dir() and (not shipped or (path / "config.json").is_file()):  # a data folder may bear the same name
        return path
    if shipped:
        return models_folder() / str(name_or_path)
    names = shipped_models()
    hint = f"; shipped models: {nearest(str(name_or_path), names)}" if names else ""
    raise InputError(f"{name_or_path}: no checkpoint folder and no shipped model of that name{hint}")
