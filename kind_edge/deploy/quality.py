"""What truncation costs on held-out images: the full model against the plan's. Never parity.

Of an ordinary model that is the diffusion loss. What a distilled model predicts, the mean velocity over a step with
guidance in it, has no target in one image and one noise: there the cut model is held to the full one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kind_edge.deploy.reference import Heldout
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.diffusion import add_noise, draw_timesteps, loss_per_image
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.sampling import step_span
from kind_edge.model.spec import Form
from kind_edge.units import format_seconds, format_share

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
    def change(self) -> float:
        """0.03 is 3 % more loss than the full model's."""
        return self.plan / self.full - 1

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "full": self.full, "plan": self.plan, "increase": self.change}


@dataclass(frozen=True)
class HeldoutDeviation:
    """Of one class of a distilled model: the full model's mean squared prediction, and that of what cutting changed."""

    name: str
    images: int
    full: float
    difference: float

    @property
    def change(self) -> float:
        """0.03: what changed has 3 % of the prediction's energy."""
        return self.difference / self.full

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "full": self.full, "difference": self.difference, "share": self.change}


Quality = HeldoutLoss | HeldoutDeviation


def heldout_quality(
    full: Checkpoint, truncated: Checkpoint, form: Form, kept: list[int], heldout: Heldout, timesteps: Tensor
) -> tuple[Quality, ...]:
    """What fits the kind of model. `timesteps` [S] are the plan's, `kept` the classes' positions in `full`."""
    if full.spec.distilled:
        return heldout_deviations(full, truncated, form, kept, heldout, timesteps)
    return heldout_losses(full, truncated, form, kept, heldout)


def overall(quality: Sequence[Quality]) -> float:
    """One figure for all classes (and the null branch): change of the mean loss, or share of what changed."""
    full = sum(each.full for each in quality)
    if any(isinstance(each, HeldoutLoss) for each in quality):
        return sum(each.plan for each in quality if isinstance(each, HeldoutLoss)) / full - 1
    return sum(each.difference for each in quality if isinstance(each, HeldoutDeviation)) / full


@dataclass(frozen=True)
class Healing:
    """What fine-tuning of a cut model brought: `before` and `after` are one `measure`, over all classes.

    `kept`: whether its weights were taken; not where they are no better than those that cutting left, or where it came
    to numbers that are none (`after` is None).
    """

    seconds: float
    steps: int
    measure: Literal["held-out loss", "held-out deviation", "deviation"]
    before: float
    after: float | None
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def told(self) -> str:
        """ "healed 5 min: 3.1 % -> 1.9 %"."""
        after = "no number" if self.after is None else format_share(self.after)
        change = f"{format_share(self.before)} -> {after}"
        if self.kept:
            return f"healed {format_seconds(self.seconds)}: {change}"
        return (
            f"healing for {format_seconds(self.seconds)} made it no better ({change}): the weights are as they were cut"
        )


def heldout_losses(
    full: Checkpoint, truncated: Checkpoint, form: Form, kept: list[int], heldout: Heldout
) -> tuple[HeldoutLoss, ...]:
    """Per kept class and, in *switch*, for the null branch. `kept` are the classes' positions in `full`."""
    full_model, plan_model = full.model(), truncated.model()
    results = []
    for name, images, in_full, in_plan in _parts(full, truncated, form, kept, heldout, null=form == "switch"):
        pair = (_mean_loss(full_model, images, in_full), _mean_loss(plan_model, images, in_plan))
        results.append(HeldoutLoss(name, len(images), *pair))
    return tuple(results)


def heldout_deviations(
    full: Checkpoint, truncated: Checkpoint, form: Form, kept: list[int], heldout: Heldout, timesteps: Tensor
) -> tuple[HeldoutDeviation, ...]:
    """Per kept class, over images noised to timesteps of the plan's own grid, `timesteps` [S]."""
    full_model, plan_model = full.model(), truncated.model()
    results = []
    for name, images, in_full, in_plan in _parts(full, truncated, form, kept, heldout, null=False):
        generator = torch.Generator().manual_seed(0)
        energy = difference = 0.0
        for _ in range(DRAWS):
            noise = torch.randn(images.shape, generator=generator)
            timestep = timesteps[torch.randint(len(timesteps), (len(images),), generator=generator)].float()
            noised, _ = add_noise(full.spec.objective, images, noise, timestep)
            span = step_span(full.spec, len(timesteps), timestep)
            with torch.no_grad():
                wanted = full_model(noised, timestep, _gate(full_model, images, in_full), span)
                got = plan_model(noised, timestep, _gate(plan_model, images, in_plan), span)
            energy += float(wanted.double().square().mean())
            difference += float((got - wanted).double().square().mean())
        results.append(HeldoutDeviation(name, len(images), energy / DRAWS, difference / DRAWS))
    return tuple(results)


def _parts(
    full: Checkpoint, truncated: Checkpoint, form: Form, kept: list[int], heldout: Heldout, null: bool
) -> Iterator[tuple[str, Tensor, int, int]]:
    """Name, images, and class index in the full and in the cut model, of every kept class that has images."""
    own = heldout.of_classes(kept)
    for i, c in enumerate(kept):
        images = own.images[own.labels == i]
        if len(images):
            yield truncated.class_names[i], images, c, i if form == "switch" else len(kept)
    if null and len(own.images):
        yield "null", own.images, full.spec.num_classes, len(kept)


def _gate(model: DiT, images: Tensor, class_index: int) -> ClassGate:
    return ClassGate.of(torch.full((len(images),), class_index), model.spec.num_classes)


def _mean_loss(model: DiT, images: Tensor, class_index: int) -> float:
    objective = model.spec.objective
    generator = torch.Generator().manual_seed(0)
    gate = _gate(model, images, class_index)
    total = 0.0
    with torch.no_grad():
        for _ in range(DRAWS):
            noise = torch.randn(images.shape, generator=generator)
            timestep = draw_timesteps(objective, len(images), generator)
            losses = loss_per_image(objective, lambda x, t: model(x, t, gate), images, noise, timestep)
            total += float(losses.mean())
    return total / DRAWS
