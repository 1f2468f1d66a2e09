"""From a request to a plan: each way to run the model that may be used becomes a problem; the best answer wins.

Ways differ in steps and guidance, form, unit and the file's precision. They are tried in the order of the best that
they could be, and left out as soon as a bound proves that they cannot win.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from kind_edge.budget.coreml import coreml_estimate, reached_units
from kind_edge.budget.latency import latency_source
from kind_edge.budget.menu import build_problem
from kind_edge.budget.plan import MatrixPlan, Plan, file_precision
from kind_edge.budget.problem import (
    Candidate,
    Deployment,
    Request,
    Source,
    limit_name,
)
from kind_edge.budget.solver import GAP, LOSS, Option, Problem, Solution, lower_bound, solve
from kind_edge.budget.ways import Way, all_baked, ways, written_precisions
from kind_edge.errors import KindEdgeError, NoPlanError
from kind_edge.model.names import weight_type

PRICED = 1.1
"""A price is what so much of a limit would buy."""

_PRICE_GAP = 5 * GAP
"""A price need not be proven as closely as a plan."""

_TIED = 2 * GAP
"""Of the best: answers are not known better than to their gap, so the faster one wins."""
_TIED_LOSS = 1e-6
_CLEARLY_BETTER = 1.02
"""Where nothing is limited, other steps than the recommended ones must be better by more: distances are measured."""


@dataclass(frozen=True)
class Answer:
    """The best choice of one way. `score`: what ways are compared by, smaller is better."""

    way: Way
    solution: Solution
    score: float


@dataclass(frozen=True)
class Problems:
    """The problems of a source, for one device: what may be chosen is built once, however its limits vary."""

    source: Source
    _built: dict[tuple[Hashable, ...], Problem] = field(default_factory=dict)
    _ways: dict[tuple[Hashable, ...], list[Way]] = field(default_factory=dict)

    def ways(self, request: Request) -> list[Way]:
        """As `ways`; found once, however limits vary, but for those of a decoder, which depend on them."""
        if self.source.decoders:
            return ways(self.source, request)
        chosen = (request.form, request.precision, request.unit, request.modulation, request.classes, request.burst)
        key = (*chosen, request.sampling, request.others, request.asked, request.minimise)
        if key not in self._ways:
            self._ways[key] = ways(self.source, request)
        own = ("sampling", "others", "asked", "decoder")  # what differs between the ways of a request
        return [
            Way(dataclasses.replace(request, **{name: getattr(way.request, name) for name in own}), way.candidate)
            for way in self._ways[key]
        ]

    def of(self, way: Way, more: Mapping[str, float]) -> Problem:
        """The problem of a way with limits that are `more` (cost -> factor) times as large."""
        request, candidate = way.request, way.candidate
        chosen = (candidate, request.sampling, request.decoder, request.classes, request.precision, request.burst)
        limited = (request.spare_bytes, request.minimise, request.max_loss is None, frozenset(request.limits))
        key = (*chosen, *limited)
        if key not in self._built:
            self._built[key] = build_problem(self.source, request, candidate)
        limits = Deployment(self.source.spec, request, candidate).limits()
        return with_more(self._built[key].within(limits, request.max_loss), more)


def with_more(problem: Problem, more: Mapping[str, float]) -> Problem:
    """The same problem with some limits (by cost, or LOSS) multiplied."""
    if not more:
        return problem
    limits = {name: int(limit * more.get(name, 1.0)) for name, limit in problem.limits.items()}
    return problem.within(limits, None if problem.max_loss is None else problem.max_loss * more.get(LOSS, 1.0))


def make_plan(source: Source, request: Request) -> Plan:
    """The best plan under the request: the lowest predicted Fréchet distance (the least predicted loss, where that is
    not known), then the lowest latency; or the least of the cost that is to be minimised.

    Raises `NoPlanError` when nothing fits, with the closest plan and verified relaxations, and `UsageError` when the
    request contradicts itself or the device.
    """
    from kind_edge.budget.refusal import refusal  # it plans, to verify what it proposes

    problems = Problems(source)
    try:
        answer = best_answer(problems, request)
    except NoPlanError as error:
        raise refusal(problems, request, error) from error
    prices = {}
    for cost in answer.solution.binding:
        more = best_answer(problems, request, {cost: PRICED}, _PRICE_GAP)
        more = min(answer, more, key=lambda each: each.score)  # what fits still fits
        limit = answer_limit(problems, more, {cost: PRICED}, cost)
        prices[limit_name(cost)] = {"limit": limit, **price_figures(source, more)}
    return plan_of(source, answer, prices)


def best_answer(
    problems: Problems, request: Request, more: Mapping[str, float] | None = None, gap: float = GAP
) -> Answer:
    """The best answer over all ways, with some limits multiplied, each proven to the relative `gap`.

    Where the distances of different steps cannot be compared, other steps are taken only if the request's own do not
    fit, in their order.
    """
    source = problems.source
    found = problems.ways(request)
    own = [way for way in found if way.request.sampling == request.sampling]
    if source.frechet(0.0, request.sampling) is not None:
        known = [way for way in found if source.frechet(0.0, way.request.sampling) is not None]
        return _best_of(problems, known, more or {}, request, gap)
    pools = [[way for way in found if way.request.sampling == other] for other in request.others]
    failures: list[NoPlanError] = []
    for pool in [own, *(pools if request.minimise == LOSS else [])]:
        try:
            return _best_of(problems, pool, more or {}, request, gap)
        except NoPlanError as error:
            failures.append(error)
    raise failures[0]


def _best_of(problems: Problems, pool: list[Way], more: Mapping[str, float], request: Request, gap: float) -> Answer:
    """The best answer of some ways. Raises `NoPlanError`, that of the way that misses by least, if none has any."""
    answers: list[Answer] = []
    failures: list[NoPlanError] = []
    at_best = math.inf
    for hope, way in _by_hope(problems, pool, more, request):
        if hope > _tied(at_best):
            break
        problem = problems.of(way, more)
        try:
            solution = solve(problem, gap=gap)
        except NoPlanError as error:
            failures.append(error)
            continue
        if _is_another(problems.source, way, solution):
            continue
        answers.append(Answer(way, solution, _score(problems.source, way, request, solution.objective, problem)))
        at_best = min(at_best, answers[-1].score)
    if not answers:
        raise min(failures, key=overshoot)
    tied = [answer for answer in answers if answer.score <= _tied(at_best)]
    return min(tied, key=lambda answer: (answer.solution.totals["latency_ns"], answer.score))


def _is_another(source: Source, way: Way, solution: Solution) -> bool:
    """Whether an int8 file turned out to have no int8 matrix; as other parts of it were counted as int8, it is not the
    fp32 file that it would be called."""
    quantized = any(option.what == "int8" for option in solution.choice.values())
    more = bool(source.decoders) or not all_baked(way)
    return way.candidate.precision == "int8" and not quantized and more


def _by_hope(
    problems: Problems, pool: list[Way], more: Mapping[str, float], request: Request
) -> list[tuple[float, Way]]:
    """Every way with the best score that it can have, by that."""
    hopes = []
    for way in pool:
        problem = problems.of(way, more)
        least = lower_bound(problem) if len(pool) > 1 else 0.0
        hopes.append((_score(problems.source, way, request, least, problem), way))
    return sorted(hopes, key=lambda each: each[0])


def _tied(score: float) -> float:
    return score + max(_TIED * score, _TIED_LOSS)


def _score(source: Source, way: Way, request: Request, objective: float, problem: Problem) -> float:
    """What ways are compared by, at an objective of the solver: Fréchet distance, loss increase, or a whole cost."""
    if request.minimise != LOSS:
        return objective + problem.fixed.get(request.minimise, 0)
    distance = source.frechet(objective, way.request.sampling)
    if distance is None:
        return objective
    unasked = not request.limits and way.request.sampling != request.sampling
    return distance * (_CLEARLY_BETTER if unasked else 1.0)


def overshoot(error: NoPlanError) -> float:
    """By which factor the worst limit of a refusal is missed."""
    entries = getattr(error, "diagnosis", ()) or ()
    return max((entry.smallest / max(entry.limit_value, 1) for entry in entries), default=float("inf"))


def answer_limit(problems: Problems, answer: Answer, more: Mapping[str, float], cost: str) -> float:
    """A limit as it was when the answer was found, in the plan's units."""
    problem = problems.of(answer.way, more)
    return problem.max_loss or 0.0 if cost == LOSS else float(problem.limits[cost])


