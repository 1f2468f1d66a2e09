"""The cost model against torch's own count of FLOPs and parameters, and against its own arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kind_edge.budget.cost import (
    attention_macs,
    baked_table_values,
    branch_fixed_cost,
    break_even_rank,
    deployed_fixed_cost,
    linear_macs,
    linear_weight_bytes,
    matrix_cost,
    matrix_macs,
    matrix_weights,
    model_cost,
    model_flops,
    operator_latency_s,
    tailor_macs,
)
from kind_edge.budget.precision import ARITHMETICS, PRECISIONS, Precision
from kind_edge.budget.profile import load_profile
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.spec import BRANCHES, MatrixShape, ModelSpec, Ranks, named_spec

SMALL = ModelSpec(
    image_size=28,
    channels=1,
    patch_size=4,
    width=64,
    depth=2,
    heads=4,
    num_classes=10,
    learngene_rank=12,
    tailor_rank=3,
)
PRODUCT_PARTS = ("patch", "timestep", "adaln", "final_adaln", "projections", "products", "mlp", "final")

sizes = st.integers(min_value=1, max_value=512)


def counted_flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs of products and convolutions, as torch counts them while the module runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops())


class PlainDiT(nn.Module):
    """An ordinary dense DiT, written with torch's own layers and none of ours."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d = spec.width
        self.heads, self.depth = spec.heads, spec.depth
        self.patch = nn.Conv2d(spec.channels, d, spec.patch_size, spec.patch_size)
        self.position = nn.Parameter(torch.zeros(spec.tokens, d))
        self.timestep = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.label = nn.Embedding(spec.num_classes + 1, d) if spec.label_embedding else None
        self.adaln = nn.ModuleList(nn.Linear(d, 6 * d) for _ in range(spec.depth))
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(spec.depth))
        self.o = nn.ModuleList(nn.Linear(d, d) for _ in range(spec.depth))
        hidden = spec.hidden_width
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d)) for _ in range(spec.depth)
        )
        self.final_adaln, self.final = nn.Linear(d, 2 * d), nn.Linear(d, spec.patch_values)

    def forward(self, sample: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = self.patch(sample).flatten(2).mT + self.position
        c = self.timestep(features)
        for i in range(self.depth):
            shift, scale, gate, shift2, scale2, gate2 = self.adaln[i](c)[:, None].chunk(6, -1)
            h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv[i](h).chunk(3, -1))
            scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            x = x + gate * self.o[i]((scores @ v).transpose(1, 2).flatten(2))
            x = x + gate2 * self.mlp[i](F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2)
        shift, scale = self.final_adaln(c)[:, None].chunk(2, -1)
        return self.final(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


@pytest.mark.parametrize("spec", [SMALL.dense(), named_spec("DiT-S/8", 5, depth=2), named_spec("DiT-S/4", 3, depth=1)])
def test_exact_is_what_torch_counts(spec: ModelSpec) -> None:
    module = PlainDiT(spec)
    sample = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
    cost = model_cost(spec, "exact")
    assert cost.params == sum(parameter.numel() for parameter in module.parameters())
    conv_bias = spec.tokens * spec.width
    part_flops = sum(cost.part(name).flops for name in PRODUCT_PARTS)
    # torch counts products alone: take our elementwise work out of the parts that hold both.
    width = spec.width
    timestep = 256 + 128 + 4 * width
    adaln = spec.depth * 6 * width + 2 * width
    final = spec.tokens * spec.patch_values
    assert part_flops - conv_bias - timestep - adaln - final == counted_flops(module, sample, torch.zeros(1, 256))


@given(sizes, sizes, sizes)
def test_one_linear_layer(rows: int, outputs: int, inputs: int) -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(inputs, outputs, bias=False), torch.zeros(rows, inputs)
    assert 2 * linear_macs(rows, outputs, inputs) == counted_flops(layer, x)


def test_one_attention() -> None:
    tokens, width, heads = 49, 128, 4
    q = torch.zeros(1, heads, tokens, width // heads)
    with FlopCounterMode(display=False) as counter:
        q @ q.mT @ q
    assert 2 * attention_macs(tokens, width) == counter.get_total_flops()


@given(sizes, sizes, sizes, st.integers(0, 600))
def test_factored_grows_with_rank_and_breaks_even(tokens: int, n: int, m: int, rank: int) -> None:
    dense, factored = (matrix_macs(tokens, n, m, storage, rank) for storage in ("dense", "factored"))
    assert (factored < dense) == (rank < break_even_rank(n, m))
    assert matrix_macs(tokens, n, m, "factored", rank + 1) - factored == tokens * (n + m)
    assert tailor_macs(tokens, n, m, rank) == factored
    assert matrix_weights(n, m, "dropped", rank) == matrix_macs(tokens, n, m, "dropped", rank) == 0


def test_ranks_of_single_matrices_count() -> None:
    cut = dataclasses.replace(SMALL, matrix_ranks={"blocks.0.attn.q": Ranks(4, 1)})
    fewer = model_cost(SMALL, "exact").params - model_cost(cut, "exact").params
    assert fewer == (15 - 5) * (64 + 64)
    assert model_flops(SMALL, "exact") == model_flops(SMALL, "exact", rank=15) < model_flops(SMALL.dense(), "exact")


@pytest.mark.parametrize("spec", [SMALL, SMALL.dense(), named_spec("DiT-B/2", 150)])
def test_fixed_part_and_matrices_are_the_whole(spec: ModelSpec) -> None:
    fixed = deployed_fixed_cost(spec, spec.num_classes, 20, baked=False, precision="fp32")
    storage = "factored" if spec.factored else "dense"
    matrices = [
        matrix_cost(spec, matrix, storage, spec.ranks(matrix.name).active, 0, 0, "fp32") for matrix in spec.matrices()
    ]
    whole = model_cost(spec, "exact")
    assert fixed.params + sum(matrix.params for matrix in matrices) == whole.params
    assert fixed.flops + sum(matrix.flops for matrix in matrices) == whole.flops
    assert fixed.weight_bytes + sum(matrix.weight_bytes for matrix in matrices) == 4 * whole.params


def test_baked_modulation() -> None:
    spec = named_spec("DiT-B/2", 150)
    assert baked_table_values(spec, 1) == 56_832
    unlabelled = dataclasses.replace(spec, label_embedding=False)
    assert baked_table_values(unlabelled, 20) * 2 == pytest.approx(2.3e6, rel=0.02)
    baked, live = (deployed_fixed_cost(unlabelled, 150, 20, baked=b, precision="fp32") for b in (True, False))
    removed = sum(model_cost(unlabelled, "exact").part(name).params for name in ("timestep", "adaln", "final_adaln"))
    assert live.params - baked.params == removed - baked_table_values(unlabelled, 20)
    assert baked.flops < live.flops
    # With a label embedding every kept class and the null class needs its own rows.
    one, two = (deployed_fixed_cost(spec, k, 20, baked=True, precision="fp32").params for k in (1, 2))
    assert two - one == baked_table_values(spec, 20)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 115e6), ("int8", 35e6)])
