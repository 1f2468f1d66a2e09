"""The plan: everything the solver decided, as a value that can be stored, read and replayed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from kind_edge.bounded import read_object
from kind_edge.budget.image_time import FACTORS
from kind_edge.budget.precision import PRECISIONS, Precision
from kind_edge.errors import InputError, nearest
from kind_edge.model.names import weight_type
from kind_edge.model.spec import Form, ModelSpec, branch_of, default_sampler

SCHEMA_VERSION = 2
"""1: kind-edge 0.1.0, whose plans maximised the layers' retained energy; still read, with nothing predicted."""

Storage = Literal["dense", "factored", "dropped"]
Modulation = Literal["baked", "baked-fp16", "network"]
"""A table of rows per step (and label) in fp32 or fp16, or the networks that they come from."""


@dataclass(frozen=True)
class MatrixPlan:
    """How one matrix is stored. *switch* has `learngene_rank` and `tailor_rank`; *single* and *union* have `rank`.

    `precision` is that of all its weights (learngene and tailors) in the plan's default file.
    """

    storage: Storage
    precision: str
    learngene_rank: int | None = None
    tailor_rank: int | None = None
    rank: int | None = None

    @property
    def shared_rank(self) -> int:
        """Rank of the part that every image sees."""
        return (self.learngene_rank if self.rank is None else self.rank) or 0

    @property
    def gone(self) -> bool:
        """Whether no component of it is left."""
        return self.storage == "dropped" and not self.shared_rank and not self.tailor_rank

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """`flops` and `evaluation_latency_s` are one evaluation at batch 1, `*image_latency_s` one whole image.

    `precision` is what the app loads (int8 where any matrix is), `precisions` what is written: fp32 and int8 unless
    another one was asked for, which is written alone. `limits` are what was
    asked for, in the solver's units; `binding` those that kept the plan from being better; `prices` what a tenth more
    of each of these would buy: the limit raised, and the figures of the plan within it.
    `predicted_loss_increase` is relative to the loss of the uncut model, `predicted_frechet` the distance that follows
    from it; None where that was never measured. `minimised` is the loss, or one of the costs at a limited loss.
    `optimality_gap` is how far from the best the plan may be, relative to what was minimised; None for a plan that was
    changed by hand.
    Latencies come from the profile's measured table or from the roofline (`latency_source`); where a limit on latency
    was asked for, it holds for the sustained one, with `burst` for that at first.
    `dense` holds the same figures of the dense fp32 model of the same shape: what percentages refer to.
    `guidance` is what the sampling loop does; a distilled model has its own, `inside_guidance`, in its prediction.
    `time` says where the sustained latency of an image goes (see `image_time`), `teacher_time` where it would go if the
    teacher of a distilled model were cut like this; both are empty where nothing is known.
    `decoder`: what turns latents into pixels, where it was given: its autoencoder, and what it adds to the figures.
    `resize`: the depth and width that the model takes first, by which method, and the seconds of healing after which
    its quality is as predicted; empty where it keeps its own.
    `coreml`: where Core ML runs on the device, or was asked for: what its packages would take (see `budget.coreml`).
    """

    model: str
    checkpoint_sha256: str
    profile: str
    unit: Literal["cpu", "gpu", "npu"]
    form: Form
    classes: tuple[str, ...]
    precision: str
    precisions: tuple[str, ...]
    sampler: str
    steps: int
    guidance: float
    evaluations_per_step: int
    modulation: Modulation
    truncation: Literal["whitened", "plain"]
    calibration: str
    params: int
    flops: int
    weight_bytes: int
    peak_memory_bytes: int
    evaluation_latency_s: float
    image_latency_s: float
    sustained_image_latency_s: float
    predicted_loss_increase: float | None
    predicted_frechet: float | None
    limits: Mapping[str, float]
    binding: tuple[str, ...]
    prices: Mapping[str, Mapping[str, float | None]]
    optimality_gap: float | None
    dense: Mapping[str, float]
    matrices: Mapping[str, MatrixPlan]
    inside_guidance: float | None = None
    time: Mapping[str, float] = field(default_factory=dict)
    teacher_time: Mapping[str, float] = field(default_factory=dict)
    minimised: Literal["loss", "flops", "weight_bytes", "peak_memory_bytes", "latency_ns"] = "loss"
    latency_source: Literal["measured table", "roofline estimate"] = "roofline estimate"
    burst: bool = False
    decoder: Mapping[str, int | str] = field(default_factory=dict)
    resize: Mapping[str, float | str] = field(default_factory=dict)
    coreml: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def strength(self) -> float:
        """Guidance of an image, whether the loop does it or the model has it inside."""
        return self.guidance if self.inside_guidance is None else self.inside_guidance

    @property
    def null_branch(self) -> bool:
        """Whether the deployed model has a null class: not where one class is folded in, nor with guidance inside."""
        return self.form == "switch" and self.inside_guidance is None

    @property
    def baked(self) -> bool:
        """Whether modulation comes from a table; the model is then asked for a step of the plan, not for a timestep."""
        return self.modulation != "network"

    @property
    def dropped_branches(self) -> tuple[str, ...]:
        """Branches of which no matrix is left ("blocks.3.attn"); their blocks go on without them."""
        return dropped_branches(self.matrices)

    def matrix_precisions(self, file_precision: str) -> dict[str, str]:
        """Precision of every matrix in the file of that precision: the int8 file keeps what the plan wants in fp32.

        A plan without any int8 matrix says nothing of its int8 file, in which every matrix is int8 then.
        """
        mixed = file_precision == self.precision == "int8"
        return {name: matrix.precision if mixed else file_precision for name, matrix in self.matrices.items()}

    def to_dict(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values["matrices"] = {name: matrix.to_dict() for name, matrix in self.matrices.items()}
        values |= {name: list(getattr(self, name)) for name in _LISTS}
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Plan:
        """Parse strictly; anything unknown, missing or of the wrong type is an `InputError`."""
        if values.get("schema_version") == 1:
            values = {key: value for key, value in values.items() if key != "retained_energy"}
            values |= {"predicted_loss_increase": None, "predicted_frechet": None, "prices": {}}
        elif values.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{where}: not a plan of schema version 1 or {SCHEMA_VERSION}; make it anew with kind-edge plan"
            )
        known = {each.name for each in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if key != "schema_version"}
        for key in given:
            if key not in known:
                raise InputError(f"{where}: unknown key {key!r}; nearest known: {nearest(key, known)}")
        if missing := sorted(known - set(given) - set(_LATER)):
            raise InputError(f"{where}: missing {', '.join(missing)}")
        if not isinstance(given["matrices"], Mapping):
            raise InputError(f"{where}: matrices: got {given['matrices']!r:.60}, want an object")
        matrices = {name: _matrix(matrix, f"{where}: matrices: {name}") for name, matrix in given["matrices"].items()}
        _check_types({**given, "matrices": {}}, cls, where)
        if not given["classes"]:
            raise InputError(f"{where}: classes: got none, want at least one")
        if given["precision"] not in given["precisions"]:
            raise InputError(f"{where}: precision {given['precision']} is not among precisions {given['precisions']}")
        _check_times(given, where)
        if given.get("resize") and not _is_resize(given["resize"]):
            raise InputError(f"{where}: resize: got {given['resize']!r:.90}, want {', '.join(_RESIZE)}; solve again")
        if given.get("decoder") and set(given["decoder"]) != set(_DECODER):
            raise InputError(f"{where}: decoder: got {given['decoder']!r:.60}, want {', '.join(_DECODER)}")
        if given.get("coreml") and not set(_COREML) <= set(given["coreml"]) <= {*_COREML, *_COREML_FIGURES}:
            raise InputError(
                f"{where}: coreml: got {given['coreml']!r:.60}, want {', '.join(_COREML)}, and its figures"
            )
        lists = {name: tuple(given[name]) for name in _LISTS}
        return cls(**{**given, **lists, "matrices": matrices})


