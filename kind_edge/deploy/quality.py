"""What truncation costs: the diffusion loss on held-out images, the full model against the plan's. Never parity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kind_edge.deploy.reference import Heldout
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.diffusion import draw_timesteps, loss_per_image
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.spec import Form

DRAWS = 4
"""Timesteps and noises per image; the same for both models, so that their difference is far finer than either."""


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean loss over `images` held-out images of one class (or of all, on the null branch)."""

    name: str
    images: int
    full: float
    plan: float

    @property
    def increase(self) -> float:
        """0.03 is 3 % more loss than the full model's."""
        return self.plan / self.full - 1

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "full": self.full, "plan": self.plan, "increase": self.increase}


def heldout_losses(
    full: Checkpoint, truncated: Checkpoint, form: Form, kept: list[int], heldout: Heldout
) -> tuple[HeldoutLoss, ...]:
    """Per kept class and, in *switch*, for the null branch. `kept` are the classes' positions in `full`."""
    own = heldout.of_classes(kept)
    full_model, plan_model = full.model(), truncated.model()
    null_full, null_plan = full.spec.num_classes, len(kept)
    results = []
    for i, c in enumerate(kept):
        images = own.images[own.labels == i]
        if len(images):
            plan_class = i if form == "switch" else null_plan
            pair = (_mean_loss(full_model, images, c), _mean_loss(plan_model, images, plan_class))
            results.append(HeldoutLoss(truncated.class_names[i], len(images), *pair))
    if form == "switch" and len(own.images):
        pair = (_mean_loss(full_model, own.images, null_full), _mean_loss(plan_model, own.images, null_plan))
        results.append(HeldoutLoss("null", len(own.images), *pair))
    return tuple(results)


def _mean_loss(model: DiT, images: torch.Tensor, class_index: int) -> float:
    objective = model.spec.objective
    generator = torch.Generator().manual_seed(0)
    gate = ClassGate.of(torch.full((len(images),), class_index), model.spec.num_classes)
    total = 0.0
    with torch.no_grad():
        for _ in range(DRAWS):
            noise = torch.randn(images.shape, generator=generator)
            timestep = draw_timesteps(objective, len(images), generator)
            losses = loss_per_image(objective, lambda x, t: model(x, t, gate), images, noise, timestep)
            total += float(losses.mean())
    return total / DRAWS
