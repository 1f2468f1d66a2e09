"""The second stage of a training: every learngene in the order of what its components carry, and every cut taught.

Nested dropout (Rippel et al., "Learning Ordered Representations with Nested Dropout", 2014) from the first step costs
quality at full rank. Here it starts from a finished model, whose learngenes are reordered by whitened SVD, which
changes nothing at full rank; and the cuts learn from the whole, which itself goes on learning from the data alone.
"""

from __future__ import annotations

import dataclasses

import torch

from kind_edge.model.calibration import Calibration, calibrate_on_images
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.truncation import reordered
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData
from kind_edge.training.distributed import Processes
from kind_edge.training.state import TrainState, start_from

RATE_SHARE = 0.2
"""Of the first stage's learning rate: the weights are good ones already."""
WARMUP_STEPS = 50
CALIBRATION_IMAGES = 1024


def nested_config(config: TrainConfig) -> TrainConfig | None:
    """The second stage as a run of its own; None where there is none to be had, or none is wanted."""
    spec = config.spec
    if not spec.factored or spec.learngene_rank == 0 or config.nested_share == 0:
        return None
    stage = dataclasses.replace(
        config,
        spec=dataclasses.replace(spec, nested=True),
        images=max(1, round(config.images * config.nested_share)),
        learning_rate=config.learning_rate * RATE_SHARE,
        nested_share=0.0,
    )
    return dataclasses.replace(stage, warmup_steps=min(WARMUP_STEPS, config.warmup_steps, stage.steps))


def start_nested(
    stage: TrainConfig, checkpoint: Checkpoint, data: TrainingData, processes: Processes | None = None
) -> TrainState:
    """The second stage at its start, from what the first one made."""
    ordered = reordered(checkpoint, calibrated(checkpoint, data))
    model = dataclasses.replace(ordered, spec=stage.spec).model().train().requires_grad_(True)
    return start_from(stage, model, processes)


def calibrated(checkpoint: Checkpoint, data: TrainingData) -> Calibration:
    """Input covariances over some of the training images."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:CALIBRATION_IMAGES]
    return calibrate_on_images(checkpoint.model(), data.batch(chosen), data.labels[chosen])
