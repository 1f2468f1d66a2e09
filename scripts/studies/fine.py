"""Factors that all blocks have in common (FINE): the exported file beside an ordinary one at equal Fréchet distance.

The preset `study` is trained as it is, and with U and V in common at its own learngene rank and at twice that: a rank
more costs a block nothing but a value of s. Each is exported as the smallest file within several predicted losses, with
few classes and with all, and the files' images are judged. Two files are compared where their curves of size over
distance have the same distance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from kind_edge.deploy.evaluation import evaluate
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.pipeline import export
from kind_edge.deploy.quality import HeldoutLoss
from kind_edge.model.checkpoint import CONFIG, load_checkpoint
from kind_edge.training.config import TrainConfig, preset
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import sampling_of
from kind_edge.training.state import STATE
from kind_edge.training.train import train
from kind_edge.units import format_bytes
from studies.progress import tell
from studies.statistics import cell, conditions_line, in_percent, markdown, paragraph, spread_of
from studies.store import Record, Store, having, subject_of

NAME = "fine"
ORDINARY = "study"
RANKS = (48, 24)
"""Of the learngenes on common factors; the ordinary ones have 24."""
PROFILE = "snapdragon8g3"
"""Any does: sizes are the same on all, and nothing else is limited."""
SETS: dict[str, tuple[str, ...] | None] = {"2": ("sneaker", "bag"), "10": None}
"""Classes of a file, by how many they are; a tailor of every block for each stays its own."""
MODULATION = "baked-fp16"
"""As small as it gets: it is the same for all, and weighs much in so small a model."""
LOSSES = ("1%", "5%", "20%")
"""Predicted losses within which the file is to be small."""
IMAGES = 1000

Point = tuple[float, float]
"""Bytes of a file, and its Fréchet distance."""


def models() -> dict[str, TrainConfig]:
    """What is trained, by name."""
    own = preset("study")
    common = {
        f"{NAME}-{rank}": dataclasses.replace(
            own, spec=dataclasses.replace(own.spec, learngene_rank=rank, shared_factors=True)
        )
        for rank in RANKS
    }
    return {ORDINARY: own, **common}


def run_study(output: Path, images: int, seeds: Sequence[int]) -> list[Record]:
    """Every run, seed by seed; finished trainings and runs are only read, begun trainings gone on with."""
    records = []
    for seed in seeds:
        for name, config in models().items():
            folder = output / "weights" / f"{name}-seed{seed}"
            if not (folder / CONFIG).exists():
                config = dataclasses.replace(config, seed=seed)
                train(config, folder, resume=(folder / STATE).exists(), on_progress=tell)
            records += _files(output, folder, name, seed, images)
    return records


def _files(output: Path, folder: Path, name: str, seed: int, images: int) -> list[Record]:
    store, advice = Store(output, NAME, subject_of(folder)), dataclasses.asdict(sampling_of(load_checkpoint(folder)))
    records = []
    for classes in SETS:
        for loss in LOSSES:
            conditions = {
                "model": name, "classes": classes, "max_quality_loss": loss, "modulation": MODULATION,
                "images": images, "seed": seed, **advice, "judge_sha256": Judge.load().judge_sha256,
            }  # fmt: skip
            run = f"{name}-{classes}-classes-{loss.rstrip('%')}-seed{seed}"
            records.append(store.run(run, conditions, partial(_figures, folder, classes, loss, images)))
    return records


def _figures(folder: Path, classes: str, loss: str, images: int) -> dict[str, Any]:
    """The smallest file within a predicted loss, and what the judge says of its images."""
    with TemporaryDirectory() as place:
        bundle = export(
            folder, profile=PROFILE, classes=SETS[classes], minimize="size", max_quality_loss=loss,
            modulation=MODULATION, output=Path(place, "out"),
        )  # fmt: skip
        file = read_manifest(bundle.path).default_model
        matrices = bundle.plan.matrices.values()
        return {
            **dataclasses.asdict(evaluate(bundle.path, images, 0).quality),
            "file_bytes": bundle.files[file],
            "planned_bytes": bundle.plan.weight_bytes,
            "flops": bundle.plan.flops,
            "params": bundle.plan.params,
            "stored_in": bundle.plan.precision,
            "heldout_loss": fmean(each.plan for each in bundle.quality if isinstance(each, HeldoutLoss)),
            "predicted_loss": bundle.plan.predicted_loss_increase,
            "learngene_ranks": sorted({matrix.shared_rank for matrix in matrices}),
            "parity_db": bundle.parity[file],
        }


# --- what is printed --------------------------------------------------------------------------------------------------


def text(records: Sequence[Record]) -> str:
    """A row per model, number of classes and predicted loss; then the ratio of the files at equal distance."""
    if not records:
        return ""
    rows = [
        row
        for classes in SETS
        for loss in LOSSES
        for name in models()
        if (row := _row(having(records, classes=classes, max_quality_loss=loss, model=name)))
    ]
    header = ("classes", "model", "loss", "file", "parameters", "MFLOPs", "held-out loss", "Fréchet", "accuracy")
    compared = [line for classes in SETS for name in list(models())[1:] if (line := _compared(records, classes, name))]
    told = f"`scripts/results {NAME}`, trained models, seeds as ranges: {conditions_line(records)}"
    return "\n\n".join([markdown(header, rows), *map(paragraph, compared), paragraph(told)])


def _row(own: Sequence[Record]) -> tuple[str, ...] | None:
    if not own:
        return None
    conditions, figures = own[0]["conditions"], [record["figures"] for record in own]
    size = spread_of(each["file_bytes"] for each in figures)
    return (
        conditions["classes"],
        conditions["model"],
        f"+{conditions['max_quality_loss'].replace('%', ' %')}",
        format_bytes(round(size.mean)),
        cell(own, "params", 0),
        cell(own, "flops", 2, 1e-6),
        cell(own, "heldout_loss", 4),
        cell(own, "frechet"),
        in_percent(spread_of(each["class_accuracy"] for each in figures).mean, 1),
    )


def _compared(records: Sequence[Record], classes: str, name: str) -> str | None:
    """How large its files are beside the ordinary ones, at the distances that both reach, over all seeds."""
    ratios = []
    for seed in sorted({record["conditions"]["seed"] for record in records}):
        ours, ordinary = (_curve(having(records, classes=classes, seed=seed, model=m)) for m in (name, ORDINARY))
        ratios += [ours_bytes / size for size, distance in ordinary if (ours_bytes := size_at(ours, distance))]
    if ratios:
        found = spread_of(ratios)
        return (
            f"{name}, {classes} classes: at equal Fréchet distance its file has {found.text(2)} times the bytes of the "
            f"ordinary one ({found.count} comparisons)."
        )
    best = [min(distance for _, distance in own) for m in (name, ORDINARY) if (own := _curve_of(records, classes, m))]
    if len(best) < 2:
        return None
    return (
        f"{name}, {classes} classes: no equal Fréchet distance; at its best it has {best[0]:.2f}, the ordinary model "
        f"{best[1]:.2f}."
    )


def size_at(curve: Sequence[Point], distance: float) -> float | None:
    """Bytes at a Fréchet distance, between two points of a curve straight in the logarithms; None beyond its ends."""
    for (small, worse), (large, better) in pairwise(curve):
        if better <= distance <= worse:
            share = 0.0 if worse == better else math.log(distance / worse) / math.log(better / worse)
            return small * (large / small) ** share
    return None


def _curve(own: Sequence[Record]) -> list[Point]:
    """By rising size, without files that a smaller one is better than."""
    points: list[Point] = []
    for record in sorted(own, key=lambda record: record["figures"]["file_bytes"]):
        point = float(record["figures"]["file_bytes"]), float(record["figures"]["frechet"])
        if not points or point[1] < points[-1][1]:
            points.append(point)
    return points


def _curve_of(records: Sequence[Record], classes: str, name: str) -> list[Point]:
    return _curve(having(records, classes=classes, model=name))
