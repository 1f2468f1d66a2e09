"""Work and weights of single operators, as pure functions of their shapes.

Symbols: N tokens, n x m a matrix (n `outputs`, m `inputs`), r rank. Everything is counted for one evaluation at
batch 1. A MAC is one multiply-accumulate; a FLOP is half of one.
"""

from __future__ import annotations

from typing import Literal

Storage = Literal["dense", "factored", "dropped"]
"""One n x m weight; two thin weights n x r and r x m; or nothing at all (only the bias remains)."""


def linear_macs(rows: int, outputs: int, inputs: int) -> int:
    """MACs of x [rows, inputs] times W^T [inputs, outputs]."""
    return rows * outputs * inputs


def attention_macs(tokens: int, width: int) -> int:
    """MACs of the two attention products, QK^T and AV, over all heads: 2 N^2 D. Projections are not in it."""
    return 2 * tokens * tokens * width


def matrix_macs(tokens: int, outputs: int, inputs: int, storage: Storage, rank: int = 0) -> int:
    """MACs of one block matrix: N n m dense, N (n + m) r factored, none dropped. `rank` counts when factored only."""
    return tokens * matrix_weights(outputs, inputs, storage, rank)


def matrix_weights(outputs: int, inputs: int, storage: Storage, rank: int = 0) -> int:
    """Stored weights of one block matrix, without its bias: n m dense, (n + m) r factored, none dropped."""
    if storage == "dense":
        return outputs * inputs
    return (outputs + inputs) * rank if storage == "factored" else 0


def tailor_macs(tokens: int, outputs: int, inputs: int, tailor_rank: int) -> int:
    """MACs of the one tailor that an image sees, kept as two thin factors: N (n + m) r."""
    return matrix_macs(tokens, outputs, inputs, "factored", tailor_rank)


def break_even_rank(outputs: int, inputs: int) -> float:
    """The rank m n / (m + n) at which factored costs as many weights and MACs as dense; below it, it saves."""
    return outputs * inputs / (outputs + inputs)
