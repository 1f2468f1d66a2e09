"""Trainings that settled choices: what docs/results.md reports of them, made anew.

trials    trains the four short runs (KIND, dense, with label embedding, epsilon) into FOLDER and judges each
twin      trains the dense transformer of the preset fashion-mnist's shape into FOLDER and judges it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRIALS = (
    "fashion-mnist-short",
    "fashion-mnist-short-dense",
    "fashion-mnist-short-label",
    "fashion-mnist-short-epsilon",
)
TWIN = ("fashion-mnist-dense",)
TRIAL_IMAGES = 2_000
TRIAL_GUIDANCE = (1.0, 1.5)
TWIN_GUIDANCE = (1.0, 1.5, 1.75)


def judge(folder: Path, images: int, guidance: float) -> dict[str, Any]:
    from kind_edge.deploy.evaluation import evaluate

    return {"model": folder.name, **evaluate(folder, images, guidance=guidance).to_dict()}


def trials(output: Path) -> list[dict[str, Any]]:
    return train_and_judge(output, TRIALS, TRIAL_GUIDANCE)


def twin(output: Path) -> list[dict[str, Any]]:
    return train_and_judge(output, TWIN, TWIN_GUIDANCE)


def train_and_judge(output: Path, presets: Sequence[str], strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Existing runs are gone on with, finished ones only judged."""
    from kind_edge.training.config import preset
    from kind_edge.training.train import train

    results = []
    for name in presets:
        folder = output / name
        if not (folder / "config.json").exists():
            train(preset(name), folder, resume=(folder / "state.safetensors").exists())
        for guidance in strengths:
            results.append(judge(folder, TRIAL_IMAGES, guidance))
            print(json.dumps(brief(results[-1])), file=sys.stderr, flush=True)
    return results


def brief(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("model", "guidance", "images", "frechet", "recall", "precision", "class_accuracy")
    return {key: row[key] for key in keys} | {"worst_class": min(row["per_class_accuracy"].values())}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | guidance | images | Fréchet | recall | precision | accuracy | worst class |",
        "|---|" + "--:|" * 7,
    ]
    for row in map(brief, rows):
        figures = " | ".join(f"{row[key]:.3f}" for key in ("frechet", "recall", "precision"))
        accuracy, worst = f"{row['class_accuracy']:.2%}", f"{row['worst_class']:.1%}"
        lines.append(f"| {row['model']} | {row['guidance']:g} | {row['images']} | {figures} | {accuracy} | {worst} |")
    return "\n".join(lines)
