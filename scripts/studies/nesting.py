"""What a cut of the learngene alone costs, without retraining: the teacher and what was distilled from it.

Every matrix keeps the leading share of its learngene, and its whole tailors, for all classes in switch form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.merge import truncate
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.quality import heldout_losses, heldout_quality
from kind_edge.deploy.request import OpenedModel, open_model
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import ModelSpec
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import judged_labels, sample_checkpoint, sampling_of
from studies.anysize import PROFILE, Matrices, deployed_flops, timesteps_of
from studies.decomposition import labelled_figures
from studies.statistics import in_percent, markdown, paragraph
from studies.steps import teacher_of
from studies.store import Record, Store, Subject

NAME = "nesting"
PERCENTS = (100, 75, 50, 33)
WANTED_AT_HALF = 1.3


def run(subject: Subject, output: Path, images: int) -> list[Record]:
    """The model at every cut, and its teacher where it has one."""
    family = [subject] if subject.teacher_sha256 is None else [teacher_of(subject.teacher_sha256), subject]
    return [record for each in family for record in _cuts(each, output, images)]


def _cuts(subject: Subject, output: Path, images: int) -> list[Record]:
    model, store = open_model(subject.folder), Store(output, NAME, subject)
    sampling = dataclasses.asdict(sampling_of(model.checkpoint))
    kind = "student" if model.checkpoint.spec.distilled else "teacher"
    base = make_plan(subject.folder, profile=PROFILE, precision="fp32", form="switch")
    rows = []
    for percent in PERCENTS:
        own = {"kind": kind, "percent": percent, "images": images, "seed": 0, **sampling}
        own["judge_sha256"] = Judge.load().judge_sha256
        rows.append(store.run(f"{kind}-{percent}", own, partial(_figures, model, base, percent, images)))
    if model.heldout is not None and not model.checkpoint.spec.distilled:
        rows.append(store.run("whole-heldout", {"kind": "whole"}, partial(_whole_loss, model)))
    return rows


def _whole_loss(model: OpenedModel) -> dict[str, float]:
    """Mean diffusion loss over the classes, nothing cut: to be compared between trainings."""
    assert model.heldout is not None
    full = model.checkpoint
    losses = heldout_losses(full, full, "switch", list(range(full.spec.num_classes)), model.heldout)
    return {"heldout_loss": float(np.mean([each.full for each in losses if each.name != "null"]))}


def _figures(model: OpenedModel, base: Plan, percent: int, images: int) -> dict[str, Any]:
    full = model.checkpoint
    matrices = learngene_cut(full.spec, percent)
    cut = full if percent == 100 else truncate(full, dataclasses.replace(base, matrices=matrices), model.calibration)
    cut = Checkpoint(cut.spec, cut.class_names, cut.tensors, full.provenance)
    sampled = sample_checkpoint(cut, images, 0)
    figures = labelled_figures(Judge.load(), sampled, judged_labels(cut.class_names))
    figures["flops"] = deployed_flops(full.spec, matrices, base)
    if model.heldout is not None and percent < 100:
        kept, grid = list(range(full.spec.num_classes)), timesteps_of(full)
        found = heldout_quality(full, cut, "switch", kept, model.heldout, grid)
        figures["heldout_change"] = float(np.mean([each.change for each in found if each.name != "null"]))
    return figures


def learngene_cut(spec: ModelSpec, percent: int) -> Matrices:
    ranks = {shape.name: spec.ranks(shape.name) for shape in spec.matrices()}
    return {
        name: MatrixPlan("factored", "fp32", max(1, round(own.learngene * percent / 100)), own.tailor)
        for name, own in ranks.items()
    }


def text(records: Sequence[Record]) -> str:
    """One row per model and cut, and whether half the learngene is enough."""
    if not records:
        return ""
    header = ("model", "learngene", "FLOPs", "Fréchet", "over its full rank", "accuracy", "worst class", "held-out")
    kinds = ("teacher", "student")
    of = {kind: {r["conditions"]["percent"]: r for r in records if r["conditions"]["kind"] == kind} for kind in kinds}
    rows, claims = [], []
    for rung in (found for found in of.values() if found.keys() >= set(PERCENTS)):
        whole = rung[100]["figures"]["frechet"]
        rows += [_row(rung[percent], whole) for percent in PERCENTS]
        ratio, name = rung[50]["figures"]["frechet"] / whole, rung[50]["checkpoint"]["model"]
        verdict = "met" if ratio <= WANTED_AT_HALF else "missed"
        claims.append(f"- {name}, half the learngene: {ratio:.2f} x (wanted: at most {WANTED_AT_HALF}): {verdict}")
    for record in (record for record in records if record["conditions"]["kind"] == "whole"):
        loss = record["figures"]["heldout_loss"]
        claims.append(f"- {record['checkpoint']['model']}, nothing cut, has a held-out loss of {loss:.4f}")
    own = records[0]["conditions"]
    judge = own["judge_sha256"][:12]
    conditions = paragraph(
        f"{own['images']:,} images each, seed {own['seed']}, as each model recommends; judge {judge}. "
        "Held-out: by how much the diffusion loss rises; of a distilled model, how much of its prediction changes."
    )
    return "\n\n".join([markdown(header, rows), conditions, "\n".join(claims)])


def _row(record: Record, whole: float) -> tuple[str, ...]:
    figures, own = record["figures"], record["conditions"]
    change = f"{100 * figures['heldout_change']:+.1f} %" if "heldout_change" in figures else "–"
    name = f"{record['checkpoint']['model']}, {own['steps']} steps"
    return (
        name, in_percent(own["percent"] / 100), f"{figures['flops'] / 1e6:.1f} M",
        f"{figures['frechet']:.2f}", f"{figures['frechet'] / whole:.2f}", in_percent(figures["class_accuracy"], 1),
        in_percent(figures["worst_class_accuracy"], 1), change,
    )  # fmt: skip
