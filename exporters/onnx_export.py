"""ONNX at opset 23: the denoiser in fp32 and in dynamic int8 (per channel), and the plan's own as a whole sampler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.budget.precision import decoder_path, decoder_precision
from kind_edge.deploy.ort import require_onnxruntime
from kind_edge.deploy.session import open_session, runtime_errors
from kind_edge.errors import InputError
from kind_edge.registry import Arrays, ExportedFile, Interpreter

if TYPE_CHECKING:
    from kind_edge.deploy.plain import PlainDiT
    from kind_edge.model.spec import ModelSpec


@dataclass(frozen=True)
class OnnxExporter:
    """Writes `onnx/denoiser.onnx`, from it `onnx/denoiser.int8.onnx`, and from the plan's own `onnx/sampler.onnx`.

    Of a model of latents also the decoders that go with these; where none was given there is no sampler either, as its
    images come from a decoder.
    """

    name: str = "onnx"
    precisions: tuple[str, ...] = ("fp32", "int8")

    def check(self, spec: ModelSpec) -> None:
        """Every model has its place in ONNX."""

    def export(self, model: PlainDiT, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        import onnx

        from kind_edge.deploy.sampler_table import sampler_table
        from kind_edge.exporters.onnx_decoder import to_decoders
        from kind_edge.exporters.onnx_graph import inputs_and_outputs, to_onnx
        from kind_edge.exporters.onnx_int8 import quantize_int8
        from kind_edge.exporters.onnx_sampler import to_sampler

        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        written = []

        def write(proto: onnx.ModelProto, path: str, role: str, precision: str, wide: list[str]) -> None:
            onnx.checker.check_model(proto, full_check=True)
            onnx.save_model(proto, folder / path)
            entry = {"role": role, "precision": precision, **inputs_and_outputs(proto)}
            if wide and precision != "fp32":
                entry["fp32_matrices"] = wide
            if model.origin.plan.modulation == "baked-fp16" and precision != "fp16" and role != "decoder":
                entry["table_precision"] = "fp16"
            written.append(ExportedFile(path, precision, entry))

        graph, plan = to_onnx(model), model.origin.plan
        decoders = to_decoders(model.origin, precisions)
        left = {shape.name for shape in model.spec.matrices()}
        for precision in precisions:
            stored = plan.matrix_precisions(precision)
            wide = [name for name in stored if stored[name] == "fp32" and name in left]
            proto = graph if precision == "fp32" else quantize_int8(graph, wide)
            path = "onnx/denoiser.onnx" if precision == "fp32" else f"onnx/denoiser.{precision}.onnx"
            write(proto, path, "denoiser", precision, wide)
            if precision == plan.precision and (model.spec.pixels_per_latent == 1 or decoders):
                table = sampler_table(plan.sampler, model.spec.objective, plan.steps)
                null_index = len(plan.classes) if plan.evaluations_per_step > 1 else None
                sampler = to_sampler(proto, table, null_index, decoders.get(decoder_precision(precision)))
                write(sampler, "onnx/sampler.onnx", "sampler", precision, wide)
        for precision, decoder in decoders.items():
            write(decoder, decoder_path(precision), "decoder", precision, [])
        return tuple(written)

    def open(self, path: Path) -> Interpreter:
        """Runs the file in ONNX Runtime on the CPU; needs nothing else."""
        session = open_session(path)
        refusals = runtime_errors(require_onnxruntime())

        def run(inputs: Arrays) -> Any:
            try:
                return session.run(None, dict(inputs))[0]
            except refusals as error:
                raise InputError(f"{path}: ONNX Runtime cannot run it: {error}") from error

        return run


EXPORTER = OnnxExporter()
