"""Matrices of a resized KIND model, split again into learngene and tailors of its ranks.

Symbols: n outputs, m inputs, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import ModelSpec
from kind_edge.model.truncation import Whitening, both_branches, sorted_factors, trainable

LEARNGENE = -1
"""Which part of a matrix is meant: this one, or the tailor of class 0, 1, ..."""

Matrices = Mapping[str, NDArray[np.float64]]
"""[n, m] by the name of their weight in a dense model ("blocks.0.attn.q.weight")."""

OnPart = Callable[[int, int], None]
"""Told (done, total) of learngene and tailors."""


def folded(checkpoint: Checkpoint, part: int) -> dict[str, NDArray[np.float64]]:
    """The learngene, or the tailor of a class, of every matrix, multiplied out."""
    spec, found = checkpoint.spec, {}
    for shape in spec.matrices():
        if part == LEARNGENE:
            u, s, v = (checkpoint.tensors[spec.factor_name(shape.name, letter)].double() for letter in "UsV")
        else:
            u, s, v = (checkpoint.tensors[f"{shape.name}.tailors.{letter}"][part].double() for letter in "UsV")
        found[f"{shape.name}.weight"] = (u * s @ v.T).numpy()
    return found


def split(
    target: ModelSpec, matrices_of: Callable[[int], Matrices], calibration: Calibration | None, on_part: OnPart
) -> dict[str, Tensor]:
    """Learngene (unless blocks have its factors in common) and tailors of the target's ranks, by name.

    `matrices_of` is asked for one part after the other, so that one part's matrices are held at a time. With a
    calibration by the SVD whitened by what each layer reads, else by the plain one.
    """
    parts = range(0 if target.shared_factors else LEARNGENE, target.num_classes)
    factors: dict[str, Tensor] = {}
    tailors: dict[str, list[Tensor]] = {}
    for done, part in enumerate(parts, 1):
        matrices = matrices_of(part)
        for shape in target.matrices():
            rank = target.ranks(shape.name)[part != LEARNGENE]
            found = _split(matrices[f"{shape.name}.weight"], rank, _whitening(calibration, shape.name, part))
            for letter, tensor in found.items():
                if part == LEARNGENE:
                    factors[f"{shape.name}.learngene.{letter}"] = tensor
                else:
                    tailors.setdefault(f"{shape.name}.tailors.{letter}", []).append(tensor)
        on_part(done, len(parts))
    return factors | {name: torch.stack(of_classes) for name, of_classes in tailors.items()}


def _whitening(calibration: Calibration | None, name: str, part: int) -> Whitening | None:
    if calibration is None:
        return None
    return both_branches(calibration, name) if part == LEARNGENE else Whitening.of(calibration.pooled[name])


def _split(matrix: NDArray[np.float64], rank: int, whitening: Whitening | None) -> dict[str, Tensor]:
    """U [n, rank], s [rank] and V [m, rank], the most important component first."""
    whole = torch.from_numpy(matrix)
    outputs, inputs = (torch.eye(size, dtype=whole.dtype) for size in whole.shape)
    a, b = (outputs, whole.T) if len(outputs) < len(inputs) else (whole, inputs)
    return trainable(sorted_factors(a, b, whitening).cut(rank))