def test_a_baked_dit_b2_of_one_class_is_small(precision: Precision, most: float) -> None:
    """At rank 154 and 20 steps; with its networks it holds 281 MB in fp32."""
    spec = named_spec("DiT-B/2", 1, factored=True, learngene_rank=154, tailor_rank=0)
    matrices = [matrix_cost(spec, matrix, "factored", 154, 0, 0, precision) for matrix in spec.matrices()]
    baked, live = (
        deployed_fixed_cost(spec, 1, 20, each, precision, switches=False).weight_bytes
        + sum(matrix.weight_bytes for matrix in matrices)
        for each in (True, False)
    )
    assert baked <= most
    assert precision == "int8" or live == pytest.approx(281e6, rel=0.01)


specs = st.sampled_from([
    SMALL, dataclasses.replace(SMALL, label_embedding=True, depth=3), named_spec("DiT-S/8", 5),
    dataclasses.replace(SMALL, step_counts=(1, 4), inside_guidance=1.5, depth=4, mlp_ratio=2.5),
])  # fmt: skip
SUMS = ("params", "flops", "weight_bytes", "operators")


@given(specs, st.sampled_from(ARITHMETICS), st.integers(1, 20), st.integers(1, 10), st.data())
def test_dropped_branches_take_their_cost_with_them(
    spec: ModelSpec, precision: Precision, evaluations: int, kept: int, data: st.DataObject
) -> None:
    dropped = data.draw(st.sets(st.sampled_from(spec.branches())), "dropped")
    baked = data.draw(st.booleans(), "baked")
    options = {"switches": data.draw(st.booleans(), "switches"), "half_table": data.draw(st.booleans(), "half")}
    whole, rest = (
        deployed_fixed_cost(each, kept, evaluations, baked, precision, **options)
        for each in (spec, spec.without_branches(dropped))
    )
    of_kind = {kind: branch_fixed_cost(spec, kind, precision, kept, evaluations, baked, **options) for kind in BRANCHES}
    gone = [of_kind[kind] for kind in BRANCHES for name in dropped if name.endswith(kind)]
    for figure in SUMS:
        assert getattr(whole, figure) - getattr(rest, figure) == sum(getattr(each, figure) for each in gone), figure
    traffic, traffic_rest, *of_gone = (
        sum(group.activation_bytes for group in each.groups) for each in (whole, rest, *gone)
    )
    assert traffic - traffic_rest == sum(of_gone)


