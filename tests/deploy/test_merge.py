"""Merge computes the same function: at full rank the original's, truncated that of the truncated checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kind_edge.deploy.merge_check as merge_check
from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.merge import class_indices, fold, truncate
from kind_edge.deploy.merge_check import check_merge
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import ModulationNetwork, ModulationTable, PlainDiT
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import GateError, InputError, UsageError
from kind_edge.model.calibration import load_calibration
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, load_checkpoint, save_checkpoint
from kind_edge.model.gated_linear import ClassGate

MakeCheckpoint = Callable[..., Checkpoint]
TIMESTEPS = torch.from_numpy(sampler_table("euler", "flow", 4).timestep)
EPSILON_STEPS = torch.from_numpy(sampler_table("dpmsolver++", "epsilon", 4).timestep)
NAMES = ("sneaker", "bag", "coat", "shirt")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label": {"label_embedding": True},
    "sigma": {"learned_sigma": True, "objective": "epsilon", "label_embedding": True, "channels": 3},
    "epsilon": {"objective": "epsilon"},
    "no-tailors": {"tailor_rank": 0},
    "no-learngene": {"learngene_rank": 0},
    "over-complete": {"learngene_rank": 20, "tailor_rank": 17},
}


def plan_of(checkpoint: Checkpoint, form: str, classes: tuple[str, ...], matrices: Mapping[str, MatrixPlan]) -> Plan:
    modulation = "network" if checkpoint.spec.learned_sigma else "baked"
    return Plan(
        model="tiny", checkpoint_sha256="", profile="host", unit="cpu", form=form, classes=classes, precision="fp32",
        precisions=("fp32",), sampler="euler", steps=4, guidance=1.0, evaluations_per_step=1, modulation=modulation,
        truncation="whitened", calibration="", params=0, flops=0, weight_bytes=0, peak_memory_bytes=0,
        evaluation_latency_s=0.0, image_latency_s=0.0, sustained_image_latency_s=0.0, predicted_loss_increase=None,
        predicted_frechet=None, prices={}, limits={},
        binding=(), optimality_gap=0.0, dense={}, matrices=matrices,
    )  # fmt: skip


def matrix_plans(checkpoint: Checkpoint, form: str, classes: tuple[str, ...], cut: float) -> dict[str, MatrixPlan]:
    """Storages in turn, dropped ones too where something is cut; `cut` is the share of every rank that stays."""
    plans = {}
    storages = itertools.cycle(["factored", "dense"] if cut == 1 else ["factored", "dense", "dropped"])
    for i, (shape, storage) in enumerate(zip(checkpoint.spec.matrices(), storages, strict=False)):
        own = checkpoint.spec.ranks(shape.name)
        whole = own.learngene if form == "switch" else own.learngene + len(classes) * own.tailor
        shared = 0 if storage == "dropped" else int(cut * whole)
        tailor = own.tailor if cut == 1 else (own.tailor - i) % (own.tailor + 1)  # zero among them
        if form == "switch":
            plans[shape.name] = MatrixPlan(storage, "fp32", shared, tailor)
        else:
            plans[shape.name] = MatrixPlan(storage, "fp32", rank=shared)
    return plans


def compared(
    plain: PlainDiT,
    checkpoint: Checkpoint,
    wanted: Callable[[Tensor, Tensor], Tensor],
    steps: Tensor,
    label: int | None,
) -> float:
    """SQNR in dB of the plain model against `wanted(sample, timestep)` at every step, the worst."""
    spec, worst = checkpoint.spec, float("inf")
    for i, timestep in enumerate(steps.float()):
        sample = torch.randn(2, spec.channels, 8, 8, generator=torch.Generator().manual_seed(i))
        step = torch.full((2,), i, dtype=torch.int32) if "step_index" in plain.input_names else timestep.expand(2)
        classes = () if label is None else (torch.full((2,), label),)
        worst = min(worst, sqnr_db(wanted(sample, timestep.expand(2)).numpy(), plain(sample, step, *classes).numpy()))
    return worst


def gated_with(checkpoint: Checkpoint, label: int, open_classes: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    gates = torch.zeros(2, checkpoint.spec.num_classes, dtype=torch.long)
    gates[:, open_classes] = 1
    gate, model = ClassGate.opening(gates, torch.full((2,), label)), checkpoint.model()
    return lambda sample, timestep: model(sample, timestep, gate)


def steps_of(checkpoint: Checkpoint) -> Tensor:
    return TIMESTEPS if checkpoint.spec.objective == "flow" else EPSILON_STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_switch_is_the_original(kind: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(**KINDS[kind])
    steps = steps_of(checkpoint)
    for classes in (NAMES, ("shirt",), ("coat", "sneaker"), ("bag", "shirt", "sneaker")):
        plan = plan_of(checkpoint, "switch", classes, matrix_plans(checkpoint, "switch", classes, 1))
        plain = fold(truncate(checkpoint, plan, None), plan, steps)
        for position, label in enumerate([*class_indices(checkpoint, classes), 4]):
            wanted = gated_with(checkpoint, label, [label] if label < 4 else [])
            assert compared(plain, checkpoint, wanted, steps, position) >= 100, (classes, label)
        assert check_merge(checkpoint, plan, steps) >= 100


@pytest.mark.parametrize("kind", KINDS)
def test_single_is_exact_for_its_class(kind: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(**KINDS[kind])
    steps = steps_of(checkpoint)
    for label, name in enumerate(NAMES):
        plan = plan_of(checkpoint, "single", (name,), matrix_plans(checkpoint, "single", (name,), 1))
        plain = fold(truncate(checkpoint, plan, None), plan, steps)
        assert "class_index" not in plain.input_names
        assert compared(plain, checkpoint, gated_with(checkpoint, label, [label]), steps, None) >= 100
        assert check_merge(checkpoint, plan, steps) >= 100


@pytest.mark.parametrize("kind", ["plain", "epsilon", "over-complete", "no-learngene"])
def test_union_is_all_its_gates_open(kind: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(**KINDS[kind])
    steps = steps_of(checkpoint)
    for count in (1, 2, 4):
        for classes in itertools.islice(itertools.combinations(NAMES, count), 2):
            plan = plan_of(checkpoint, "union", classes, matrix_plans(checkpoint, "union", classes, 1))
            plain = fold(truncate(checkpoint, plan, None), plan, steps)
            wanted = gated_with(checkpoint, 4, class_indices(checkpoint, classes))
            assert compared(plain, checkpoint, wanted, steps, None) >= 100
            assert check_merge(checkpoint, plan, steps) >= 100


def test_union_with_a_label_embedding_takes_the_mean_label(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(label_embedding=True)
    plan = plan_of(checkpoint, "union", ("bag", "shirt"), matrix_plans(checkpoint, "union", ("bag", "shirt"), 1))
    assert check_merge(checkpoint, plan, TIMESTEPS) >= 100
    labels = checkpoint.tensors["y_embed.weight"]
    truncated = truncate(checkpoint, plan, None)
    torch.testing.assert_close(truncated.tensors["y_embed.weight"][-1], (labels[1] + labels[3]) / 2)


@pytest.mark.parametrize("form", ["switch", "single", "union"])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_the_plain_model_is_the_truncated_gated_one(
    kind: str, form: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Dense, factored and dropped matrices, tailors of rank zero among them."""
    checkpoint = make_checkpoint(**KINDS[kind])
    steps = steps_of(checkpoint)
    classes = ("coat",) if form == "single" else ("shirt", "bag")
    plan = plan_of(checkpoint, form, classes, matrix_plans(checkpoint, form, classes, 0.6))
    truncated = truncate(checkpoint, plan, None)
    plain = fold(truncated, plan, steps)
    if form == "switch":
        for label in range(len(classes) + 1):
            wanted = gated_with(truncated, label, [label] if label < len(classes) else [])
            assert compared(plain, checkpoint, wanted, steps, label) >= 100
    else:
        wanted = gated_with(truncated, truncated.spec.num_classes, [])
        assert compared(plain, checkpoint, wanted, steps, None) >= 100


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