_LISTS = ("classes", "precisions", "binding")
_LATER = (
    "inside_guidance",
    "time",
    "teacher_time",
    "minimised",
    "latency_source",
    "burst",
    "decoder",
    "coreml",
    "resize",
)
"""Fields that plans of kind-edge 0.1.0 do not have."""
_RESIZE = ("depth", "width", "method", "heal_s")
_DECODER = ("autoencoder_sha256", "precision", "tiles", "params", "flops", "weight_bytes")
_COREML = ("mark", "target", "layout", "weights", "denoiser_bytes", "app_bytes")
_COREML_FIGURES = (
    "sampler_bytes", "decoder_bytes", "limit_bytes",
    *(f"{unit}_{name}_s" for unit in ("npu", "gpu") for name in ("image_latency", "sustained_image_latency")),
)  # fmt: skip


def _is_resize(values: Mapping[str, Any]) -> bool:
    """Whole blocks and channels, a method's name, and seconds."""
    if set(values) != set(_RESIZE):
        return False
    sizes = all(isinstance(values[name], int) and values[name] > 0 for name in ("depth", "width"))
    seconds = values["heal_s"]
    return sizes and isinstance(values["method"], str) and not isinstance(seconds, str) and seconds >= 0


def _check_times(values: Mapping[str, Any], where: str) -> None:
    """Empty, or whole: what is shown of a time is computed from its factors."""
    for name in ("time", "teacher_time"):
        found = values.get(name, {})
        if found and (set(found) != set(FACTORS) or found["evaluations_per_step"] < 1 or found["image_s"] <= 0):
            raise InputError(f"{where}: {name}: got {found!r:.60}, want {', '.join(FACTORS)}")
    if values.get("teacher_time") and not values.get("time"):
        raise InputError(f"{where}: teacher_time: there is no time to compare it with")


