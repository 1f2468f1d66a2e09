"""The decomposition again, over trainings instead of noises: the study presets, each trained with three seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kind_edge.model.checkpoint import CONFIG
from kind_edge.training.config import preset
from kind_edge.training.state import STATE
from kind_edge.training.train import train
from studies import decomposition
from studies.claims import decomposition_table
from studies.store import Record, subject_of

PRESETS = ("study", "study-label")


def run(output: Path, images: int, seeds: Sequence[int]) -> dict[str, list[Record]]:
    """Records of every training by preset; finished trainings and runs are only read, begun ones gone on with."""
    found: dict[str, list[Record]] = {}
    for name in PRESETS:
        for seed in seeds:
            folder = output / "weights" / f"{name}-seed{seed}"
            if not (folder / CONFIG).exists():
                train(dataclasses.replace(preset(name), seed=seed), folder, resume=(folder / STATE).exists())
            study = decomposition.Decomposition(subject_of(folder), output / folder.name, images, (0,))
            found.setdefault(name, []).extend(study.run())
    return found


def table(records: dict[str, list[Record]]) -> str:
    """One table per preset; ranges are over trainings."""
    return "\n\n".join(f"{name}\n\n{decomposition_table(own)}" for name, own in records.items())
