"""What blocks have in common lies once in a file, is counted once in a plan, and computes what the gated model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from kind_edge.budget.deployed import deployed_fixed_cost
from kind_edge.budget.graph_bytes import GRAPH_BYTES_PER_OPERATOR, TAILOR_BYTES_PER_OPERATOR
from kind_edge.budget.plan import MatrixPlan, Plan, check_replayable
from kind_edge.budget.precision import PRECISIONS, denoiser_path
from kind_edge.deploy.inspection import inspect
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.merge_check import check_merge
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.pipeline import plan as plan_for
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import InputError
from kind_edge.exporters.onnx_int8 import quantize_int8
from kind_edge.exporters.onnx_precisions import Precisions
from kind_edge.exporters.trajectories import open_model
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.names import weight_type
from kind_edge.model.spec import ModelSpec

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
SHAPE = {"width": 32, "depth": 3, "learngene_rank": 12, "shared_factors": True}
TIMESTEPS = torch.from_numpy(sampler_table("euler", "flow", 4).timestep)
CLASSES = ("coat", "sneaker")
STORED = {
    "attn.q": ("factored", 12), "attn.k": ("factored", 5), "attn.v": ("dense", 12), "attn.o": ("dropped", 0),
    "mlp.fc1": ("factored", 12), "mlp.fc2": ("dense", 7),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(made_once: MadeOnce, make_checkpoint_folder: Callable[..., Path]) -> Path:
    return made_once("shared-factors", lambda folder: make_checkpoint_folder(folder, **SHAPE))


@pytest.fixture(scope="module")
def planned(folder: Path) -> Plan:
    asked = {"classes": CLASSES, "precision": "fp32", "max_size": "100KB"}
    return plan_for(folder, profile="snapdragon8g3", **asked)


@pytest.fixture(scope="module")
def by_hand(planned: Plan, folder: Path) -> Plan:
    """Every storage, ranks cut or not; tailors that differ from block to block."""
    spec = load_checkpoint(folder).spec
    matrices = {}
    for number, matrix in enumerate(spec.matrices()):
        storage, rank = STORED[weight_type(matrix.name)]
        matrices[matrix.name] = MatrixPlan(storage, "fp32", rank, 1 + number % 2)
    return dataclasses.replace(planned, matrices=matrices)


@pytest.fixture(scope="module")
def plain(by_hand: Plan, folder: Path) -> PlainDiT:
    check_replayable(by_hand, load_checkpoint(folder).spec)
    return fold(truncate(load_checkpoint(folder), by_hand, None), by_hand, TIMESTEPS)


def test_merged_is_gated_whole_and_cut(plain: PlainDiT, planned: Plan, by_hand: Plan, folder: Path) -> None:
    checkpoint, truncated = load_checkpoint(folder), plain.origin.truncated
    assert check_merge(checkpoint, planned, TIMESTEPS) > 100
    assert truncated.spec.shared_factors
    assert truncated.tensors["shared.attn.k.U"].shape == (32, 5)
    assert torch.equal(truncated.tensors["shared.attn.k.U"], checkpoint.tensors["shared.attn.k.U"][:, :5].float())
    sample, step = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3], dtype=torch.int32)
    classes = torch.tensor([0, 1, 2])
    wanted = truncated.model()(sample, TIMESTEPS[step.long()].float(), classes)
    assert sqnr_db(wanted.numpy(), plain(sample, step, classes).numpy()) > 100


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "a16w8"])  # as int8-qdq, but slower
def test_every_precision_keeps_its_gate(precision: str, plain: PlainDiT) -> None:
    proto = Precisions(plain).make(precision).proto
    reference = make_reference(plain.origin.truncated, "switch", TIMESTEPS, None, seed=3)
    feeds = {each.name: reference[each.name] for each in proto.graph.input}
    if PRECISIONS[precision].static:  # a fixed batch
        feeds = {name: array[:2].astype("int32" if "index" in name else "float32") for name, array in feeds.items()}
    out = open_model(proto).run(None, feeds)[0]
    assert sqnr_db(reference["prediction"][: len(out)], out) > PRECISIONS[precision].gate_db


def test_a_file_holds_once_what_blocks_have_in_common(plain: PlainDiT) -> None:
    made = Precisions(plain)
    for proto, suffix in ((made.graph, ""), (quantize_int8(made.graph), "_quantized")):
        held = [tensor.name for tensor in proto.graph.initializer if tensor.name.startswith("shared.")]
        wanted = {f"shared.{kind}.{side}{suffix}" for kind in ("attn.q", "attn.k", "mlp.fc1") for side in "vu"}
        assert {name for name in held if name.endswith(suffix or ("v", "u"))} == wanted
        takers = [node for node in proto.graph.node if f"shared.attn.q.v{suffix}" in node.input]
        assert len(takers) == SHAPE["depth"]
    # Kept in fp32 in one block, a weight is kept for all of them, and not stored twice.
    kept = {tensor.name for tensor in quantize_int8(made.graph, ["blocks.1.attn.q"]).graph.initializer}
    assert {"shared.attn.q.v", "shared.attn.k.v_quantized"} <= kept
    assert "shared.attn.q.v_quantized" not in kept


def recounted(spec: ModelSpec, plan: Plan) -> tuple[int, int, int]:
    """Parameters, FLOPs and operators from ranks by hand."""
    fixed = deployed_fixed_cost(spec, len(plan.classes), 4, True, "fp32")
    params, flops, operators, seen = fixed.params, fixed.flops, fixed.operators, set()
    for shape in spec.matrices():
        chosen, n, m, kind = plan.matrices[shape.name], shape.outputs, shape.inputs, weight_type(shape.name)
        rank, tailor = chosen.shared_rank, (n + m) * (chosen.tailor_rank or 0)
        weights = {"dense": n * m, "factored": (n + m) * rank, "dropped": 0}[chosen.storage]
        scales = rank if chosen.storage == "factored" else 0
        stored = 0 if scales and kind in seen else weights
        seen |= {kind} if scales else set()
        params += stored + scales + len(plan.classes) * tailor
        flops += spec.tokens * (2 * (weights + tailor) + scales)
        operators += {"dense": 1, "factored": 3 if rank else 0, "dropped": 0}[chosen.storage] + (5 if tailor else 0)
    return params, flops, operators


def test_a_plan_counts_once_what_blocks_have_in_common(planned: Plan, folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    params, flops, operators = recounted(checkpoint.spec, planned)
    assert (planned.params, planned.flops) == (params, flops)
    of_tailors = 5 * sum(1 for matrix in planned.matrices.values() if matrix.tailor_rank)
    graph = GRAPH_BYTES_PER_OPERATOR * (operators - of_tailors) + TAILOR_BYTES_PER_OPERATOR * of_tailors
    assert planned.weight_bytes == 4 * params + graph <= 100_000
    assert planned.binding == ("max_size",)
    assert not planned.dropped_branches
    for kind, first in checkpoint.spec.weight_types().items():
        alike = {planned.matrices[m.name] for m in checkpoint.spec.matrices() if weight_type(m.name) == kind}
        assert len({(matrix.storage, matrix.learngene_rank) for matrix in alike}) == 1, first
    plain = fold(truncate(checkpoint, planned, None), planned, TIMESTEPS)
    assert params == sum(parameter.numel() for parameter in plain.parameters())
    path = tmp_path / Path(denoiser_path("fp32")).name
    onnx.save(Precisions(plain).graph, path)
    nodes = len(onnx.load(path).graph.node)
    assert abs(path.stat().st_size - planned.weight_bytes) < 300 * nodes


def test_one_class_alone_folds_its_factors_into_an_ordinary_model(folder: Path) -> None:
    asked = {"classes": CLASSES[:1], "form": "single", "guidance": 1.0, "precision": "fp32"}
    plan = plan_for(folder, profile="snapdragon8g3", **asked)
    truncated = truncate(load_checkpoint(folder), plan, None)
    assert not truncated.spec.shared_factors
    assert not any(name.startswith("shared.") for name in truncated.tensors)
    assert check_merge(load_checkpoint(folder), plan, TIMESTEPS) > 100


def test_a_plan_whose_blocks_differ_is_refused(planned: Plan, folder: Path) -> None:
    own = planned.matrices["blocks.1.attn.q"]
    changed = dataclasses.replace(own, learngene_rank=(own.learngene_rank or 0) + 1)
    plan = dataclasses.replace(planned, matrices={**planned.matrices, "blocks.1.attn.q": changed})
    with pytest.raises(InputError, match=r"stores blocks.1.attn.q as .*factors of attn.q in common; solve again"):
        check_replayable(plan, load_checkpoint(folder).spec)


def test_inspect_counts_them_once(folder: Path) -> None:
    found, spec = inspect(folder), load_checkpoint(folder).spec
    once = 12 * (8 * 32 + 2 * (32 + 128)) + 18 * 12  # U and V of six types, and s of 18 matrices
    assert found.parts["learngenes"] == 2 * once  # fp16
    assert spec.to_dict()["shared_factors"] is found.shape["shared_factors"] is True
