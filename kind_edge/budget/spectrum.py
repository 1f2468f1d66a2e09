"""What the solver knows of a matrix: how much of its output energy every rank retains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spectrum:
    """Retained energy of one matrix by rank, as shares of the whole model's, so that all full ranks add up to 1.

    `shared` [k + 1] is the learngene's (in single and union: the folded product's), `tailor` [N_T + 1] the mean over
    kept classes; both start at 0 for rank 0.
    """

    shared: NDArray[np.float64]
    tailor: NDArray[np.float64]
