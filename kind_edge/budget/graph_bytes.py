"""What an ONNX file takes for the graph round its values; measured on our own exports."""

from __future__ import annotations

from kind_edge.budget.deployed import FixedCost, MatrixCost
from kind_edge.budget.precision import PRECISIONS, Precision

GRAPH_BYTES_PER_OPERATOR = 180
"""Names, shapes and attributes of one node in an ONNX file; measured on our own exports, and checked on every file."""

DYNAMIC_BYTES_PER_OPERATOR = 310
"""The same of the two operators of a product in int8, which are five nodes: a cast and two scales come with them."""

TAILOR_BYTES_PER_OPERATOR = 100
"""The same of a tailor's operators, which have no constants of their own: all gathers are from the same few tables."""


def file_bytes(cost: MatrixCost | FixedCost, file_precision: Precision) -> int:
    """Bytes of a part in the file of that precision, values and graph: rather too much than too little."""
    own = PRECISIONS[file_precision].operator_bytes
    each = own or GRAPH_BYTES_PER_OPERATOR
    if isinstance(cost, MatrixCost) and not own:
        if cost.layer.tailor_rank:
            each = TAILOR_BYTES_PER_OPERATOR
        elif cost.layer.precision == "int8":
            each = DYNAMIC_BYTES_PER_OPERATOR
    return cost.weight_bytes + cost.operators * each
