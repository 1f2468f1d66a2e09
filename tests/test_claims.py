"""What the method promises, on both shipped models: the distilled one and its teacher come apart in the same way."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kind_edge.model.checkpoint import Checkpoint, load_checkpoint
from kind_edge.model.sampling import denoiser, sample
from kind_edge.model.shipped import find_model, shipped_models
from kind_edge.model.spec import Ranks
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import sampling_of

NOISES = 8


def drawn(checkpoint: Checkpoint, classes: Tensor, guided: bool = True) -> Tensor:
    """The judge's probabilities [n, 10] for images of `classes` [n], noise by noise the same for every class."""
    spec, advice = checkpoint.spec, sampling_of(checkpoint)
    guidance = advice.guidance if guided or spec.distilled else 1.0
    noise = torch.randn(NOISES, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    walk = denoiser(checkpoint.model(), advice.steps, guidance)
    images = sample(walk, noise.repeat(len(classes) // NOISES, 1, 1, 1), classes, spec.objective, advice.steps)
    pixels = ((images.clamp(-1, 1)[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    return torch.from_numpy(Judge.load().look(pixels[..., None])[1])


def entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


@pytest.fixture(scope="module", params=shipped_models())
def model(request: pytest.FixtureRequest) -> Checkpoint:
    return load_checkpoint(find_model(request.param))


@pytest.fixture(scope="module")
def by_tailor(model: Checkpoint) -> Tensor:
    """[10, NOISES, 10]: the same noises under every tailor."""
    return drawn(model, torch.arange(10).repeat_interleave(NOISES)).unflatten(0, (10, NOISES))


def test_the_package_has_the_model_and_its_teacher() -> None:
    assert shipped_models() == ("fashion-mnist", "fashion-mnist-teacher")


def test_the_same_noise_under_another_tailor_is_another_class(by_tailor: Tensor) -> None:
    seen = by_tailor.argmax(-1)
    assert (seen == torch.arange(10).unsqueeze(1)).float().mean() >= 0.9


def test_the_learngene_alone_prefers_no_class(model: Checkpoint, by_tailor: Tensor) -> None:
    alone = drawn(model, torch.full((NOISES,), 10), guided=False)
    everyone = by_tailor.mean((0, 1))
    assert float(entropy(everyone)) >= 0.95 * math.log(10)
    assert float(entropy(alone.mean(0))) >= 0.6 * math.log(10)  # of eight images
    assert float(entropy(alone).mean()) >= 2 * float(entropy(by_tailor).mean())


def test_half_the_learngene_still_draws_every_class(model: Checkpoint) -> None:
    tensors, ranks = dict(model.float_tensors()), {}
    for shape in model.spec.matrices():
        full = model.spec.ranks(shape.name)
        half = full.learngene // 2
        for part in "UsV":
            name = f"{shape.name}.learngene.{part}"
            tensors[name] = tensors[name][..., :half].clone()
        ranks[shape.name] = Ranks(half, full.tailor)
    spec = dataclasses.replace(model.spec, matrix_ranks=ranks)
    cut = Checkpoint(spec, model.class_names, tensors, model.provenance)
    seen = drawn(cut, torch.arange(10).repeat_interleave(NOISES)).argmax(-1)
    assert (seen == torch.arange(10).repeat_interleave(NOISES)).float().mean() >= 0.85
