"""Input covariances of every factored matrix: what makes truncation minimise the error of a layer's *output*.

E[x x^T] over images, tokens and timesteps, once pooled over the classes and once with every gate closed (the null
branch; not of a distilled model, which is deployed without one). Stored as fp16 lower triangles of the covariance over
its mean diagonal, and that scale in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kind_edge.errors import InputError
from kind_edge.model.checkpoint import read_tensors, write_tensors
from kind_edge.model.diffusion import TRAIN_STEPS, add_noise, draw_timesteps
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.sampling import Denoiser, denoiser, sample
from kind_edge.model.spec import ModelSpec

RIDGE = 1e-3
"""Added to the diagonal, as a share of its mean: keeps the whitening finite where calibration saw little."""

Inputs = tuple[Tensor, ...]
"""What the network takes: sample [B, ch, H, W], timestep [B], class index [B], and the span [B] if it is distilled."""
Batches = Iterable[Inputs]


@dataclass(frozen=True)
class Calibration:
    """Covariances [m, m] by matrix name. `source` says what they were measured on.

    `null` is empty for a distilled model.
    """

    pooled: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    source: str


def covariances(model: DiT, batches: Batches) -> dict[str, Tensor]:
    """E[x x^T] of the input of every factored matrix over all batches, float64, ridge added."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, GatedLinear):
            continue

        def collect(_: object, inputs: tuple[Tensor, ClassGate], name: str = name) -> None:
            x = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + (x.T @ x).double()
            counts[name] = counts.get(name, 0) + len(x)

        hooks.append(module.register_forward_pre_hook(collect))
    try:
        with torch.no_grad():
            for inputs in batches:
                model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _with_ridge(total / counts[name]) for name, total in sums.items()}


def _with_ridge(covariance: Tensor) -> Tensor:
    return covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)


def calibrate_on_images(model: DiT, images: Tensor, labels: Tensor, seed: int = 0) -> Calibration:
    """Covariances over noised training images [n, ch, H, W] in [-1, 1], at random timesteps of those it works at."""
    spec = model.spec

    def batches(null: bool) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        for x, classes in zip(images.split(64), labels.split(64), strict=True):
            timestep, *span = _draw_steps(spec, len(x), generator)
            noised, _ = add_noise(spec.objective, x, torch.randn(x.shape, generator=generator), timestep)
            yield noised, timestep, torch.full_like(classes, spec.num_classes) if null else classes, *span

    null = {} if spec.distilled else covariances(model, batches(True))
    return Calibration(covariances(model, batches(False)), null, "training images")


def _draw_steps(spec: ModelSpec, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Timesteps [count] as in training; of a distilled model those of its own steps, and their spans [count]."""
    if not spec.distilled:
        return (draw_timesteps(spec.objective, count, generator),)
    counts = torch.tensor(spec.step_counts)[torch.randint(len(spec.step_counts), (count,), generator=generator)]
    steps = (torch.rand(count, generator=generator) * counts).floor()
    return TRAIN_STEPS * (1 - steps / counts), TRAIN_STEPS / counts


def calibrate_on_samples(model: DiT, per_class: int = 4, steps: int = 10, seed: int = 0) -> Calibration:
    """Covariances over the model's own sampling trajectories: for checkpoints that come without calibration.

    A distilled model takes each of its step counts instead of `steps`.
    """
    return calibrate_on_inputs(model, trajectory_inputs(model, per_class, steps, seed))


def trajectory_inputs(
    model: DiT, per_class: int = 4, steps: int = 10, seed: int = 0, images: int | None = None
) -> list[Inputs]:
    """What a model is asked at every step while it draws `per_class` images of every class.

    `images`: no more than so many, of evenly spread classes.
    """
    spec = model.spec
    seen: list[Inputs] = []
    counts = spec.step_counts or (steps,)
    wanted = torch.arange(spec.num_classes).repeat(per_class)
    if images is not None and images < len(wanted):
        wanted = wanted[torch.arange(images) * len(wanted) // images]
    for count, classes in itertools.product(counts, wanted.split(64)):
        walk = denoiser(model, count, 1.0 if spec.inside_guidance is None else spec.inside_guidance)

        def record(x: Tensor, timestep: Tensor, classes: Tensor, count: int = count, walk: Denoiser = walk) -> Tensor:
            span = (torch.full_like(timestep, TRAIN_STEPS / count),) if spec.distilled else ()
            seen.append((x, timestep, classes, *span))
            return walk(x, timestep, classes)

        generator = torch.Generator().manual_seed(seed + len(seen))
        noise = torch.randn(len(classes), spec.channels, spec.image_size, spec.image_size, generator=generator)
        sample(record, noise, classes, spec.objective, count)
    return seen


def calibrate_on_inputs(model: DiT, seen: Sequence[Inputs]) -> Calibration:
    """Covariances over sampling trajectories, this model's own or another's of the same images and classes."""
    source, classes = "own sampling trajectories", model.spec.num_classes
    if model.spec.distilled:
        return Calibration(covariances(model, seen), {}, source)
    null = [(x, timestep, torch.full_like(labels, classes)) for x, timestep, labels in seen]
    return Calibration(covariances(model, seen), covariances(model, null), source)


def save_calibration(path: Path, calibration: Calibration) -> None:
    tensors: dict[str, Tensor] = {}
    for branch in ("pooled", "null"):
        for name, covariance in getattr(calibration, branch).items():
            scale = covariance.diagonal().mean()
            rows, columns = torch.tril_indices(len(covariance), len(covariance))
            tensors[f"{name}.{branch}.covariance"] = (covariance / scale)[rows, columns].half()
            tensors[f"{name}.{branch}.scale"] = scale.float().reshape(1)
    write_tensors(path, tensors, {"source": calibration.source})


def load_calibration(path: Path, spec: ModelSpec) -> Calibration:
    """Read covariances back; a file of another model is an `InputError`."""
    tensors = read_tensors(path)
    pooled: dict[str, Tensor] = {}
    null: dict[str, Tensor] = {}
    for branch, out in [("pooled", pooled)] if spec.distilled else [("pooled", pooled), ("null", null)]:
        for shape in spec.matrices():
            packed, scale = (tensors.get(f"{shape.name}.{branch}.{part}") for part in ("covariance", "scale"))
            wanted = shape.inputs * (shape.inputs + 1) // 2
            if packed is None or scale is None or packed.shape != (wanted,) or scale.shape != (1,):
                got = "nothing" if packed is None else f"shape {tuple(packed.shape)}"
                raise InputError(f"{path}: {shape.name}.{branch}: file has {got}, model wants {wanted} values")
            if not (torch.isfinite(packed).all() and torch.isfinite(scale).all() and scale > 0):
                raise InputError(
                    f"{path}: {shape.name}.{branch}: holds NaN or infinity; remove the file or calibrate anew"
                )
            rows, columns = torch.tril_indices(shape.inputs, shape.inputs)
            covariance = torch.zeros(shape.inputs, shape.inputs, dtype=torch.float64)
            covariance[rows, columns] = packed.double() * scale.double()
            out[shape.name] = covariance + covariance.tril(-1).T
    return Calibration(pooled, null, "stored with the checkpoint")
