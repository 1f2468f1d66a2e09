"""The tailors of a model during training: one row per class, and a step that costs what its own classes cost.

A row holds everything that one class adds to the model: U, s and V of its tailor in every matrix, side by side. A step
copies the rows of its classes into slots, on which the model's forward and backward pass run, and updates these rows
alone. Nothing else in a step depends on the number of classes.

What this means for a class that is absent from a step's batch:
- AdamW: nothing happens. A class's moments, its bias correction and its weight decay count the steps in which it
  appeared, as if its row were trained by an AdamW of its own. An absent class has no gradient, which is not a gradient
  of zero: decaying its moments (the first faster than the second) would shrink the steps of rare classes, and decaying
  its weights would pull a rare class to zero, as decay per update is what AdamW balances against the gradient.
- The average over steps (EMA) is exact. While a class is absent its weights stand still, so the average has moved
  towards them by a factor known in closed form; it is caught up when the class appears again and when it is read.

With every class in every batch, both are the ordinary AdamW and EMA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import GatedLinear

BETAS = (0.9, 0.99)
EPSILON = 1e-8


@dataclass(frozen=True)
class RowLayout:
    """Names and shapes (without the class axis) of the tensors in a row, P values in all."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: DiT) -> RowLayout:
        return cls({name: tuple(tensor.shape[1:]) for name, tensor in tailor_parameters(model)})

    @property
    def values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def views(self, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors [k, ...] that rows [k, P] hold; writing to one writes to the rows."""
        start = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            yield name, rows[:, start : start + size].unflatten(1, shape)
            start += size


def tailor_parameters(model: DiT) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in model.named_modules():
        if isinstance(layer, GatedLinear):
            yield from ((f"{name}.tailors.{part}", parameter) for part, parameter in layer.tailors.named_parameters())


Slots = dict[str, nn.Parameter]
"""The tailors that the model's layers hold at the moment, one per group of the batch: the model's own parameters."""


@dataclass(frozen=True)
class Tailors:
    """All rows [C, P] with their average and Adam's moments. The tensors are updated in place."""

    layout: RowLayout
    weight: Tensor
    average: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    appearances: Tensor  # float32 [C]: Adam's step counts
    averaged_to: Tensor  # int64 [C], on the CPU: the step up to which a row's average is current

    @classmethod
    @torch.no_grad()
    def of(cls, model: DiT) -> Tailors:
        """The tailors of a model, copied."""
        layout, device = RowLayout.of(model), model.pos_embed.device
        weight = torch.empty(model.spec.num_classes, layout.values, device=device)
        for (_, view), (_, parameter) in zip(layout.views(weight), tailor_parameters(model), strict=True):
            view.copy_(parameter)
        count = len(weight)
        moments = torch.zeros_like(weight), torch.zeros_like(weight)
        steps = torch.zeros(count, dtype=torch.float32, device=device), torch.zeros(count, dtype=torch.long)
        return cls(layout, weight, weight.clone(), *moments, *steps)

    def tensors(self) -> dict[str, Tensor]:
        names = ("weight", "average", "exp_avg", "exp_avg_sq", "appearances", "averaged_to")
        return {name: getattr(self, name) for name in names}

    def lend(self, model: DiT, groups: int) -> Slots:
        """Replace the tailors of the model's layers by slots for `groups` of them."""
        slots = {name: nn.Parameter(self.weight.new_zeros(groups, *s)) for name, s in self.layout.shapes.items()}
        for name, parameter in slots.items():
            layer, _, part = name.rpartition(".")
            setattr(model.get_submodule(layer), part, parameter)
        return slots

    @torch.no_grad()
    def fill(self, slots: Slots, classes: Tensor) -> None:
        """Copy the rows of `classes` [G] into the slots."""
        rows = self.weight[classes.to(self.weight.device)]
        for name, view in self.layout.views(rows):
            slots[name].copy_(view)

    @torch.no_grad()
    def collect(self, slots: Slots, positions: Tensor, gradient: Tensor) -> None:
        """Move the slots' gradient into `gradient` [K, P]; `positions` [G]: the row of each slot."""
        positions = positions.to(gradient.device)
        for name, view in self.layout.views(gradient):
            if slots[name].grad is not None:
                view.index_add_(0, positions, slots[name].grad)
                slots[name].grad = None

    @torch.no_grad()
    def update(
        self, classes: Tensor, gradient: Tensor, step: int, learning_rate: float, weight_decay: float, ema_decay: float
    ) -> None:
        """One AdamW step and one of the average on the rows of `classes` [K], all different; `gradient` [K, P]."""
        if self.layout.values == 0:
            return
        wanted = classes.tolist()
        weight, average = [self.weight[c] for c in wanted], [self.average[c] for c in wanted]
        kept = [average_kept(ema_decay, int(self.averaged_to[c]), step) for c in wanted]
        if min(kept) < 1:
            torch._foreach_lerp_(average, weight, [1 - share for share in kept])
        adamw(
            weight,
            list(gradient.unbind()),
            *([rows[c] for c in wanted] for rows in (self.exp_avg, self.exp_avg_sq)),
            [],
            [self.appearances[c] for c in wanted],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        torch._foreach_lerp_(average, weight, 1 - decay_at(ema_decay, step))
        self.averaged_to[classes.cpu()] = step + 1

    @torch.no_grad()
    def current_average(self, step: int, ema_decay: float) -> Tensor:
        """The average of every row after `step` steps, [C, P]."""
        kept = [average_kept(ema_decay, since, step) for since in self.averaged_to.tolist()]
        share = torch.tensor([1 - k for k in kept], dtype=self.weight.dtype, device=self.weight.device)
        return torch.lerp(self.average, self.weight, share.unsqueeze(1))


def decay_at(ema_decay: float, step: int) -> float:
    """The average's decay in a step: short at first, so that it forgets the random start."""
    return min(ema_decay, (1 + step) / (10 + step))


def average_kept(ema_decay: float, since: int, until: int) -> float:
    """What is left of an average after the steps [since, until): the product of `decay_at` over them."""
    if since == until:
        return 1.0
    if ema_decay == 0:
        return 0.0
    constant_from = max(0, math.ceil((10 * ema_decay - 1) / (1 - ema_decay)))
    low, high = min(since, constant_from), min(until, constant_from)
    # prod (1 + i) / (10 + i) over [low, high) telescopes to nine factors
    rising = math.prod((low + i) / (high + i) for i in range(1, 10))
    return rising * ema_decay ** ((until - since) - (high - low))
