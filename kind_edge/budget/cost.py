"""The cost model in one place: pure functions of shapes, and the roofline that turns them into seconds.

`formulas` has single operators, `whole_model` a model under the `paper` and `exact` conventions, `deployed` what a plan
decides about: block matrices one by one, the fixed rest, bytes and latency.
"""

from kind_edge.budget.deployed import (
    FixedCost,
    MatrixCost,
    OperatorGroup,
    baked_table_values,
    branch_fixed_cost,
    deployed_fixed_cost,
    fixed_latency_s,
    linear_weight_bytes,
    matrix_cost,
    matrix_latency_s,
    operator_latency_s,
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
    "break_even_rank",
    "deployed_fixed_cost",
    "fixed_latency_s",
    "linear_macs",
    "linear_weight_bytes",
    "matrix_cost",
    "matrix_latency_s",
    "matrix_macs",
    "matrix_weights",
    "model_cost",
    "model_flops",
    "model_params",
    "operator_latency_s",
    "paper_table",
    "peak_activation_bytes",
    "tailor_macs",
]
