"""Plain selection: every k-th layer and the leading channels; what the other methods are measured against.

Smaller: of L layers those at floor(i L / L'), and the leading outputs and inputs. A sum over fewer inputs is smaller:
inputs scale by sqrt(m/m'), which keeps its variance where inputs are not correlated. Larger: layers are repeated, each
next to its original; channel i beyond the old ones is a copy of channel i mod n, and as inputs a channel and its copies
share its weight, so that a sum over them stays what it was.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def selection(stack: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """[layers, outputs, inputs] -> `shape`."""
    layers, outputs, inputs = shape
    old_layers, old_outputs, old_inputs = stack.shape
    source = np.arange(inputs) % old_inputs
    shared = np.bincount(source)[source]
    chosen = stack[np.arange(layers) * old_layers // layers][:, np.arange(outputs) % old_outputs][:, :, source]
    return chosen * (np.sqrt(max(1.0, old_inputs / inputs)) / shared)
