"""What each matrix is worth: the share of its output energy that every rank retains, for the kept classes.

The only module of `budget` that needs torch: it looks at weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.spectrum import Spectrum
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import Form
from kind_edge.model.truncation import SortedFactors, fold_matrix


def spectra(
    checkpoint: Checkpoint, classes: list[int], form: Form, calibration: Calibration | None
) -> dict[str, Spectrum]:
    """The spectrum of every factored matrix, whitened where there is calibration.

    Energies are shares of the whole model's: a matrix with little output loses little. (Held-out loss rises 1.5 x
    as much when every matrix is normalised by itself.)
    """
    energies = {}
    for shape in checkpoint.spec.matrices():
        folded = fold_matrix(checkpoint, shape.name, classes, form, calibration)
        tailor = np.mean([_retained(t) for t in folded.tailors], axis=0) if folded.tailors else np.zeros(1)
        energies[shape.name] = (_retained(folded.shared), tailor)
    total = sum(shared[-1] + tailor[-1] for shared, tailor in energies.values()) or 1.0
    return {name: Spectrum(shared / total, tailor / total) for name, (shared, tailor) in energies.items()}


def _retained(factors: SortedFactors) -> NDArray[np.float64]:
    energy: NDArray[np.float64] = factors.energy.numpy()
    return np.concatenate([[0.0], np.cumsum(energy)])
