"""The spectral penalty: what it measures, that factors need not be multiplied out, and that it does something."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from kind_edge.errors import InputError
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import Factors
from kind_edge.model.spec import ModelSpec, Ranks
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import in_memory
from kind_edge.training.loop import train_step
from kind_edge.training.spectral import spectral_penalty
from kind_edge.training.state import start

SPEC = ModelSpec(8, 1, 4, 16, 3, 4, 3, learngene_rank=6, tailor_rank=2)
PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2")


penalty = torch.no_grad()(spectral_penalty)


def folded(model: DiT, part: str, which: str) -> np.ndarray:
    """[L, (C,) n, m]; heads and the places in them apart: [L, (C,) H, d, m] or [L, (C,) n, H, d]."""
    factors = [getattr(model.get_submodule(f"blocks.{i}.{part}"), which) for i in range(SPEC.depth)]
    assert all(isinstance(f, Factors) for f in factors)
    return torch.stack([f.product() for f in factors]).detach().double().numpy()


def by_the_spectrum(stack: np.ndarray, heads_first: bool, heads_last: bool) -> float:
    """The same from the DCT of [L, n, m]: each axis's energy by frequency, weighted by 4 sin^2(pi k / 2n)."""
    layers, outputs, inputs = stack.shape
    view = stack.reshape(layers, *((4, -1) if heads_first else (outputs, 1)), *((4, -1) if heads_last else (inputs, 1)))
    ratios = []
    for axis in (0, 1, 3):
        size = view.shape[axis]
        power = np.square(dctn(view, norm="ortho", axes=[axis])).sum(tuple(a for a in range(5) if a != axis))
        weight = 4 * np.sin(np.pi * np.arange(size) / (2 * size)) ** 2
        ratios.append((power * weight).sum() / (size - 1) / (2 * power.sum() / size))
    return float(np.mean(ratios))


def test_it_is_the_weighted_spectrum_of_the_folded_matrices() -> None:
    model = initialise(DiT(SPEC), 0)
    wanted = []
    for part in PARTS:
        heads = part in ("attn.q", "attn.k", "attn.v"), part == "attn.o"
        wanted.append(by_the_spectrum(folded(model, part, "learngene"), *heads))
        tailors = folded(model, part, "tailors")
        wanted.append(np.mean([by_the_spectrum(tailors[:, c], *heads) for c in range(3)]))
    assert float(penalty(model)) == pytest.approx(np.mean(wanted), rel=1e-4)
    assert float(penalty(model)) == pytest.approx(1, abs=0.15)  # random weights are white
    dense = initialise(DiT(SPEC.dense()), 0)
    wanted = [
        by_the_spectrum(torch.stack([dense.get_submodule(f"blocks.{i}.{part}").weight for i in range(3)]).detach()
            .double().numpy(), part in PARTS[:3], part == "attn.o")
        for part in PARTS
    ]  # fmt: skip
    assert float(penalty(dense)) == pytest.approx(np.mean(wanted), rel=1e-4)


def test_training_with_it_leaves_less_in_high_frequencies() -> None:
    labels = torch.arange(36) % 3
    images = torch.randint(40, (36, 1, 8, 8), generator=torch.Generator().manual_seed(0)) + 100 * labels.view(
        -1, 1, 1, 1
    )
    data = in_memory(images.to(torch.uint8).numpy(), labels, ("a", "b", "c"), "0")

    def trained(weight: float) -> tuple[float, float]:
        config = TrainConfig(SPEC, images=12 * 25, batch_size=12, warmup_steps=2, learning_rate=5e-3,
            spectral_penalty=weight)  # fmt: skip
        state = start(config)
        batches = ClassBatches(labels, 3, 12, 0)
        losses = [train_step(config, state, data, batches) for _ in range(25)]
        return losses[0], float(penalty(state.model))

    (first, without), (same_first, with_it) = trained(0.0), trained(1.0)
    assert same_first == first  # what is reported is the diffusion loss alone
    assert with_it < 0.8 * without


def test_where_it_can_be_asked_for() -> None:
    config = TrainConfig(SPEC, spectral_penalty=0.1)
    assert TrainConfig.from_dict(config.to_dict(), "here") == config
    assert "spectral_penalty" not in TrainConfig(SPEC).to_dict()  # or runs of before could not be resumed
    with pytest.raises(InputError, match="spectral_penalty: got -1"):
        TrainConfig(SPEC, spectral_penalty=-1)
    with pytest.raises(InputError, match="cut model"):
        TrainConfig(dataclasses.replace(SPEC, matrix_ranks={"blocks.0.attn.q": Ranks(2, 1)}), spectral_penalty=1)
