"""New classes for a trained model: tailors of their own on a learngene that stays as it is.

The run is an ordinary one of a model that has the new classes alone: its shared weights are the checkpoint's, frozen,
and its tailors (with the label rows, where the model has labels) are all that is trained. No old tailor takes part, so
none can change; at the end the new rows are put behind the old ones, whose bytes are copied.

No image is trained with its gate closed: the null branch is the learngene, and nothing of it learns.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kind_edge.errors import UsageError
from kind_edge.model.calibration import save_calibration
from kind_edge.model.checkpoint import CALIBRATION, load_checkpoint, save_checkpoint
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import DataSplit
from kind_edge.training.distributed import Alone, launched_processes
from kind_edge.training.joined import join, measure, mix, save_heldout, stored_calibration, stored_heldout
from kind_edge.training.loop import Progress, run
from kind_edge.training.losses import NestedLoss
from kind_edge.training.newcomers import Request, begin, origins_of
from kind_edge.training.open import dataset_at, open_data
from kind_edge.training.state import (
    TrainState,
    averaged_tensors,
    check_state,
    data_choices,
    load_state,
    save_state,
    start_from,
)
from kind_edge.training.train import hardware, heldout_tensors, is_begun, pick_device, training_tools, warn_of_unnoted

IMAGES = 60_000
WARMUP_STEPS = 100
AS_TRAINED = ("batch_size", "learning_rate", "weight_decay", "gradient_clip")
"""Of the run that made the checkpoint, what its new tailors are trained with, too."""


def adapt(
    checkpoint: Path,
    data: Path,
    classes: Sequence[str],
    output: Path,
    *,
    start: str | None = None,
    learngene_only: bool = False,
    images: int | None = None,
    class_map: Path | None = None,
    autoencoder: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train tailors for `classes` of `data` into folder `output`, which becomes a checkpoint of old and new classes.

    `data`, `class_map` and `autoencoder` are as in `open_data`; `start` and `learngene_only` as in `Request` (with
    `learngene_only` the old classes are dropped). An interrupted run goes on with `resume`.

    Raises:
        UsageError: a class that the data does not have or the model has already, a model without tailors, data of
            another shape than the model's, or an `output` that holds something.
        InputError: the checkpoint or the data cannot be read.
    """
    place = pick_device(device)
    if launched_processes() > 1:
        raise UsageError("adapt trains little, so it runs in one process: start it without a launcher")
    resume = is_begun(output, resume, on_note)
    request = Request(load_checkpoint(checkpoint), tuple(classes), start, learngene_only)
    config = adapt_config(request, dataset_at(data), images)
    if resume:
        warn_of_unnoted(check_state(output, config, request.choices()), output, on_note)
    split = open_data(
        config, data, only=classes, class_map=class_map, autoencoder=autoencoder, device=place, report=on_note
    )
    return adapt_to(request, config, split, output, device=place, resume=resume, on_progress=on_progress)


def adapt_to(
    request: Request,
    config: TrainConfig,
    split: DataSplit,
    output: Path,
    *,
    device: torch.device,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """`adapt` with data that is open already: `split` holds the new classes alone, in the order of the request."""
    calibration, heldout = stored_calibration(request), stored_heldout(request)  # read first: they may be corrupt
    origins = origins_of(request, split.training, config.seed)
    model, alone = begin(request, config, origins), Alone(device)
    choices = {**request.choices(), **data_choices(split.training)}
    state = load_state(output, config, alone, model, choices) if resume else start_from(config, model, alone)
    output.mkdir(parents=True, exist_ok=True)
    nested = NestedLoss(config.spec.objective, config.seed) if config.spec.nested else None
    run(config, state, split.training, lambda s: save_state(output, config, s, choices), on_progress, nested)
    provenance = _provenance(request, config, state, split, origins)
    joined = join(request.source, request.kept, request.classes, averaged_tensors(config, state), provenance)
    if calibration is not None or not request.kept:
        measured = measure(joined, split.training, len(request.kept))
        weights = len(request.kept), len(request.classes)
        save_calibration(output / CALIBRATION, measured if calibration is None else mix(calibration, measured, weights))
    save_heldout(output, heldout, heldout_tensors(split.heldout), len(request.kept))
    save_checkpoint(output, joined)
    return output


def adapt_config(request: Request, dataset: str, images: int | None = None, seed: int = 0) -> TrainConfig:
    """A run of the new classes alone, trained the way the checkpoint was, as far as it says how."""
    trained = request.source.provenance.get("config", {})
    values = {
        **{key: trained[key] for key in AS_TRAINED if key in trained},
        "model": dataclasses.replace(request.source.spec, num_classes=len(request.classes)).to_dict(),
        "dataset": dataset,
        "images": IMAGES if images is None else images,
        "warmup_steps": WARMUP_STEPS,
        "null_share": 0.0,
        "nested_share": 0.0,
        "seed": seed,
    }
    return TrainConfig.from_dict(values, f"{request.source.path}: provenance: config")


def _provenance(
    request: Request, config: TrainConfig, state: TrainState, split: DataSplit, origins: Sequence[str] | None
) -> dict[str, Any]:
    """That of the checkpoint, whose learngene this is, and how the new classes came; no judgement of the old whole."""
    old = {key: value for key, value in request.source.provenance.items() if key not in ("quality", "adapted")}
    count = len(request.kept) + len(request.classes)
    if isinstance(old.get("config"), Mapping):
        old["config"] = {**old["config"], "model": {**config.to_dict()["model"], "num_classes": count}}
    adapted = {
        "command": "kind-edge " + shlex.join(sys.argv[1:]),
        **request.choices(),
        "origins": None if origins is None else list(origins),
        "config": config.to_dict(),
        "data": dict(split.facts),
        "data_sha256": split.training.sha256,
        "hardware": hardware(state.processes.device),
        "seconds": round(state.seconds, 1),
        "images_seen": state.step * config.batch_size,
        "trained_values": state.tailors.weight.numel() + sum(p[:-1].numel() for p in state.parameters().values()),
        "final_loss": state.loss,
        "tools": training_tools(),
        "before": request.source.provenance.get("adapted"),
    }
    return {**old, "adapted": adapted}
