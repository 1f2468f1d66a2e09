"""What a step minimises: the ordinary diffusion loss, alone or while every cut of the learngene is taught, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kind_edge.model.diffusion import loss_per_image
from kind_edge.training.batches import generator

NESTED_LOWEST = 0.3
"""The smallest share of the learngene that a nested step cuts to."""


class Predict(Protocol):
    """The network in training as a loss calls it: its gates are those of the examples.

    `share`: only this leading share of the learngene's components is used. `span`: as in `DiT.forward`.
    """

    def __call__(
        self, sample: Tensor, timestep: Tensor, *, share: float = 1.0, span: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Examples:
    """A part of a step's batch, on the device: images and noise [B, ch, H, W], the rest [B].

    `closed` says whose gates are closed; their labels are those of their images all the same.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor
    timestep: Tensor
    closed: Tensor


Loss = Callable[[Predict, Examples, int], Tensor]
"""(network, examples, step) -> a mean over the examples. What is random in it depends on the step alone."""


@dataclass(frozen=True)
class DiffusionLoss:
    objective: str

    def __call__(self, predict: Predict, examples: Examples, step: int) -> Tensor:
        return loss_per_image(self.objective, predict, examples.images, examples.noise, examples.timestep).mean()


@dataclass(frozen=True)
class NestedLoss:
    """The diffusion loss of the whole, and how far a cut of random size is from the whole's prediction, as both stand.

    The whole is taught by the data alone: it learns nothing from its cuts, so that it need not get worse for them.
    """

    objective: str
    seed: int

    def __call__(self, predict: Predict, examples: Examples, step: int) -> Tensor:
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def watched(sample: Tensor, timestep: Tensor) -> Tensor:
            prediction = predict(sample, timestep)
            seen.append((sample, timestep, prediction.detach()))
            return prediction

        whole = loss_per_image(self.objective, watched, examples.images, examples.noise, examples.timestep).mean()
        ((sample, timestep, wanted),) = seen
        cut = predict(sample, timestep, share=nested_share(self.seed, step))
        return whole + (cut - wanted).square().mean()


def nested_share(seed: int, step: int) -> float:
    """The share of the learngene that a nested step cuts to, uniform in [`NESTED_LOWEST`, 1)."""
    size = float(torch.rand((), generator=generator(seed, step, 0, 0), dtype=torch.float64))
    return NESTED_LOWEST + (1 - NESTED_LOWEST) * size
