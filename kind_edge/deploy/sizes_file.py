"""Where the measured sizes of a model lie: beside the checkpoint, or in the user's cache where that is read-only."""

from __future__ import annotations

from pathlib import Path

from kind_edge.budget.sizes import SizeTable, read_sizes
from kind_edge.deploy.request import OpenedModel
from kind_edge.model.cache import cache_base
from kind_edge.model.checkpoint import write_text
from kind_edge.model.spec import ModelSpec

SIZES = "sizes.json"


def find_sizes(model: OpenedModel) -> SizeTable:
    """What was measured of this very model, beside it or in the cache; a table of other weights is passed over.

    Raises `InputError` for one that cannot be read.
    """
    folder, found = model.checkpoint.path, SizeTable(model.sha256, ())
    for path in (*([folder / SIZES] if folder else []), _cached(model.sha256)):
        if path.is_file() and (table := read_sizes(path)).checkpoint_sha256 == model.sha256:
            return table
    return found


def keep_sizes(table: SizeTable, folder: Path | None) -> Path | None:
    """Write it beside the checkpoint, else into the cache; None where neither can be written."""
    for path in (*([folder / SIZES] if folder else []), _cached(table.checkpoint_sha256)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, table.to_json())
        except OSError:
            continue
        return path
    return None


def healing_file(sha256: str, spec: ModelSpec) -> Path:
    """Where unfinished healing of a size is kept."""
    return _cached(sha256).with_suffix("") / f"depth{spec.depth}-width{spec.width}.safetensors"


def _cached(sha256: str) -> Path:
    return cache_base() / f"sizes-{sha256[:16]}.json"
