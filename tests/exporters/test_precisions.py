"""Every precision of every kind of model: close enough, as small as counted, and static where NPUs want it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.precision import PRECISIONS, denoiser_path
from kind_edge.deploy.manifest import ModelEntry, TensorInfo
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import Reference, verify_model
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.registry import exporter

MakeCheckpoint = Callable[..., Checkpoint]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
CLASSES = ("coat", "sneaker")
# One matrix of a block each: both storages with and without tailors, and nothing but a tailor.
MATRICES = {
    "attn.q": ("factored", 9, 2), "attn.k": ("dense", 12, 1), "attn.v": ("factored", 5, 0), "attn.o": ("dropped", 0, 2),
    "mlp.fc1": ("dense", 12, 0), "mlp.fc2": ("factored", 12, 2),
}  # fmt: skip
KINDS = {
    "guided": {},
    "labelled": {"label_embedding": True, "objective": "epsilon", "learned_sigma": True, "channels": 3},
    "distilled": {"step_counts": (1, 2, 4), "inside_guidance": 1.75},
    "single": {},
}
SHAPE = {"width": 32, "depth": 1, "learngene_rank": 12}
STATIC = [name for name, traits in PRECISIONS.items() if traits.static]
FILES = [name for name in PRECISIONS if name != "int8"]  # tested by itself


def plain_model(checkpoint: Checkpoint, kind: str) -> PlainDiT:
    spec = checkpoint.spec
    form, guided = ("single" if kind == "single" else "switch"), kind in ("guided", "labelled")
    matrices = {}
    for name, (storage, shared, tailor) in MATRICES.items():
        ranks = (None, None, shared or 3) if form == "single" else (shared, tailor, None)
        kept = "factored" if form == "single" and storage == "dropped" else storage
        matrices[f"blocks.0.{name}"] = MatrixPlan(kept, "fp32", *ranks)
    sampler = "euler" if spec.objective == "flow" else "ddim"
    unknown = {field.name: None for field in dataclasses.fields(Plan)}  # these alone are looked at:
    plan = Plan(**{
        **unknown, "checkpoint_sha256": "", "form": form, "classes": CLASSES[: 1 if form == "single" else 2],
        "matrices": matrices, "modulation": "network" if spec.label_embedding else "baked", "sampler": sampler,
        "steps": 4, "guidance": 1.5 if guided else 1.0, "evaluations_per_step": 1 + guided, "precision": "fp32",
        "inside_guidance": spec.inside_guidance,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table(sampler, spec.objective, 4).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(kind: str, make_checkpoint: MakeCheckpoint) -> PlainDiT:
    return plain_model(make_checkpoint(**{**SHAPE, **KINDS[kind]}), kind)


@pytest.fixture(scope="module")
def exported(kind: str, plain: PlainDiT, made_once: MadeOnce) -> Path:
    def write(folder: Path) -> None:
        files = exporter("onnx").export(plain, folder, tuple(FILES))
        (folder / "entries.json").write_text(json.dumps({file.path: file.entry for file in files}))

    return made_once(f"precisions-{kind}", write)


@pytest.fixture(scope="module")
def reference(plain: PlainDiT) -> Reference:
    origin = plain.origin
    return make_reference(origin.truncated, origin.plan.form, origin.timesteps, None, seed=3)


def entry_of(folder: Path, precision: str) -> ModelEntry:
    values = json.loads((folder / "entries.json").read_text())[denoiser_path(precision)]
    tensors = {
        part: tuple(TensorInfo(each["name"], each["dtype"], tuple(each["shape"])) for each in values[part])
        for part in ("inputs", "outputs")
    }
    wide = tuple(values.get("wide_operators", ()))
    return ModelEntry(denoiser_path(precision), "denoiser", precision, **tensors, wide_operators=wide)


@pytest.mark.parametrize("precision", FILES)
def test_gate(precision: str, plain: PlainDiT, exported: Path, reference: Reference) -> None:
    parity = verify_model(exported, entry_of(exported, precision), reference, CLASSES)
    size = (exported / denoiser_path(precision)).stat().st_size
    print(precision, parity.worst_db, parity.gate_db, entry_of(exported, precision).wide_operators, size)
    assert parity.failures == ()
