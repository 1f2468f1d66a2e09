"""Sampling through diffusers: guidance, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.sampling import guided, make_scheduler, sample

NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_guidance_pushes_from_null_through_the_class(make_checkpoint: Callable[..., Checkpoint]) -> None:
    model = make_checkpoint().model()
    timestep, classes = torch.tensor([700.0, 20.0]), torch.tensor([1, 3])
    of_class, of_null = model(NOISE, timestep, classes), model(NOISE, timestep, torch.tensor([4, 4]))
    got = guided(model, 2.5, 4)(NOISE, timestep, classes)
    torch.testing.assert_close(got, of_null + 2.5 * (of_class - of_null), rtol=1e-4, atol=1e-5)
    assert guided(model, 1.0, 4) is model


def test_a_straight_flow_is_solved_by_any_number_of_steps() -> None:
    """If the network always says e - x_0 of one image, every sampler ends at that image."""
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    for sampler in ("euler", "heun"):
        for steps in (1, 3, 20):
            images = sample(lambda x, t, c: NOISE - image, NOISE, torch.zeros(2).long(), "flow", steps, sampler)
            torch.testing.assert_close(images, image.expand(2, -1, -1, -1), rtol=0, atol=2e-5)


def test_a_perfect_noise_prediction_finds_the_image() -> None:
    """x_t is known to come from one image: epsilon = (x_t - sqrt(bar) image) / sqrt(1 - bar)."""
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    bars = make_scheduler("ddim", "epsilon", 10).alphas_cumprod

    def predict(x: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        bar = bars[t.long()].view(-1, 1, 1, 1)
        return torch.cat([(x - bar.sqrt() * image) / (1 - bar).sqrt(), torch.full_like(x, 7.0)], 1)  # and a variance

    for sampler in ("ddim", "dpmsolver++"):
        images = sample(predict, NOISE, torch.zeros(2).long(), "epsilon", 20, sampler)
        torch.testing.assert_close(images, image.expand(2, -1, -1, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "objective", "steps", "words"),
    [
        ("ddim", "flow", 5, "euler"),
        ("euler", "epsilon", 5, "ddim"),
        ("eulr", "flow", 5, "euler"),
        ("euler", "flow", 0, "--steps"),
        ("ddim", "epsilon", 1001, "--steps"),
        ("ddim", "epsilon", 998, "998: ddim cannot space"),
        ("dpmsolver++", "epsilon", 1000, "1000: dpmsolver"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, objective: str, steps: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_scheduler(kind, objective, steps)
