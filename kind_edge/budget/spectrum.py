"""What the solver knows of a matrix: how much of its output energy every rank retains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spectrum:
    """Retained energy of one matrix by rank, as shares of the active matrix's: shared[0] = 0 ... shared[-1] +
    tailor[-1] = 1. `shared` [k + 1] is the learngene (in single and union: the folded product); `tailor` [N_T + 1] is
    the mean over kept classes."""

    shared: NDArray[np.float64]
    tailor: NDArray[np.float64]
