"""Peak memory of a process that runs a deployed model in ONNX Runtime, above what it held before the session.

Measured in fresh processes on Linux (glibc, CPU provider, one file without external data), from 1 to 330 MB:

    runtime      code pages, kernels and graph of an empty model, and a little per operator
    weights      once: a matrix is packed for the kernels and the file's copy given back (`deploy.session` sees to it);
                 of matrices too small for a mapping of their own, most of that copy stays in the heap
    tailors      as weights, and a copy of the class that is picked, widened, for every row
    activations  the arena takes what the first call needs, then a block for the order that it plans from the second on
"""

from __future__ import annotations

from collections.abc import Iterator

from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.deployed import FixedCost, Layer, MatrixCost

RUNTIME_BYTES = 12 * 2**20
OPERATOR_BYTES = 7 * 2**10
ACTIVATION_COPIES = 2.4

_OWN_MAPPING_BYTES = 128 * 2**10
_HEAP_COPIES = 1.7
"""Copies of a weight that is smaller than a mapping of its own."""

_WIDENED_ALIVE = 1.0


def matrix_memory_bytes(cost: MatrixCost, batch: int = 1) -> int:
    """What one part of a matrix adds to the peak: its learngene, or its tailors."""
    layer, total = cost.layer, cost.operators * OPERATOR_BYTES
    pieces = list(_pieces(layer))
    values = sum(pieces)
    # A weight that blocks have in common is packed for each of them, so it is held as often as it is read.
    held = cost.weight_bytes if layer.tailor_rank else cost.weight_bytes_read
    for piece in pieces:
        total += held_bytes(held * piece / values)
    if layer.tailor_rank:
        total += round(_WIDENED_ALIVE * batch * 4 * layer.tailor_rank * (layer.inputs + layer.outputs))
    return total


def held_bytes(stored_bytes: float) -> int:
    """What one constant takes in memory."""
    return round(stored_bytes * (_HEAP_COPIES if stored_bytes < _OWN_MAPPING_BYTES else 1.0))


def _pieces(layer: Layer) -> Iterator[int]:
    """Relative sizes of the constants of one part: m x n, or m x r and r x n."""
    if layer.tailor_rank:
        yield from (layer.inputs, layer.outputs)
    elif layer.storage == "dense":
        yield 1
    elif layer.storage == "factored" and layer.learngene_rank:
        yield from (layer.inputs, layer.outputs)


def branch_memory_bytes(cost: FixedCost) -> int:
    """What a branch of a block adds beside its matrices; other branches need no less room for activations."""
    return cost.weight_bytes + cost.operators * OPERATOR_BYTES


def fixed_memory_bytes(cost: FixedCost, batch: int, decoder: DecoderCost) -> int:
    """The runtime, everything but the matrices, and the activations of `batch` rows; the decoder runs after the loop.

    Modulation tables, biases and positions are kept as they are; the decoder's weights are kept as its file has them.
    """
    weights = branch_memory_bytes(cost) + decoder.weight_bytes(cost.precision)
    weights += decoder.graph_operators(cost.precision) * OPERATOR_BYTES
    activations = max(batch * cost.activation_bytes_peak, decoder.activation_bytes_peak)
    return RUNTIME_BYTES + weights + round(ACTIVATION_COPIES * activations)
