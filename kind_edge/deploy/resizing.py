"""Other depths and widths of a model: measured once for plans, and made again when such a plan is carried out.

A size is begun from the model's own weights and healed by the whole model, as a cut is, but that all weights learn.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from kind_edge.budget.problem import Source
from kind_edge.budget.sizes import Size, sized_source
from kind_edge.deploy.probe import int8_losses
from kind_edge.deploy.quality import heldout_quality, overall
from kind_edge.deploy.request import OpenedModel
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.sizes_file import find_sizes, healing_file, keep_sizes
from kind_edge.errors import GateError, UsageError
from kind_edge.model.checkpoint import as_stored
from kind_edge.model.one_thread import one_thread
from kind_edge.model.resize import FIT, resized, target_spec
from kind_edge.model.spec import ModelSpec, recommended
from kind_edge.units import format_seconds

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan
    from kind_edge.training.healing import HealingProgress

    OnHealing = Callable[[HealingProgress], None]

SHARES = ((0.5, 1.0), (1.0, 0.5), (0.75, 0.75))
"""Of depth and width, of the sizes that are offered."""

Resize = Mapping[str, float | str]


def size_spec(spec: ModelSpec, resize: Resize) -> ModelSpec:
    """The shape of a model that a plan resizes; its own where `resize` is empty."""
    return target_spec(spec, depth=int(resize["depth"]), width=int(resize["width"])) if resize else spec


def offered(spec: ModelSpec) -> Iterator[ModelSpec]:
    """The shapes that are offered beside the model's own: whole blocks, whole heads."""
    found: set[tuple[int, int]] = set()
    for depth_share, width_share in SHARES:
        depth, heads = max(1, round(depth_share * spec.depth)), max(1, round(width_share * spec.heads))
        unit = math.lcm(spec.head_width, 4)
        width = max(1, round(heads * spec.head_width / unit)) * unit
        if (depth, width) not in found | {(spec.depth, spec.width)}:
            found.add((depth, width))
            yield target_spec(spec, depth=depth, width=width)


def method_for(spec: ModelSpec) -> str:
    """The one that begins nearest to the model; factors that blocks have in common it would take apart."""
    return "front" if spec.shared_factors else FIT


def at_planned_size(model: OpenedModel, plan: Plan) -> OpenedModel:
    """The model as the plan resizes it, not healed yet; itself where the plan leaves its size."""
    if not plan.resize:
        return model
    spec = size_spec(model.checkpoint.spec, plan.resize)
    with one_thread():  # `verify --checkpoint` begins with the same weights, on whatever machine
        begun = resized(model.checkpoint, spec, str(plan.resize["method"]), to_heal=True)
    return dataclasses.replace(model, checkpoint=begun, stored_calibration=None, stored_sensitivity=None)


def check_heal(plan: Plan, heal_s: float | None) -> None:
    """`UsageError` unless a plan that resizes is given the time of healing that its quality is of."""
    needed = float(plan.resize.get("heal_s", 0.0))
    if (heal_s or 0.0) < needed:
        size = f"depth {plan.resize['depth']} and width {plan.resize['width']}"
        given = "it is missing" if heal_s is None else f"got {format_seconds(heal_s)}"
        raise UsageError(
            f"--heal: the plan takes the model at {size}, and its quality is that after {format_seconds(needed)} of "
            f"healing; {given}: add --heal {needed:.0f}s, or longer"
        )


def planned_source(model: OpenedModel, whole: Source, plan: Plan) -> Source:
    """What a stored plan is about: the model, or the size of it that the plan takes."""
    if not plan.resize:
        return whole
    depth, width, method = int(plan.resize["depth"]), int(plan.resize["width"]), str(plan.resize["method"])
    size = find_sizes(model).find(depth, width, method, float(plan.resize["heal_s"]))
    if size is None:
        raise UsageError(
            "the plan takes the model at another size, whose quality is not known here: make it anew with kind-edge "
            "plan --allow-resize, or copy sizes.json beside the checkpoint"
        )
    return sized_source(whole, size, size_spec(model.checkpoint.spec, plan.resize))


def sized_sources(
    model: OpenedModel,
    whole: Source,
    heal_s: float,
    on_healing: OnHealing | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Source]:
    """The sizes that are offered, as something to plan for; those not measured yet are, which takes `heal_s` each.

    What is measured is kept beside the checkpoint, size by size, and an interrupted healing goes on.
    """
    found = []
    for spec in offered(model.checkpoint.spec):
        table = find_sizes(model)
        size = table.find(spec.depth, spec.width, method_for(spec), heal_s)
        if size is None:
            size = measured_size(model, spec, heal_s, on_healing, clock)
            keep_sizes(dataclasses.replace(table, sizes=(*table.sizes, size)), model.checkpoint.path)
        found.append(sized_source(whole, size, spec))
    return found


def measured_size(
    model: OpenedModel,
    spec: ModelSpec,
    heal_s: float,
    on_healing: OnHealing | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Size:
    """Resize to `spec`, heal for so long and measure what is lost, all classes in *switch*, sampled as recommended.

    Only a healing of the same length goes on: what a longer one had learned would be told of this one.
    """
    from kind_edge.training.healing import Lesson, heal, sampler_rows, walk_deviation
    from kind_edge.training.train import hardware

    whole, advice = model.checkpoint, recommended(model.checkpoint.spec, model.checkpoint.provenance)
    kept, null_branch = list(range(whole.spec.num_classes)), not whole.spec.distilled
    method = method_for(spec)
    begun = resized(whole, spec, method, to_heal=True)
    table = sampler_table(advice.sampler, whole.spec.objective, advice.steps)
    guidance = advice.guidance if null_branch else 1.0
    lesson = Lesson(whole, begun, tuple(kept), "switch", sampler_rows(table), guidance, null_branch, whole=True)
    key = f"{model.sha256} {method} {spec.depth} {spec.width} {heal_s:g} {advice}"
    state = healing_file(model.sha256, spec)
    done = heal(lesson, heal_s, state, key, on_healing or (lambda _: None), clock)
    healed = as_stored(done.checkpoint, whole)
    timesteps = torch.from_numpy(table.timestep)
    quality = heldout_quality(whole, healed, "switch", kept, model.heldout, timesteps) if model.heldout else ()
    increase = overall(quality) if quality else walk_deviation(lesson, healed)
    if not math.isfinite(increase):
        raise GateError(f"healing at depth {spec.depth} and width {spec.width} came to numbers that are none")
    size = Size(
        spec.depth, spec.width, method, heal_s, max(0.0, increase), int8_losses(healed), done.steps,
        hardware(torch.device("cpu")),
    )  # fmt: skip
    state.unlink(missing_ok=True)
    return size
