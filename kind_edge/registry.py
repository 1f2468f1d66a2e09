"""Formats by name, loaded on demand, and the protocols they keep. The only module that knows where they live."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
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
    "coreml": "kind_edge.exporters.coreml_export",
    "ort": "kind_edge.exporters.ort_export",
}

PACKS = "packs"

_PACKAGERS = {
    "android": "kind_edge.deploy.android",
    PACKS: "kind_edge.deploy.packs_bundle",
    "web": "kind_edge.deploy.web",
}

FORMATS = (*_MODULES, *_PACKAGERS)

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


class Packager(Protocol):
    """What is made for an app of model files that are written, proven and measured."""

    def check(self, spec: ModelSpec) -> None:
        """`UsageError` before any work for a model that it has no place for, or for tools that are missing."""

    def write(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Write into the bundle at `folder`; `values` are its manifest's, but for the files."""


def exporter(name: str, choices: Mapping[str, Any] | None = None) -> Exporter:
    """The exporter of that format; an unknown name is a `UsageError` with the nearest known ones.

    `choices` are fields of its own ("target" of coreml) that are not to have their defaults.
    """
    if name not in _MODULES:
        raise unknown("format", name, FORMATS)
    found = importlib.import_module(_MODULES[name]).EXPORTER
    return cast(Exporter, dataclasses.replace(found, **choices) if choices else found)


def packagers(formats: Sequence[str]) -> tuple[Packager, ...]:
    """Those of the formats that package what the others wrote."""
    names = [name for name in dict.fromkeys(formats) if name in _PACKAGERS]
    return tuple(cast(Packager, importlib.import_module(_PACKAGERS[name]).PACKAGER) for name in names)


def exporters(formats: Sequence[str], choices: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Exporter, ...]:
    """Those of the formats that write model files; `choices` by format, as `exporter` takes them."""
    names = [name for name in dict.fromkeys(formats) if name not in _PACKAGERS]
    return tuple(exporter(name, (choices or {}).get(name)) for name in names)
