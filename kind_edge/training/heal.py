"""Training on from a checkpoint: what truncation took away, a few hundred steps give back in part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from kind_edge.errors import InputError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import load_fashion_mnist
from kind_edge.training.loop import STATE, Progress, TrainState, load_state, run, save_state, start
from kind_edge.training.train import finish, pick_device, tensors

HEAL_STEPS = 300
HEAL_WARMUP_STEPS = 30
HEAL_RATE_SHARE = 0.3
"""Of the learning rate that the model was trained with: the weights are close to good ones already."""


def heal_config(checkpoint: Checkpoint, steps: int = HEAL_STEPS, seed: int = 0) -> TrainConfig:
    """A short run in the way the checkpoint was trained, for its ranks as they are now.

    `checkpoint.provenance` should hold the configuration of the original run; without one the defaults are taken.
    """
    original = checkpoint.provenance.get("config")
    config = TrainConfig(checkpoint.spec) if original is None else TrainConfig.from_dict(original, "provenance: config")
    return dataclasses.replace(
        config,
        spec=checkpoint.spec,
        images=steps * config.batch_size,
        learning_rate=config.learning_rate * HEAL_RATE_SHARE,
        warmup_steps=min(HEAL_WARMUP_STEPS, steps),
        seed=seed,
    )


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
    place = pick_device(device)
    dataset = load_fashion_mnist(data)
    output.mkdir(parents=True, exist_ok=True)
    state = load_state(output, config, place) if (output / STATE).exists() else start(config, place)
    if state.step == 0:
        init_from(state, checkpoint)
    images, labels = tensors(dataset.train_images, dataset.train_labels)
    run(config, state, images.to(place), labels, lambda s: save_state(output, s), on_progress)
    finish(config, state, output, dataset)
    return output


def init_from(state: TrainState, checkpoint: Checkpoint) -> None:
    """Replace the fresh weights of a run, and their average, by the checkpoint's. In place."""
    weights = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    state.model.load_state_dict(weights)
    state.ema.load_state_dict(weights)
