"""Noise, targets and losses of both objectives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from kind_edge.model.diffusion import (
    TRAIN_STEPS,
    _discretised_nll,
    add_noise,
    alphas_cumprod,
    draw_timesteps,
    loss_per_image,
)

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def noise_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(seed))


def test_the_schedule_is_the_linear_one_of_ddpm() -> None:
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    np.testing.assert_allclose(alphas_cumprod().numpy(), scheduler.alphas_cumprod.double().numpy(), rtol=2e-5)
    timestep = torch.tensor([3, 870])
    noised, target = add_noise("epsilon", IMAGES, noise_of(), timestep.float())
    torch.testing.assert_close(noised, scheduler.add_noise(IMAGES, noise_of(), timestep), rtol=1e-5, atol=1e-5)
    assert noised.dtype == torch.float32
    assert torch.equal(target, noise_of())


def test_flow_goes_straight_from_image_to_noise() -> None:
    noise = noise_of()
    noised, target = add_noise("flow", IMAGES, noise, torch.tensor([0.0, 1000.0]))
    torch.testing.assert_close(noised, torch.stack([IMAGES[0], noise[1]]))
    torch.testing.assert_close(target, noise - IMAGES)
    noised, _ = add_noise("flow", IMAGES, noise, torch.tensor([250.0, 250.0]))
    torch.testing.assert_close(noised, 0.75 * IMAGES + 0.25 * noise)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_timesteps_stay_in_range_and_follow_the_generator(objective: str) -> None:
    first, again = (draw_timesteps(objective, 4000, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < 50
    assert 950 < first.max() < TRAIN_STEPS
    if objective == "flow":  # logit-normal: a third of all lie in the inner quarter
        inner = ((first > 375) & (first < 625)).float().mean()
        assert float(inner) == pytest.approx(2 * 0.19522, abs=0.02)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_the_loss_is_the_mean_square_error_of_every_image(objective: str) -> None:
    timestep = torch.tensor([10.0, 700.0])
    _, target = add_noise(objective, IMAGES, noise_of(), timestep)
    loss = loss_per_image(objective, lambda x, t: target + 0.5, IMAGES, noise_of(), timestep)
    torch.testing.assert_close(loss, torch.full((2,), 0.25))


@pytest.mark.parametrize("timesteps", [(0.0, 0.0), (0.0, 1.0), (500.0, 999.0)])
def test_a_learned_variance_leaves_the_mean_alone(timesteps: tuple[float, float]) -> None:
    """The bound's gradient reaches the variance channels, and the mean's gradient is that of the square error."""
    timestep, noise = torch.tensor(timesteps), noise_of()
    prediction = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = loss_per_image("epsilon", lambda x, t: prediction, IMAGES, noise, timestep)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert prediction.grad is not None
    mean, variance = prediction.grad.chunk(2, 1)
    torch.testing.assert_close(mean, 2 * (prediction[:, :3] - noise).detach() / 48)
    assert variance.abs().sum(dim=(1, 2, 3)).min() > 0


def test_the_variance_term_is_the_kl_divergence_in_bits() -> None:
    """With the true mean predicted, KL(N(m, v1) | N(m, v2)) has only its variance part."""
    step, fraction = 2, 0.25
    noise = noise_of()
    prediction = torch.cat([noise, torch.full_like(noise, fraction)], 1)
    loss = loss_per_image("epsilon", lambda x, t: prediction, IMAGES, noise, torch.full((2,), float(step)))
    bars = alphas_cumprod()
    beta = 1 - bars[step] / bars[step - 1]
    low, high = float((beta * (1 - bars[step - 1]) / (1 - bars[step])).log()), float(beta.log())
    modelled = low + (fraction + 1) / 2 * (high - low)
    wanted = 0.5 * (modelled - low - 1 + math.exp(low - modelled)) / math.log(2)
    np.testing.assert_allclose(loss.numpy(), wanted, rtol=2e-2)


def test_the_likelihood_of_all_256_levels_adds_up_to_one() -> None:
    levels = torch.linspace(-1, 1, 256)
    for mean, log_scale in ((0.1, -1.0), (-0.95, -2.0), (0.999, 0.0)):
        nll = _discretised_nll(levels, torch.full((256,), mean), torch.full((256,), log_scale))
        assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-5)
