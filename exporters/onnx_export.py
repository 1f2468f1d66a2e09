"""ONNX at opset 23 (21 where the graph is static): the denoiser in every precision, and the plan's own as a sampler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.budget.precision import PRECISIONS, decoder_path, decoder_precision, denoiser_path
from kind_edge.deploy.ort import require_onnxruntime
from kind_edge.deploy.session import open_session, runtime_errors
from kind_edge.errors import InputError
from kind_edge.model.provenance import file_metadata
from kind_edge.registry import Arrays, ExportedFile, Interpreter

if TYPE_CHECKING:
    from kind_edge.deploy.plain import PlainDiT
    from kind_edge.model.spec import ModelSpec


@dataclass(frozen=True)
class OnnxExporter:
    """Writes `onnx/denoiser.onnx` or `onnx/denoiser.PRECISION.onnx`, and from the plan's own `onnx/sampler.onnx`.

    Of a model of latents also the decoders that go with these; where none was given there is no sampler either, as its
    images come from a decoder. Nor has a static model one: NPUs know no loops.
    """

    name: str = "onnx"
    precisions: tuple[str, ...] = tuple(PRECISIONS)

    def check(self, spec: ModelSpec) -> None:
        """Every model has its place in ONNX."""

    def export(self, model: PlainDiT, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        import onnx

        from kind_edge.deploy.sampler_table import sampler_table
        from kind_edge.exporters.onnx_decoder import to_decoders
        from kind_edge.exporters.onnx_graph import inputs_and_outputs
        from kind_edge.exporters.onnx_precisions import Precisions, Rounded
        from kind_edge.exporters.onnx_sampler import to_sampler

        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        made, plan, written = Precisions(model), model.origin.plan, []
        props = file_metadata(model.origin.lineage())
        left = {shape.name for shape in model.spec.matrices()}

        def write(rounded: Rounded, path: str, role: str, precision: str) -> None:
            onnx.helper.set_model_props(rounded.proto, props)
            onnx.save_model(rounded.proto, folder / path)
            entry = {"role": role, "precision": precision, **inputs_and_outputs(rounded.proto)}
            stored = plan.matrix_precisions(precision) if role != "decoder" else {}
            if precision != "fp32" and (kept := [n for n in stored if stored[n] == "fp32" and n in left]):
                entry["fp32_matrices"] = kept
            if rounded.wide:
                entry["wide_operators"] = list(rounded.wide)
            if plan.modulation == "baked-fp16" and precision != "fp16" and role != "decoder":
                entry["table_precision"] = "fp16"
            written.append(ExportedFile(path, precision, entry))

        decoders = to_decoders(model.origin, precisions)
        for precision in precisions:
            rounded = made.make(precision)
            write(rounded, denoiser_path(precision), "denoiser", precision)
            looped = precision == plan.precision and not PRECISIONS[precision].static  # type: ignore[index]
            if looped and (model.spec.pixels_per_latent == 1 or decoders):
                table = sampler_table(plan.sampler, model.spec.objective, plan.steps)
                null_index = len(plan.classes) if plan.evaluations_per_step > 1 else None
                sampler = to_sampler(rounded.proto, table, null_index, decoders.get(decoder_precision(precision)))
                write(Rounded(sampler, rounded.wide), "onnx/sampler.onnx", "sampler", precision)
        for precision, decoder in decoders.items():
            write(Rounded(decoder), decoder_path(precision), "decoder", precision)
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