def price_figures(source: Source, answer: Answer) -> dict[str, float | None]:
    """The figures of an answer that is not chosen."""
    totals, loss = answer.solution.totals, answer.solution.loss
    return {
        "predicted_loss_increase": loss,
        "predicted_frechet": source.frechet(loss, answer.way.request.sampling),
        "flops": float(totals["flops"]),
        "weight_bytes": float(totals["weight_bytes"] - answer.way.request.spare_bytes),
        "peak_memory_bytes": float(totals["peak_memory_bytes"]),
        "image_latency_s" if answer.way.request.burst else "sustained_image_latency_s": totals["latency_ns"] / 1e9,
        "steps": float(answer.way.request.sampling.steps),
    }


def plan_of(source: Source, answer: Answer, prices: Mapping[str, Mapping[str, float | None]]) -> Plan:
    """The answer in the words of a plan; its costs are counted anew, from the matrices."""
    way, solution = answer.way, answer.solution
    matrices = {m.name: _matrix_plan(m.name, way.candidate, solution.choice) for m in source.spec.matrices()}
    plan = figures_of(source, way, matrices)
    counted = Deployment(source.spec, way.request, way.candidate).totals(matrices)
    if counted != solution.totals:
        raise KindEdgeError(f"the plan costs {counted}, the solver counted {dict(solution.totals)}")
    return dataclasses.replace(
        plan,
        predicted_loss_increase=solution.loss,
        predicted_frechet=source.frechet(solution.loss, way.request.sampling),
        binding=tuple(limit_name(cost) for cost in solution.binding),
        prices=prices,
        optimality_gap=solution.optimality_gap,
    )


