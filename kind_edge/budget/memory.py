"""Peak memory of a process that runs a deployed model in ONNX Runtime, above what it held before the session.

Measured in fresh processes on Linux (glibc, CPU provider, one file without external data), from 1 to 330 MB:

    runtime      code pages, kernels and graph of an empty model, and a little per operator
    weights      a dense fp32 matrix is packed for the kernels while the file's copy is given back; of the smaller
                 matrices of a factored layer, and of int8, much of that space stays with the allocator
    activations  twice: the arena grows by what the first call needs, then by one block in the order of the second
"""

from __future__ import annotations

from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.deployed import FixedCost, MatrixCost
from kind_edge.budget.profile import Precision

RUNTIME_BYTES = 13 * 2**20
OPERATOR_BYTES = 5 * 2**10
ACTIVATION_COPIES = 2

_COPIES = {("dense", False): 1.0, ("factored", False): 1.5, ("dense", True): 1.9, ("factored", True): 1.9}
"""Weights in memory over weights in the file, by storage and whether they are int8."""

_TAILOR_COPIES = {False: 1.3, True: 1.6}


def matrix_memory_bytes(cost: MatrixCost, precision: Precision) -> int:
    """What one part of a matrix adds to the peak: its learngene, or its tailors."""
    int8 = precision == "int8"
    storage, tailors = cost.layer.storage, bool(cost.layer.tailor_rank)
    copies = _TAILOR_COPIES[int8] if tailors else _COPIES.get((storage, int8), 1.0)
    return round(copies * cost.weight_bytes) + cost.operators * OPERATOR_BYTES


def branch_memory_bytes(cost: FixedCost) -> int:
    """What a branch of a block adds beside its matrices; other branches need no less room for activations."""
    return cost.weight_bytes + cost.operators * OPERATOR_BYTES


def fixed_memory_bytes(cost: FixedCost, batch: int, decoder: DecoderCost) -> int:
    """The runtime, everything but the matrices, and the activations of `batch` rows; the decoder runs after the loop.

    Modulation tables, biases and positions are kept as they are; the decoder's convolutions are packed, in one copy.
    """
    weights = branch_memory_bytes(cost) + 4 * decoder.params
    activations = max(batch * cost.activation_bytes_peak, decoder.activation_bytes_peak)
    return RUNTIME_BYTES + weights + ACTIVATION_COPIES * activations