def _matrix(values: Any, where: str) -> MatrixPlan:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: got {values!r:.60}, want an object")
    try:
        matrix = MatrixPlan(**values)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error
    _check_types(values, MatrixPlan, where)
    for name in ("learngene_rank", "tailor_rank", "rank"):
        if (getattr(matrix, name) or 0) < 0:
            raise InputError(f"{where}: {name}: got {getattr(matrix, name)}, want at least 0")
    return matrix


def _check_types(values: Mapping[str, Any], cls: type, where: str) -> None:
    """Refuse what is not of its field's type; JSON knows no tuples, so lists are taken for them."""
    kinds = get_type_hints(cls)
    for key, value in values.items():
        if not _fits(value, kinds[key]):
            choices = get_args(kinds[key]) if get_origin(kinds[key]) is Literal else ()
            wanted = ", ".join(choices) or getattr(kinds[key], "__name__", str(kinds[key]))
            raise InputError(f"{where}: {key}: got {value!r:.60}, want {wanted}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, str, type(None)):
        return isinstance(value, kind) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if get_origin(kind) is tuple:
        strings = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        return strings and len(set(value)) == len(value)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, get_args(kind)[1]) for item in value.values())
    return any(_fits(value, alternative) for alternative in get_args(kind))  # int | None


def read_plan(path: Path) -> Plan:
    return Plan.from_dict(read_object(path, "the plan"), str(path))


def check_replayable(plan: Plan, spec: ModelSpec) -> None:
    """A stored plan must be about this model's matrices, and say of each what its form needs; `InputError` if not."""
    names = {matrix.name for matrix in spec.matrices()}
    if odd := sorted(names ^ set(plan.matrices)):
        raise InputError(f"the plan and the model do not have the same matrices: {', '.join(odd[:3])}; solve again")
    wanted = ("learngene_rank", "tailor_rank") if plan.form == "switch" else ("rank",)
    for name, matrix in plan.matrices.items():
        if any(getattr(matrix, key) is None for key in wanted):
            raise InputError(f"the plan's matrix {name} lacks {' or '.join(wanted)}; solve again")
        if matrix.storage == "dropped" and matrix.shared_rank:
            raise InputError(f"the plan's matrix {name} is dropped, but has rank {matrix.shared_rank}; solve again")
        if matrix.gone and branch_of(name) not in plan.dropped_branches:
            raise InputError(
                f"the plan drops {name}, but not all of {branch_of(name)}: a branch is dropped whole or not at all; "
                "solve again"
            )
    _check_in_common(plan, spec)
    _check_precisions(plan)
    if not {plan.precision} <= set(plan.precisions) <= set(PRECISIONS):
        raise InputError(f"the plan's precisions {', '.join(plan.precisions)} cannot be written; solve again")
    if not 0 < plan.guidance < 100 or plan.evaluations_per_step not in (1, 2):
        raise InputError(f"the plan's guidance {plan.guidance} is out of range; solve again")
    if plan.inside_guidance != spec.inside_guidance or (spec.distilled and plan.guidance != 1.0):
        raise InputError(f"the plan's guidance is not that inside the model, {spec.inside_guidance}; solve again")
    if spec.distilled and (plan.steps not in spec.step_counts or plan.sampler != default_sampler(spec.objective)):
        raise InputError(f"the plan's {plan.steps} {plan.sampler} steps are not what the model is for; solve again")