@given(specs)
def test_without_any_branch_embedding_and_final_layer_are_left(spec: ModelSpec) -> None:
    bare, whole = (model_cost(each, "exact") for each in (spec.without_branches(spec.branches()), spec))
    elements = spec.tokens * spec.width
    for part in bare.parts:
        left = {"norms": 4 * elements, "modulation": 2 * elements}
        gone = ("adaln", "projections", "products", "softmax", "mlp", "activation", "biases", "residuals")
        wanted = left.get(part.name, 0 if part.name in gone else whole.part(part.name).flops)
        assert (part.flops, part.params) == (wanted, 0 if part.name in gone else whole.part(part.name).params)


@pytest.mark.parametrize("dropped", [["blocks.0.attn"], ["blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]])
def test_a_dense_model_without_branches_holds_and_does_what_is_counted(dropped: list[str]) -> None:
    cut = SMALL.dense().without_branches(dropped)
    cost = model_cost(cut, "exact")
    with torch.device("meta"):
        model, x = DiT(cut), torch.zeros(1, cut.channels, cut.image_size, cut.image_size)
        inputs = (x, torch.zeros(1), ClassGate(torch.zeros(1, dtype=torch.long), None, None, None))
        flops = counted_flops(model, *inputs)
    assert sum(p.numel() for p in model.parameters()) + cut.tokens * cut.width == cost.params
    elementwise = cut.tokens * (cut.width + cut.patch_values) + sum(layer.out_features for layer in model.modulators())
    timestep = 256 + 128 + 4 * cut.width
    assert sum(cost.part(name).flops for name in PRODUCT_PARTS) - elementwise - timestep == flops


def test_bytes_of_a_matrix_by_hand() -> None:
    matrix = MatrixShape("blocks.0.mlp.fc1", 256, 64)
    assert linear_weight_bytes(256, 64, "int8") == 256 * 64 + 256 * 5
    dense = matrix_cost(SMALL, matrix, "dense", 0, 0, 0, "int8")
    assert (dense.params, dense.weight_bytes) == (256 * 64, 256 * 64 + 256 * 5)
    switch = matrix_cost(SMALL, matrix, "factored", 12, 3, 10, "int8")
    thin = (12 * 64 + 12 * 5) + (256 * 12 + 256 * 5)
    assert switch.weight_bytes == thin + 10 * ((256 + 64) * 3 + 2 * 3 * 4)
    assert switch.flops == 2 * 49 * (256 + 64) * (12 + 3)  # ten tailors are stored, one runs
    assert matrix_cost(SMALL, matrix, "factored", 12, 3, 10, "fp32").weight_bytes == 4 * (256 + 64) * (12 + 10 * 3)
    assert matrix_cost(SMALL, matrix, "dropped", 0, 0, 0, "fp32").operators == 0


def test_blocks_are_whole_and_hold_a_scale_each() -> None:
    assert linear_weight_bytes(10, 64, "int4") == 10 * 2 * (16 + 4)
    assert linear_weight_bytes(10, 65, "int8-weights") == 10 * 3 * (32 + 4)
    assert linear_weight_bytes(10, 64, "fp16") == 10 * 64 * 2
    matrix = MatrixShape("blocks.0.mlp.fc1", 256, 64)
    assert matrix_cost(SMALL, matrix, "dropped", 0, 3, 2, "int4").weight_bytes == 2 * 3 * (160 + (8 + 2) * 4)
    assert matrix_cost(SMALL, matrix, "dropped", 0, 3, 2, "a16w8").weight_bytes == 2 * 3 * (320 + 2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_costs_grow_with_rank_and_tailors(precision: Precision) -> None:
    for matrix in SMALL.matrices():
        costs = [
            matrix_cost(SMALL, matrix, "factored", r, t, k, precision) for r, t, k in ((4, 2, 1), (5, 2, 1), (5, 2, 2))
        ]
        assert costs[0].weight_bytes < costs[1].weight_bytes < costs[2].weight_bytes
        assert costs[0].flops < costs[1].flops == costs[2].flops


def test_the_roof_has_two_slopes() -> None:
    phone = load_profile("snapdragon8g3")
    overhead_s = phone.unit("gpu").overhead_us.value * 1e-6
    compute_bound = operator_latency_s(1e12, 1, 1, phone, "gpu", "fp32", sustained=False)
    assert compute_bound == pytest.approx(1e12 / (2774e9 * 0.7) + overhead_s)
    assert operator_latency_s(1e12, 1, 1, phone, "gpu", "fp32") == pytest.approx(2 * compute_bound - overhead_s)
    memory_bound = operator_latency_s(1, 76.8e9, 0, phone, "gpu", "fp32", operators=10)
    assert memory_bound == pytest.approx(1 + 10 * overhead_s)
