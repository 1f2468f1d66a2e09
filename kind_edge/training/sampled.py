"""Images for the judge, sampled from a checkpoint through the gated model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.sampling import Denoiser, denoiser, sample
from kind_edge.model.spec import ModelSpec, check_sampling, recommended
from kind_edge.training.data import CLASS_NAMES, IMAGE_SIDE
from kind_edge.training.evaluate import Judge, QualityReport

OnProgress = Callable[[int, int], None]
BATCH = 50
"""Images that share an evaluation: 100 no longer fit a core's cache."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: a sampler's name, its steps, and the weight of guidance (1 is none).

    `guidance_inside`: a distilled model has it in its prediction, and no branch costs anything.
    """

    sampler: str
    steps: int
    guidance: float
    guidance_inside: bool = False


@dataclass(frozen=True)
class Sampled:
    """uint8 images [n, H, W, ch] and what each should show, as positions in CLASS_NAMES."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def judged_labels(class_names: tuple[str, ...]) -> list[int]:
    """Positions of class names in the judge's list; the judge knows the ten of Fashion-MNIST alone."""
    unknown = [name for name in class_names if name not in CLASS_NAMES]
    if unknown:
        named = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise InputError(
            f"the judge does not know the model's classes {named}; it knows {', '.join(CLASS_NAMES)}. Give a model of "
            "these, or measure this one against its own real images: kind-edge eval with --features inception --data"
        )
    return [CLASS_NAMES.index(name) for name in class_names]


def check_judgeable(spec: ModelSpec) -> None:
    """Refuse a model whose images the judge cannot take, before any is drawn."""
    wanted = (1, IMAGE_SIDE)
    if (spec.channels, spec.image_size) != wanted or spec.pixels_per_latent != 1:
        kind = "latents" if spec.pixels_per_latent != 1 else "images"
        raise InputError(
            f"the model draws {spec.image_size} x {spec.image_size} {kind} of {spec.channels} channels, the judge "
            f"knows {IMAGE_SIDE} x {IMAGE_SIDE} images of 1; look at its pictures with kind-edge generate"
        )


def spread(images: int, classes: int) -> NDArray[np.int64]:
    """`images` class indices, as equal in number as can be, sorted."""
    if images < classes:
        raise UsageError(f"--images: got {images}, want at least one for each of {classes} classes")
    return np.sort(np.arange(images) % classes)


def sampling_of(
    checkpoint: Checkpoint, steps: int | None = None, guidance: float | None = None, sampler: str | None = None
) -> Sampling:
    """What is given, and for the rest what the checkpoint recommends."""
    advice = recommended(checkpoint.spec, checkpoint.provenance)
    return Sampling(
        sampler or advice.sampler,
        steps or advice.steps,
        advice.guidance if guidance is None else guidance,
        checkpoint.spec.distilled,
    )


def draw_noise(spec: ModelSpec, images: int, seed: int) -> Tensor:
    """Initial noise [n, ch, H, W], batch by batch from one generator."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.channels, spec.image_size, spec.image_size)
    counts = [min(BATCH, images - start) for start in range(0, images, BATCH)]
    return torch.cat([torch.randn(count, *shape, generator=generator) for count in counts])


def draw(
    denoise: Denoiser,
    noise: Tensor,
    classes: Tensor,
    objective: str,
    sampling: Sampling,
    on_progress: OnProgress | None = None,
) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, ch] from noise [n, ch, H, W] and what `denoise` takes for classes, its rows [n, ...]."""
    parts = []
    for start, wanted in zip(noise.split(BATCH), classes.split(BATCH), strict=True):
        x = sample(denoise, start, wanted, objective, sampling.steps, sampling.sampler)
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        if on_progress:
            on_progress(sum(map(len, parts)), len(noise))
    return np.concatenate(parts)


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
    sampling = sampling_of(checkpoint, steps, guidance, sampler)
    check_sampling(checkpoint.spec, sampling.steps, sampling.guidance, sampling.sampler)
    names = judged_labels(checkpoint.class_names)
    check_judgeable(checkpoint.spec)
    index = spread(images, checkpoint.spec.num_classes)
    return Sampled(draw_classes(checkpoint, index, seed, sampling, on_progress), np.array(names)[index])


def draw_classes(
    checkpoint: Checkpoint,
    index: NDArray[np.int64],
    seed: int,
    sampling: Sampling,
    on_progress: OnProgress | None = None,
) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, ch] of the checkpoint's classes `index` [n], through the gated model."""
    spec = checkpoint.spec
    denoise = denoiser(checkpoint.model(), sampling.steps, sampling.guidance)
    noise = draw_noise(spec, len(index), seed)
    return draw(denoise, noise, torch.from_numpy(index), spec.objective, sampling, on_progress)


@dataclass(frozen=True)
class Evaluation:
    """What was judged, how its images were drawn, and what the judge says: all that a figure means something with."""

    kind: str  # "checkpoint" or "bundle"
    checkpoint_sha256: str  # of the checkpoint, or of the one that the bundle was cut from
    precision: str  # of the weights as they ran: of a checkpoint always fp32
    sampling: Sampling
    seed: int
    quality: QualityReport

    def to_dict(self) -> dict[str, Any]:
        """One flat object."""
        own = {"kind": self.kind, "checkpoint_sha256": self.checkpoint_sha256, "weights_precision": self.precision}
        return {**own, **dataclasses.asdict(self.sampling), "seed": self.seed, **dataclasses.asdict(self.quality)}


def score(sampled: Sampled) -> QualityReport:
    """What the shipped judge says of images."""
    return Judge.load().score(sampled.images, sampled.labels)
