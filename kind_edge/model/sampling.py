"""Sampling from a model in PyTorch, through diffusers' schedulers. Images are [B, ch, H, W] in [-1, 1]."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kind_edge.errors import UsageError, unknown
from kind_edge.model.diffusion import BETA_END, BETA_START, TRAIN_STEPS
from kind_edge.model.dit import DiT
from kind_edge.model.spec import SAMPLERS, ModelSpec, check_sampling, default_sampler

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sample [B, ch, H, W], timestep [B], class index [B]) -> prediction"""


def make_scheduler(kind: str, objective: str, steps: int) -> Any:
    """The diffusers scheduler of that name, with its timesteps set."""
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
    )

    if kind not in SAMPLERS[objective]:
        raise unknown(f"sampler for the {objective} objective", kind, SAMPLERS[objective])
    if not 1 <= steps <= TRAIN_STEPS:
        raise UsageError(f"--steps: got {steps}, want 1 to {TRAIN_STEPS}")
    linear = {"num_train_timesteps": TRAIN_STEPS, "beta_start": BETA_START, "beta_end": BETA_END}
    if kind == "euler":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS)
    elif kind == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=TRAIN_STEPS)
    elif kind == "ddim":
        scheduler = DDIMScheduler(**linear, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    else:
        scheduler = DPMSolverMultistepScheduler(**linear, algorithm_type="dpmsolver++", timestep_spacing="linspace")
    if kind == "euler":  # evenly spaced down to the last step, as few steps need; diffusers' own spacing wastes one
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    timesteps, rows = scheduler.timesteps.tolist(), 2 * steps - 1 if kind == "heun" else steps
    falling = all(a > b for a, b in itertools.pairwise(timesteps)) or kind == "heun"
    if len(timesteps) != rows or not falling or timesteps[-1] < 0:  # diffusers rounds, and some counts do not come out
        raise UsageError(
            f"--steps {steps}: {kind} cannot space that many steps over {TRAIN_STEPS}; take another number"
        )
    return scheduler


def guided(denoise: Denoiser, guidance: float, null_index: int) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans, 2022): null + w (class - null).

    The branches run apart: one batch of 2B mixes open and closed gates, and takes longer on a CPU.
    """
    if guidance == 1.0:
        return denoise

    def predict(sample: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        wanted = denoise(sample, timestep, classes)
        unconditional = denoise(sample, timestep, torch.full_like(classes, null_index))
        return unconditional + guidance * (wanted - unconditional)

    return predict


def step_span(spec: ModelSpec, steps: int, timestep: Tensor) -> Tensor | None:
    """What `DiT.forward` takes as span at `timestep` [B] of a sampler of `steps` Euler steps; None: it takes none."""
    return torch.full_like(timestep, TRAIN_STEPS / steps, dtype=torch.float32) if spec.distilled else None


def denoiser(model: DiT, steps: int, guidance: float) -> Denoiser:
    """The model as a sampler of `steps` steps calls it, with guidance of that strength.

    Raises `UsageError` where a distilled model does not support the steps, or has other guidance inside.
    """
    check_sampling(model.spec, steps, guidance)
    if not model.spec.distilled:
        return guided(model, guidance, model.spec.num_classes)

    def predict(sample: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        return model(sample, timestep, classes, step_span(model.spec, steps, timestep))

    return predict


@torch.no_grad()
def sample(
    denoise: Denoiser, noise: Tensor, classes: Tensor, objective: str, steps: int, sampler: str | None = None
) -> Tensor:
    """Images from `noise` [B, ch, H, W]; a learned variance in the prediction is ignored, as DDIM and ODEs do."""
    scheduler = make_scheduler(sampler or default_sampler(objective), objective, steps)
    x = noise
    for timestep in scheduler.timesteps:
        prediction = denoise(x, timestep.float().expand(len(x)).to(x.device), classes)[:, : x.shape[1]]
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x
