"""ORT format: every ONNX file of the bundle once more, as a small build of ONNX Runtime loads it.

Style Fixed: the graph is optimised here, as far as that is the same for every CPU (level "extended"; what comes after
is laid out for the machine at hand), so that a minimal build needs no optimiser and starts at once. Style Runtime keeps
the graph open for NNAPI and Core ML instead, needs an extended minimal build and stores more; for those two the bundle
has the ONNX files and `--formats coreml`.

`required_operators_and_types.config` beside them names the kernels, and the types of each, that such a build must have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kind_edge.exporters.onnx_export import EXPORTER as ONNX
from kind_edge.exporters.ort_format import build_config, convert
from kind_edge.registry import ExportedFile, Interpreter

if TYPE_CHECKING:
    from kind_edge.deploy.plain import PlainDiT
    from kind_edge.model.spec import ModelSpec

CONFIG = "onnx/required_operators_and_types.config"


@dataclass(frozen=True)
class OrtExporter:
    """Writes `onnx/X.ort` beside every `onnx/X.onnx`, which must be there, and the configuration of a small build."""

    name: str = "ort"
    precisions: tuple[str, ...] = ONNX.precisions

    def check(self, spec: ModelSpec) -> None:
        """What is in ONNX has its place here."""

    def export(self, model: PlainDiT, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        """Entries name their `source` alone: role, precision, inputs and outputs are those of the ONNX file."""
        sources = sorted((folder / "onnx").glob("*.onnx"))
        targets = [source.with_suffix(".ort") for source in sources]
        for source, target in zip(sources, targets, strict=True):
            convert(source, target)
        (folder / CONFIG).write_text(build_config(targets, folder), encoding="utf-8", newline="\n")
        return tuple(
            ExportedFile(f"onnx/{target.name}", "", {"source": f"onnx/{source.name}"})
            for source, target in zip(sources, targets, strict=True)
        )

    def open(self, path: Path) -> Interpreter:
        """Runs the file in ONNX Runtime on the CPU, as an ONNX file."""
        return ONNX.open(path)


EXPORTER = OrtExporter()
