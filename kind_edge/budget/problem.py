"""What a request costs on a device, and the knapsack that follows from it.

Value: the share of the model's (whitened) output energy, over all matrices, that is retained. Costs: exact FLOPs of one
evaluation, bytes of the model files, peak memory, and the sustained latency of one whole image, decoder included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kind_edge.budget.cost import (
    FixedCost,
    MatrixCost,
    deployed_fixed_cost,
    fixed_latency_s,
    matrix_cost,
    matrix_latency_s,
    model_cost,
)
from kind_edge.budget.decoder import decoder_cost
from kind_edge.budget.image_time import Teacher, image_time
from kind_edge.budget.plan import MatrixPlan, Storage
from kind_edge.budget.profile import DeviceProfile, Precision, Unit
from kind_edge.budget.solver import Option, Problem
from kind_edge.budget.spectrum import Spectrum
from kind_edge.errors import UsageError
from kind_edge.model.spec import Form, MatrixShape, ModelSpec
from kind_edge.units import Quantity

GRAPH_BYTES_PER_OPERATOR = 180
"""Names, shapes and attributes of one node in an ONNX file; measured on our own exports, and checked on every file."""

RUNTIME_MEMORY_BYTES = 16 * 2**20
"""What ONNX Runtime holds for a session besides weights and activations; scripts/bench cost compares."""

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
    """How one image is made. `evaluations` is how many rows the sampler's table has.

    `guidance` is what the loop does: 1 for a distilled model, which has `inside_guidance` in its prediction.
    """

    sampler: str
    steps: int
    guidance: float
    evaluations: int
    inside_guidance: float | None = None


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
    """What is planned for: the model, its identity, how its spectra were made, and whom it learned from."""

    name: str
    checkpoint_sha256: str
    spec: ModelSpec
    spectra: Mapping[Form, Mapping[str, Spectrum]]
    truncation: Literal["whitened", "plain"]
    calibration: str
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to run the model: what the solver is asked about."""

    form: Form
    precision: Precision
    unit: Unit


@dataclass(frozen=True)
class Deployment:
    """A model as one candidate of a request would run it: everything that costs are computed from."""

    spec: ModelSpec
    request: Request
    candidate: Candidate

    @property
    def evaluations_per_step(self) -> int:
        return 2 if self.candidate.form == "switch" and self.request.sampling.guidance != 1.0 else 1

    @property
    def evaluations(self) -> int:
        """Network evaluations of one image, guidance included."""
        return self.request.sampling.evaluations * self.evaluations_per_step

    @property
    def fixed(self) -> FixedCost:
        """Everything but the block matrices; modulation is baked unless it depends on the label."""
        rows, kept = self.request.sampling.evaluations, len(self.request.classes)
        return deployed_fixed_cost(self.spec, kept, rows, not self.spec.label_embedding, self.candidate.precision)

    def shared(self, matrix: MatrixShape, storage: Storage, rank: int) -> MatrixCost:
        """The part of a matrix that every image sees."""
        return matrix_cost(self.spec, matrix, storage, rank, 0, 0, self.candidate.precision)

    def tailors(self, matrix: MatrixShape, rank: int) -> MatrixCost:
        """The tailors of all kept classes, of which an image sees one."""
        kept = len(self.request.classes)
        return matrix_cost(self.spec, matrix, "dropped", 0, rank, kept, self.candidate.precision)

    def matrix_costs(self, cost: MatrixCost) -> dict[str, int]:
        """One part of a matrix in the solver's units."""
        profile, unit, precision = self.request.profile, self.candidate.unit, self.candidate.precision
        file_bytes = cost.weight_bytes + cost.operators * GRAPH_BYTES_PER_OPERATOR
        return {
            "flops": cost.flops,
            "weight_bytes": file_bytes,
            "peak_memory_bytes": WEIGHT_COPIES * file_bytes,
            "latency_ns": _ns(matrix_latency_s(cost, profile, unit, precision) * self.evaluations),
        }

    def fixed_costs(self) -> dict[str, int]:
        """Everything that is not chosen, in the solver's units: the fixed parts, the decoder, the runtime."""
        fixed, decoder = self.fixed, decoder_cost(self.spec)
        file_bytes = fixed.weight_bytes + fixed.operators * GRAPH_BYTES_PER_OPERATOR + 4 * decoder.params
        activations = max(self.evaluations_per_step * fixed.activation_bytes_peak, decoder.activation_bytes_peak)
        seconds = fixed_latency_s(fixed, self.request.profile, self.candidate.unit) * self.evaluations
        return {
            "flops": fixed.flops,
            "weight_bytes": file_bytes + self.request.spare_bytes,
            "peak_memory_bytes": RUNTIME_MEMORY_BYTES + WEIGHT_COPIES * file_bytes + activations,
            "latency_ns": _ns(seconds + self.decoder_latency_s()),
        }

    def decoder_latency_s(self, sustained: bool = True) -> float:
        """Seconds of the fp32 decoder for one image; 0 for a pixel model. Convolutions are bound by arithmetic."""
        flops = decoder_cost(self.spec).flops
        return flops / self.request.profile.throughput(self.candidate.unit, "fp32", sustained) if flops else 0.0

    def evaluation_latency_s(self, matrices: Mapping[str, MatrixPlan], sustained: bool) -> float:
        """Seconds of one evaluation at batch 1 with these matrices."""
        profile, unit, precision = self.request.profile, self.candidate.unit, self.candidate.precision
        parts = [
            part
            for shape in self.spec.matrices()
            for plan in [matrices[shape.name]]
            for part in (self.shared(shape, plan.storage, plan.shared_rank), self.tailors(shape, plan.tailor_rank or 0))
        ]
        seconds = sum(matrix_latency_s(part, profile, unit, precision, sustained) for part in parts)
        return fixed_latency_s(self.fixed, profile, unit, sustained) + seconds

    def time(self, evaluation_s: float, teacher: Teacher | None = None) -> dict[str, float]:
        """Where an image's sustained time goes; with `teacher`, at the teacher's steps and guidance."""
        sampling, decoder_s = self.request.sampling, self.decoder_latency_s()
        if teacher is not None:
            return image_time(teacher.steps, teacher.steps, teacher.evaluations_per_step, evaluation_s, decoder_s)
        return image_time(sampling.steps, sampling.evaluations, self.evaluations_per_step, evaluation_s, decoder_s)

    def dense(self) -> dict[str, float]:
        """The dense fp32 model of the same shape, nothing baked, on the same unit: what percentages refer to."""
        spec, profile, unit = self.spec.dense(), self.request.profile, self.candidate.unit
        if "fp32" not in profile.unit(unit).peak_flops_per_s:
            raise UsageError(f"--unit {unit}: profile {profile.name!r} has no fp32 figure to compare with")
        params = model_cost(spec, "exact").params
        fixed = deployed_fixed_cost(spec, spec.num_classes, 1, False, "fp32")
        matrices = [matrix_cost(spec, matrix, "dense", 0, 0, 0, "fp32") for matrix in spec.matrices()]
        seconds = sum(matrix_latency_s(matrix, profile, unit, "fp32") for matrix in matrices)
        seconds += fixed_latency_s(fixed, profile, unit)
        decoder = decoder_cost(self.spec)
        weight_bytes = 4 * (params + decoder.params)
        activations = max(2 * fixed.activation_bytes_peak, decoder.activation_bytes_peak)
        return {
            "params": params,
            "flops": fixed.flops + sum(matrix.flops for matrix in matrices),
            "weight_bytes": weight_bytes,
            "peak_memory_bytes": RUNTIME_MEMORY_BYTES + WEIGHT_COPIES * weight_bytes + activations,
            "latency_ns": _ns(seconds * self.evaluations + self.decoder_latency_s()),
        }

    def limits(self) -> dict[str, int]:
        """The request's limits in the solver's units; memory is always limited by what the system allows an app."""
        dense = self.dense()
        allowed = int(self.request.profile.app_memory_limit_bytes.value)
        limits = {"peak_memory_bytes": allowed}
        for name, quantity in self.request.limits.items():
            cost = LIMIT_NAMES[name]
            if quantity.unit == "share":
                limits[cost] = int(dense[cost] * quantity.value)
            else:
                limits[cost] = _ns(quantity.value) if cost == "latency_ns" else int(quantity.value)
        limits["peak_memory_bytes"] = min(allowed, limits["peak_memory_bytes"])
        return limits


