"""FRONT: a stack of weights resized in the frequency domain.

The weights of one type, stacked over the blocks, are taken for samples of a function of depth, output and input; its
low frequencies are kept. The orthonormal DCT-II over the axes that change, its low-frequency block cut or padded with
zeros, and the inverse transform. Along one axis of size n that becomes n' this is y' = A y with A of n' x n, whose rows
(n' < n) or columns (n' > n) are orthonormal.

How much to scale. Let activations keep their size per channel: y' = sqrt(n'/n) A y, x' = sqrt(m'/m) A x. A smooth y is
then sampled at n' places with its amplitude kept: A alone would change it by sqrt(n/n'), as the same energy is spread
over n' samples. With y = W x, and x ~ sqrt(m/m') A^T x' for all x' (no error if n' > n and x' = sqrt(m'/m) A x),

    y' = sqrt(n'/n) sqrt(m/m') (A W A^T) x',

and depth keeps amplitudes, as outputs do: sqrt(L'/L). So outputs and layers scale by the root of the ratio of their new
size to the old one, and inputs by that of its inverse: twice as many inputs, each with half the weight. The variance
E[y'^2] of an output is that of E[y^2] for smooth weights under smooth inputs, and for any weights that grow. Weights
that are white along an axis of outputs or layers have no more than the share n'/n of their energy in what is kept, and
their outputs have that share of the variance.

Source: "One-for-All Model Initialization with Frequency-Domain Knowledge" (FRONT, 2026): DCT over the stack, cut or
padded. The scale is derived here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn


def front(stack: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """[layers, outputs, inputs] -> `shape`. Axes that keep their size are not transformed, so those stay exact."""
    axes = [axis for axis in range(3) if stack.shape[axis] != shape[axis]]
    if not axes:
        return stack.copy()
    spectrum = dctn(stack, type=2, norm="ortho", axes=axes)
    kept = np.zeros(shape)
    low = tuple(slice(min(old, new)) for old, new in zip(stack.shape, shape, strict=True))
    kept[low] = spectrum[low]
    layers, outputs, inputs = (new / old for old, new in zip(stack.shape, shape, strict=True))
    resized: NDArray[np.float64] = idctn(kept, type=2, norm="ortho", axes=axes)
    return resized * np.sqrt(layers * outputs / inputs)
