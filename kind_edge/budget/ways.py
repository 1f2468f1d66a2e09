"""The ways to run a model that a request and a device leave open: steps, form, unit, precision, modulation, decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.plan import Modulation
from kind_edge.budget.precision import PRECISIONS, Precision, precisions_of
from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling, Source
from kind_edge.budget.solver import LOSS
from kind_edge.errors import UsageError
from kind_edge.model.spec import Form

PLANNED_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
"""What is written where nothing else is asked for."""


@dataclass(frozen=True)
class Way:
    """One way to run the model: a request with its sampling settled, and a candidate of it."""

    request: Request
    candidate: Candidate


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
    for form in candidate_forms(request):
        for precision in _precisions(request):
            units = request.profile.units_for(precision)
            for unit in units if request.unit == "auto" else (request.unit,):
                if unit in units:
                    yield Candidate(form, precision, unit)


def _precisions(request: Request) -> tuple[Precision, ...]:
    """What is asked for; where that is left open, what the unit is fast with. Other units than CPUs are taken with
    their own precisions only where they are asked for."""
    if request.precision != "auto":
        return (request.precision,)
    if request.unit == "gpu":
        return ("fp16",) if request.profile.unit("gpu").has("fp16") else ("fp32",)
    if request.unit == "npu":
        return tuple(name for name in precisions_of("npu") if request.profile.unit("npu").has(name))
    return PLANNED_PRECISIONS


def ways(source: Source, request: Request) -> list[Way]:
    """Every way that a request allows, those at its own sampling first; `UsageError` where there is none.

    A file whose matrices may all be int8 or fp32 is fp32 where all are, unless something else of it is int8.
    """
    samplings = [request.sampling] if request.minimise != LOSS else [request.sampling, *request.others]
    settled = [dataclasses.replace(request, sampling=each, others=(), asked=request.sampling) for each in samplings]
    each_way = [
        Way(dataclasses.replace(each, decoder=decoder), candidate)
        for each in settled
        for candidate in candidates(each)
        for decoder in _decoder_choices(source, each, candidate)
    ]
    found = [modulated for way in each_way for modulated in _modulated(source, way)]
    if request.precision == "auto" and not source.decoders:
        mixed = {_but_precision(way) for way in found if way.candidate.precision == "int8" and all_baked(way)}
        found = [way for way in found if way.candidate.precision == "int8" or _but_precision(way) not in mixed]
    if not found:
        raise UsageError(
            f"--unit {request.unit}: profile {request.profile.name!r} cannot run --precision {request.precision} "
            "there; kind-edge profiles show lists what it can run"
        )
    return found


def all_baked(way: Way) -> bool:
    """Whether there is no network beside the blocks."""
    return way.candidate.modulation != "network"


def _but_precision(way: Way) -> tuple[Sampling, str, str, str]:
    return way.request.sampling, way.candidate.form, way.candidate.unit, way.candidate.modulation


def _modulated(source: Source, way: Way) -> Iterator[Way]:
    """The way with baked modulation, with its networks, or with either, where neither is cheaper in everything.

    A table grows with steps, and with classes where modulation depends on the label; the networks do not.
    """
    asked = way.request.modulation
    kinds: tuple[Modulation, ...] = ("baked", "network") if asked == "auto" else (asked,)
    if PRECISIONS[way.candidate.precision].static:
        kinds = ("baked",)
    choices = [Way(way.request, dataclasses.replace(way.candidate, modulation=kind)) for kind in kinds]
    bare = source.spec.without_branches(source.spec.branches())  # all costs lie between those with and without branches
    costs = [
        [
            cost
            for spec in (source.spec, bare)
            for cost in Deployment(spec, way.request, each.candidate).fixed_costs().values()
        ]
        for each in choices
    ]
    for choice, own in zip(choices, costs, strict=True):
        others = [other for other in costs if other is not own]
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in others):
            yield choice


def written_precisions(request: Request, candidate: Candidate) -> tuple[Precision, ...]:
    """fp32 and int8 side by side; what was asked for by name, or chosen for another unit than a CPU, alone."""
    planned = candidate.precision in PLANNED_PRECISIONS and request.precision != "fp32"
    return PLANNED_PRECISIONS if planned else (candidate.precision,)


def _decoder_choices(source: Source, request: Request, candidate: Candidate) -> Iterator[DecoderCost | None]:
    """The decoder in one piece; and in tiles, which take longer, where the dense model with the whole is too large."""
    if not source.decoders:
        yield None
    for decoder in source.decoders:
        yield decoder
        deployment = Deployment(source.spec, dataclasses.replace(request, decoder=decoder), candidate)
        if deployment.dense()["peak_memory_bytes"] <= deployment.limits()["peak_memory_bytes"]:
            return
