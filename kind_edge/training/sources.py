"""Where images come from: a folder per class, WebDataset shards, or a Hugging Face data set, told apart as found.

A source lists its items and their classes without decoding one of them, and reads the bytes of any item on request.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError
from kind_edge.training.pictures import SUFFIXES
from kind_edge.units import format_count

WANTED = (
    "a folder with one sub-folder of images per class; WebDataset shards (a .tar, a folder of them, or a pattern such "
    "as data-{000..009}.tar); a folder saved by Hugging Face datasets; or .parquet or .arrow files"
)
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


@dataclass(frozen=True, eq=False)
class Source:
    """A list of images with classes. `labels` are positions in `class_names`; an item's number is its place there."""

    kind: str
    where: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    name: Callable[[int], str]
    """An item's name, for messages."""
    read: Callable[[int], bytes]
    """An item's encoded image; `OSError` if it cannot be read."""
    files: Callable[[NDArray[np.int64]], Sequence[tuple[str, Path]]]
    """Names and paths of the files that determine the given items."""
    notes: tuple[str, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    """(name, reason) of entries that are no item: without a label, or without an image."""
    licence: str = ""
    """What the source itself says of it."""


def open_source(path: Path) -> Source:
    """Recognise what lies at `path`, and list it.

    Raises:
        InputError: nothing there, nothing that is known, or contradictory.
        UsageError: a package is missing that reads this kind.
    """
    from kind_edge.training.tables import open_saved, open_tables
    from kind_edge.training.tars import expand, open_tars

    if not path.exists() and "{" in str(path):
        return open_tars(expand(str(path)), str(path))
    if not path.exists():
        raise InputError(f"--data {path}: no such file or folder; want {WANTED}")
    if path.is_file():
        openers = {".tar": open_tars, ".parquet": open_tables, ".arrow": open_tables}
        if path.suffix.lower() not in openers:
            raise InputError(f"--data {path}: a file of no kind that is known; want {WANTED}")
        return openers[path.suffix.lower()]([path], str(path))
    if (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and _has(path, "dataset_info.json")):
        return open_saved(path)
    tars = sorted(path.glob("*.tar"))
    tables = sorted(path.glob("*.parquet")) + sorted(path.glob("*.arrow"))
    tables = tables or sorted(path.glob("data/*.parquet")) + sorted(path.glob("data/*.arrow"))
    if tars and tables:
        raise InputError(f"--data {path}: holds .tar files and tables ({tables[0].name}); name the ones that are meant")
    if tars:
        return open_tars(tars, str(path))
    return open_tables(tables, str(path)) if tables else _open_folder(path)


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def needed(package: str, reads: str) -> ModuleType:
    """Import what reads a kind of source; `UsageError` says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{reads} needs the package {package!r} ({error}); install it with: pip install 'kind-edge[train]'"
        ) from error


def _open_folder(path: Path) -> Source:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    loose = sum(1 for entry in path.iterdir() if entry.is_file() and _is_image(entry.name))
    if not classes:
        found = f"{format_count(loose, 'image')} and no sub-folder" if loose else "nothing that is known"
        raise InputError(f"--data {path}: holds {found}; want {WANTED}")
    if len(classes) > 1 and {name.lower() for name in classes} <= _SPLITS:
        raise InputError(
            f"--data {path}: {', '.join(classes)} are parts of a data set, no classes; give one of them, for instance "
            f"--data {path / classes[0]}"
        )
    files: list[Path] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        images, rest = _images_below(path / name)
        files += images
        labels += [label] * len(images)
        others += rest
    if not files:
        raise InputError(
            f"--data {path}: no image in {format_count(len(classes), 'sub-folder')}; want files that end in "
            f"{', '.join('.' + suffix for suffix in sorted(SUFFIXES))}"
        )
    notes = [f"left out: {format_count(loose, 'image')} outside of the class folders"] if loose else []
    notes += [f"left out: {format_count(others, 'other file')}"] if others else []

    def name_of(item: int) -> str:
        return files[item].relative_to(path).as_posix()

    return Source(
        "image folder",
        str(path),
        tuple(classes),
        np.array(labels, dtype=np.int64),
        name_of,
        lambda item: files[item].read_bytes(),
        lambda items: [(name_of(item), files[item]) for item in items.tolist()],
        tuple(notes),
    )


def _images_below(folder: Path) -> tuple[list[Path], int]:
    """All images in a folder and the folders in it, in the order of their names; and how many other files."""
    images, others = [], 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if _is_image(name):
                images.append(Path(parent) / name)
            else:
                others += not name.startswith(".")
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix()), others


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in SUFFIXES
