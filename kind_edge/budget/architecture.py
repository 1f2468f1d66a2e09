"""What a named architecture costs on a device, from its shape alone: no weights, nothing to solve.

Under `paper` the figures are those of the KIND authors' mobile table; under `exact` what the model's operators cost
as we deploy them, unbaked, with every block matrix dense or at one active rank, and the decoder once per image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kind_edge.budget.cost import (
    Convention,
    MatrixCost,
    PaperRow,
    deployed_fixed_cost,
    fixed_latency_s,
    fixed_memory_bytes,
    in_common,
    matrix_cost,
    matrix_latency_s,
    matrix_memory_bytes,
    model_cost,
    paper_table,
)
from kind_edge.budget.decoder import NO_DECODER, DecoderCost, decoder_cost
from kind_edge.budget.image_time import image_time
from kind_edge.budget.plan import Plan
from kind_edge.budget.precision import Precision, Unit, check_unit
from kind_edge.budget.profile import DeviceProfile
from kind_edge.budget.whole_model import PAPER_EVALUATIONS
from kind_edge.errors import UsageError
from kind_edge.model.spec import ModelSpec

PAPER_STEPS, EXACT_STEPS = 250, 20


@dataclass(frozen=True)
class ArchitectureCost:
    """`params` and `flops` are of the network alone, one evaluation at batch 1.

    Latencies are one image: steps x evaluations_per_step evaluations and the decoder; `time` has the sustained one's
    factors, as `image_time` names them. Bytes count the decoder too.
    Under `paper` there is none.
    """

    arch: str
    num_classes: int
    convention: Convention
    rank: int | None
    profile: str
    unit: Unit
    precision: Precision
    steps: int
    evaluations_per_step: int
    params: int
    flops: int
    weight_bytes: int
    peak_memory_bytes: int
    image_latency_s: float
    sustained_image_latency_s: float
    time: Mapping[str, float]
    decoder: DecoderCost
    matrix_names: tuple[str, ...]

    def paper_row(self) -> PaperRow:
        return PaperRow(self.params, self.flops, self.weight_bytes, self.image_latency_s)

    def describe(self) -> str:
        """What the latency stands for."""
        work = f"{self.steps} steps x {self.evaluations_per_step}"
        if self.convention == "paper":
            return f"as the KIND authors count: {work} at the GPU's peak"
        return f"{self.unit}, {self.precision}, {work} evaluations"

    def to_dict(self) -> dict[str, Any]:
        """The keys of a plan, as far as they have a meaning without weights."""
        storage = {"storage": "dense"} if self.rank is None else {"storage": "factored", "rank": self.rank}
        return {
            "arch": self.arch,
            "num_classes": self.num_classes,
            "convention": self.convention,
            "profile": self.profile,
            "unit": self.unit,
            "form": None,
            "classes": [],
            "precision": self.precision,
            "rank": self.rank,
            "steps": self.steps,
            "evaluations_per_step": self.evaluations_per_step,
            "params": self.params,
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "image_latency_s": self.image_latency_s,
            "sustained_image_latency_s": self.sustained_image_latency_s,
            "time": dict(self.time),
            "decoder": {"params": self.decoder.params, "flops": self.decoder.flops},
            "binding": [],
            "optimality_gap": 0.0,
            "matrices": {name: {**storage, "precision": self.precision} for name in self.matrix_names},
        }


def architecture_cost(
    arch: str,
    spec: ModelSpec,
    rank: int | None,
    profile: DeviceProfile,
    convention: Convention,
    precision: Precision | Literal["auto"] = "auto",
    unit: Unit | Literal["auto"] = "auto",
    steps: int | None = None,
    evaluations_per_step: int = 2,
) -> ArchitectureCost:
    """The cost of `spec` at an active rank, None for dense; "auto" is fp32, on the unit that is fastest with it.

    Raises `UsageError` for a rank outside 1..D, for a unit that the profile has no figure for, and under `paper` for
    another unit or precision than the GPU in fp32.
    """
    model_cost(spec, convention, rank)  # refuses the rank
    if convention == "paper":
        if unit not in ("auto", "gpu") or precision not in ("auto", "fp32"):
            raise UsageError("--convention paper is fp32 at the GPU's peak: leave out --unit and --precision")
        return _paper_cost(arch, spec, rank, profile, steps or PAPER_STEPS, evaluations_per_step)
    check_unit(precision, unit)
    chosen: Precision = "fp32" if precision == "auto" else precision
    units = profile.units_for(chosen) if unit == "auto" else (unit,)
    steps = steps or EXACT_STEPS
    costs = [_exact_cost(arch, spec, rank, profile, chosen, one, steps, evaluations_per_step) for one in units]
    return min(costs, key=lambda cost: cost.sustained_image_latency_s)


def paper_row_of_plan(spec: ModelSpec, plan: Plan, profile: DeviceProfile) -> PaperRow:
    """The authors' figures for what one image sees of a planned model: every matrix as the plan stores it.

    Modulation counts as the networks that the authors have, baked or not. `spec` is the checkpoint's.
    """
    rest = [part for part in model_cost(spec, "paper").parts if part.name not in ("projections", "mlp")]
    params, flops = (sum(getattr(part, what) for part in rest) for what in ("params", "flops"))
    first = {matrix.name for matrix in spec.weight_types().values()}
    for matrix in spec.matrices():
        chosen = plan.matrices[matrix.name]
        shared = matrix_cost(spec, matrix, chosen.storage, chosen.shared_rank, 0, 0, "fp32")
        if spec.shared_factors and plan.form == "switch" and chosen.storage == "factored" and chosen.shared_rank:
            shared = in_common(shared, matrix.name in first)
        tailor = matrix_cost(spec, matrix, "factored", chosen.tailor_rank or 0, 0, 0, "fp32")
        params, flops = params + shared.params + tailor.params, flops + shared.flops + tailor.flops
    return PaperRow(params, flops, 4 * params, flops * PAPER_EVALUATIONS / profile.unit("gpu").peak("fp32").value)


def _paper_cost(
    arch: str, spec: ModelSpec, rank: int | None, profile: DeviceProfile, steps: int, per_step: int
) -> ArchitectureCost:
    row = paper_table(spec, rank, profile)
    latency_s = row.latency_s * (steps * per_step) / PAPER_EVALUATIONS
    return ArchitectureCost(
        arch, spec.num_classes, "paper", rank, profile.name, "gpu", "fp32", steps, per_step,
        row.params, row.flops, row.memory_bytes, row.memory_bytes, latency_s, latency_s,
        image_time(steps, steps, per_step, row.latency_s / PAPER_EVALUATIONS, 0.0), NO_DECODER, _names(spec),
    )  # fmt: skip


def _exact_cost(
    arch: str,
    spec: ModelSpec,
    rank: int | None,
    profile: DeviceProfile,
    precision: Precision,
    unit: Unit,
    steps: int,
    per_step: int,
) -> ArchitectureCost:
    fixed = deployed_fixed_cost(spec, spec.num_classes, steps, False, precision)
    matrices: list[MatrixCost] = [
        matrix_cost(spec, matrix, "dense" if rank is None else "factored", rank or 0, 0, 0, precision)
        for matrix in spec.matrices()
    ]
    decoder = decoder_cost(spec)
    weight_bytes = fixed.weight_bytes + sum(matrix.weight_bytes for matrix in matrices) + 4 * decoder.params
    memory_bytes = sum(matrix_memory_bytes(matrix, per_step) for matrix in matrices)
    burst, sustained = (
        image_time(
            steps,
            steps,
            per_step,
            (
                fixed_latency_s(fixed, profile, unit, lasting, per_step)
                + sum(matrix_latency_s(matrix, profile, unit, precision, lasting, per_step) for matrix in matrices)
            )
            / per_step,
            decoder.latency_s(profile, unit, "fp32", lasting),
        )
        for lasting in (False, True)
    )
    return ArchitectureCost(
        arch, spec.num_classes, "exact", rank, profile.name, unit, precision, steps, per_step,
        params=fixed.params + sum(matrix.params for matrix in matrices),
        flops=fixed.flops + sum(matrix.flops for matrix in matrices),
        weight_bytes=weight_bytes,
        peak_memory_bytes=memory_bytes + fixed_memory_bytes(fixed, per_step, decoder),
        image_latency_s=burst["image_s"],
        sustained_image_latency_s=sustained["image_s"],
        time=sustained,
        decoder=decoder,
        matrix_names=_names(spec),
    )  # fmt: skip


def _names(spec: ModelSpec) -> tuple[str, ...]:
    return tuple(matrix.name for matrix in spec.matrices())
