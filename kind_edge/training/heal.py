"""Training on from a checkpoint: what truncation took away, a few hundred steps give back in part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.provenance import Stated
from kind_edge.training.config import TrainConfig
from kind_edge.training.distributed import join
from kind_edge.training.loop import Progress
from kind_edge.training.open import open_data
from kind_edge.training.state import STATE, data_choices, load_state, start_from
from kind_edge.training.train import pick_device, train_to_end

HEAL_STEPS = 300
HEAL_WARMUP_STEPS = 30
HEAL_RATE_SHARE = 0.3
"""Of the learning rate that the model was trained with: the weights are close to good ones already."""


def heal_config(checkpoint: Checkpoint, steps: int = HEAL_STEPS, seed: int = 0) -> TrainConfig:
    """A short run in the way the checkpoint was trained, for its ranks as they are now.

    `checkpoint.provenance` should hold the configuration of the original run; without one the defaults are taken.
    """
    config = _original(checkpoint)
    return dataclasses.replace(
        config,
        spec=checkpoint.spec,
        images=steps * config.batch_size,
        learning_rate=config.learning_rate * HEAL_RATE_SHARE,
        warmup_steps=min(HEAL_WARMUP_STEPS, steps),
        nested_share=0.0,
        seed=seed,
    )


def _original(checkpoint: Checkpoint) -> TrainConfig:
    """With author and licence of the checkpoint, which hold for what is made of its weights, whatever the images."""
    given = checkpoint.provenance.get("config")
    config = TrainConfig(checkpoint.spec) if given is None else TrainConfig.from_dict(given, "provenance: config")
    stated = Stated.from_dict(checkpoint.provenance.get("stated", {}), "provenance: stated")
    return dataclasses.replace(config, stated=Stated(author=stated.author, licence=stated.licence))


def same_config(checkpoint: Checkpoint, images: int | None = None) -> TrainConfig:
    """The run that the checkpoint was trained by, once more from its present weights and at its present size.

    Raises:
        UsageError: the checkpoint is distilled.
    """
    spec = checkpoint.spec
    if spec.distilled:
        raise UsageError(f"--from {checkpoint.path}: it is distilled; train the model it was distilled from")
    # The second stage of the run makes it nested, where there is one.
    config = dataclasses.replace(_original(checkpoint), spec=dataclasses.replace(spec, nested=False))
    return config if images is None else dataclasses.replace(config, images=images)


def train_from(
    checkpoint: Checkpoint,
    config: TrainConfig,
    output: Path,
    *,
    data: Path | None = None,
    device: str = "auto",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Train on from `checkpoint` into folder `output`, which becomes a checkpoint; an interrupted run goes on.

    Weights and their average start as the checkpoint's, the optimizer as new. Raises `InputError` if `config` is for
    another shape than the checkpoint's.
    """
    if config.spec != checkpoint.spec:
        raise InputError("the configuration is for a model of another shape than the checkpoint; use heal_config")
    processes = join(pick_device(device))
    split = open_data(config, data, device=processes.device)
    output.mkdir(parents=True, exist_ok=True)
    if (output / STATE).exists():
        state = load_state(output, config, processes, choices=data_choices(split.training))
    else:
        state = start_from(config, checkpoint.model().train().requires_grad_(True), processes)
    return train_to_end(config, state, split, output, on_progress)
