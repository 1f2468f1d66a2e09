"""The two training objectives. Timesteps run over (0, 1000] for both; images and noise are [B, ch, H, W].

epsilon: Ho et al. (2020) with DiT's linear schedule; a learned variance adds Nichol & Dhariwal's (2021) hybrid loss.
flow: rectified flow (Liu et al., 2023), x_t = (1 - t) x_0 + t e, target e - x_0, logit-normal t (Esser et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START, BETA_END = 1e-4, 2e-2

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noised images, timesteps [B]) -> prediction"""


def alphas_cumprod(device: torch.device | None = None) -> Tensor:
    """prod (1 - beta) of the linear schedule, [1000], float64."""
    betas = torch.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=torch.float64, device=device)
    return (1 - betas).cumprod(0)


def draw_timesteps(objective: str, count: int, generator: torch.Generator) -> Tensor:
    """Training timesteps [count], float32."""
    if objective == "flow":
        return torch.randn(count, generator=generator).sigmoid() * TRAIN_STEPS
    return torch.randint(TRAIN_STEPS, (count,), generator=generator).float()


def add_noise(objective: str, images: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The noised images at `timestep` [B] and what the network should predict for them."""
    if objective == "flow":
        t = (timestep / TRAIN_STEPS).view(-1, 1, 1, 1)
        return (1 - t) * images + t * noise, noise - images
    signal = alphas_cumprod(images.device)[timestep.long()].view(-1, 1, 1, 1)
    return (signal.sqrt() * images + (1 - signal).sqrt() * noise).float(), noise


def loss_per_image(objective: str, predict: Predict, images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The ordinary diffusion loss of every image, [B]."""
    noised, target = add_noise(objective, images, noise, timestep)
    prediction = predict(noised, timestep)
    mean, *variance = prediction.split(images.shape[1], 1)
    loss = (mean - target).square().flatten(1).mean(1)
    if variance:
        loss = loss + _variational_bound(images, noised, mean.detach(), variance[0], timestep.long())
    return loss


def _variational_bound(images: Tensor, noised: Tensor, noise: Tensor, fraction: Tensor, step: Tensor) -> Tensor:
    """The learned variance's term, [B]: KL of the posterior (first step: a discretised likelihood), times 1000 / 1000.

    Nichol & Dhariwal (2021), equations 15 and 16; the mean is frozen, so that only the variance learns from it.
    """
    bars = alphas_cumprod(images.device)
    before = torch.cat([bars.new_ones(1), bars[:-1]])
    betas = 1 - bars / before
    posterior = betas * (1 - before) / (1 - bars)
    low = torch.cat([posterior[1:2], posterior[1:]]).log()

    def at(table: Tensor) -> Tensor:
        return table[step].float().view(-1, 1, 1, 1)

    log_variance = at(low) + (fraction + 1) / 2 * (at(betas.log()) - at(low))
    start = ((noised - at((1 - bars).sqrt()) * noise) / at(bars.sqrt())).clamp(-1, 1)
    from_start, from_noised = at(betas * before.sqrt() / (1 - bars)), at((1 - before) * (1 - betas).sqrt() / (1 - bars))
    true_mean, mean = from_start * images + from_noised * noised, from_start * start + from_noised * noised
    ratio = at(low) - log_variance
    kl = 0.5 * (-1 - ratio + ratio.exp() + (true_mean - mean).square() * (-log_variance).exp())
    nll = _discretised_nll(images, mean, 0.5 * log_variance)
    first = (step == 0).view(-1, 1, 1, 1)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)


def _discretised_nll(images: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood of 8-bit images in [-1, 1] under a Gaussian that is integrated over each bin."""
    centred, inverse = images - mean, (-log_scale).exp()
    upper = torch.special.ndtr(inverse * (centred + 1 / 255))
    lower = torch.special.ndtr(inverse * (centred - 1 / 255))
    upper = torch.where(images > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(images < -0.999, torch.zeros_like(lower), lower)
    return -(upper - lower).clamp_min(1e-12).log()
