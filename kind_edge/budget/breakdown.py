"""Where an image's predicted time goes, part by part, and what the front round a plan looks like: for the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.front import curve_points
from kind_edge.budget.latency import matrix_latency_s
from kind_edge.budget.plan import MatrixPlan, Plan, dropped_branches
from kind_edge.budget.planner import Problems
from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.budget.solver import GAP
from kind_edge.errors import NoPlanError

FRONT_POINTS, FRONT_GAP = 6, 5 * GAP
"""It is drawn, so its points need not be proven as closely as a plan."""


def deployment_of(
    plan: Plan, source: Source, device: DeviceProfile, rows: int, decoder: DecoderCost | None
) -> Deployment:
    """What the plan's costs are counted from; `rows` is how many times its sampler asks."""
    sampling = Sampling(plan.sampler, plan.steps, plan.guidance, rows, plan.inside_guidance)
    request = Request(device, plan.classes, sampling, plan.form, unit=plan.unit, burst=plan.burst, decoder=decoder)
    candidate = Candidate(plan.form, plan.precision, plan.unit, plan.modulation)  # type: ignore[arg-type]
    return Deployment(source.spec, request, candidate)


def seconds_by_part(deployment: Deployment, matrices: Mapping[str, MatrixPlan]) -> dict[str, float]:
    """Predicted sustained seconds of one image: the shared matrices, the tailors, the decoder, and everything else."""
    request, unit, batch = deployment.request, deployment.candidate.unit, deployment.evaluations_per_step
    left = deployment.spec.without_branches(dropped_branches(matrices))
    shared_s = tailors_s = 0.0
    for shape in left.matrices():
        plan = matrices[shape.name]
        shared = deployment.shared(shape, plan.storage, plan.shared_rank, plan.precision)  # type: ignore[arg-type]
        tailors = deployment.tailors(shape, plan.tailor_rank or 0, plan.precision)  # type: ignore[arg-type]
        where = (deployment.profile, unit, plan.precision, True, batch)
        shared_s += matrix_latency_s(shared, *where)  # type: ignore[arg-type]
        tailors_s += matrix_latency_s(tailors, *where)  # type: ignore[arg-type]
    calls, decoder_s = request.sampling.evaluations, deployment.decoder_latency_s()
    rest_s = deployment.image_latency_s(matrices, sustained=True) - decoder_s - calls * (shared_s + tailors_s)
    parts = {"shared matrices": calls * shared_s, "tailors": calls * tailors_s}
    return {**parts, "attention, norms, activations": rest_s, "decoder": decoder_s}


def front_around(plan: Plan, source: Source, request: Request) -> list[dict[str, float | None]]:
    """Least predicted loss at a few sizes of the model file, for the plan's classes and form; empty where none fits."""
    limits = {name: limit for name, limit in request.limits.items() if name != "max_size"}
    asked = dataclasses.replace(request, form=plan.form, limits=limits)
    try:
        points = curve_points(Problems(source), asked, "weight_bytes", FRONT_POINTS, FRONT_GAP)
        return [dict(point) for point in points]
    except NoPlanError:
        return []
