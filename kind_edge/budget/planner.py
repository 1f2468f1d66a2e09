"""From a request to a plan: each form, precision and unit that may be used becomes a knapsack; the best answer wins."""

from __future__ import annotations

from collections.abc import Iterator

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.problem import (
    Candidate,
    Deployment,
    Request,
    Source,
    build_problem,
    limit_name,
)
from kind_edge.budget.profile import Precision
from kind_edge.budget.solver import Solution, solve
from kind_edge.errors import NoPlanError, UsageError
from kind_edge.model.spec import Form

PLANNED_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
"""What the exporters can write."""


def candidate_forms(request: Request) -> tuple[Form, ...]:
    """The forms a request allows. Guidance needs the null branch, which *switch* alone has."""
    guided = request.sampling.guidance != 1.0
    if request.form != "auto":
        if request.form == "single" and len(request.classes) != 1:
            raise UsageError(
                f"--form single holds one class, got {len(request.classes)}; use switch, or export each apart"
            )
        if request.form != "switch" and guided:
            raise UsageError(
                f"--form {request.form} has no null branch to guide with: add --guidance 1, or use --form switch"
            )
        return (request.form,)
    return ("switch", "single") if len(request.classes) == 1 and not guided else ("switch",)


def candidates(request: Request) -> Iterator[Candidate]:
    """Every combination of form, precision and unit that the request and the device allow."""
    precisions = PLANNED_PRECISIONS if request.precision == "auto" else (request.precision,)
    for form in candidate_forms(request):
        for precision in precisions:
            if precision not in PLANNED_PRECISIONS:
                raise UsageError(f"--precision {precision}: cannot be written yet; choose auto, fp32 or int8")
            units = request.profile.units_for(precision)
            for unit in units if request.unit == "auto" else (request.unit,):
                if unit in units:
                    yield Candidate(form, precision, unit)


def make_plan(source: Source, request: Request) -> Plan:
    """The best plan under the request: most retained energy, then lowest latency.

    Raises `NoPlanError` when nothing fits (that of the candidate that misses by least), `UsageError` when the request
    contradicts itself or the device.
    """
    plans: list[Plan] = []
    failures: list[NoPlanError] = []
    for candidate in candidates(request):
        problem = build_problem(source, request, candidate)
        try:
            plans.append(_plan(source, request, candidate, solve(problem)))
        except NoPlanError as error:
            failures.append(error)
    if plans:
        return min(plans, key=lambda plan: (-round(plan.retained_energy, 3), plan.sustained_image_latency_s))
    if failures:
        raise min(failures, key=_overshoot)
    raise UsageError(
        f"--unit {request.unit}: profile {request.profile.name!r} cannot run --precision {request.precision} there; "
        "dynamic int8 runs on cpu, fp32 on cpu and gpu"
    )


def _overshoot(error: NoPlanError) -> float:
    entries = getattr(error, "diagnosis", ()) or ()
    return max((entry.smallest / max(entry.limit_value, 1) for entry in entries), default=float("inf"))


def _plan(source: Source, request: Request, candidate: Candidate, solution: Solution) -> Plan:
    """The solver's answer in the words of a plan."""
    spec, sampling = source.spec, request.sampling
    deployment = Deployment(spec, request, candidate)
    matrices = {matrix.name: _matrix_plan(matrix.name, candidate, solution) for matrix in spec.matrices()}
    params = deployment.fixed.params
    for shape in spec.matrices():
        chosen = matrices[shape.name]
        params += deployment.shared(shape, chosen.storage, chosen.shared_rank).params
        params += deployment.tailors(shape, chosen.tailor_rank or 0).params
    burst_s = deployment.evaluations * deployment.evaluation_latency_s(matrices, sustained=False)
    evaluation_s = deployment.evaluation_latency_s(matrices, sustained=True)
    return Plan(
        model=source.name,
        checkpoint_sha256=source.checkpoint_sha256,
        profile=request.profile.name,
        unit=candidate.unit,
        form=candidate.form,
        classes=request.classes,
        precision=candidate.precision,
        precisions=("fp32",) if request.precision == "fp32" else PLANNED_PRECISIONS,
        sampler=sampling.sampler,
        steps=sampling.steps,
        guidance=sampling.guidance,
        evaluations_per_step=deployment.evaluations_per_step,
        modulation="network" if spec.label_embedding else "baked",
        truncation=source.truncation,
        calibration=source.calibration,
        params=params,
        flops=solution.totals["flops"],
        weight_bytes=solution.totals["weight_bytes"] - request.spare_bytes,
        peak_memory_bytes=solution.totals["peak_memory_bytes"],
        evaluation_latency_s=evaluation_s,
        image_latency_s=burst_s + deployment.decoder_latency_s(sustained=False),
        sustained_image_latency_s=solution.totals["latency_ns"] / 1e9,
        retained_energy=solution.value,
        limits={limit_name(cost): float(limit) for cost, limit in deployment.limits().items()},
        binding=tuple(limit_name(cost) for cost in solution.binding),
        optimality_gap=solution.optimality_gap,
        dense=deployment.dense(),
        matrices=matrices,
        inside_guidance=sampling.inside_guidance,
        time=deployment.time(evaluation_s),
        teacher_time=deployment.time(evaluation_s, source.teacher) if source.teacher else {},
    )


def _matrix_plan(name: str, candidate: Candidate, solution: Solution) -> MatrixPlan:
    shared, tailors = solution.choice[f"{name}/shared"], solution.choice.get(f"{name}/tailors")
    if candidate.form != "switch":
        return MatrixPlan(shared.storage, candidate.precision, rank=shared.learngene_rank)
    tailor_rank = tailors.tailor_rank if tailors else 0
    storage = "factored" if shared.storage == "dropped" and tailor_rank else shared.storage
    return MatrixPlan(storage, candidate.precision, shared.learngene_rank, tailor_rank)
