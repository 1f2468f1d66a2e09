"""Calibration measures what the exporter writes: the same operators, and the same after the runtime's fusions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.probe_graph import Layer, Network, network
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.registry import exporter

CLASSES = ("coat", "sneaker")


def export(checkpoint: Checkpoint, folder: Path, rank: int, tailor_rank: int) -> None:
    """fp32 and int8, every matrix alike."""
    form = "switch" if tailor_rank else "single"
    one = MatrixPlan("factored", "fp32", rank, tailor_rank) if tailor_rank else MatrixPlan("dense", "fp32", rank=rank)
    unknown = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(**{
        **unknown, "model": "tiny", "checkpoint_sha256": "ab" * 32, "form": form,
        "classes": CLASSES if tailor_rank else CLASSES[:1],
        "matrices": {shape.name: one for shape in checkpoint.spec.matrices()}, "modulation": "baked",
        "precision": "fp32", "steps": 4, "sampler": "euler", "evaluations_per_step": 2 if tailor_rank else 1,
        "guidance": 1.5 if tailor_rank else 1.0,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table("euler", "flow", 4).timestep)
    plain = fold(truncate(checkpoint, plan, None), plan, timesteps)
    exporter("onnx").export(plain, folder, ("fp32", "int8"))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def optimized(model: bytes, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    options, path = onnxruntime.SessionOptions(), folder / "optimized.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return operators(onnx.load_model(path))


@pytest.mark.parametrize(("rank", "tailor_rank"), [(9, 2), (14, 0)], ids=["switch", "single"])
def test_probes_have_the_operators_of_exported_models(
    rank: int,
    tailor_rank: int,
    make_checkpoint: Callable[..., Checkpoint],
    made_once: Callable[[str, Callable[[Path], object]], Path],
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(width=32, depth=1, learngene_rank=12)
    spec = checkpoint.spec
    folder = made_once(f"probe-{rank}", lambda folder: export(checkpoint, folder, rank, tailor_rank))
    for precision, file in (("fp32", "denoiser.onnx"), ("int8", "denoiser.int8.onnx")):
        layer = Layer(precision, rank if tailor_rank else 0, tailor_rank)
        probe = network(
            Network(
                spec.image_size, spec.channels, spec.patch_size, spec.output_channels, spec.width, spec.heads,
                spec.hidden_width, (("attn", "mlp"),) * spec.depth, layer, null_branch=bool(tailor_rank),
            )
        )  # fmt: skip
        exported = (folder / "onnx" / file).read_bytes()
        assert operators(onnx.load_from_string(probe)) == operators(onnx.load_from_string(exported))
        assert optimized(probe, tmp_path) == optimized(exported, tmp_path)
