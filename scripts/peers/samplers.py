"""Samplers for the dense twin, as tables (kind_edge.deploy.sampler_table says what the columns mean), and their loop.

A step here is one guided evaluation of the denoiser, which is what a user pays for: Heun takes two of them for each of
its own, but the last.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kind_edge.deploy.sampler_table import SamplerTable, sampler_table
from kind_edge.model.diffusion import TRAIN_STEPS

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]
Predict = Callable[[FloatArray, FloatArray, IndexArray], FloatArray]
"""(sample [B, ch, H, W], timestep [B], class index [B]) -> prediction"""

SAMPLERS = ("dpmsolver++", "euler", "heun")


def flow_table(sampler: str, steps: int) -> SamplerTable:
    """Rows of `steps` guided evaluations; Heun's are an odd number."""
    if sampler == "dpmsolver++":
        return _dpm_solver_table(steps)
    return sampler_table(sampler, "flow", (steps + 1) // 2 if sampler == "heun" else steps)


def _dpm_solver_table(steps: int) -> SamplerTable:
    """DPM-Solver++(2M) of a flow, with the spacing and the whole timesteps that diffusers has for it.

    d is the predicted image, sample - sigma * velocity.
    """
    sigma = np.append(np.flip(1 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1))[:-1], 0.0)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(1 - sigma) - np.log(sigma)
    b, c = np.empty(steps), np.zeros(steps)
    for i in range(steps):
        h = half_log_snr[i + 1] - half_log_snr[i]
        gain = -(1 - sigma[i + 1]) * np.expm1(-h)
        first_order = i in (0, steps - 1)
        half_ratio = 0.0 if first_order else h / (half_log_snr[i] - half_log_snr[i - 1]) / 2
        b[i], c[i] = gain * (1 + half_ratio), -gain * half_ratio
    timestep = np.trunc(sigma[:-1] * TRAIN_STEPS)
    return SamplerTable(timestep, np.ones(steps), -sigma[:-1], sigma[1:] / sigma[:-1], b, c)


def draw(
    predict: Predict, table: SamplerTable, guidance: float, noise: FloatArray, classes: IndexArray, null_index: int
) -> FloatArray:
    """Guided images [n, ch, H, W] in [-1, 1]: class and null rows in one call, class rows first."""
    sample, previous = noise, np.zeros_like(noise)
    both = np.concatenate([classes, np.full_like(classes, null_index)])
    for timestep, p, q, a, b, c in zip(table.timestep, table.p, table.q, table.a, table.b, table.c, strict=True):
        stacked = np.concatenate([sample, sample])
        of_class, of_null = np.split(predict(stacked, np.full(len(stacked), timestep, np.float32), both), 2)
        direction = np.float32(p) * sample + np.float32(q) * (of_null + np.float32(guidance) * (of_class - of_null))
        sample, previous = np.float32(a) * sample + np.float32(b) * direction + np.float32(c) * previous, direction
    return np.clip(sample, -1.0, 1.0)
