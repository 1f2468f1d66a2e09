"""From a request to a plan: every form, precision and unit that may be used becomes a knapsack; the best answer wins.

Value: the share of the model's (whitened) output energy, over all matrices, that is retained. Costs: exact FLOPs of one
evaluation, bytes of the file, peak memory, and the sustained latency of one whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kind_edge.budget.cost import (
    FixedCost,
    deployed_fixed_cost,
    fixed_latency_s,
    matrix_cost,
    matrix_latency_s,
    model_cost,
)
from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.profile import DeviceProfile, Precision, Unit
from kind_edge.budget.solver import Option, Problem, Solution, solve
from kind_edge.budget.spectrum import Spectrum
from kind_edge.errors import NoPlanError, UsageError
from kind_edge.model.spec import Form, MatrixShape, ModelSpec
from kind_edge.units import Quantity

PLANNED_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
"""What the exporters can write."""

GRAPH_BYTES_PER_OPERATOR = 300
"""Names, shapes and attributes of one node in an ONNX file; measured on our own exports, and checked on every file."""

RUNTIME_MEMORY_BYTES = 24 * 2**20
"""What ONNX Runtime holds for a session besides weights and activations; measured by scripts/bench memory."""

WEIGHT_COPIES = 2
"""While a session is made, the file's weights and the prepacked ones are both in memory."""

LIMIT_NAMES = {
    "max_flops": "flops",
    "max_size": "weight_bytes",
    "max_memory": "peak_memory_bytes",
    "max_latency": "latency_ns",
}
"""Limits of a request and what they bound in the solver."""


@dataclass(frozen=True)
class Sampling:
    """How one image is made. `evaluations` is how many rows the sampler's table has."""

    sampler: str
    steps: int
    guidance: float
    evaluations: int