def figures_of(source: Source, way: Way, matrices: Mapping[str, MatrixPlan]) -> Plan:
    """A plan of these very matrices: what it costs and what it is predicted to lose, with no claim to be the best."""
    spec, request, candidate = source.spec, way.request, way.candidate
    deployment, sampling = Deployment(spec, request, candidate), request.sampling
    totals = deployment.totals(matrices)
    increase = source.losses(candidate.form, request.classes).increase(matrices)
    precision = file_precision(matrices)
    limits = {limit_name(cost): float(limit) for cost, limit in deployment.limits().items()}
    reached = reached_units(request.profile.execution_providers)
    return Plan(
        model=source.name,
        checkpoint_sha256=source.checkpoint_sha256,
        profile=request.profile.name,
        unit=candidate.unit,
        form=candidate.form,
        classes=request.classes,
        precision=precision,
        precisions=written_precisions(request, candidate),
        sampler=sampling.sampler,
        steps=sampling.steps,
        guidance=sampling.guidance,
        evaluations_per_step=deployment.evaluations_per_step,
        modulation=candidate.modulation,
        truncation=source.truncation,
        calibration=source.calibration,
        params=deployment.params(matrices),
        flops=totals["flops"],
        weight_bytes=totals["weight_bytes"] - request.spare_bytes,
        peak_memory_bytes=totals["peak_memory_bytes"],
        evaluation_latency_s=deployment.evaluation_latency_s(matrices, sustained=True),
        image_latency_s=deployment.image_latency_s(matrices, sustained=False),
        sustained_image_latency_s=deployment.image_latency_s(matrices, sustained=True),
        predicted_loss_increase=increase,
        predicted_frechet=source.frechet(increase, sampling),
        limits=limits if request.max_loss is None else {**limits, "max_quality_loss": request.max_loss},
        binding=(),
        prices={},
        optimality_gap=None,
        dense=deployment.dense(),
        matrices=matrices,
        inside_guidance=sampling.inside_guidance,
        time=deployment.time(matrices),
        teacher_time=deployment.time(matrices, source.teacher) if source.teacher else {},
        minimised=request.minimise,
        latency_source=latency_source(request.profile, candidate.unit, candidate.precision),
        burst=request.burst,
        decoder=deployment.decoder.to_dict(precision),
        resize=source.resize,
        coreml=coreml_estimate(deployment, matrices, limits=limits) if reached else {},
    )


def _matrix_plan(name: str, candidate: Candidate, choice: Mapping[str, Option]) -> MatrixPlan:
    group = name if name in choice else weight_type(name)  # what blocks have in common is chosen for all of them
    if group not in choice:  # its branch is dropped: there is nothing to quantize
        return (
            MatrixPlan("dropped", "fp32", rank=0) if candidate.form != "switch" else MatrixPlan("dropped", "fp32", 0, 0)
        )
    precision = choice[group].what
    shared = choice[f"{group}/{precision}/shared"]
    storage, rank = shared.what, shared.rank
    if candidate.form != "switch":
        return MatrixPlan(storage, precision, rank=rank)  # type: ignore[arg-type]  # a word of `build_problem`
    tailors = choice.get(f"{name}/{precision}/tailors")
    tailor_rank = tailors.rank if tailors else 0
    return MatrixPlan("factored" if storage == "dropped" and tailor_rank else storage, precision, rank, tailor_rank)  # type: ignore[arg-type]