def _check_in_common(plan: Plan, spec: ModelSpec) -> None:
    """What blocks have in common is stored once, so they all store it alike."""
    if not spec.shared_factors or plan.form != "switch":
        return
    for kind, first in spec.weight_types().items():
        for name, matrix in plan.matrices.items():
            own, wanted = ((m.storage, m.learngene_rank, m.precision) for m in (matrix, plan.matrices[first.name]))
            if weight_type(name) == kind and own != wanted:
                raise InputError(
                    f"the plan stores {name} as {own}, {first.name} as {wanted}, but the model's blocks have their "
                    f"factors of {kind} in common; solve again"
                )


def _check_precisions(plan: Plan) -> None:
    """Every matrix has the plan's precision, but that an int8 plan may keep some in fp32; what is gone has none."""
    left = {name: matrix for name, matrix in plan.matrices.items() if not matrix.gone}
    for name, matrix in left.items():
        if matrix.precision not in PRECISIONS:
            raise InputError(f"the plan's matrix {name} is {matrix.precision}, which cannot be written; solve again")
        allowed = ("fp32", "int8") if plan.precision in ("fp32", "int8") else (plan.precision,)
        if matrix.precision not in allowed:
            raise InputError(f"the plan is {plan.precision}, but its matrix {name} is {matrix.precision}; solve again")
    if plan.precision in PRECISIONS and plan.precision != (label := file_precision(plan.matrices)):
        raise InputError(f"the plan is called {plan.precision}, but its matrices make it {label}; solve again")
    if plan.precision in PRECISIONS and plan.unit not in PRECISIONS[plan.precision].units:  # type: ignore[index]
        raise InputError(f"the plan is {plan.precision}, which does not run on the {plan.unit}; solve again")


def file_precision(matrices: Mapping[str, MatrixPlan]) -> Precision:
    """What a file of these matrices is called: as the matrices that are not fp32, if there are any."""
    found = [matrix.precision for matrix in matrices.values() if matrix.precision != "fp32"]
    return cast(Precision, found[0]) if found else "fp32"


def dropped_branches(matrices: Mapping[str, MatrixPlan]) -> tuple[str, ...]:
    """Names of the branches ("blocks.3.attn") of which no matrix is left, in the order of the matrices."""
    kept = {branch_of(name) for name, matrix in matrices.items() if not matrix.gone}
    return tuple(branch for branch in dict.fromkeys(map(branch_of, matrices)) if branch not in kept)


def full_rank(plan: Plan, ranks: Mapping[str, tuple[int, int]]) -> Plan:
    """The same plan with every matrix at the ranks (learngene, tailor) of the checkpoint: what merge is checked at."""
    matrices = {}
    for name, matrix in plan.matrices.items():
        learngene, tailor = ranks[name]
        if plan.form == "switch":
            whole = dataclasses.replace(matrix, learngene_rank=learngene, tailor_rank=tailor)
        else:
            whole = dataclasses.replace(matrix, rank=learngene + tailor * len(plan.classes))
        storage: Storage = "factored" if matrix.storage == "dropped" else matrix.storage
        matrices[name] = dataclasses.replace(whole, storage=storage)
    return dataclasses.replace(plan, matrices=matrices)
