"""No plan fits: the closest plan, by how much it misses, and what would have to give way, each tried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kind_edge.budget.infeasible import Infeasible, limit_flag, raised_limit
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import (
    Answer,
    Problems,
    best_answer,
    plan_of,
    price_figures,
    with_more,
)
from kind_edge.budget.problem import LIMIT_NAMES, Request, limit_name
from kind_edge.budget.profile import Figure
from kind_edge.budget.solver import LOSS, Problem, diagnose, lower_bound, solve
from kind_edge.budget.ways import Way, ways
from kind_edge.errors import NoPlanError, UsageError

_PRECISION = 1e-3
"""Relative: how closely the smallest overshoot is found."""
_MOST_OVERSHOOT = 2.0**40


@dataclass(frozen=True)
class Miss:
    """One limit that the closest plan does not keep, in the plan's units. `over`: 0.1 is a tenth too much."""

    limit: str
    asked: float
    needed: float

    @property
    def over(self) -> float:
        return self.needed / self.asked - 1.0


@dataclass(frozen=True)
class Relaxation:
    """A request that has a plan. `change` in the words of the command line; `given_up`: the share of what was asked
    for that it costs the user, 0 for what only leaves the planner free; `figures` of the best plan then."""

    change: str
    given_up: float
    figures: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        return {"change": self.change, "given_up": self.given_up, **self.figures}


@dataclass(frozen=True)
class Refusal:
    """What `NoPlanError.refusal` holds: the plan that misses its limits by least, and ways out, cheapest first."""

    closest: Plan
    misses: tuple[Miss, ...]
    relaxations: tuple[Relaxation, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "closest": self.closest.to_dict(),
            "misses": {
                miss.limit: {"asked": miss.asked, "needed": miss.needed, "over": miss.over} for miss in self.misses
            },
            "relaxations": [each.to_dict() for each in self.relaxations],
        }


def refusal(problems: Problems, request: Request, error: NoPlanError) -> NoPlanError:
    """The same error with its `refusal`, and with the words of what was tried out in place of guesses."""
    if not getattr(error, "diagnosis", ()):
        return error  # time ran out: nothing is known
    answer, misses = _closest(problems, request)
    raises = list(_raised(problems, request, answer, misses))
    found = sorted([*raises, *_others(problems, request)], key=_rank)
    what = "; ".join(str(error).split("; ")[:-1]) or str(error)
    given = "".join(_device_words(request, error.diagnosis))  # type: ignore[attr-defined]
    ways_out = "; or ".join(each.change for each in found[:4])
    otherwise = f"{what}{given}; no choice of this model that was tried fits" if given else str(error)
    better = NoPlanError(f"{what}{given}; {ways_out}" if found else otherwise)
    better.diagnosis = error.diagnosis  # type: ignore[attr-defined]
    better.refusal = Refusal(plan_of(problems.source, answer, {}), misses, tuple(found))  # type: ignore[attr-defined]
    return better


def _device_limits(request: Request) -> dict[str, tuple[str, Figure]]:
    """What nobody can raise, by cost: who sets the limit, and where that is said."""
    profile = request.profile
    limits = {"peak_memory_bytes": (f"the system of {profile.title}", profile.app_memory_limit_bytes)}
    if profile.store is not None:
        limits["weight_bytes"] = (profile.store.name, profile.store.model_bytes)
    return limits


def _device_words(request: Request, diagnosis: tuple[Infeasible, ...]) -> Iterator[str]:
    """Who sets the limits that the user did not."""
    for cost, (who, figure) in _device_limits(request).items():
        if any(entry.limit == cost and entry.limit_value == int(figure.value) for entry in diagnosis):
            yield f"; {who} allows an app no more ({figure.source})"


def _rank(relaxation: Relaxation) -> tuple[float, float]:
    quality = relaxation.figures.get("predicted_frechet") or relaxation.figures.get("predicted_loss_increase") or 0.0
    return relaxation.given_up, quality


def _closest(problems: Problems, request: Request) -> tuple[Answer, tuple[Miss, ...]]:
    """The plan whose worst overshoot over any limit is smallest; among those the one of least predicted loss."""
    best: tuple[float, Way, Problem] | None = None
    for way in ways(problems.source, request):
        problem = problems.of(way, {})
        least = _least_overshoot(problem, best[0] if best else _MOST_OVERSHOOT)
        if least is not None and (best is None or least < best[0]):
            best = (least, way, problem)
    if best is None:
        raise NoPlanError("no plan fits, whatever the limits")
    factor, way, problem = best
    relaxed = _all_more(problem, factor)
    solution = solve(relaxed)
    misses = []
    for cost, limit in problem.limits.items():
        if solution.totals[cost] > limit:
            misses.append(Miss(limit_name(cost), float(limit), float(solution.totals[cost])))
    if problem.max_loss is not None and solution.loss > problem.max_loss:
        misses.append(Miss("max_quality_loss", problem.max_loss, solution.loss))
    return Answer(way, solution, 0.0), tuple(sorted(misses, key=lambda miss: -miss.over))


