"""Old and new classes together: the checkpoint that `adapt` writes, and what planning wants beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kind_edge.errors import InputError
from kind_edge.model.calibration import Calibration, calibrate_on_images, load_calibration
from kind_edge.model.checkpoint import (
    CALIBRATION,
    HELDOUT,
    HELDOUT_IMAGES,
    HELDOUT_LATENTS,
    Checkpoint,
    read_tensors,
    weight_files,
    write_tensors,
)
from kind_edge.training.data import TrainingData
from kind_edge.training.nested import CALIBRATION_IMAGES
from kind_edge.training.newcomers import LABELS, Request


def join(
    source: Checkpoint,
    kept_classes: Sequence[str],
    new_classes: Sequence[str],
    trained: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> Checkpoint:
    """The first classes of `source` that are kept, then new ones, then the null label.

    All old tensors keep their bytes; new rows take their dtype.
    """
    tensors = {}
    for name, old in _stored_tensors(source).items():
        new = trained[name].to(old.dtype) if ".tailors." in name or name == LABELS else None
        kept = [old[: len(kept_classes)]]
        if new is None:
            tensors[name] = old
        elif name == LABELS:
            tensors[name] = torch.cat([*kept, new[:-1], old[-1:]])
        else:
            tensors[name] = torch.cat([*kept, new])
    classes = (*kept_classes, *new_classes)
    spec = dataclasses.replace(source.spec, num_classes=len(classes))
    return Checkpoint(spec, classes, tensors, provenance)


def _stored_tensors(source: Checkpoint) -> dict[str, Tensor]:
    """As they lie in the file, `pos_embed` too, which loading may have widened."""
    assert source.path is not None
    tensors: dict[str, Tensor] = {}
    for file in weight_files(source.path):
        tensors |= read_tensors(file)
    return tensors


def stored_calibration(request: Request) -> Calibration | None:
    """Of the old classes; None where none stays, or none is stored (planning then makes one for all classes)."""
    assert request.source.path is not None
    path = request.source.path / CALIBRATION
    return load_calibration(path, request.source.spec) if request.kept and path.exists() else None


def measure(joined: Checkpoint, data: TrainingData, first: int) -> Calibration:
    """On images of the new classes, which are numbered from `first` in the joined checkpoint."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:CALIBRATION_IMAGES]
    return calibrate_on_images(joined.model(), data.batch(chosen), data.labels[chosen] + first)


def mix(old: Calibration, new: Calibration, classes: tuple[int, int]) -> Calibration:
    """Every class counts the same, as if all had been measured at once: an expectation over classes is their mean.

    The null branch is mixed, too: its weights are the old ones, but guidance shows it images of the new classes.
    """
    share = classes[1] / sum(classes)

    def mixed(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.lerp(a[name], b[name], share) for name in a}

    source = "training images of the new classes, and what was stored of the old"
    sides = (mixed(old.pooled, new.pooled), mixed(old.null, new.null), mixed(old.outputs, new.outputs))
    return Calibration(sides[0], sides[1], source, sides[2])


def stored_heldout(request: Request) -> dict[str, Tensor]:
    """The held-out items and labels of the old classes; empty where none stays or none is stored."""
    assert request.source.path is not None
    path = request.source.path / HELDOUT
    if not request.kept or not path.exists():
        return {}
    tensors = read_tensors(path)
    if set(tensors) not in ({HELDOUT_IMAGES, "labels"}, {HELDOUT_LATENTS, "labels"}):
        raise InputError(f"{path}: holds {', '.join(sorted(tensors))}; want {HELDOUT_IMAGES} and labels")
    return tensors


def save_heldout(output: Path, old: Mapping[str, Tensor], new: Mapping[str, Tensor], first: int) -> None:
    """Old items, then new ones, whose labels are counted from `first`."""
    parts = [dict(old)] if old else []
    if new:
        parts.append({**new, "labels": new["labels"].long() + first})
    if not parts:
        return
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    few = int(joined["labels"].max()) < 256
    joined["labels"] = joined["labels"].to(torch.uint8 if few else torch.int32)
    write_tensors(output / HELDOUT, joined)
