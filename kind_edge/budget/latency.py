"""Seconds of a deployed model's parts on a device: from its measured table, or from the roofline where it has none.

The roofline takes the longer of computing and of moving weights and activations, plus the start of every operator. A
table holds what ONNX Runtime really took, operator overhead and memory traffic included; only the networks of unbaked
modulation, which run on a single row, are left to the roofline there.
"""

from __future__ import annotations

from typing import Literal

from kind_edge.budget.deployed import FixedCost, MatrixCost, OperatorGroup
from kind_edge.budget.operator_table import OperatorTable
from kind_edge.budget.precision import PRECISIONS, Precision, Unit
from kind_edge.budget.profile import DeviceProfile

LatencySource = Literal["measured table", "roofline estimate"]

_CONDITIONING = ("timestep", "adaln", "final_adaln", "label")


def latency_source(profile: DeviceProfile, unit: Unit, precision: Precision) -> LatencySource:
    """What latencies of that unit and precision are made from."""
    return "measured table" if profile.operators(unit, precision) else "roofline estimate"


def operator_latency_s(
    flops: float,
    weight_bytes: float,
    activation_bytes: float,
    profile: DeviceProfile,
    unit: Unit,
    precision: Precision,
    sustained: bool = True,
    operators: int = 1,
) -> float:
    """Roofline: the longer of computing and of moving weights and activations, plus the start of `operators`.

    Raises `UsageError` where the profile has no figure for that unit and precision.
    """
    compute_s = flops / profile.throughput(unit, precision, sustained)
    memory_s = weight_bytes / profile.memory_bytes_per_s.value + activation_bytes / profile.activation_bytes_per_s.value
    return max(compute_s, memory_s) + operators * profile.unit(unit).overhead_us.value * 1e-6


def matrix_latency_s(
    cost: MatrixCost, profile: DeviceProfile, unit: Unit, precision: Precision, sustained: bool = True, batch: int = 1
) -> float:
    """Seconds of one block matrix in one call with `batch` rows."""
    table = profile.operators(unit, precision)
    if table is not None:
        return _matrix_us(cost, table, precision, batch) * 1e-6 / profile.speed_share(unit, sustained)
    return operator_latency_s(
        batch * cost.flops, cost.weight_bytes_read, batch * cost.activation_bytes,
        profile, unit, precision, sustained, cost.operators,
    )  # fmt: skip


def fixed_latency_s(
    cost: FixedCost, profile: DeviceProfile, unit: Unit, sustained: bool = True, batch: int = 1
) -> float:
    """Seconds of everything else in one call with `batch` rows: the groups run one after another.

    Of a file with int8 matrices, what is not quantized runs in fp32, on an NPU in fp16 (NPUs have no fp32 figure).
    """
    table = profile.operators(unit, cost.precision)
    if table is None:
        return sum(_group_latency_s(group, cost.precision, profile, unit, sustained, batch) for group in cost.groups)
    rest = [group for group in cost.groups if group.name in _CONDITIONING]
    seconds = _parts_us(cost, table, batch) * 1e-6 / profile.speed_share(unit, sustained)
    return seconds + sum(_group_latency_s(group, cost.precision, profile, unit, sustained, batch) for group in rest)


def _matrix_us(cost: MatrixCost, table: OperatorTable, precision: Precision, batch: int) -> float:
    tokens, n, m, storage, rank, tailor_rank, _ = cost.layer
    total, where = 0.0, (precision, batch, tokens, m, n)
    if storage == "dense":
        total += table.layer_us("dense", *where)
    elif storage == "factored" and rank:
        total += table.layer_us("factored", *where, rank)
    if tailor_rank:
        total += table.layer_us("tailor", *where, tailor_rank)
    return total


def _parts_us(cost: FixedCost, table: OperatorTable, batch: int) -> float:
    parts, where = cost.parts, (batch, cost.parts.tokens, cost.parts.width)
    total = table.ends_us(*where) if parts.ends else 0.0
    if parts.attentions:
        total += parts.attentions * table.branch_us("attention", *where)
    if parts.mlps:
        total += parts.mlps * table.branch_us("mlp", *where)
    return total


def _group_latency_s(
    group: OperatorGroup, precision: Precision, profile: DeviceProfile, unit: Unit, sustained: bool, batch: int
) -> float:
    if PRECISIONS[precision].weight_bits <= 8 and group.role == "float":
        precision = "fp16" if unit == "npu" else "fp32"
    return operator_latency_s(
        batch * group.flops, group.weight_bytes_read, batch * group.activation_bytes,
        profile, unit, precision, sustained, group.operators,
    )  # fmt: skip
