"""ONNX: the denoiser at opset 20, in fp32 and in dynamic int8 (per channel)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.deploy.ort import require_onnxruntime
from kind_edge.deploy.session import open_session, runtime_errors
from kind_edge.errors import InputError
from kind_edge.registry import Arrays, ExportedFile, Interpreter

if TYPE_CHECKING:
    from kind_edge.deploy.plain import PlainDiT
    from kind_edge.model.spec import ModelSpec


@dataclass(frozen=True)
class OnnxExporter:
    """Writes `onnx/denoiser.onnx` and, from it, `onnx/denoiser.int8.onnx`."""

    name: str = "onnx"
    precisions: tuple[str, ...] = ("fp32", "int8")

    def check(self, spec: ModelSpec) -> None:
        """Every model has its place in ONNX."""

    def export(self, model: PlainDiT, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        import onnx

        from kind_edge.exporters.onnx_graph import inputs_and_outputs, to_onnx
        from kind_edge.exporters.onnx_int8 import quantize_int8

        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        graph = to_onnx(model)
        written = []
        for precision in precisions:
            proto = graph if precision == "fp32" else quantize_int8(graph)
            path = "onnx/denoiser.onnx" if precision == "fp32" else f"onnx/denoiser.{precision}.onnx"
            onnx.checker.check_model(proto, full_check=True)
            onnx.save_model(proto, folder / path)
            entry = {"role": "denoiser", "precision": precision, **inputs_and_outputs(proto)}
            written.append(ExportedFile(path, precision, entry))
        return tuple(written)

    def open(self, path: Path) -> Interpreter:
        """Runs the file in ONNX Runtime on the CPU; needs nothing else."""
        session = open_session(path)
        refusals = runtime_errors(require_onnxruntime())

        def run(inputs: Arrays) -> Any:
            try:
                return session.run(["prediction"], dict(inputs))[0]
            except refusals as error:
                raise InputError(f"{path}: ONNX Runtime cannot run it: {error}") from error

        return run


EXPORTER = OnnxExporter()
