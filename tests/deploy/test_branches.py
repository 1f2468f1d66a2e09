"""Plans that drop whole branches and mix precisions: the same function in every form, files that hold what is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from kind_edge.budget.cost import branch_fixed_cost, deployed_fixed_cost, matrix_cost, model_cost
from kind_edge.budget.graph_bytes import GRAPH_BYTES_PER_OPERATOR
from kind_edge.budget.plan import MatrixPlan, Plan, check_replayable, full_rank
from kind_edge.deploy.assemble import predict_here_ms
from kind_edge.deploy.graph_facts import graph_facts
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.merge_check import check_merge
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from kind_edge.model.spec import BRANCHES, ModelSpec, branch_of
from kind_edge.registry import exporter

MakeCheckpoint = Callable[..., Checkpoint]
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"label_embedding": True, "depth": 3},
    {"step_counts": (1, 2, 4), "inside_guidance": 1.75, "nested": True},
)
TIMESTEPS = torch.from_numpy(sampler_table("euler", "flow", 4).timestep)


def plan_of(
    spec: ModelSpec, form: str, classes: tuple[str, ...], matrices: dict[str, MatrixPlan], modulation: str = "baked"
) -> Plan:
    label = "int8" if any(m.precision == "int8" for m in matrices.values()) else "fp32"
    return Plan(
        model="tiny", checkpoint_sha256="", profile="host", unit="cpu", form=form, classes=classes, precision=label,
        precisions=("fp32", "int8"), sampler="euler", steps=4, guidance=1.0, evaluations_per_step=1,
        modulation=modulation, truncation="plain", calibration="", params=0,
        flops=0, weight_bytes=0, peak_memory_bytes=0, evaluation_latency_s=0.0, image_latency_s=0.0,
        sustained_image_latency_s=0.0, predicted_loss_increase=None,
        predicted_frechet=None, limits={}, binding=(), prices={}, optimality_gap=0.0, dense={},
        matrices=matrices, inside_guidance=spec.inside_guidance,
    )  # fmt: skip


@st.composite
def plans(draw: st.DrawFn, spec: ModelSpec, names: tuple[str, ...]) -> Plan:
    """Any plan that can be replayed: form, classes, branches, storages, ranks and precisions."""
    form = draw(st.sampled_from(["switch", "single", "union"]))
    most = 1 if form == "single" else 3
    classes = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True)))
    dropped = draw(st.sets(st.sampled_from(spec.branches())))
    matrices = {}
    for shape in spec.matrices():
        own, precision = spec.ranks(shape.name), draw(st.sampled_from(["fp32", "int8"]))
        whole = own.learngene if form == "switch" else own.learngene + len(classes) * own.tailor
        gone = branch_of(shape.name) in dropped
        storage = "dropped" if gone else draw(st.sampled_from(["dense", "factored"]))
        rank = 0 if gone else draw(st.integers(1, whole))
        if form == "switch":
            tailor = 0 if gone else draw(st.integers(0, own.tailor))
            matrices[shape.name] = MatrixPlan(storage, precision, rank, tailor)
        else:
            matrices[shape.name] = MatrixPlan(storage, precision, rank=rank)
    return plan_of(spec, form, classes, matrices, draw(st.sampled_from(["baked", "network"])))


def run_reference(run: Callable[..., Any], plan: Plan, truncated: Checkpoint) -> float:
    """The worst SQNR of an interpreter, or of a plain model, against the gated truncated checkpoint."""
    reference = make_reference(truncated, plan.form, TIMESTEPS, None)
    names = ["sample", "step_index" if plan.baked else "timestep"]
    names += ["class_index"] if plan.form == "switch" else []
    worst = float("inf")
    for i in range(len(reference["sample"])):  # int8 has one range for a whole batch
        got = run({name: reference[name][i : i + 1] for name in names})
        worst = min(worst, sqnr_db(reference["prediction"][i : i + 1], got))
    return worst


def plain_runner(plain: PlainDiT) -> Callable[..., Any]:
    return lambda inputs: plain(*(torch.from_numpy(inputs[name]) for name in plain.input_names)).numpy()


@pytest.mark.parametrize("kind", range(len(KINDS)))
@settings(max_examples=12)
@given(st.data())
def test_any_plan_is_the_gated_truncated_checkpoint(
    kind: int, make_checkpoint: MakeCheckpoint, data: st.DataObject
) -> None:
    checkpoint = make_checkpoint(**KINDS[kind])
    plan = data.draw(plans(checkpoint.spec, checkpoint.class_names), "plan")
    check_replayable(plan, checkpoint.spec)
    truncated = truncate(checkpoint, plan, None)
    plain = fold(truncated, plan, TIMESTEPS)
    assert run_reference(plain_runner(plain), plan, truncated) >= 100
    assert truncated.spec.dropped_branches == plan.dropped_branches
    gone = tuple(f"{name}." for name in plan.dropped_branches)
    assert not [name for name in (*truncated.tensors, *plain.state_dict()) if gone and name.startswith(gone)]
    if plan.baked:
        left = 3 * len(truncated.spec.branches()) + 2
        assert plain.modulation.table.shape[-2:] == (4, left * checkpoint.spec.width)
    assert check_merge(checkpoint, plan, TIMESTEPS) >= 100  # at full rank, with every branch


@pytest.mark.parametrize("dropped", [{"blocks.1.attn"}, {"blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"}])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_dropped_branch_is_one_whose_gate_is_zero(
    kind: int, dropped: set[str], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """In its result, not by how it is made; and such a checkpoint is an ordinary one, which can be cut again."""
    checkpoint = make_checkpoint(**KINDS[kind])
    spec, width = checkpoint.spec, checkpoint.spec.width
    matrices = {
        shape.name: MatrixPlan("dropped", "fp32", 0, 0)
        if branch_of(shape.name) in dropped
        else MatrixPlan("factored", "fp32", *spec.ranks(shape.name))
        for shape in spec.matrices()
    }
    plan = plan_of(spec, "switch", checkpoint.class_names, matrices)
    truncated = truncate(checkpoint, plan, None)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    for name in dropped:
        block, branch = name.rsplit(".", 1)
        gate = 3 * BRANCHES.index(branch) + 2
        for part in ("weight", "bias"):
            tensors[f"{block}.adaln.{part}"][gate * width : (gate + 1) * width] = 0
    shut = dataclasses.replace(checkpoint, tensors=tensors)
    save_checkpoint(tmp_path, truncated)
    again = load_checkpoint(tmp_path)
    assert again.spec == truncated.spec
    wanted, got = (make_reference(each, "switch", TIMESTEPS, None)["prediction"] for each in (shut, again))
    assert sqnr_db(wanted, got) >= 110
    rest = {name: matrix for name, matrix in plan.matrices.items() if branch_of(name) not in dropped}
    twice = truncate(again, dataclasses.replace(plan, matrices=rest), None)
    assert twice.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in twice.tensors.items())


WIDE: dict[str, Any] = {"image_size": 16, "width": 128, "heads": 4, "depth": 2, "learngene_rank": 24, "tailor_rank": 4}
WIDE_PARTS = {
    "attn.q": ("factored", "int8", 20, 4), "attn.k": ("dense", "fp32", 24, 3), "attn.v": ("factored", "fp32", 9, 0),
    "attn.o": ("dense", "int8", 24, 0), "mlp.fc1": ("dense", "int8", 24, 4), "mlp.fc2": ("factored", "fp32", 16, 2),
}  # fmt: skip
WIDE_DROPPED = ("blocks.0.mlp", "blocks.1.attn")


@pytest.fixture(scope="module")
def wide(make_checkpoint: MakeCheckpoint) -> tuple[Plan, Checkpoint]:
    checkpoint = make_checkpoint(**WIDE)
    matrices = {
        shape.name: MatrixPlan("dropped", "int8", 0, 0)
        if branch_of(shape.name) in WIDE_DROPPED
        else MatrixPlan(*WIDE_PARTS[shape.name.split(".", 2)[2]])
        for shape in checkpoint.spec.matrices()
    }
    plan = plan_of(checkpoint.spec, "switch", ("coat", "bag"), matrices)
    return plan, checkpoint


@pytest.fixture(scope="module")
def exported(wide: tuple[Plan, Checkpoint], made_once: Callable[..., Path]) -> Path:
    def write(folder: Path) -> None:
        plan, checkpoint = wide
        plain = fold(truncate(checkpoint, plan, None), plan, TIMESTEPS)
        files = exporter("onnx").export(plain, folder, plan.precisions)
        (folder / "entries.json").write_text(json.dumps({file.precision: file.entry for file in files}))

    return made_once("onnx-branches", write)


FILES = {"fp32": "onnx/denoiser.onnx", "int8": "onnx/denoiser.int8.onnx"}


def test_exported_files_keep_their_gates(wide: tuple[Plan, Checkpoint], exported: Path) -> None:
    plan, checkpoint = wide
    truncated = truncate(checkpoint, plan, None)
    fp32, int8 = (run_reference(exporter("onnx").open(exported / file), plan, truncated) for file in FILES.values())
    assert fp32 >= 100 > int8 >= 25
    entries = predict_here_ms(plan, checkpoint.spec, {p: {"role": "denoiser", "precision": p} for p in FILES}, 4)
    assert all(latency > 0 for latency in entries.values())


def test_an_int8_file_holds_in_fp32_what_the_plan_says_and_nothing_else(
    wide: tuple[Plan, Checkpoint], exported: Path
) -> None:
    plan, _ = wide
    model = onnx.load_model(exported / FILES["int8"])
    types = {t.name: numpy_helper.to_array(t).dtype for t in model.graph.initializer if len(t.dims) > 1}
    for node in model.graph.node:  # tailors lie in tables, and are cut out of what is picked from those
        if node.op_type == "Split" and ".tailors." in node.output[0]:
            types |= dict.fromkeys(node.output, types[node.input[1].removesuffix(".rows")])
    floats = {name for name, kind in types.items() if kind == np.float32}
    quantized = {name for name, kind in types.items() if kind == np.int8}
    for name, matrix in plan.matrices.items():
        weights = [other for other in floats if other.startswith(f"{name}.") and not other.endswith(".scale")]
        narrow = [other for other in quantized if other.startswith(f"{name}.")]
        parts = {"dense": 1, "factored": 2, "dropped": 0}[matrix.storage] + 2 * bool(matrix.tailor_rank)
        assert (len(weights), bool(narrow)) == ((parts, False) if matrix.precision == "fp32" else (0, parts > 0)), name
    entries = json.loads((exported / "entries.json").read_text())
    wide_parts = {name for name, matrix in plan.matrices.items() if matrix.precision == "fp32"}
    assert set(entries["int8"]["fp32_matrices"]) == wide_parts
    assert "fp32_matrices" not in entries["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_work_and_bytes_of_the_files_are_those_that_are_predicted(
    precision: str, wide: tuple[Plan, Checkpoint], exported: Path
) -> None:
    plan, checkpoint = wide
    spec, kept, facts = checkpoint.spec, len(plan.classes), graph_facts(exported / FILES[precision])
    stored = plan.matrix_precisions(precision)
    costs = []
    for shape in spec.matrices():
        matrix = plan.matrices[shape.name]
        ranks = (matrix.shared_rank, matrix.tailor_rank or 0)
        costs.append(matrix_cost(spec, shape, matrix.storage, *ranks, kept, stored[shape.name]))
    # From the whole model by what vanishes: as the solver counts.
    fixed = deployed_fixed_cost(spec, kept, len(TIMESTEPS), True, precision)
    gone = [
        branch_fixed_cost(spec, kind, precision, kept, len(TIMESTEPS))
        for kind in BRANCHES
        for name in plan.dropped_branches
        if name.endswith(kind)
    ]
    left = model_cost(spec.without_branches(plan.dropped_branches), "exact")
    elementwise = spec.tokens * (spec.width + spec.patch_values)  # biases of patches and of the final layer
    others = sum(left.part(name).flops for name in ("patch", "products", "final")) - elementwise
    assert facts.uncounted == ()
    assert facts.flops == sum(cost.flops for cost in costs) + others
    weights = fixed.weight_bytes + sum(c.weight_bytes for c in costs) - sum(c.weight_bytes for c in gone)
    small = 4 * spec.width + 300  # the normalisations' row of ones, and constants of shapes
    assert 0 <= sum(facts.constant_bytes.values()) - weights <= small
    operators = fixed.operators + sum(c.operators for c in costs) - sum(c.operators for c in gone)
    assert facts.size_bytes == pytest.approx(weights + GRAPH_BYTES_PER_OPERATOR * operators, rel=0.02)


def test_plans_that_cannot_be_carried_out_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    spec = make_checkpoint().spec
    whole = {shape.name: MatrixPlan("factored", "fp32", *spec.ranks(shape.name)) for shape in spec.matrices()}
    plan = dataclasses.replace(plan_of(spec, "switch", ("bag",), whole), guidance=1.5)
    check_replayable(plan, spec)
    nothing = MatrixPlan("dropped", "fp32", 0, 0)
    attention = {name: nothing for name in whole if name.startswith("blocks.0.attn.")}
    check_replayable(dataclasses.replace(plan, matrices=whole | attention), spec)
    only_tailor = {"blocks.0.attn.q": MatrixPlan("dropped", "fp32", 0, 2)}
    check_replayable(dataclasses.replace(plan, matrices=whole | only_tailor), spec)
    for words, matrices in {
        r"drops blocks.0.attn.q, but not all of blocks.0.attn": {"blocks.0.attn.q": nothing},
        r"drops blocks.0.attn.q, but not all": attention
        | only_tailor
        | {"blocks.0.attn.q": nothing, "blocks.0.attn.o": whole["blocks.0.attn.o"]},
        r"blocks.1.mlp.fc1 is dropped, but has rank 3": {"blocks.1.mlp.fc1": MatrixPlan("dropped", "fp32", 3, 1)},
        r"blocks.1.mlp.fc1 is fp8": {"blocks.1.mlp.fc1": MatrixPlan("dense", "fp8", 3, 1)},
        r"called fp32, but its matrices make it int8": {"blocks.1.mlp.fc1": MatrixPlan("dense", "int8", 3, 1)},
    }.items():
        with pytest.raises(InputError, match=words):
            check_replayable(dataclasses.replace(plan, matrices=whole | matrices), spec)
    restored = full_rank(dataclasses.replace(plan, matrices=whole | attention), {n: spec.ranks(n) for n in whole})
    assert restored.dropped_branches == ()
