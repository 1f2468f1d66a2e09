"""What only an export knows and a report shows: the front round the plan, time and bytes by part, the whole model's
pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kind_edge.budget.breakdown import deployment_of, front_around, seconds_by_part
from kind_edge.budget.cost import model_cost
from kind_edge.budget.plan import Plan
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.deploy.assemble import PICTURE_CHANNELS, PREVIEW_IMAGES
from kind_edge.deploy.decoder import planned_decoder
from kind_edge.deploy.graph_facts import bytes_by_part
from kind_edge.deploy.grid import save_grid
from kind_edge.deploy.merge import class_indices
from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.report import FULL_PICTURE
from kind_edge.deploy.runtime import to_pixels
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.sampling import denoiser, sample

MOST_FLOPS = 2e12
"""Of all pictures by the whole model: some ten seconds of a laptop's CPU. Beyond that fewer are drawn."""


def report_facts(
    plan: Plan, source: Source, request: Request | None, device: DeviceProfile, default_model: Path, rows: int
) -> dict[str, Any]:
    """For the manifest's `report`. `request` None: the plan was replayed, and the front is that without limits."""
    deployment = deployment_of(plan, source, device, rows, planned_decoder(source.decoders, plan))
    return {
        "front": front_around(plan, source, request or deployment.request),
        "seconds": seconds_by_part(deployment, plan.matrices),
        "bytes": bytes_by_part(default_model),
    }


def draw_whole_model(folder: Path, checkpoint: Checkpoint, plan: Plan) -> None:
    """What the uncut model draws of the plan's classes, laid out like the preview. Latents have no picture here."""
    spec = checkpoint.spec
    if spec.channels not in PICTURE_CHANNELS or spec.pixels_per_latent > 1:
        return
    each = model_cost(spec.dense(), "exact").flops * plan.steps * (1 if spec.distilled or plan.strength == 1 else 2)
    columns = min(PREVIEW_IMAGES, int(MOST_FLOPS / (each * len(plan.classes))))
    if not columns:
        return
    shape = (spec.channels, spec.image_size, spec.image_size)
    noise = torch.from_numpy(np.tile(gaussian_noise(0, 0, columns, shape), (len(plan.classes), 1, 1, 1)))
    classes = torch.tensor(class_indices(checkpoint, plan.classes)).repeat_interleave(columns)
    denoise = denoiser(checkpoint.model(), plan.steps, plan.strength)
    images = sample(denoise, noise, classes, spec.objective, plan.steps, plan.sampler)
    save_grid(to_pixels(images.numpy()), folder / FULL_PICTURE, columns, labels=plan.classes)
