"""From loss to pictures: the Fréchet distance that a plan will have, from what was measured.

The uncut model was judged at every choice of steps and guidance; cutting multiplies that by a response to the increase
of the loss, fitted on plans that were cut, drawn from and judged: 1 + scale x increase ^ power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kind_edge.errors import InputError


@dataclass(frozen=True)
class Judged:
    """The uncut model at one choice: its Fréchet distance."""

    steps: int
    guidance: float
    frechet: float


@dataclass(frozen=True)
class Response:
    """`table`: the uncut model's distances; `scale` and `power` of the response; `conditions` of both."""

    table: tuple[Judged, ...]
    scale: float
    power: float
    conditions: Mapping[str, Any]

    def factor(self, loss_increase: float) -> float:
        """By how much the distance grows; 1 where nothing is lost, never falling."""
        return 1.0 + self.scale * math.pow(max(loss_increase, 0.0), self.power)

    def frechet(self, loss_increase: float, steps: int, guidance: float) -> float:
        """The predicted distance at a predicted relative increase of the loss.

        Raises `InputError` where the uncut model was never judged at these steps and guidance.
        """
        for row in self.table:
            if (row.steps, row.guidance) == (steps, guidance):
                return row.frechet * self.factor(loss_increase)
        known = ", ".join(f"{row.steps} steps at guidance {row.guidance:g}" for row in self.table)
        raise InputError(f"no Fréchet distance was measured at {steps} steps, guidance {guidance:g}; known: {known}")

    def measured(self, steps: int, guidance: float) -> bool:
        """Whether `frechet` can say anything there."""
        return any((row.steps, row.guidance) == (steps, guidance) for row in self.table)

    def to_dict(self) -> dict[str, Any]:
        table = [[row.steps, row.guidance, row.frechet] for row in self.table]
        return {"table": table, "scale": self.scale, "power": self.power, "conditions": dict(self.conditions)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Response:
        """Raises `ValueError`, `TypeError` or `KeyError` for what is no response."""
        table = tuple(
            Judged(int(steps), float(guidance), float(frechet)) for steps, guidance, frechet in values["table"]
        )
        scale, power = float(values["scale"]), float(values["power"])
        numbers = [scale, power, *(row.frechet for row in table)]
        if not table or not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("a response needs a table, and numbers of at least 0")
        return cls(table, scale, power, dict(values["conditions"]))
