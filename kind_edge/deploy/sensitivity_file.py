"""Where a model's sensitivity lies: beside the checkpoint, or in the user's cache where that cannot be written to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kind_edge.budget.influence import Sensitivity, read_sensitivity
from kind_edge.errors import InputError
from kind_edge.model.cache import cache_base
from kind_edge.model.checkpoint import write_text
from kind_edge.model.spec import ModelSpec

SENSITIVITY = "sensitivity.json"


def find_sensitivity(folder: Path, sha256: str, spec: ModelSpec) -> Sensitivity | None:
    """The table of this very model, from beside it or from the cache; None where there is none.

    A table of other weights is passed over, as after training on: it is measured anew and replaced. A damaged one
    beside the checkpoint is an `InputError`; in the cache it is passed over too.
    """
    beside, cached = folder / SENSITIVITY, cache_path(sha256)
    found = [read_sensitivity(beside)] if beside.is_file() else []
    try:
        found += [read_sensitivity(cached)] if cached.is_file() else []
    except InputError:
        cached.unlink(missing_ok=True)
    for table in found:
        if table.checkpoint_sha256 == sha256:
            _check(table, spec, str(beside))
            return table
    return None


def keep_sensitivity(table: Sensitivity, folder: Path | None) -> Path | None:
    """Write it beside the checkpoint, else into the cache; where neither can be written, it holds for this process."""
    places = [folder / SENSITIVITY] if folder else []
    return write_to_first([*places, cache_path(table.checkpoint_sha256)], table.to_json())


def write_to_first(places: Iterable[Path], text: str) -> Path | None:
    """The first of the places that can be written to, with the text in it; None where there is none."""
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        except OSError:
            continue
        return path
    return None


def cache_path(sha256: str) -> Path:
    """$XDG_CACHE_HOME (or ~/.cache) /kind-edge/sensitivity-*.json."""
    return cache_base() / f"sensitivity-{sha256[:16]}.json"


def _check(table: Sensitivity, spec: ModelSpec, where: str) -> None:
    """A table must know every matrix of its model."""
    if missing := sorted({shape.name for shape in spec.matrices()} - set(table.matrices)):
        raise InputError(f"{where}: lacks {', '.join(missing[:3])}; remove it, and it is measured anew")