def test_the_checkpoint_is_not_changed_and_the_truncated_one_is_ordinary(tiny_folder: Path, tmp_path: Path) -> None:
    before = digest(tiny_folder)
    checkpoint = load_checkpoint(tiny_folder)
    kept = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    plan = plan_of(checkpoint, "switch", ("coat", "bag"), matrix_plans(checkpoint, "switch", ("coat", "bag"), 0.6))
    truncated = truncate(checkpoint, plan, load_calibration(tiny_folder / CALIBRATION, checkpoint.spec))
    fold(truncated, plan, TIMESTEPS)
    assert digest(tiny_folder) == before
    for name, tensor in kept.items():
        assert torch.equal(checkpoint.tensors[name], tensor), name
    save_checkpoint(tmp_path, truncated)
    again = load_checkpoint(tmp_path)
    assert again.class_names == ("coat", "bag")
    assert again.spec.ranks("blocks.0.attn.q") == (3, 2)
    sample, timestep, classes = torch.randn(3, 1, 8, 8), torch.rand(3) * 1000, torch.tensor([0, 1, 2])
    assert torch.equal(again.model()(sample, timestep, classes), truncated.model()(sample, timestep, classes))


def test_a_matrix_that_keeps_its_rank_keeps_its_factors(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    plans = matrix_plans(checkpoint, "switch", ("bag",), 1)
    plans["blocks.1.mlp.fc2"] = MatrixPlan("factored", "fp32", 3, 2)
    truncated = truncate(checkpoint, plan_of(checkpoint, "switch", ("bag",), plans), None)
    for name, tensor in truncated.tensors.items():
        original = checkpoint.tensors[name]
        if name.startswith("blocks.1.mlp.fc2.learngene"):
            assert tensor.shape != original.shape
        else:
            assert torch.equal(tensor, original[[1]] if ".tailors." in name else original), name


def test_truncation_is_a_function_of_its_input(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    plan = plan_of(checkpoint, "switch", NAMES, matrix_plans(checkpoint, "switch", NAMES, 0.5))
    first, again = truncate(checkpoint, plan, None), truncate(checkpoint, plan, None)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


def test_the_deployed_model_holds_no_training_machinery(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    plan = plan_of(checkpoint, "switch", ("bag",), matrix_plans(checkpoint, "switch", ("bag",), 1))
    plain = fold(truncate(checkpoint, plan, None), plan, TIMESTEPS)
    assert isinstance(plain.modulation, ModulationTable)
    assert not any("embed" in name and "t_embed" in name for name, _ in plain.named_parameters())
    assert not any(module.__class__.__name__ in ("GatedLinear", "Factors", "DiT") for module in plain.modules())
    labelled = make_checkpoint(label_embedding=True)
    plan = dataclasses.replace(plan, modulation="network")
    plain = fold(truncate(labelled, plan, None), plan, TIMESTEPS)
    assert isinstance(plain.modulation, ModulationNetwork)
    assert plain.input_names == ("sample", "timestep", "class_index")


def test_a_table_of_labels_holds_a_row_for_every_class_and_step(make_checkpoint: MakeCheckpoint) -> None:
    """Of a switch; what is folded into one has the rows of its own label alone."""
    checkpoint = make_checkpoint(label_embedding=True)
    classes = ("bag", "coat")
    plan = plan_of(checkpoint, "switch", classes, matrix_plans(checkpoint, "switch", classes, 1))
    truncated = truncate(checkpoint, plan, None)
    table = fold(truncated, plan, TIMESTEPS).modulation.table
    width = 3 * len(checkpoint.spec.branches()) + 2
    assert table.shape == (3, 4, width * checkpoint.spec.width)  # the null class is the last
    half = fold(truncated, dataclasses.replace(plan, modulation="baked-fp16"), TIMESTEPS).modulation.table
    assert torch.equal(half, table.half())
    single = plan_of(checkpoint, "single", classes[1:], matrix_plans(checkpoint, "single", classes[1:], 1))
    alone = fold(truncate(checkpoint, single, None), single, TIMESTEPS).modulation.table
    assert torch.equal(alone, table[1])


def test_plans_of_other_models_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    plan = plan_of(checkpoint, "switch", ("bag",), matrix_plans(checkpoint, "switch", ("bag",), 1))
    with pytest.raises(InputError, match=r"the plan has no matrix blocks\.2\.attn\.q.*solve again"):
        truncate(make_checkpoint(depth=3), plan, None)
    with pytest.raises(InputError, match=r"the plan wants ranks \(6, 2\), the checkpoint has \(5, 2\); solve again"):
        truncate(make_checkpoint(learngene_rank=5), plan, None)
    with pytest.raises(UsageError, match="unknown class 'beg'; did you mean: bag"):
        truncate(checkpoint, dataclasses.replace(plan, classes=("beg",)), None)


def test_the_merge_check_notices_a_wrong_merge(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    plan = plan_of(checkpoint, "switch", ("bag", "coat"), matrix_plans(checkpoint, "switch", ("bag", "coat"), 1))

    def noisy(*arguments: Any) -> PlainDiT:
        plain = fold(*arguments)
        tailors = plain.blocks[0].mlp.fc1.tailors.u
        tailors[1] += 1e-2 * torch.randn(tailors[1].shape)  # the last class's tailor in one matrix
        return plain

    monkeypatch.setattr(merge_check, "fold", noisy)
    with pytest.raises(GateError, match=r"merge: at full rank the merged model differs: .* dB, want at least 100"):
        check_merge(checkpoint, plan, TIMESTEPS)
