"""How large is a class? Bytes of a core and of a class pack, of DiT-B/2 and of the shipped model. Nothing is timed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.bundle import verified_manifest
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.packs import Core, join_file, take_apart
from kind_edge.deploy.packs_file import ClassPack, pack_bytes
from kind_edge.deploy.packs_join import core_of
from kind_edge.deploy.packs_recipe import make_core
from kind_edge.deploy.pipeline import export
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import TIMESTEPS
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.dit import DiT
from kind_edge.model.shipped import DEFAULT_MODEL
from kind_edge.model.spec import ModelSpec, default_sampler, named_spec
from kind_edge.registry import exporter

CLASSES, PRECISIONS = ("a", "b"), ("fp32", "int8")
RANK, TAILOR_RANK, STEPS, GUIDANCE = 154, 3, 20, 4.0
"""Of DiT-B/2: the authors' active rank and, in it, their tailors."""
DEVICE = "snapdragon8g3"


def packs() -> dict[str, Any]:
    """One row per model and precision: the model file without classes, what a class adds to it, and its pack."""
    random = [row for labels in (False, True) for row in _random(labels)]
    return {"rows": [*random, *map(_shipped, PRECISIONS)]}


def _random(labels: bool) -> list[dict[str, Any]]:
    """DiT-B/2 with random weights, exported."""
    plain = random_model(labels)
    name = f"DiT-B/2, N_T {TAILOR_RANK}" + (", with labels" if labels else "")
    with tempfile.TemporaryDirectory() as folder:
        files = exporter("onnx").export(plain, Path(folder), PRECISIONS)
        denoisers = {each.precision: each.path for each in files if each.entry["role"] == "denoiser"}
        read = {precision: (path, Path(folder, path).read_bytes()) for precision, path in denoisers.items()}
        return [_sized(name, precision, *file, plain.origin.truncated.spec) for precision, file in read.items()]


def random_model(labels: bool) -> PlainDiT:
    """DiT-B/2 with random weights, every matrix factored; with `labels` its modulation table has rows for classes."""
    ranks = {"factored": True, "learngene_rank": RANK - TAILOR_RANK, "tailor_rank": TAILOR_RANK}
    spec = named_spec("DiT-B/2", len(CLASSES), label_embedding=labels, **ranks)
    torch.manual_seed(0)
    model = DiT(spec)
    with torch.no_grad():  # no two weights alike, which a package would hold once, and each matrix of an ordinary scale
        for name, weight in model.named_parameters():
            if name.endswith((".U", ".V", ".s")):
                torch.nn.init.normal_(weight, mean=float(name.endswith(".s")), std=0.04)
    checkpoint = Checkpoint(spec, CLASSES, {name: t.detach() for name, t in model.state_dict().items()}, {})
    plan = _plan(spec)
    timesteps = torch.from_numpy(sampler_table(plan.sampler, spec.objective, plan.steps).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps)


def _plan(spec: ModelSpec) -> Plan:
    """Every matrix as the model has it; what is only told of a plan is left out."""
    unknown = {field.name: None for field in dataclasses.fields(Plan)}
    matrix = MatrixPlan("factored", "fp32", RANK - TAILOR_RANK, TAILOR_RANK)
    return Plan(**{
        **unknown, "checkpoint_sha256": "", "form": "switch", "classes": CLASSES, "modulation": "baked",
        "precision": "fp32", "precisions": PRECISIONS, "steps": STEPS, "sampler": default_sampler(spec.objective),
        "guidance": GUIDANCE, "evaluations_per_step": 2, "matrices": {m.name: matrix for m in spec.matrices()},
    })  # type: ignore[arg-type]  # fmt: skip


def _sized(name: str, precision: str, path: str, content: bytes, spec: ModelSpec) -> dict[str, Any]:
    """A pack with a reference of the right shapes, as `export --formats packs` writes it for this one file."""
    core = make_core({path: content}, len(CLASSES), precision, {}, {})[1]
    shared, rows = take_apart(core, path, content, len(CLASSES))
    pack = ClassPack(
        CLASSES[0], core.sha256, {"checkpoint_sha256": "0" * 64, "model_license": ""}, rows[0], _reference(spec)
    )
    bare = len(join_file(core, path, shared, ()))
    return _row(name, precision, core, bare, len(pack_bytes(pack, core)), len(content))


def _reference(spec: ModelSpec) -> Mapping[str, Any]:
    def zeros(count: int, channels: int) -> Any:
        return np.zeros((count, channels, spec.image_size, spec.image_size), np.float32)

    steps = np.zeros(TIMESTEPS, np.int32)
    points = {"sample": zeros(TIMESTEPS, spec.channels), "step_index": steps, "timestep": steps.astype(np.float32)}
    points["prediction"] = zeros(TIMESTEPS, spec.output_channels)
    return points | {"noise": zeros(1, spec.channels), "image": zeros(1, spec.channels)}


def _shipped(precision: str) -> dict[str, Any]:
    """All classes of the shipped model, exported; the file that an app loads."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(DEFAULT_MODEL, profile=DEVICE, precision=precision, formats=["packs"], output=Path(folder, "b"))
        manifest = verified_manifest(bundle.path, str(bundle.path))
        core, path, classes = core_of(bundle.path, manifest, "b"), manifest.default_model, manifest.classes
        content = (bundle.path / path).read_bytes()
        bare = len(join_file(core, path, take_apart(core, path, content, len(classes))[0], ()))
        size = max(size for file, size in bundle.files.items() if file.startswith("packs/") and "core" not in file)
        return _row(DEFAULT_MODEL, precision, core, bare, size, bare + 2 * core.row_bytes)


def _row(name: str, precision: str, core: Core, bare: int, pack: int, two: int) -> dict[str, Any]:
    return {
        "model": name,
        "precision": precision,
        "core_bytes": bare,
        "class_row_bytes": core.row_bytes,
        "pack_bytes": pack,
        "file_of_2_classes_bytes": two,
    }
