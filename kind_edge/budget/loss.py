"""What the solver knows of quality: by how much every choice raises the model's loss, added up over the matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.plan import MatrixPlan
from kind_edge.budget.precision import PRECISIONS, Precision


@dataclass(frozen=True)
class MatrixLoss:
    """Predicted relative increase of the loss by what one matrix keeps; 0.01 is 1 % more.

    `shared` [R + 1] by the rank of the part that every image sees, `tailor` [N_T + 1] by the rank of the tailors (in
    single and union: [1]); both never rise with the rank and end at 0, or at what the model's size costs. Infinite
    where nothing was measured: such ranks are not offered. `int8`: where the matrix is stored in int8.
    """

    shared: NDArray[np.float64]
    tailor: NDArray[np.float64]
    int8: float


@dataclass(frozen=True)
class LossModel:
    """The increase of a whole model is the sum over its `matrices`, by name.

    `branches`, by the name of an attention or an MLP ("blocks.3.attn"): where that branch is dropped whole, instead of
    what its matrices would add.
    """

    matrices: Mapping[str, MatrixLoss]
    branches: Mapping[str, float]

    def increase(self, matrices: Mapping[str, MatrixPlan]) -> float:
        """The predicted relative increase of a plan's matrices."""
        dropped = {branch for branch in self.branches if _is_dropped(branch, matrices)}
        total = sum(self.branches[branch] for branch in dropped)
        for name, chosen in matrices.items():
            if branch_of(name) not in dropped:
                own = self.matrices[name]
                total += own.shared[chosen.shared_rank] + own.tailor[min(chosen.tailor_rank or 0, len(own.tailor) - 1)]
                total += own.int8 * PRECISIONS[cast(Precision, chosen.precision)].int8_losses
        return float(total)


def branch_of(matrix: str) -> str:
    """ "blocks.3.attn" of "blocks.3.attn.q"."""
    return matrix.rsplit(".", 1)[0]


def _is_dropped(branch: str, matrices: Mapping[str, MatrixPlan]) -> bool:
    own = [chosen for name, chosen in matrices.items() if branch_of(name) == branch]
    return bool(own) and all(chosen.storage == "dropped" for chosen in own)
