"""Few steps against many: a distilled model at each of its step counts, beside its guided teacher.

All are exported for every class in fp32 and drawn through ONNX Runtime, as many images each, from the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kind_edge.deploy.evaluation import evaluate
from kind_edge.deploy.pipeline import export
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.shipped import shipped_models
from kind_edge.model.spec import check_sampling
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import sampling_of
from studies.statistics import in_percent, markdown
from studies.store import Record, Store, Subject, subject_of

NAME = "steps"
PROFILE = "snapdragon8g3"
"""Any does: nothing is limited, and nothing timed."""

IMAGES = 5_000
TEACHER_STEPS = (20, 50)
TARGETS = {"frechet_4_over_teacher_20": 1.10, "frechet_2_over_teacher_20": 1.35, "accuracy_drop_4": 2.0}


def run(subject: Subject, output: Path, images: int) -> list[Record]:
    checkpoint = load_checkpoint(subject.folder)
    if not checkpoint.spec.distilled:
        raise UsageError(f"{subject.name} is not distilled; --checkpoint takes a model that is")
    teacher = teacher_of(checkpoint.provenance["distilled"]["teacher_sha256"])
    guidance = sampling_of(load_checkpoint(teacher.folder)).guidance
    rows = [judged(Store(output, NAME, teacher), "teacher", steps, guidance, images) for steps in TEACHER_STEPS]
    for steps in checkpoint.spec.step_counts:
        check_sampling(checkpoint.spec, steps, sampling_of(checkpoint).guidance)
        rows.append(judged(Store(output, NAME, subject), "student", steps, sampling_of(checkpoint).guidance, images))
    return rows


def teacher_of(sha256: str) -> Subject:
    """Among the shipped models, by its hash."""
    for name in shipped_models():
        found = subject_of(name)
        if found.sha256 == sha256:
            return found
    raise UsageError(f"the teacher, {sha256[:12]}, is not among the shipped models ({', '.join(shipped_models())})")


def judged(store: Store, kind: str, steps: int, guidance: float, images: int) -> Record:
    conditions = {
        "kind": kind, "steps": steps, "guidance": guidance, "images": images, "seed": 0, "precision": "fp32",
        "judge_sha256": Judge.load().judge_sha256,
    }  # fmt: skip
    name = f"{kind}-{steps}-steps-guidance-{guidance:g}"
    return store.run(name, conditions, partial(figures, store.subject.folder, steps, guidance, images))


def figures(model: Path, steps: int, guidance: float, images: int) -> dict[str, Any]:
    """What the judge says of images that an exported model draws."""
    with TemporaryDirectory() as folder:
        bundle = export(
            model, profile=PROFILE, precision="fp32", steps=steps, guidance=guidance, output=Path(folder, "out")
        )
        quality = evaluate(bundle.path, images, 0).quality
    return {**dataclasses.asdict(quality), "evaluations": steps * bundle.plan.evaluations_per_step}


def summary(records: Sequence[Record]) -> dict[str, float]:
    """The figures that have targets, accuracy in points; none where their runs are missing."""
    by = {(record["conditions"]["kind"], record["conditions"]["steps"]): record["figures"] for record in records}
    wanted = [("teacher", 20), ("student", 4), ("student", 2)]
    if any(key not in by for key in wanted):
        return {}
    teacher, four, two = (by[key] for key in wanted)
    return {
        "frechet_4_over_teacher_20": four["frechet"] / teacher["frechet"],
        "frechet_2_over_teacher_20": two["frechet"] / teacher["frechet"],
        "accuracy_drop_4": 100 * (teacher["class_accuracy"] - four["class_accuracy"]),
    }


def text(records: Sequence[Record]) -> str:
    """One row per step count, and how the targets were met."""
    if not records:
        return ""
    order = sorted(records, key=lambda each: (each["conditions"]["kind"] != "teacher", -each["conditions"]["steps"]))
    header = ("model", "steps", "evaluations an image", "Fréchet", "recall", "precision", "accuracy", "worst class")
    table = markdown(header, map(_row, order))
    own = order[0]["conditions"]
    conditions = (
        f"{own['images']:,} images each, seed {own['seed']}, Euler steps, fp32 through ONNX Runtime; judge "
        f"{own['judge_sha256'][:12]}."
    )
    found = summary(records)
    words = {
        "frechet_4_over_teacher_20": "Fréchet distance at 4 steps over the teacher's at 20",
        "frechet_2_over_teacher_20": "at 2 steps over the teacher's at 20",
        "accuracy_drop_4": "class accuracy lost at 4 steps, in points",
    }
    claims = [
        f"- {words[key]}: {found[key]:.2f} (wanted: at most {wanted:g}): {'met' if found[key] <= wanted else 'missed'}"
        for key, wanted in TARGETS.items()
        if key in found
    ]
    return "\n\n".join([table, conditions, "\n".join(claims)])


def _row(record: Record) -> tuple[str, ...]:
    figures, own = record["figures"], record["conditions"]
    worst = min(figures["per_class_accuracy"].items(), key=lambda item: item[1])
    guidance = f", guidance {own['guidance']:g}" + (" inside" if own["kind"] == "student" else "")
    return (
        f"{record['checkpoint']['model']}{guidance}", str(own["steps"]), str(figures["evaluations"]),
        *(f"{figures[key]:.3f}" for key in ("frechet", "recall", "precision")),
        in_percent(figures["class_accuracy"], 2), f"{in_percent(worst[1], 1)} ({worst[0]})",
    )  # fmt: skip
