"""The cost of a named architecture is the cost model's own, and a plan under the authors' convention fits it."""

from __future__ import annotations

import dataclasses

import pytest

from kind_edge.budget.architecture import architecture_cost, paper_row_of_plan
from kind_edge.budget.cost import model_cost, paper_table
from kind_edge.budget.decoder import decoder_cost
from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.profile import load_profile
from kind_edge.errors import UsageError
from kind_edge.model.spec import ModelSpec, named_spec

SPEC = named_spec("DiT-B/2", 150)
DEVICE = load_profile("snapdragon8g3")


@pytest.mark.parametrize("rank", [None, 1, 154, 768])
def test_exact_is_the_models_cost(rank: int | None) -> None:
    cost = architecture_cost("DiT-B/2", SPEC, rank, DEVICE, "exact")
    whole = model_cost(SPEC, "exact", rank)
    assert (cost.params, cost.flops) == (whole.params, whole.flops)
    assert cost.weight_bytes == 4 * (whole.params + decoder_cost(SPEC).params)
    assert cost.peak_memory_bytes > cost.weight_bytes


def test_the_decoder_is_run_once_per_image() -> None:
    one, two = (architecture_cost("DiT-B/2", SPEC, 154, DEVICE, "exact", unit="gpu", steps=s) for s in (1, 2))
    evaluations_s = two.image_latency_s - one.image_latency_s
    decoder_s = decoder_cost(SPEC).flops / DEVICE.throughput("gpu", "fp32", sustained=False)
    assert one.image_latency_s - evaluations_s == pytest.approx(decoder_s)


def test_auto_takes_the_fastest_unit() -> None:
    chosen = architecture_cost("DiT-B/2", SPEC, 154, DEVICE, "exact")
    every = [architecture_cost("DiT-B/2", SPEC, 154, DEVICE, "exact", unit=unit) for unit in ("cpu", "gpu")]
    assert chosen == min(every, key=lambda cost: cost.sustained_image_latency_s)
    with pytest.raises(UsageError, match="--unit"):
        architecture_cost("DiT-B/2", SPEC, 154, DEVICE, "paper", unit="cpu")


def planned(spec: ModelSpec, matrix: MatrixPlan) -> Plan:
    return Plan(
        "m", "0", DEVICE.name, "gpu", "switch", ("a",), "fp32", ("fp32",), "euler", 20, 1.5, 2, "baked", "whitened",
        "none", 0, 0, 0, 0, 0.0, 0.0, 0.0, None, None, {}, (), {}, 0.0, {},
        {shape.name: matrix for shape in spec.matrices()},
    )  # fmt: skip


def test_a_plan_at_full_rank_is_the_checkpoint_under_the_papers_convention() -> None:
    spec = dataclasses.replace(SPEC, factored=True, learngene_rank=100, tailor_rank=54)
    row = paper_row_of_plan(spec, planned(spec, MatrixPlan("factored", "fp32", 100, 54)), DEVICE)
    assert row == paper_table(SPEC, 154, DEVICE)


def test_a_dense_plan_is_the_dense_model_without_biases_of_its_matrices() -> None:
    spec = dataclasses.replace(SPEC, factored=True, learngene_rank=100, tailor_rank=54)
    row = paper_row_of_plan(spec, planned(spec, MatrixPlan("dense", "fp32", 154, 0)), DEVICE)
    dense = model_cost(SPEC, "paper")
    assert (row.params, row.flops) == (dense.params - dense.part("biases").params, dense.flops)
