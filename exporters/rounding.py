"""Rounding a matrix to integers so that its products err least, not its entries.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023): inputs
are rounded one after the other, and what each loses is made up for by those still to come, as far as the inputs'
covariance lets them stand in for one another.

Symbols: n outputs, m inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_DAMPING = 0.01
"""Of the covariance, relative to its mean diagonal: calibration has seen few inputs."""

_CHUNK = 64
"""Inputs whose losses are handed on together, where no block says how many."""

_SHARES = np.linspace(0.75, 1.0, 11)
"""Scales that are tried, relative to the one that cuts nothing off."""


def round_matrix(
    weight: NDArray[Any], covariance: NDArray[np.float64], bits: int, block: int = 0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """weight [n, m], covariance [m, m] of its inputs -> integers [n, m] and their scales.

    `block` inputs of an output share a scale: scales [n, ceil(m / block)], and integers from -2^(bits-1) on; without
    blocks a whole output does: scales [n, 1], and integers are symmetric.
    """
    left = np.array(weight, np.float64)
    n, m = left.shape
    step = block or _CHUNK
    lowest, highest = (-(2 ** (bits - 1)) if block else 1 - 2 ** (bits - 1)), 2 ** (bits - 1) - 1
    upper = _making_up(covariance)
    integers = np.zeros((n, m), np.int8)
    scale = _scale(left, lowest, highest)
    scales = np.zeros((n, -(-m // block) if block else 1), np.float32)
    for start in range(0, m, step):
        end = min(start + step, m)
        if block:
            scale = _scale(left[:, start:end], lowest, highest)
        scales[:, start // step if block else 0] = scale
        losses = np.zeros((n, end - start))
        for j in range(start, end):
            integers[:, j] = np.clip(np.rint(left[:, j] / scale), lowest, highest)
            losses[:, j - start] = (left[:, j] - integers[:, j] * scale) / upper[j, j]
            left[:, j + 1 : end] -= losses[:, j - start, None] * upper[j, j + 1 : end]
        left[:, end:] -= losses @ upper[start:end, end:]
    return integers, scales


def _making_up(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper Cholesky factor of the damped covariance's inverse."""
    m = len(covariance)
    damping = max(_DAMPING * float(np.trace(covariance)) / m, 1e-9)
    inverse = np.linalg.inv(covariance + damping * np.eye(m))
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float64)


def _scale(part: NDArray[np.float64], lowest: int, highest: int) -> NDArray[np.float32]:
    """Of every output, the scale with the least square error; negative where that uses the range better."""
    most = part[np.arange(len(part)), np.abs(part).argmax(1)]  # with its sign
    whole = np.where(most == 0, 1.0, most / lowest if -lowest > highest else np.abs(most) / highest)
    best, least = whole, np.full(len(part), np.inf)
    for share in _SHARES:
        scale = whole * share
        rounded = np.clip(np.rint(part / scale[:, None]), lowest, highest) * scale[:, None]
        error = ((part - rounded) ** 2).sum(1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best.astype(np.float32)
