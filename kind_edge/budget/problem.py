"""What a request costs on a device, and the choices that follow from it.

Costs: exact FLOPs of one evaluation, bytes of the model files, peak memory, and the sustained latency of one whole
image, decoder included. A branch is kept or dropped whole; a matrix of a kept branch has one precision; its shared part
and its tailors each have a rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

from kind_edge.budget.cost import (
    FixedCost,
    MatrixCost,
    branch_fixed_cost,
    branch_memory_bytes,
    deployed_fixed_cost,
    fixed_latency_s,
    fixed_memory_bytes,
    in_common,
    matrix_cost,
    matrix_latency_s,
    matrix_memory_bytes,
    model_cost,
    runs_on_one_thread,
)
from kind_edge.budget.decoder import DecoderCost, decoder_cost
from kind_edge.budget.graph_bytes import GRAPH_BYTES_PER_OPERATOR, file_bytes
from kind_edge.budget.image_time import Teacher, image_time
from kind_edge.budget.loss import LossModel
from kind_edge.budget.plan import MatrixPlan, Modulation, Storage, dropped_branches
from kind_edge.budget.precision import PRECISIONS, Precision, Unit
from kind_edge.budget.profile import DeviceProfile
from kind_edge.budget.response import Response
from kind_edge.budget.solver import LOSS
from kind_edge.errors import UsageError
from kind_edge.model.spec import Branch, Form, MatrixShape, ModelSpec
from kind_edge.units import Quantity

Objective = Literal["loss", "flops", "weight_bytes", "peak_memory_bytes", "latency_ns"]

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
    """What the user asks for. `spare_bytes` of --max-size are kept for what a file holds beyond prediction.

    `sampling` is what the user or the checkpoint says; `others` may be taken instead, where the user left it open;
    `fewer` have fewer steps, most first: ways out where nothing fits. `asked` is `sampling` as it was before another
    one was taken, if one was: percentages refer to that, so that no choice has a larger budget than another.
    `minimise`: the predicted loss; or one of the costs, with a predicted relative increase of the loss of at most
    `max_loss`.
    `burst`: latency is limited as it is at first, not after minutes of load.
    `decoder`: the one of a latent model, where it is known; else Stable Diffusion's is assumed.
    `dense_spec`: the shape whose dense model percentages refer to, where that is not the planned one's own.
    """

    profile: DeviceProfile
    classes: tuple[str, ...]
    sampling: Sampling
    form: Form | Literal["auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    unit: Unit | Literal["auto"] = "auto"
    limits: Mapping[str, Quantity] = field(default_factory=dict)
    spare_bytes: int = 0
    others: tuple[Sampling, ...] = ()
    fewer: tuple[Sampling, ...] = ()
    minimise: Objective = LOSS
    max_loss: float | None = None
    burst: bool = False
    modulation: Modulation | Literal["auto"] = "auto"
    decoder: DecoderCost | None = None
    dense_spec: ModelSpec | None = None
    asked: Sampling | None = None


@dataclass(frozen=True)
class Source:
    """What is planned for: the model, its identity, what cutting it costs, and whom it learned from.

    `losses` gives the predicted losses for a form and classes; `response` what they mean for pictures, where that has
    been measured. `decoders`: the given decoder of a latent model, whole and in ever more tiles; () if none was given.
    `resize`: as in a plan, where the model takes another size first, which `spec` is.
    """

    name: str
    checkpoint_sha256: str
    spec: ModelSpec
    losses: Callable[[Form, tuple[str, ...]], LossModel]
    truncation: Literal["whitened", "plain"]
    calibration: str
    teacher: Teacher | None = None
    response: Response | None = None
    decoders: tuple[DecoderCost, ...] = ()
    resize: Mapping[str, float | str] = field(default_factory=dict)

    def frechet(self, loss_increase: float, sampling: Sampling) -> float | None:
        """The predicted Fréchet distance; None where nothing was measured."""
        guidance = sampling.guidance if sampling.inside_guidance is None else sampling.inside_guidance
        if self.response is None or not self.response.measured(sampling.steps, guidance):
            return None
        return self.response.frechet(loss_increase, sampling.steps, guidance)


@dataclass(frozen=True)
class Candidate:
    """One way to run the model: what the solver is asked about.

    `precision` is that of the file: in an int8 file matrices may be int8 or, where the request leaves it open, fp32.
    """

    form: Form
    precision: Precision
    unit: Unit
    modulation: Modulation = "baked"


@dataclass(frozen=True)
class Deployment:
    """A model as one candidate of a request would run it: everything that costs are computed from."""

    spec: ModelSpec
    request: Request
    candidate: Candidate

    @cached_property
    def profile(self) -> DeviceProfile:
        """The device, as a model sees it that runs with so many threads."""
        own = self.request.profile
        return own.on_one_thread() if runs_on_one_thread(self.spec) else own

    @property
    def evaluations_per_step(self) -> int:
        """A guided step has both in one batch, one call of the runtime."""
        return 2 if self.candidate.form == "switch" and self.request.sampling.guidance != 1.0 else 1

    @property
    def fixed(self) -> FixedCost:
        """Everything but the block matrices."""
        rows, kept = self.request.sampling.evaluations, len(self.request.classes)
        baked = self.candidate.modulation != "network"
        return deployed_fixed_cost(self.spec, kept, rows, baked, self.candidate.precision, **self._conditioning)

    @property
    def _conditioning(self) -> dict[str, bool]:
        """What the table of modulation or the label embedding is like."""
        half = self.candidate.modulation == "baked-fp16"
        return {"switches": self.candidate.form == "switch", "half_table": half}

    @property
    def decoder(self) -> DecoderCost:
        """The one that was given, or is assumed; all zero for a pixel model."""
        return self.request.decoder or decoder_cost(self.spec)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What a single matrix may be stored in."""
        mixed = self.candidate.precision == "int8" and self.request.precision == "auto"
        return ("fp32", "int8") if mixed else (self.candidate.precision,)

    @cached_property
    def first_of_types(self) -> frozenset[str]:
        """The matrices with which the file holds what blocks have in common, one of each weight type; none where they
        have nothing so: forms that fold tailors in, and an NPU's graph, in which every product has its own constant."""
        own = PRECISIONS[self.candidate.precision].static or self.candidate.form != "switch"
        shared = self.spec.shared_factors and not own
        return frozenset(matrix.name for matrix in self.spec.weight_types().values()) if shared else frozenset()

    def shared(self, matrix: MatrixShape, storage: Storage, rank: int, precision: Precision) -> MatrixCost:
        """The part of a matrix that every image sees."""
        cost = matrix_cost(self.spec, matrix, storage, rank, 0, 0, precision)
        common = self.first_of_types and storage == "factored" and rank
        return in_common(cost, matrix.name in self.first_of_types) if common else cost

    def tailors(self, matrix: MatrixShape, rank: int, precision: Precision) -> MatrixCost:
        """The tailors of all kept classes, of which an image sees one."""
        null = PRECISIONS[precision].static and not self.spec.distilled  # a row of zeros, in place of arithmetic
        return matrix_cost(self.spec, matrix, "dropped", 0, rank, len(self.request.classes) + null, precision)

    def matrix_costs(self, cost: MatrixCost, precision: Precision) -> dict[str, int]:
        """One part of a matrix in the solver's units."""
        profile, unit, sustained = self.profile, self.candidate.unit, not self.request.burst
        seconds = matrix_latency_s(cost, profile, unit, precision, sustained, self.evaluations_per_step)
        return self._costs(cost, seconds, matrix_memory_bytes(cost, self.evaluations_per_step))

    def branch_costs(self, kind: Branch) -> dict[str, int]:
        """What a kept branch of one block costs beside its matrices, in the solver's units."""
        rows, kept = self.request.sampling.evaluations, len(self.request.classes)
        baked = self.candidate.modulation != "network"
        fixed = branch_fixed_cost(self.spec, kind, self.candidate.precision, kept, rows, baked, **self._conditioning)
        return self._costs(fixed, self._fixed_latency_s(fixed), branch_memory_bytes(fixed))

    def _costs(self, cost: MatrixCost | FixedCost, seconds: float, memory_bytes: int) -> dict[str, int]:
        return {
            "flops": cost.flops,
            "weight_bytes": self._file_bytes(cost),
            "peak_memory_bytes": memory_bytes,
            "latency_ns": _ns(seconds * self.request.sampling.evaluations),
        }

    def _file_bytes(self, cost: MatrixCost | FixedCost) -> int:
        return file_bytes(cost, self.candidate.precision)

    def _fixed_latency_s(self, fixed: FixedCost) -> float:
        profile, unit, sustained = self.profile, self.candidate.unit, not self.request.burst
        return fixed_latency_s(fixed, profile, unit, sustained, self.evaluations_per_step)

    def totals(self, matrices: Mapping[str, MatrixPlan]) -> dict[str, int]:
        """What the whole costs with these matrices, in the solver's units: counted from the plan, not by the solver."""
        totals = self.fixed_costs()
        for branch in dropped_branches(matrices):
            for name, amount in self.branch_costs(branch_kind(branch)).items():
                totals[name] -= amount
        for shape in self.spec.matrices():
            plan = matrices[shape.name]
            precision = cast(Precision, plan.precision)
            for part in (
                self.shared(shape, plan.storage, plan.shared_rank, precision),
                self.tailors(shape, plan.tailor_rank or 0, precision),
            ):
                for name, amount in self.matrix_costs(part, precision).items():
                    totals[name] += amount
        return totals

    def fixed_costs(self) -> dict[str, int]:
        """Everything that is not chosen, in the solver's units: the fixed parts, the decoder, the runtime."""
        fixed, decoder = self.fixed, self.decoder
        precision = self.candidate.precision
        decoder_bytes = decoder.weight_bytes(precision) + decoder.graph_operators(precision) * GRAPH_BYTES_PER_OPERATOR
        seconds = self._fixed_latency_s(fixed) * self.request.sampling.evaluations
        seconds += self.decoder_latency_s(not self.request.burst)
        return {
            "flops": fixed.flops,
            "weight_bytes": self._file_bytes(fixed) + decoder_bytes + self.request.spare_bytes,
            "peak_memory_bytes": fixed_memory_bytes(fixed, self.evaluations_per_step, decoder),
            "latency_ns": _ns(seconds),
        }

    def decoder_latency_s(self, sustained: bool = True) -> float:
        """Seconds of the decoder for one image; 0 for a pixel model."""
        candidate = self.candidate
        return self.decoder.latency_s(self.profile, candidate.unit, candidate.precision, sustained)

    def evaluation_latency_s(self, matrices: Mapping[str, MatrixPlan], sustained: bool, batch: int = 1) -> float:
        """Seconds of one call with these matrices and `batch` rows: one evaluation, or two of a guided step."""
        profile, unit = self.profile, self.candidate.unit
        left = dataclasses.replace(self, spec=self.spec.without_branches(dropped_branches(matrices)))
        seconds = fixed_latency_s(left.fixed, profile, unit, sustained, batch)
        for shape in left.spec.matrices():
            plan = matrices[shape.name]
            precision = cast(Precision, plan.precision)
            shared = self.shared(shape, plan.storage, plan.shared_rank, precision)
            tailors = self.tailors(shape, plan.tailor_rank or 0, precision)
            seconds += sum(matrix_latency_s(p, profile, unit, precision, sustained, batch) for p in (shared, tailors))
        return seconds

    def image_latency_s(self, matrices: Mapping[str, MatrixPlan], sustained: bool) -> float:
        """Seconds of an image."""
        call_s = self.evaluation_latency_s(matrices, sustained, self.evaluations_per_step)
        return self.request.sampling.evaluations * call_s + self.decoder_latency_s(sustained)

    def params(self, matrices: Mapping[str, MatrixPlan]) -> int:
        """Stored parameters with these matrices."""
        left = dataclasses.replace(self, spec=self.spec.without_branches(dropped_branches(matrices)))
        stored = left.fixed.params
        for shape in left.spec.matrices():
            plan = matrices[shape.name]
            stored += self.shared(shape, plan.storage, plan.shared_rank, "fp32").params
            stored += self.tailors(shape, plan.tailor_rank or 0, "fp32").params
        return stored

    def time(self, matrices: Mapping[str, MatrixPlan], teacher: Teacher | None = None) -> dict[str, float]:
        """Where an image's sustained time goes, an evaluation its share of a call; with `teacher`, as the teacher's."""
        sampling, decoder_s = self.request.sampling, self.decoder_latency_s()
        per_step = self.evaluations_per_step if teacher is None else teacher.evaluations_per_step
        evaluation_s = self.evaluation_latency_s(matrices, sustained=True, batch=per_step) / per_step
        if teacher is not None:
            return image_time(teacher.steps, teacher.steps, per_step, evaluation_s, decoder_s)
        return image_time(sampling.steps, sampling.evaluations, per_step, evaluation_s, decoder_s)

    def dense(self) -> dict[str, float]:
        """The dense fp32 model of the same shape, nothing baked, on the same unit: what percentages refer to.

        Its time on a unit without fp32, as NPUs are, is that of fp16.
        """
        spec, profile, unit = (self.request.dense_spec or self.spec).dense(), self.profile, self.candidate.unit
        timed: Precision = "fp32" if profile.unit(unit).has("fp32") else "fp16"
        if not profile.unit(unit).has(timed):
            raise UsageError(f"--unit {unit}: profile {profile.name!r} has no fp32 or fp16 figure to compare with")
        params = model_cost(spec, "exact").params
        fixed = deployed_fixed_cost(spec, spec.num_classes, 1, False, "fp32")
        fixed_timed = dataclasses.replace(fixed, precision=timed)
        matrices = [matrix_cost(spec, matrix, "dense", 0, 0, 0, "fp32") for matrix in spec.matrices()]
        sustained, batch = not self.request.burst, self.evaluations_per_step
        seconds = sum(matrix_latency_s(matrix, profile, unit, timed, sustained, batch) for matrix in matrices)
        seconds += fixed_latency_s(fixed_timed, profile, unit, sustained, batch)
        decoder = self.decoder.whole or self.decoder
        decoder_s = decoder.latency_s(profile, unit, timed, sustained)
        memory_bytes = sum(matrix_memory_bytes(matrix, batch) for matrix in matrices)
        return {
            "params": params,
            "flops": fixed.flops + sum(matrix.flops for matrix in matrices),
            "weight_bytes": 4 * (params + decoder.params),
            "peak_memory_bytes": memory_bytes + fixed_memory_bytes(fixed, batch, decoder),
            "latency_ns": _ns(seconds * self.request.sampling.evaluations + decoder_s),
        }

    def limits(self) -> dict[str, int]:
        """The request's limits in the solver's units. Memory is always limited by what the system allows an app, the
        model files by what its store takes, where they could be larger than that."""
        of_device, dense = self._of_device(), {}
        if any(quantity.unit == "share" for quantity in self.request.limits.values()):
            asked = dataclasses.replace(self.request, sampling=self.request.asked or self.request.sampling)
            guided = dataclasses.replace(self.candidate, form="switch")  # if guidance was asked for
            dense = dataclasses.replace(self, request=asked, candidate=guided).dense()
        limits = dict(of_device)
        for name, quantity in self.request.limits.items():
            cost = LIMIT_NAMES[name]
            if quantity.unit == "share":
                limits[cost] = int(dense[cost] * quantity.value)
            else:
                limits[cost] = _ns(quantity.value) if cost == "latency_ns" else int(quantity.value)
        return limits | {cost: min(limits[cost], allowed) for cost, allowed in of_device.items()}

    def _of_device(self) -> dict[str, int]:
        """What no request can raise."""
        profile = self.request.profile
        limits = {"peak_memory_bytes": int(profile.app_memory_limit_bytes.value)}
        if profile.store is not None and self._largest_bytes > profile.store.model_bytes.value:
            limits["weight_bytes"] = int(profile.store.model_bytes.value)
        return limits

    @property
    def _largest_bytes(self) -> int:
        """No plan of this candidate has larger model files."""
        largest = self.fixed_costs()["weight_bytes"]
        for matrix in self.spec.matrices():
            ranks = self.spec.ranks(matrix.name)
            shared = (self.shared(matrix, kind, ranks.learngene, "fp32") for kind in ("dense", "factored"))
            largest += max(map(self._file_bytes, shared)) + self._file_bytes(self.tailors(matrix, ranks.tailor, "fp32"))
        return largest


def limit_name(cost: str) -> str:
    """The limit's name in a request ("max_size") from the solver's ("weight_bytes")."""
    if cost == LOSS:
        return "max_quality_loss"
    return next(name for name, bound in LIMIT_NAMES.items() if bound == cost)


def branch_kind(branch: str) -> Branch:
    """ "attn" of "blocks.3.attn"."""
    return "attn" if branch.endswith(".attn") else "mlp"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
