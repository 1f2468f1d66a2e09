"""Decomposition and sizes over trainings instead of noises: the study presets, each trained with three seeds.

The sizes, with healed and dense models, are of the preset that is built like the shipped one: no label embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kind_edge.model.checkpoint import CONFIG
from kind_edge.training.config import preset
from kind_edge.training.state import STATE
from kind_edge.training.train import train
from studies import anysize
from studies.anysize import METHODS, AnySize
from studies.claims import anysize_table, decomposition_table
from studies.decomposition import Decomposition
from studies.pictures import plot_sizes, pyplot
from studies.store import Record, subject_of

PRESETS = ("study", "study-label")
SIZED = PRESETS[:1]


def run(output: Path, images: int, seeds: Sequence[int]) -> dict[str, list[Record]]:
    """Records of every training by preset; finished trainings and runs are only read, begun ones gone on with."""
    found: dict[str, list[Record]] = {}
    for name in PRESETS:
        for seed in seeds:
            folder = output / "weights" / f"{name}-seed{seed}"
            if not (folder / CONFIG).exists():
                train(dataclasses.replace(preset(name), seed=seed), folder, resume=(folder / STATE).exists())
            subject, runs = subject_of(folder), output / folder.name
            found.setdefault(name, []).extend(Decomposition(subject, runs, images, (0,)).run())
            if name in SIZED:
                found[name].extend(AnySize(subject, runs, images, (seed,)).run(METHODS[1:]))
    return found


def table(records: dict[str, list[Record]]) -> str:
    """Two tables at most per preset; ranges are over trainings."""
    parts = []
    for name, own in records.items():
        sizes = [record for record in own if record["study"] == anysize.NAME]
        parts += [name, decomposition_table([record for record in own if record not in sizes])]
        parts += [anysize_table(sizes)] if sizes else []
    return "\n\n".join(parts)


def draw(records: dict[str, list[Record]], album: Path) -> None:
    """The curves of every preset that was cut to sizes."""
    for name, own in records.items():
        if sizes := [record for record in own if record["study"] == anysize.NAME]:
            plot_sizes(pyplot(), sizes, album / f"{name}-sizes.png")
