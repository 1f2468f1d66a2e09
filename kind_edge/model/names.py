"""Names of a model's tensors, and what they say. Needs no torch."""

from __future__ import annotations

SHARED = "shared"
"""What the names of factors begin with that the blocks have in common ("shared.attn.q.U")."""


def weight_type(matrix: str) -> str:
    """What a matrix is, whatever its block: "attn.q" of "blocks.3.attn.q"."""
    return matrix.split(".", 2)[2]


def is_factor(tensor: str) -> bool:
    """Whether a tensor of a checkpoint is a factor of learngene or tailors."""
    return ".learngene." in tensor or ".tailors." in tensor or tensor.startswith(f"{SHARED}.")
