"""Other depths and widths of a model as choices of the planner: what each of them loses was measured, after healing.

A resized model is no approximation of what it was: its loss follows from no spectrum. So a table beside the checkpoint
says by how much the held-out loss was up after a stated time of healing (of a distilled model, which share of its
prediction changed), and what int8 adds. Lower ranks of such a model were not measured, so they are not offered.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.bounded import read_object
from kind_edge.budget.influence import measured_number
from kind_edge.budget.loss import LossModel, MatrixLoss
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import make_plan
from kind_edge.budget.problem import Request, Source
from kind_edge.errors import InputError, NoPlanError
from kind_edge.model.spec import Form, ModelSpec

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Size:
    """One measured size: the relative increase of the loss at full rank, and what int8 adds to it by matrix.

    `method` and seconds of healing, `steps` of the optimizer in them, and on what (`hardware`) it was measured.
    """

    depth: int
    width: int
    method: str
    heal_s: float
    increase: float
    int8: Mapping[str, float]
    steps: int
    hardware: str


@dataclass(frozen=True)
class SizeTable:
    """The measured sizes of one checkpoint, as they lie beside it."""

    checkpoint_sha256: str
    sizes: tuple[Size, ...]

    def find(self, depth: int, width: int, method: str, heal_s: float) -> Size | None:
        wanted = depth, width, method, heal_s
        own = (size for size in self.sizes if (size.depth, size.width, size.method, size.heal_s) == wanted)
        return next(own, None)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        values["sizes"] = [{**size, "int8": dict(size["int8"])} for size in values["sizes"]]
        return json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Any, where: str) -> SizeTable:
        """`InputError` for what is no such table."""
        if not isinstance(values, Mapping) or values.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"{where}: not a table of sizes of schema version {SCHEMA_VERSION}; remove it")
        try:
            sizes = tuple(_size(each) for each in values["sizes"])
            return cls(str(values["checkpoint_sha256"]), sizes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: damaged ({error!r:.80}); remove it, and measure the sizes anew") from error


def read_sizes(path: Path) -> SizeTable:
    try:
        values = read_object(path, "the sizes")
    except InputError as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and measure the sizes anew") from error
    return SizeTable.from_dict(values, str(path))


def _size(values: Mapping[str, Any]) -> Size:
    int8 = {str(name): measured_number(value) for name, value in values["int8"].items()}
    depth, width, steps = (int(measured_number(values[name])) for name in ("depth", "width", "steps"))
    method, hardware = str(values["method"]), str(values["hardware"])
    return Size(
        depth,
        width,
        method,
        measured_number(values["heal_s"]),
        measured_number(values["increase"]),
        int8,
        steps,
        hardware,
    )


def sized_source(whole: Source, size: Size, spec: ModelSpec) -> Source:
    """The model at a measured size, `spec`, as something to plan for: at full rank, with precision left to choose."""

    if missing := sorted({shape.name for shape in spec.matrices()} - set(size.int8)):
        raise InputError(
            f"the sizes of {whole.name}: depth {size.depth}, width {size.width} lacks {', '.join(missing[:3])}; remove "
            "sizes.json, and measure the sizes anew"
        )

    def losses(form: Form, classes: Sequence[str]) -> LossModel:
        return full_rank_losses(spec, size, form, len(classes))

    resize: dict[str, float | str] = {
        "depth": size.depth,
        "width": size.width,
        "method": size.method,
        "heal_s": size.heal_s,
    }
    return dataclasses.replace(
        whole, spec=spec, losses=losses, calibration="none: no rank is cut", teacher=None, resize=resize
    )


def full_rank_losses(spec: ModelSpec, size: Size, form: Form, classes: int) -> LossModel:
    """What is lost by the size, in equal shares of the matrices, so that their sum is what was measured."""
    matrices = {}
    shapes = list(spec.matrices())
    for shape in shapes:
        ranks = spec.ranks(shape.name)
        full, tailor = ranks.learngene, ranks.tailor
        if form != "switch":
            full, tailor = min(full + classes * tailor, shape.outputs, shape.inputs), 0
        shared = _at_full_rank(full, size.increase / len(shapes))
        matrices[shape.name] = MatrixLoss(shared, _at_full_rank(tailor, 0.0), size.int8[shape.name])
    return LossModel(matrices, {})


def _at_full_rank(rank: int, loss: float) -> NDArray[np.float64]:
    """[rank + 1]: infinite, but for the last."""
    return np.array([*[math.inf] * rank, loss])


def make_plan_of_any_size(
    sources: Sequence[Source], request: Request, solve: Callable[[Source, Request], Plan] = make_plan
) -> Plan:
    """The best plan over the whole model, which is the first of `sources`, and its other sizes, each found by `solve`.

    Percentages of limits, and the plan's comparison, are of the dense model of the whole one's shape. Raises what
    `make_plan` does: if nothing fits at any size, the refusal of the whole model.
    """
    whole = sources[0]
    asked = dataclasses.replace(request, dense_spec=whole.spec)
    plans: list[Plan] = []
    failures: list[NoPlanError] = []
    for source in sources:
        try:
            plans.append(solve(source, asked))
        except NoPlanError as error:
            failures.append(error)
    if not plans:
        raise failures[0]
    if whole.response is None:  # losses at different steps cannot be compared
        plans = [plan for plan in plans if plan.steps == request.sampling.steps] or plans
    score = _score_of(plans)
    best = min(map(score, plans))
    return min((plan for plan in plans if score(plan) <= best * 1.001), key=lambda plan: plan.image_latency_s)


def _score_of(plans: Sequence[Plan]) -> Callable[[Plan], float]:
    """What plans are compared by: Fréchet distance if it is known of all, else the loss; or what is minimised."""
    minimised = plans[0].minimised
    if minimised == "latency_ns":
        return lambda plan: plan.image_latency_s if plan.burst else plan.sustained_image_latency_s
    if minimised != "loss":
        return lambda plan: float(getattr(plan, minimised))
    if all(plan.predicted_frechet is not None for plan in plans):
        return lambda plan: plan.predicted_frechet or 0.0
    return lambda plan: plan.predicted_loss_increase or 0.0
