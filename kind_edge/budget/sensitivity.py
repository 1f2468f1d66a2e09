"""What each matrix is worth for the kept classes: how much every rank raises the loss.

The only module of `budget` that needs torch: it looks at weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.influence import Sensitivity
from kind_edge.budget.loss import LossModel, MatrixLoss
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import Form
from kind_edge.model.truncation import SortedFactors, fold_matrix

__all__ = ["LossModel", "MatrixLoss", "loss_model"]


def loss_model(
    checkpoint: Checkpoint, classes: list[int], form: Form, calibration: Calibration | None, sensitivity: Sensitivity
) -> LossModel:
    """The predicted increase of the loss by rank, for these classes in that form.

    Every rank loses some of the energy of its matrix's output, and the sensitivity says what such a loss costs. In
    single and union learngene and tailors are one product: it is read on the learngene's curve.
    """
    matrices = {}
    for shape in checkpoint.spec.matrices():
        folded = fold_matrix(checkpoint, shape.name, classes, form, calibration)
        own = sensitivity.matrices[shape.name]
        tailors = [_lost(tailor) for tailor in folded.tailors]
        tailor = own.tailor.at(np.mean(tailors, axis=0)) if tailors else np.zeros(1)
        matrices[shape.name] = MatrixLoss(own.shared.at(_lost(folded.shared)), tailor, own.int8)
    return LossModel(matrices, sensitivity.branches)


def _lost(factors: SortedFactors) -> NDArray[np.float64]:
    """Output energy [R + 1] that goes when rank r is kept: all of it at 0, nothing at full rank."""
    energy: NDArray[np.float64] = factors.energy.numpy()
    return np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