@dataclass(frozen=True)
class Request:
    """What the user asks for. `spare_bytes` of --max-size are kept for what a file holds beyond prediction."""

    profile: DeviceProfile
    classes: tuple[str, ...]
    sampling: Sampling
    form: Form | Literal["auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    unit: Unit | Literal["auto"] = "auto"
    limits: Mapping[str, Quantity] = field(default_factory=dict)
    spare_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """What is planned for: the model, its identity, and how its spectra were made."""

    name: str
    checkpoint_sha256: str
    spec: ModelSpec
    spectra: Mapping[Form, Mapping[str, Spectrum]]
    truncation: Literal["whitened", "plain"]
    calibration: str


@dataclass(frozen=True)
class Candidate:
    """One way to run the model: what the solver is asked about."""

    form: Form
    precision: Precision
    unit: Unit


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


def build_problem(source: Source, request: Request, candidate: Candidate) -> Problem:
    """The knapsack of one candidate: for every matrix its shared part and (in *switch*) its tailors choose a rank."""
    rows = request.sampling.evaluations
    network = evaluations(request, candidate.form)
    fixed = _fixed_cost(source.spec, request, candidate)
    overhead = fixed.operators * GRAPH_BYTES_PER_OPERATOR + request.spare_bytes
    costs = {
        "flops": fixed.flops,
        "weight_bytes": fixed.weight_bytes + overhead,
        "peak_memory_bytes": RUNTIME_MEMORY_BYTES
        + WEIGHT_COPIES * (fixed.weight_bytes + overhead)
        + (network // rows) * fixed.activation_bytes_peak,
        "latency_ns": _ns(fixed_latency_s(fixed, request.profile, candidate.unit) * network),
    }
    options: dict[str, tuple[Option, ...]] = {}
    for matrix in source.spec.matrices():
        spectrum = source.spectra[candidate.form][matrix.name]
        options[f"{matrix.name}/shared"] = tuple(
            _shared_options(source.spec, matrix, spectrum, request, candidate, network)
        )
        if len(spectrum.tailor) > 1:
            options[f"{matrix.name}/tailors"] = tuple(
                _tailor_options(source.spec, matrix, spectrum, request, candidate, network)
            )
    return Problem(options, costs, _limits(source.spec, request, candidate))


def evaluations(request: Request, form: Form) -> int:
    """Network evaluations of one image, guidance included."""
    return request.sampling.evaluations * (2 if form == "switch" and request.sampling.guidance != 1.0 else 1)


def rank_levels(full: int) -> list[int]:
    """About sixteen ranks from small to full: fine enough to fill a budget, coarse enough to be solved at once."""
    step = max(1, full // 16)
    return [*range(step, full, step), full] if full else []


def _shared_options(
    spec: ModelSpec, matrix: MatrixShape, spectrum: Spectrum, request: Request, candidate: Candidate, network: int
) -> Iterator[Option]:
    full = len(spectrum.shared) - 1
    yield Option("dropped", 0, 0, 0.0, _option_costs(spec, matrix, "dropped", 0, 0, request, candidate, network))
    for rank in rank_levels(full):
        for storage in ("factored", "dense") if rank == full else ("factored",):
            costs = _option_costs(spec, matrix, storage, rank, 0, request, candidate, network)
            yield Option(storage, rank, 0, float(spectrum.shared[rank]), costs)


def _tailor_options(
    spec: ModelSpec, matrix: MatrixShape, spectrum: Spectrum, request: Request, candidate: Candidate, network: int
) -> Iterator[Option]:
    for rank in [0, *rank_levels(len(spectrum.tailor) - 1)]:
        costs = _option_costs(spec, matrix, "dropped", 0, rank, request, candidate, network)
        yield Option("factored" if rank else "dropped", 0, rank, float(spectrum.tailor[rank]), costs)


def _option_costs(
    spec: ModelSpec,
    matrix: MatrixShape,
    storage: Literal["dense", "factored", "dropped"],
    rank: int,
    tailor_rank: int,
    request: Request,
    candidate: Candidate,
    network: int,
) -> dict[str, int]:
    tailors = len(request.classes) if tailor_rank else 0
    cost = matrix_cost(spec, matrix, storage, rank, tailor_rank, tailors, candidate.precision)
    latency_s = matrix_latency_s(cost, request.profile, candidate.unit, candidate.precision)
    file_bytes = cost.weight_bytes + cost.operators * GRAPH_BYTES_PER_OPERATOR
    return {
        "flops": cost.flops,
        "weight_bytes": file_bytes,
        "peak_memory_bytes": WEIGHT_COPIES * file_bytes,
        "latency_ns": _ns(latency_s * network),
    }


def _fixed_cost(spec: ModelSpec, request: Request, candidate: Candidate) -> FixedCost:
    baked = not spec.label_embedding
    return deployed_fixed_cost(spec, len(request.classes), request.sampling.evaluations, baked, candidate.precision)


def dense_figures(spec: ModelSpec, profile: DeviceProfile, unit: Unit, network: int) -> dict[str, float]:
    """The dense fp32 model of the same shape, nothing baked, on the same unit: what percentages refer to."""
    dense = spec.dense()
    cost = model_cost(dense, "exact")
    precision: Precision = "fp32"
    fixed = deployed_fixed_cost(dense, dense.num_classes, 1, False, precision)
    matrices = [matrix_cost(dense, matrix, "dense", 0, 0, 0, precision) for matrix in dense.matrices()]
    if precision not in profile.unit(unit).peak_flops_per_s:
        raise UsageError(f"--unit {unit}: profile {profile.name!r} has no fp32 figure to compare with")
    seconds = fixed_latency_s(fixed, profile, unit) + sum(
        matrix_latency_s(matrix, profile, unit, precision) for matrix in matrices
    )
    return {
        "params": cost.params,
        "flops": cost.flops,
        "weight_bytes": 4 * cost.params,
        "peak_memory_bytes": RUNTIME_MEMORY_BYTES + WEIGHT_COPIES * 4 * cost.params + 2 * fixed.activation_bytes_peak,
        "latency_ns": _ns(seconds * network),
    }


def _limits(spec: ModelSpec, request: Request, candidate: Candidate) -> dict[str, int]:
    network = evaluations(request, candidate.form)
    dense = dense_figures(spec, request.profile, candidate.unit, network)
    limits: dict[str, int] = {}
    for name, quantity in request.limits.items():
        cost = LIMIT_NAMES[name]
        if quantity.unit == "share":
            limits[cost] = int(dense[cost] * quantity.value)
        else:
            limits[cost] = _ns(quantity.value) if cost == "latency_ns" else int(quantity.value)
    return limits


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _plan(source: Source, request: Request, candidate: Candidate, solution: Solution) -> Plan:
    """The solver's answer in the words of a plan."""
    spec, sampling = source.spec, request.sampling
    fixed = _fixed_cost(spec, request, candidate)
    network = evaluations(request, candidate.form)
    matrices = {m.name: _matrix_plan(m.name, candidate, solution) for m in spec.matrices()}
    params = fixed.params + sum(
        matrix_cost(
            spec, m, matrices[m.name].storage, matrices[m.name].shared_rank, matrices[m.name].tailor_rank or 0,
            len(request.classes), candidate.precision,
        ).params
        for m in spec.matrices()
    )  # fmt: skip
    sustained_s = solution.totals["latency_ns"] / 1e9
    return Plan(
        model=source.name,
        checkpoint_sha256=source.checkpoint_sha256,
        profile=request.profile.name,
        unit=candidate.unit,
        form=candidate.form,
        classes=request.classes,
        precision=candidate.precision,
        sampler=sampling.sampler,
        steps=sampling.steps,
        guidance=sampling.guidance,
        evaluations_per_step=network // sampling.evaluations,
        modulation="network" if spec.label_embedding else "baked",
        truncation=source.truncation,
        calibration=source.calibration,
        params=params,
        flops=solution.totals["flops"],
        weight_bytes=solution.totals["weight_bytes"] - request.spare_bytes,
        peak_memory_bytes=solution.totals["peak_memory_bytes"],
        evaluation_latency_s=sustained_s / network,
        image_latency_s=network
        * predict_evaluation_s(
            spec, matrices, len(request.classes), sampling.evaluations, candidate, request.profile, sustained=False
        ),
        sustained_image_latency_s=sustained_s,
        retained_energy=solution.value,
        limits={_flag(name): float(limit) for name, limit in _limits(spec, request, candidate).items()},
        binding=tuple(_flag(name) for name in solution.binding),
        optimality_gap=solution.optimality_gap,
        dense=dense_figures(spec, request.profile, candidate.unit, network),
        matrices=matrices,
    )


def _matrix_plan(name: str, candidate: Candidate, solution: Solution) -> MatrixPlan:
    shared, tailors = solution.choice[f"{name}/shared"], solution.choice.get(f"{name}/tailors")
    storage = shared.storage
    if candidate.form != "switch":
        return MatrixPlan(storage, candidate.precision, rank=shared.learngene_rank)
    tailor_rank = tailors.tailor_rank if tailors else 0
    return MatrixPlan(storage, candidate.precision, shared.learngene_rank, tailor_rank)


def predict_evaluation_s(
    spec: ModelSpec,
    matrices: Mapping[str, MatrixPlan],
    num_classes: int,
    rows: int,
    candidate: Candidate,
    profile: DeviceProfile,
    sustained: bool,
) -> float:
    """Seconds of one evaluation at batch 1 of a planned model, on any device; `rows` are those of the sampler table."""
    unit, precision = candidate.unit, candidate.precision
    fixed = deployed_fixed_cost(spec, num_classes, rows, not spec.label_embedding, precision)
    seconds = fixed_latency_s(fixed, profile, unit, sustained)
    for shape in spec.matrices():
        plan = matrices[shape.name]
        parts = [matrix_cost(spec, shape, plan.storage, plan.shared_rank, 0, 0, precision)]
        if plan.tailor_rank:
            parts.append(matrix_cost(spec, shape, "dropped", 0, plan.tailor_rank, num_classes, precision))
        seconds += sum(matrix_latency_s(part, profile, unit, precision, sustained) for part in parts)
    return seconds


def _flag(cost: str) -> str:
    """The limit's name in a request ("max_size") from the solver's ("weight_bytes")."""
    return next(flag for flag, name in LIMIT_NAMES.items() if name == cost)