def _all_more(problem: Problem, factor: float) -> Problem:
    return with_more(problem, dict.fromkeys((*problem.limits, LOSS), factor))


def _least_overshoot(problem: Problem, most: float) -> float | None:
    """The smallest factor on all limits together at which something fits; None if it is above `most`."""
    low = max(1.0, max((e.smallest / max(e.limit_value, 1) for e in _alone(problem)), default=1.0))
    if low > most:
        return None
    low *= 1 + 1e-12  # limits are cut to integers
    if _fits(problem, low):
        return low
    step, high = _PRECISION, low * (1 + _PRECISION)
    while not _fits(problem, high):
        low, step = high, 4 * step
        high = low * (1 + step)
        if low > most:
            return None
    while high / low > 1 + _PRECISION:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _fits(problem, middle) else (middle, high)
    return high


def _alone(problem: Problem) -> Iterator[Infeasible]:
    for entry in diagnose(problem):
        if not entry.conflicts:
            yield entry


def _fits(problem: Problem, factor: float) -> bool:
    relaxed = _all_more(problem, factor)
    if lower_bound(relaxed) == float("inf"):
        return False
    try:
        solve(relaxed, gap=1.0)
    except NoPlanError:
        return False
    return True


def _raised(problems: Problems, request: Request, closest: Answer, misses: tuple[Miss, ...]) -> Iterator[Relaxation]:
    """One limit alone where that is enough; and those that the closest plan misses, together."""
    problem = problems.of(closest.way, {})
    for entry in diagnose(problem):
        if entry.limit == LOSS or (not entry.conflicts and len(misses) > 1):
            continue
        yield from _verified(problems, request, {entry.limit: entry.smallest}, problem)
    if len(misses) > 1 and all(miss.limit in LIMIT_NAMES for miss in misses):
        yield from _verified(problems, request, {LIMIT_NAMES[m.limit]: int(m.needed) for m in misses}, problem)


def _verified(
    problems: Problems, request: Request, needed: Mapping[str, int], problem: Problem
) -> Iterator[Relaxation]:
    limits = dict(request.limits)
    words = []
    for cost, amount in needed.items():
        known = _device_limits(request)
        if cost in known and amount > known[cost][1].value:
            return  # nobody gets more, whoever asks
        text, quantity = raised_limit(cost, amount)
        limits[limit_name(cost)] = quantity
        words.append(f"{limit_flag(cost)} to at least {text}")
    change = f"raise {' and '.join(words)}"
    over = max(amount / max(problem.limits[cost], 1) - 1 for cost, amount in needed.items())
    yield from _tried(problems, dataclasses.replace(request, limits=limits), change, over)


def _others(problems: Problems, request: Request) -> Iterator[Relaxation]:
    """Other choices: what the user fixed may be left open; fewer steps, fewer classes, no guidance."""
    if request.precision == "fp32":
        yield from _tried(problems, dataclasses.replace(request, precision="auto"), "leave --precision open", 0.0)
    if request.unit != "auto":
        yield from _tried(problems, dataclasses.replace(request, unit="auto"), "leave --unit open", 0.0)
    if request.sampling.guidance != 1.0:
        unguided = dataclasses.replace(request.sampling, guidance=1.0)
        changed = dataclasses.replace(request, sampling=unguided, others=(), fewer=())
        yield from _tried(problems, changed, "draw without guidance: --guidance 1", 0.5)
    yield from _first_that_fits(problems, list(_fewer_steps(request)))
    yield from _first_that_fits(problems, list(_fewer_classes(request)))


def _fewer_steps(request: Request) -> Iterator[tuple[Request, str, float]]:
    steps = request.sampling.steps
    for fewer in request.fewer:
        changed = dataclasses.replace(request, sampling=fewer, others=(), fewer=())
        yield changed, f"take --steps {fewer.steps} instead of {steps}", 1 - fewer.steps / steps


def _fewer_classes(request: Request) -> Iterator[tuple[Request, str, float]]:
    """The first classes of the request, one less each time."""
    whole = len(request.classes)
    for count in range(whole - 1, 0, -1):
        changed = dataclasses.replace(request, classes=request.classes[:count])
        words = f"keep {count} {'class' if count == 1 else 'classes'} instead of {whole}"
        yield changed, words, 1 - count / whole


def _first_that_fits(problems: Problems, asked: list[tuple[Request, str, float]]) -> Iterator[Relaxation]:
    """Of requests each of which fits wherever one before it does, the first that does."""
    low, high = 0, len(asked) - 1
    found: list[Relaxation] = []
    while low <= high:
        middle = (low + high) // 2
        tried = list(_tried(problems, *asked[middle]))
        low, high, found = (low, middle - 1, tried) if tried else (middle + 1, high, found)
    yield from found


def _tried(problems: Problems, request: Request, change: str, given_up: float) -> Iterator[Relaxation]:
    """The relaxation, if there really is a plan."""
    try:
        answer = best_answer(problems, request)
    except (NoPlanError, UsageError):
        return
    yield Relaxation(change, given_up, price_figures(problems.source, answer))
