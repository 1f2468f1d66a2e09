"""The cost model in one place: pure functions of shapes, and what turns them into seconds and peak memory.

`formulas` has single operators, `whole_model` a model under the `paper` and `exact` conventions, `deployed` what a plan
decides about: block matrices one by one and the fixed rest; `latency` and `memory` what these take on a device.
"""

from kind_edge.budget.deployed import (
    FixedCost,
    MatrixCost,
    OperatorGroup,
    baked_table_values,
    branch_fixed_cost,
    deployed_fixed_cost,
    in_common,
    linear_weight_bytes,
    matrix_cost,
    peak_activation_bytes,
)
from kind_edge.budget.formulas import (
    Storage,
    attention_macs,
    break_even_rank,
    linear_macs,
    matrix_macs,
    matrix_weights,
    tailor_macs,
)
from kind_edge.budget.latency import fixed_latency_s, matrix_latency_s, operator_latency_s
from kind_edge.budget.memory import branch_memory_bytes, fixed_memory_bytes, matrix_memory_bytes
from kind_edge.budget.whole_model import (
    CONVENTIONS,
    Convention,
    CostBreakdown,
    PaperRow,
    PartCost,
    model_cost,
    model_flops,
    model_params,
    paper_table,
    runs_on_one_thread,
)

__all__ = [
    "CONVENTIONS",
    "Convention",
    "CostBreakdown",
    "FixedCost",
    "MatrixCost",
    "OperatorGroup",
    "PaperRow",
    "PartCost",
    "Storage",
    "attention_macs",
    "baked_table_values",
    "branch_fixed_cost",
    "branch_memory_bytes",
    "break_even_rank",
    "deployed_fixed_cost",
    "fixed_latency_s",
    "fixed_memory_bytes",
    "in_common",
    "linear_macs",
    "linear_weight_bytes",
    "matrix_cost",
    "matrix_latency_s",
    "matrix_macs",
    "matrix_memory_bytes",
    "matrix_weights",
    "model_cost",
    "model_flops",
    "model_params",
    "operator_latency_s",
    "paper_table",
    "peak_activation_bytes",
    "runs_on_one_thread",
    "tailor_macs",
]
