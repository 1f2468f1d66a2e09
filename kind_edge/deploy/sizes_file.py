"""Where the measured sizes of a model lie: beside the checkpoint, or in the user's cache where that is read-only."""

from __future__ import annotations

from pathlib import Path

from kind_edge.budget.sizes import SizeTable, read_sizes
from kind_edge.deploy.request import OpenedModel
from kind_edge.deploy.sensitivity_file import write_to_first
from kind_edge.model.cache import cache_base
from kind_edge.model.spec import ModelSpec

SIZES = "sizes.json"


def find_sizes(model: OpenedModel) -> SizeTable:
    """What was measured of this very model, beside it or in the cache; a table of other weights is passed over.

    Raises `InputError` for one that cannot be read.
    """
    for path in _places(model.sha256, model.checkpoint.path):
        if path.is_file() and (table := read_sizes(path)).checkpoint_sha256 == model.sha256:
            return table
    return SizeTable(model.sha256, ())


def keep_sizes(table: SizeTable, folder: Path | None) -> Path | None:
    """Write it beside the checkpoint, else into the cache; None where neither can be written."""
    return write_to_first(_places(table.checkpoint_sha256, folder), table.to_json())


def _places(sha256: str, folder: Path | None) -> list[Path]:
    """Where it may lie, the best one first."""
    return [*([folder / SIZES] if folder else []), _cached(sha256)]


def healing_file(sha256: str, spec: ModelSpec) -> Path:
    """Where unfinished healing of a size is kept."""
    return _cached(sha256).with_suffix("") / f"depth{spec.depth}-width{spec.width}.safetensors"


def _cached(sha256: str) -> Path:
    return cache_base() / f"sizes-{sha256[:16]}.json"
