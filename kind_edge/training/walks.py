"""Few steps and no guidance branch: a student that does in one evaluation what its teacher does in many.

The student starts as the teacher, with one more input: the span of the step that it is to take. It walks from noise in
N steps, N one of its step counts, and at every state that it comes to it learns the mean velocity with which the
*guided* teacher walks on from there over the span of the step: a teacher of several small Euler steps, each of two
evaluations. So guidance and steps are learned at once, on the states that the student itself meets (as in on-policy
imitation), and no image is needed.

Sources: progressive distillation (Salimans & Ho, 2022), a student step for several of the teacher's; guidance inside
(Meng et al., "On Distillation of Guided Diffusion Models", 2023); the span of a step as an input (Frans et al., "One
Step Diffusion via Shortcut Models", 2024).

Gates are open and closed as in training, so the student comes apart like its teacher: a closed gate learns the
teacher's null branch, without guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kind_edge.model.diffusion import TRAIN_STEPS
from kind_edge.model.dit import DiT
from kind_edge.training.batches import generator
from kind_edge.training.losses import Examples, Predict, nested_share

STEP_COUNTS = (1, 2, 4, 8)
STEP_COUNT_WEIGHTS = (0.1, 0.3, 0.45, 0.15)
"""How often a training step walks in so many steps."""
TEACHER_STEPS = 16
"""Of the teacher over the whole way, in training: a multiple of every step count."""


@dataclass(frozen=True)
class DistillationLoss:
    """How far the student's mean velocity is from its guided teacher's, over a walk of the student from noise."""

    teacher: DiT
    guidance: float
    seed: int

    def __call__(self, predict: Predict, examples: Examples, step: int) -> Tensor:
        count, x, losses = step_count(self.seed, step), examples.noise, []
        span = examples.timestep.new_full((len(x),), 1 / count)
        also_cut = int(torch.randint(count, (), generator=generator(self.seed, step, 0, 1)))
        for number in range(count):
            time = 1 - number * span
            velocity = predict(x, TRAIN_STEPS * time, span=TRAIN_STEPS * span)
            losses.append((velocity - self.walked(x, time, count, examples)).square().mean())
            if self.teacher.spec.nested and number == also_cut:
                share = nested_share(self.seed, step)
                cut = predict(x, TRAIN_STEPS * time, share=share, span=TRAIN_STEPS * span)
                losses.append((cut - velocity.detach()).square().mean())
            x = x - velocity.detach() / count
        return torch.stack(losses).sum() / count

    @torch.no_grad()
    def walked(self, x: Tensor, time: Tensor, count: int, examples: Examples) -> Tensor:
        """The teacher's mean velocity from the states x [B, ch, H, W] at `time` [B] on, over 1 / count."""
        small, start = 1 / TEACHER_STEPS, x
        null = torch.full_like(examples.labels, self.teacher.spec.num_classes)
        closed = examples.closed.view(-1, 1, 1, 1)
        for number in range(TEACHER_STEPS // count):
            timestep = TRAIN_STEPS * (time - number * small)
            free = self.teacher(x, timestep, null)
            led = self.teacher(x, timestep, examples.labels)
            x = x - small * torch.where(closed, free, free + self.guidance * (led - free))
        return (start - x) * count


def step_count(seed: int, step: int) -> int:
    """In how many steps a training step walks."""
    weights = torch.tensor(STEP_COUNT_WEIGHTS)
    return STEP_COUNTS[int(weights.multinomial(1, generator=generator(seed, step, 0, 2)))]
