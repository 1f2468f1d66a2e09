"""A sampler as numbers, so that any runtime can take its steps: one row per network evaluation.

    d_i     = p_i x_i + q_i prediction_i
    x_{i+1} = a_i x_i + b_i d_i + c_i d_{i-1}          (d_{-1} = 0)

Every row is derived from the diffusers scheduler's own timesteps and sigmas; tests hold the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.model.sampling import make_scheduler

Row = NDArray[np.float64]


@dataclass(frozen=True)
class SamplerTable:
    """All [evaluations], float64; `timestep` is what the network is given."""

    timestep: Row
    p: Row
    q: Row
    a: Row
    b: Row
    c: Row

    def to_dict(self) -> dict[str, list[float]]:
        return {name: [float(value) for value in getattr(self, name)] for name in ("timestep", "p", "q", "a", "b", "c")}


def sampler_table(kind: str, objective: str, steps: int) -> SamplerTable:
    """Coefficients for `steps` steps of a sampler ("euler", "heun", "ddim", "dpmsolver++")."""
    scheduler = make_scheduler(kind, objective, steps)
    timestep = scheduler.timesteps.double().numpy()
    if objective == "flow":
        return _flow_table(timestep, scheduler.sigmas.double().numpy(), heun=kind == "heun")
    if kind == "ddim":
        # As diffusers has it: a whole number of training steps at a time, though the timesteps may lie a little apart.
        here, after = scheduler.timesteps, scheduler.timesteps - scheduler.config.num_train_timesteps // steps
        bars = scheduler.alphas_cumprod.double()
        return _ddim_table(timestep, bars[here].numpy(), torch.where(after < 0, 1.0, bars[after.clamp(0)]).numpy())
    return _dpm_solver_table(timestep, scheduler.sigmas.double().numpy())


def _flow_table(timestep: Row, sigma: Row, heun: bool) -> SamplerTable:
    """Euler: x + (sigma' - sigma) v. Heun adds a corrector row, x + h/2 (v' - v), to every step but the last."""
    rows = len(timestep)
    zero, one = np.zeros(rows), np.ones(rows)
    if not heun:
        return SamplerTable(timestep, zero, one, one, np.diff(sigma), zero)
    b, c = np.empty(rows), np.zeros(rows)
    b[0::2] = sigma[1::2] - sigma[0:-1:2]
    b[1::2] = b[0:-1:2] / 2
    c[1::2] = -b[1::2]
    return SamplerTable(timestep, zero, one, one, b, c)


def _ddim_table(timestep: Row, bars: Row, after: Row) -> SamplerTable:
    """Song et al. (2021), equation 12 with eta 0, from signal share `bars` to `after`; d is the predicted x_0."""
    ratio = np.sqrt((1 - after) / (1 - bars))
    zero = np.zeros(len(bars))
    return SamplerTable(
        timestep, 1 / np.sqrt(bars), -np.sqrt(1 / bars - 1), ratio, np.sqrt(after) - ratio * np.sqrt(bars), zero
    )


def _dpm_solver_table(timestep: Row, sigma: Row) -> SamplerTable:
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2; first order at the first row, and at the last of few steps."""
    alpha = 1 / np.sqrt(1 + sigma**2)
    noise = sigma * alpha
    rows = len(timestep)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(noise)
    a, b, c = noise[1:] / noise[:-1], np.empty(rows), np.zeros(rows)
    for i in range(rows):
        h = lam[i + 1] - lam[i]
        gain = -alpha[i + 1] * np.expm1(-h)
        first_order = i == 0 or (i == rows - 1 and (rows < 15 or np.isinf(h)))
        half_ratio = 0.0 if first_order else h / (lam[i] - lam[i - 1]) / 2
        b[i], c[i] = gain * (1 + half_ratio), -gain * half_ratio
    return SamplerTable(timestep, 1 / alpha[:-1], -noise[:-1] / alpha[:-1], a, b, c)
