"""A cut: the checkpoint that truncation leaves, healed or not, and what is known of it before anything is exported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kind_edge.budget.plan import Plan
from kind_edge.deploy.merge import class_indices, truncate
from kind_edge.deploy.merge_check import check_merge
from kind_edge.deploy.quality import Healing, Quality, heldout_quality, overall
from kind_edge.deploy.request import OpenedModel
from kind_edge.deploy.resizing import at_planned_size
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.model.checkpoint import Checkpoint, as_stored


@dataclass(frozen=True)
class Cut:
    """`merge_db`: the merged model at full rank against the gated one. `quality` is of `truncated`, as it is here."""

    truncated: Checkpoint
    merge_db: float
    quality: tuple[Quality, ...]
    healing: Healing | None = None

    @property
    def healed(self) -> bool:
        """Whether the weights are other than truncation left them."""
        return self.healing is not None and self.healing.kept


def make_cut(model: OpenedModel, plan: Plan) -> Cut:
    """What a plan leaves of a model. Raises `GateError` if merging changes the function."""
    sized = at_planned_size(model, plan)
    merge_db = check_merge(sized.checkpoint, plan, timesteps_of(model, plan))
    truncated = truncated_by(plan, sized)
    return Cut(truncated, merge_db, quality_of(model, plan, truncated))


def truncated_by(plan: Plan, sized: OpenedModel) -> Checkpoint:
    """The model, at the plan's size, cut as planned; at another size no rank is cut, so nothing need be calibrated."""
    return truncate(sized.checkpoint, plan, None if plan.resize else sized.calibration)


def quality_of(model: OpenedModel, plan: Plan, truncated: Checkpoint) -> tuple[Quality, ...]:
    """On the held-out images beside the checkpoint; nothing where there are none."""
    kept, heldout = class_indices(model.checkpoint, plan.classes), model.heldout
    if heldout is None:
        return ()
    return heldout_quality(model.checkpoint, truncated, plan.form, kept, heldout, timesteps_of(model, plan))


def timesteps_of(model: OpenedModel, plan: Plan) -> torch.Tensor:
    """Of the plan's sampler, [S], float64."""
    return torch.from_numpy(sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps).timestep)


def judged(
    model: OpenedModel,
    plan: Plan,
    cut: Cut,
    healed: Checkpoint,
    seconds: float,
    steps: int,
    deviation: Callable[[Checkpoint], float],
) -> Cut:
    """The cut with the healed weights, as they will be stored, or with its own where those are no better.

    Measured on held-out images; where there are none, by `deviation` from the full model.
    """
    healed = as_stored(healed, model.checkpoint)
    quality = quality_of(model, plan, healed)
    if quality:
        measure: Any = "held-out deviation" if model.checkpoint.spec.distilled else "held-out loss"
        before, after = overall(cut.quality), overall(quality)
    else:
        measure, before, after = "deviation", deviation(cut.truncated), deviation(healed)
    found = after if math.isfinite(after) else None
    report = Healing(seconds, steps, measure, before, found, found is not None and found < before)
    return Cut(healed, cut.merge_db, quality, report) if report.kept else dataclasses.replace(cut, healing=report)


def healing_state(destination: Path) -> Path:
    """The file beside a bundle in which unfinished healing is kept."""
    real = Path(os.path.realpath(destination))
    return real.parent / f".{real.name}.heal" / "state.safetensors"


def healing_key(plan: Plan) -> str:
    """What unfinished healing can go on for: the same cut of the same model, sampled alike, for however long."""
    same = (
        "checkpoint_sha256",
        "form",
        "classes",
        "sampler",
        "steps",
        "guidance",
        "truncation",
        "calibration",
        "resize",
    )
    values = plan.to_dict()
    ranks = {name: {**matrix, "precision": None} for name, matrix in values["matrices"].items()}
    return hashlib.sha256(json.dumps([ranks, *(values[name] for name in same)]).encode()).hexdigest()
