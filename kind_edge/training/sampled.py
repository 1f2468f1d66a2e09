"""Images for the judge, sampled from a checkpoint through the gated model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.sampling import Denoiser, guided, sample
from kind_edge.model.spec import DEFAULT_GUIDANCE, DEFAULT_STEPS, default_sampler
from kind_edge.training.data import CLASS_NAMES
from kind_edge.training.evaluate import Judge, QualityReport

OnProgress = Callable[[int, int], None]
BATCH = 100


@dataclass(frozen=True)
class Sampled:
    """uint8 images [n, H, W, ch] and what each should show, as positions in CLASS_NAMES."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def judged_labels(class_names: tuple[str, ...]) -> list[int]:
    """Positions of class names in the judge's list; the judge knows the ten of Fashion-MNIST alone."""
    unknown = [name for name in class_names if name not in CLASS_NAMES]
    if unknown:
        raise InputError(f"the judge does not know {', '.join(unknown)}; it knows {', '.join(CLASS_NAMES)}")
    return [CLASS_NAMES.index(name) for name in class_names]


def spread(images: int, classes: int) -> NDArray[np.int64]:
    """`images` class indices, as equal in number as can be, sorted."""
    if images < classes:
        raise UsageError(f"--images: got {images}, want at least one for each of {classes} classes")
    return np.sort(np.arange(images) % classes)


@torch.no_grad()
def sample_checkpoint(
    checkpoint: Checkpoint,
    images: int,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    on_progress: OnProgress | None = None,
    sampler: str | None = None,
) -> Sampled:
    """Images of all classes in equal shares, at the checkpoint's recommended steps and guidance unless given."""
    spec, advice = checkpoint.spec, checkpoint.provenance.get("recommended", {})
    steps = steps or int(advice.get("steps", DEFAULT_STEPS))
    guidance = float(advice.get("guidance", DEFAULT_GUIDANCE)) if guidance is None else guidance
    kind = sampler or str(advice.get("sampler", default_sampler(spec.objective)))
    names = judged_labels(checkpoint.class_names)
    index = spread(images, spec.num_classes)
    generator = torch.Generator().manual_seed(seed)
    model = checkpoint.model()
    denoise: Denoiser = guided(model, guidance, spec.num_classes)
    parts = []
    for classes in torch.from_numpy(index).split(BATCH):
        noise = torch.randn(len(classes), spec.channels, spec.image_size, spec.image_size, generator=generator)
        x = sample(denoise, noise, classes, spec.objective, steps, kind)
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        if on_progress:
            on_progress(sum(map(len, parts)), images)
    return Sampled(np.concatenate(parts), np.array(names)[index])


def score(sampled: Sampled, data: Path | None = None, neighbours: bool = True) -> QualityReport:
    return Judge.load(data_root=data).score(sampled.images, sampled.labels, neighbours=neighbours)
