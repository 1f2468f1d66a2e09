"""A plan can be stored, read and replayed; whatever is wrong with a stored one is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.budget.image_time import image_time
from kind_edge.budget.plan import MatrixPlan, Plan, check_replayable, full_rank, read_plan
from kind_edge.errors import InputError
from kind_edge.model.spec import ModelSpec

ranks = st.integers(0, 64)
storages = st.sampled_from(["dense", "factored", "dropped"])
switch_matrices = st.builds(MatrixPlan, storages, st.just("int8"), ranks, ranks)
folded_matrices = st.builds(MatrixPlan, storages, st.just("int8"), rank=ranks)
names = st.text(min_size=1, max_size=8)
seconds = st.floats(1e-6, 1e3)
PLAN = Plan(
    model="tiny", checkpoint_sha256="ab" * 32, profile="host", unit="cpu", form="switch", classes=("sneaker", "bag"),
    precision="fp32", precisions=("fp32", "int8"), sampler="euler", steps=4, guidance=1.5,
    evaluations_per_step=2, modulation="baked", truncation="whitened", calibration="training images",
    params=1000, flops=2000, weight_bytes=4000,
    peak_memory_bytes=9000, evaluation_latency_s=0.001, image_latency_s=0.007, sustained_image_latency_s=0.008,
    predicted_loss_increase=0.02, predicted_frechet=7.4,
    prices={"max_size": {"limit": 5500.0, "predicted_frechet": None}},
    limits={"max_size": 5000.0}, binding=("max_size",), optimality_gap=1e-5,
    dense={"params": 3000.0},
    matrices={
        "blocks.0.attn.q": MatrixPlan("factored", "fp32", 4, 2),
        "blocks.0.attn.k": MatrixPlan("dropped", "fp32", 0, 0),
    },
)  # fmt: skip


@given(
    st.builds(
        dataclasses.replace,
        st.just(PLAN),
        form=st.just("switch"),
        classes=st.lists(names, min_size=1, max_size=3, unique=True).map(tuple),
        image_latency_s=seconds,
        predicted_loss_increase=st.none() | st.floats(0, 1),
        optimality_gap=st.none() | st.floats(0, 1),
        limits=st.dictionaries(st.sampled_from(["max_size", "max_flops"]), st.floats(1, 1e12)),
        matrices=st.dictionaries(names, switch_matrices | folded_matrices, max_size=4),
    )
)
def test_round_trip_through_json(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict())), "here") == plan


def test_matrices_hold_the_ranks_of_their_form_alone() -> None:
    assert MatrixPlan("factored", "fp32", 4, 2).to_dict() == {
        "storage": "factored", "precision": "fp32", "learngene_rank": 4, "tailor_rank": 2,
    }  # fmt: skip
    assert MatrixPlan("dense", "int8", rank=6).to_dict() == {"storage": "dense", "precision": "int8", "rank": 6}
    assert (MatrixPlan("dense", "int8", rank=6).shared_rank, MatrixPlan("factored", "fp32", 4, 2).shared_rank) == (6, 4)


TIME = image_time(4, 4, 2, 0.001, 0.0)


def test_plans_without_times_are_read() -> None:
    """Those of kind-edge 0.1.0: nothing was predicted then but the energy that the layers keep."""
    newer = ("time", "teacher_time", "inside_guidance", "minimised", "prices", "predicted_loss_increase")
    older = {key: value for key, value in PLAN.to_dict().items() if key not in (*newer, "predicted_frechet")}
    older |= {"schema_version": 1, "retained_energy": 0.9}
    unknown = dataclasses.replace(PLAN, predicted_loss_increase=None, predicted_frechet=None, prices={})
    assert Plan.from_dict(json.loads(json.dumps(older)), "here") == unknown


def values_with(changes: dict[str, Any]) -> dict[str, Any]:
    values = {**json.loads(json.dumps(PLAN.to_dict())), **changes}
    return {key: value for key, value in values.items() if value != "remove"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 3}, ("schema version 1 or 2",)),
        ({"schema_version": "remove"}, ("schema version 1 or 2",)),
        ({"prices": {"max_size": 3}}, ("prices", "3")),
        ({"stpes": 3}, ("'stpes'", "steps")),
        ({"steps": "remove", "unit": "remove"}, ("missing steps, unit",)),
        ({"form": "both"}, ("'both'", "switch, single, union")),
        ({"steps": "4"}, ("steps", "'4'")),
        ({"steps": 4.5}, ("steps", "4.5")),
        ({"steps": True}, ("steps", "True")),
        ({"guidance": None}, ("guidance", "None")),
        ({"guidance": float("nan")}, ("guidance", "nan")),
        ({"classes": "bag"}, ("classes", "bag")),
        ({"classes": [1]}, ("classes", "1")),
        ({"classes": []}, ("classes",)),
        ({"classes": ["bag", "bag"]}, ("classes", "bag")),
        ({"binding": 3}, ("binding", "3")),
        ({"precisions": ["int8"]}, ("precision", "fp32", "int8")),
        ({"limits": []}, ("limits", "[]")),
        ({"limits": {"max_size": "3MB"}}, ("limits", "3MB")),
        ({"modulation": "fried"}, ("modulation", "fried")),
        ({"inside_guidance": "2"}, ("inside_guidance", "'2'")),
        ({"time": {"steps": 4}}, ("time", "evaluation_s")),
        ({"time": {**TIME, "evaluations_per_step": 0}}, ("time", "evaluations_per_step")),
        ({"teacher_time": TIME}, ("teacher_time", "no time")),
        ({"matrices": []}, ("matrices",)),
        ({"matrices": {"q": 3}}, ("matrices", "q")),
        ({"matrices": {"q": {"storage": "dense"}}}, ("matrices", "q", "precision")),
        ({"matrices": {"q": {"storage": "dense", "precision": "fp32", "rnak": 3}}}, ("matrices", "rnak")),
        ({"matrices": {"q": {"storage": "sparse", "precision": "fp32"}}}, ("matrices", "sparse")),
        ({"matrices": {"q": {"storage": "dense", "precision": "fp32", "rank": -1}}}, ("matrices", "-1")),
        ({"matrices": {"q": {"storage": "dense", "precision": "fp32", "rank": "3"}}}, ("matrices", "'3'")),
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        Plan.from_dict(values_with(changes), "plan.json")
    for word in ("plan.json", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"3", b"", b"[" * 100_000, b"9" * 5000])
def test_files_that_are_no_plans(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        read_plan(path)
    with pytest.raises(InputError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json")


def test_only_a_plan_about_this_model_is_replayed() -> None:
    spec = ModelSpec(image_size=8, channels=1, patch_size=4, width=16, depth=1, heads=2, num_classes=3)
    switch = dict.fromkeys((matrix.name for matrix in spec.matrices()), MatrixPlan("factored", "fp32", 4, 2))
    plan = dataclasses.replace(PLAN, matrices=switch)
    check_replayable(plan, spec)
    name = next(iter(switch))
    without = {other: matrix for other, matrix in switch.items() if other != name}
    for words, changes in {
        f"the same matrices: {name}": {"matrices": without},
        "the same matrices: extra": {"matrices": {**switch, "extra": switch[name]}},
        f"{name} lacks learngene_rank or tailor_rank": {
            "matrices": {**switch, name: MatrixPlan("dense", "fp32", rank=2)}
        },
        f"{name} lacks rank": {"form": "union"},
        "precisions fp32, fp8": {"precisions": ("fp32", "fp8")},
        "guidance -1": {"guidance": -1.0},
    }.items():
        with pytest.raises(InputError, match=words):
            check_replayable(dataclasses.replace(plan, **changes), spec)


def test_full_rank_restores_every_matrix() -> None:
    sizes = dict.fromkeys(PLAN.matrices, (6, 3))
    whole = full_rank(PLAN, sizes)
    assert whole.matrices == {
        "blocks.0.attn.q": MatrixPlan("factored", "fp32", 6, 3),
        "blocks.0.attn.k": MatrixPlan("factored", "fp32", 6, 3),
    }
    union = dataclasses.replace(PLAN, form="union", matrices={"w": MatrixPlan("dense", "fp32", rank=2)})
    assert full_rank(union, {"w": (6, 3)}).matrices == {"w": MatrixPlan("dense", "fp32", rank=12)}  # two tailors
