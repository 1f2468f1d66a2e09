"""The whole front: how little is lost at every size, for one class, two, five and all that were asked for.

Each point is a plan of its own: the least predicted loss within that much of one cost, every other limit kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kind_edge.budget.planner import Answer, Problems, best_answer, price_figures
from kind_edge.budget.problem import Objective, Request, Source, limit_name
from kind_edge.budget.solver import GAP, LOSS
from kind_edge.errors import NoPlanError
from kind_edge.units import Quantity

CLASS_COUNTS = (1, 2, 5)
"""And all of them."""

POINTS = 9
LEAST_LOSS, MOST_LOSS = 1e-3, 1.0
"""Predicted increases of the loss at the ends of a curve: hardly any, and as much as the model had."""

_PER_UNIT = {"latency_ns": 1e9}
_KINDS = {"latency_ns": "seconds", "flops": "flops"}


@dataclass(frozen=True)
class Curve:
    """Points for the first so many of the classes that were asked for, by rising cost and falling loss."""

    classes: tuple[str, ...]
    points: tuple[Mapping[str, float | None], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "points": [dict(point) for point in self.points]}


def front(source: Source, request: Request, axis: Objective) -> tuple[Curve, ...]:
    """A curve over the cost `axis` for each number of classes. Raises `NoPlanError` where not even one point fits."""
    counts = [count for count in CLASS_COUNTS if count < len(request.classes)]
    kept = [request.classes[:count] for count in (*counts, len(request.classes))]
    problems, curves, failures = Problems(source), [], []
    for classes in kept:
        try:
            points = curve_points(problems, dataclasses.replace(request, classes=classes), axis)
            curves.append(Curve(classes, tuple(points)))
        except NoPlanError as error:
            failures.append(error)
    if not curves:
        raise failures[0]
    return tuple(curves)


def curve_points(
    problems: Problems, request: Request, axis: Objective, count: int = POINTS, gap: float = GAP
) -> Iterator[Mapping[str, float | None]]:
    """Plans of the request's classes with the least predicted loss, by rising `axis`, each proven to the
    relative `gap`; `NoPlanError` if not one fits."""
    request = dataclasses.replace(request, max_loss=None, minimise=LOSS)
    low = _smallest(problems, request, axis, MOST_LOSS)
    high = max(low, _smallest(problems, request, axis, LEAST_LOSS, low))
    best = float("inf")
    for amount in np.unique(np.geomspace(low, high, count).round()).tolist():
        quantity = Quantity(amount / _PER_UNIT.get(axis, 1), _KINDS.get(axis, "bytes"))  # type: ignore[arg-type]
        limits = {**request.limits, limit_name(axis): quantity}
        answer = best_answer(problems, dataclasses.replace(request, limits=limits), gap=gap)
        if answer.score < best:
            best = answer.score
            yield price_figures(problems.source, answer)


def _smallest(
    problems: Problems, request: Request, axis: Objective, loss: float, otherwise: float | None = None
) -> float:
    """The least that a plan costs at a predicted loss of at most so much; `otherwise` where there is none."""
    try:
        answer: Answer = best_answer(problems, dataclasses.replace(request, minimise=axis, max_loss=loss))
    except NoPlanError:
        if otherwise is None:
            raise
        return otherwise
    return float(answer.solution.totals[axis])
