"""BoT: a stack of weights resized by the levels of a Haar wavelet transform.

Smaller: neighbours are replaced by the approximation coefficient of their pair, level by level. Larger: the inverse
transform with details of zero, which gives every sample a twin. A level halves or doubles an axis. Where less than a
level is left to go, as many pairs as are wanted are joined (or samples doubled), evenly spread along the axis, and the
other samples stay: of 4 layers for 3, for instance, two become one. So any size is reached, and a smaller one undoes
what a larger one did.

Scale: an approximation coefficient of the Haar transform is sqrt(2) times the mean of its pair. Along layers and
outputs the mean stands for both; along inputs, whose activations are alike where channels were joined, the sum does. A
model that grows by twins computes what it computed before, up to its position table.

Source: "A Unified Framework for Knowledge Transfer in Bidirectional Model Scaling" (BoT, 2026): wavelet transform down,
inverse transform up. Haar, the partial level and the scale are choices made here.
"""

from __future__ import annotations

import numpy as np
import pywt
from numpy.typing import NDArray

_WAVELET = "haar"


def bot(stack: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """[layers, outputs, inputs] -> `shape`."""
    resized = stack
    for axis, size in enumerate(shape):
        resized = _along(resized, axis, size, share=axis == 2)
    return resized.copy()


def _along(stack: NDArray[np.float64], axis: int, size: int, share: bool) -> NDArray[np.float64]:
    """One axis, level by level. `share`: samples sum where they are joined, and share where they are doubled."""
    small, large = sorted((stack.shape[axis], size))
    whole = [small * 2**level for level in range(large // small) if small * 2**level <= large]
    if stack.shape[axis] > size:  # what is no whole level first, so that this undoes its inverse
        for step in reversed(whole):
            stack = _join(stack, axis, step, share)
        return stack
    for step in [*whole[1:], size]:
        stack = _double(stack, axis, step, share)
    return stack


def _join(stack: NDArray[np.float64], axis: int, size: int, share: bool) -> NDArray[np.float64]:
    first, paired = _groups(stack.shape[axis], size)
    joined = np.moveaxis(stack, axis, 0)
    pairs = np.stack([joined[first[paired]], joined[first[paired] + 1]], -1)
    approximation, _ = pywt.dwt(pairs, _WAVELET, mode="periodization")
    result = joined[first]
    result[paired] = approximation[..., 0] * (np.sqrt(2) if share else np.sqrt(0.5))
    return np.moveaxis(result, 0, axis)


def _double(stack: NDArray[np.float64], axis: int, size: int, share: bool) -> NDArray[np.float64]:
    first, paired = _groups(size, stack.shape[axis])
    single = np.moveaxis(stack, axis, 0)
    result = np.empty((size, *single.shape[1:]))
    result[first] = single
    twins = pywt.idwt(single[paired, ..., None], None, _WAVELET, mode="periodization")
    twins = twins * (np.sqrt(0.5) if share else np.sqrt(2))
    result[first[paired]], result[first[paired] + 1] = twins[..., 0], twins[..., 1]
    return np.moveaxis(result, 0, axis)


def _groups(large: int, small: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each of `small` groups of one or two begins among `large` samples, evenly spread, and which are pairs."""
    edges = np.arange(small + 1) * large // small
    return edges[:-1], np.diff(edges) == 2
