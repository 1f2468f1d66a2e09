"""Exporters by name, loaded on demand, and the protocol they keep. The only module that knows where they live."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from kind_edge.errors import unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kind_edge.model.spec import ModelSpec

_MODULES = {
    "onnx": "kind_edge.exporters.onnx_export",
    "diffusers": "kind_edge.exporters.diffusers_export",
    "ort": "kind_edge.exporters.ort_export",
}

FORMATS = tuple(_MODULES)

Arrays = Mapping[str, "NDArray[np.generic]"]
Interpreter = Callable[[Arrays], "NDArray[np.float32]"]
"""Inputs by name -> prediction."""


@dataclass(frozen=True)
class ExportedFile:
    """One model file of a bundle: its path in the bundle, and the manifest's entry for it (role, precision, inputs,
    outputs)."""

    path: str
    precision: str
    entry: Mapping[str, Any]


class Exporter(Protocol):
    """One format. `check` refuses a model before any work, `export` writes every file of the wanted precisions under
    `folder`, and `open` runs one of them."""

    name: str
    precisions: tuple[str, ...]

    def check(self, spec: ModelSpec) -> None:
        """`UsageError` for a model that the format has no place for, however it is cut."""

    def export(self, model: Any, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        """Write a `kind_edge.deploy.plain.PlainDiT`; returns what was written, in the order of `precisions`."""

    def open(self, path: Path) -> Interpreter:
        """The format's reference interpreter on a written file."""


def exporter(name: str) -> Exporter:
    """The exporter of that format; an unknown name is a `UsageError` with the nearest known ones."""
    if name not in _MODULES:
        raise unknown("format", name, FORMATS)
    return cast(Exporter, importlib.import_module(_MODULES[name]).EXPORTER)
