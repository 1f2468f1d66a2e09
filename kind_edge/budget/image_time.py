"""Where the time of one image goes: steps x evaluations per step x one evaluation + decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kind_edge.errors import InputError

FACTORS = ("steps", "evaluations_per_step", "evaluations", "evaluation_s", "decoder_s", "image_s")


def image_time(
    steps: int, rows: int, evaluations_per_step: int, evaluation_s: float, decoder_s: float
) -> dict[str, float]:
    """The factors and their result, by name; seconds. `rows`: how many times a sampler of `steps` steps asks."""
    evaluations = rows * evaluations_per_step
    image_s = evaluations * evaluation_s + decoder_s
    return dict(zip(FACTORS, (steps, evaluations_per_step, evaluations, evaluation_s, decoder_s, image_s), strict=True))


@dataclass(frozen=True)
class Teacher:
    """How the model that a distilled one learned from makes an image, in Euler steps."""

    steps: int
    guidance: float

    @property
    def evaluations_per_step(self) -> int:
        return 1 if self.guidance == 1.0 else 2


def teacher_of(provenance: Mapping[str, Any]) -> Teacher | None:
    """What a checkpoint says of its teacher; None if it says nothing, `InputError` if that cannot be read."""
    if (found := provenance.get("distilled")) is None:
        return None
    values = found if isinstance(found, Mapping) else {}
    steps: Any = values.get("teacher_steps")
    guidance: Any = values.get("teacher_guidance")
    if type(steps) is not int or steps < 1 or type(guidance) not in (int, float):
        raise InputError(f"provenance: distilled: got {found!r:.80}, want teacher_steps and teacher_guidance, numbers")
    return Teacher(steps, float(guidance))