def limit_name(cost: str) -> str:
    """The limit's name in a request ("max_size") from the solver's ("weight_bytes")."""
    return next(name for name, bound in LIMIT_NAMES.items() if bound == cost)


def build_problem(source: Source, request: Request, candidate: Candidate) -> Problem:
    """The knapsack of one candidate: for every matrix its shared part and (in *switch*) its tailors choose a rank."""
    deployment = Deployment(source.spec, request, candidate)
    options: dict[str, tuple[Option, ...]] = {}
    for matrix in source.spec.matrices():
        spectrum = source.spectra[candidate.form][matrix.name]
        options[f"{matrix.name}/shared"] = tuple(_shared_options(deployment, matrix, spectrum))
        if len(spectrum.tailor) > 1:
            options[f"{matrix.name}/tailors"] = tuple(_tailor_options(deployment, matrix, spectrum))
    return Problem(options, deployment.fixed_costs(), deployment.limits())


def rank_levels(full: int) -> list[int]:
    """About sixteen ranks from small to full: fine enough to fill a budget, coarse enough to be solved at once."""
    step = max(1, full // 16)
    return [*range(step, full, step), full] if full else []


def _shared_options(deployment: Deployment, matrix: MatrixShape, spectrum: Spectrum) -> Iterator[Option]:
    """Dropped, every factored level, and at full rank also dense: below it, dense costs the same and keeps less."""
    full = len(spectrum.shared) - 1
    levels: list[tuple[Storage, int]] = [("dropped", 0), *(("factored", rank) for rank in rank_levels(full))]
    for storage, rank in [*levels, ("dense", full)] if full else levels:
        costs = deployment.matrix_costs(deployment.shared(matrix, storage, rank))
        yield Option(storage, rank, 0, float(spectrum.shared[rank]), costs)


def _tailor_options(deployment: Deployment, matrix: MatrixShape, spectrum: Spectrum) -> Iterator[Option]:
    """Never rank 0: tailors carry little energy, so a tight budget would drop them first, and the classes with them."""
    for rank in rank_levels(len(spectrum.tailor) - 1):
        costs = deployment.matrix_costs(deployment.tailors(matrix, rank))
        yield Option("factored", 0, rank, float(spectrum.tailor[rank]), costs)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
