"""Covariances at both sides of every factored matrix: what makes truncation minimise the error of the *prediction*.

*Inputs*: E[x x^T] over images, tokens and timesteps, once pooled over the classes and once with every gate closed (the
null branch; not of a distilled model, which is deployed without one). *Outputs*, where ranks do not nest: E[g g^T] with
g the gradient, by the matrix's output, of a random projection of the prediction; so g^T e is what the prediction sees
of an error e. Stored as fp16 lower triangles of the covariance over its mean diagonal, and that scale in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, read_tensors, write_tensors
from kind_edge.model.diffusion import TRAIN_STEPS, add_noise, draw_timesteps
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import GatedLinear
from kind_edge.model.sampling import Denoiser, denoiser, sample
from kind_edge.model.spec import ModelSpec

RIDGE = 1e-3
"""Added to the diagonal, as a share of its mean: keeps the whitening finite where calibration saw little."""

BRANCHES = ("pooled", "null", "outputs")
"""Of a stored covariance; the inputs' first."""

Inputs = tuple[Tensor, ...]
"""What the network takes: sample [B, ch, H, W], timestep [B], class index [B], and the span [B] if it is distilled."""
Batches = Iterable[Inputs]


@dataclass(frozen=True)
class Calibration:
    """Covariances by matrix name, of inputs [m, m] and of gradients at the outputs [n, n]; `source` says what they were
    measured on.

    `null` is empty for a distilled model; `outputs` for one whose ranks nest, as nothing orders its learngene anew, and
    tailors alone gain next to nothing by it.
    """

    pooled: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    source: str
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


def covariances(model: DiT, batches: Batches) -> dict[str, Tensor]:
    """E[x x^T] of the input of every factored matrix over all batches, float64, ridge added."""
    found = _Products()

    def collect(name: str, layer: GatedLinear) -> RemovableHandle:
        return layer.register_forward_pre_hook(lambda _, inputs: found.add(name, inputs[0]))

    with _watching(model, collect), torch.no_grad():
        for inputs in batches:
            model(*inputs)
    return found.means()


def output_covariances(model: DiT, batches: Batches, seed: int = 0) -> dict[str, Tensor]:
    """E[g g^T] of the gradient by the output of every factored matrix over all batches, float64, ridge added.

    Of v^T y with y the prediction and v normal noise: its square is in expectation that of the whole prediction.
    """
    found, generator = _Products(), torch.Generator().manual_seed(seed)

    def collect(name: str, layer: GatedLinear) -> RemovableHandle:
        def at_output(_: object, inputs: object, output: Tensor) -> None:
            output.register_hook(lambda gradient: found.add(name, gradient))

        return layer.register_forward_hook(at_output)

    with _watching(model, collect), torch.enable_grad():
        for x, *conditions in batches:
            x = x.detach().requires_grad_()
            prediction = model(x, *conditions)
            noise = torch.randn(prediction.shape, generator=generator)
            torch.autograd.grad(prediction, x, noise.to(prediction))  # leaves no gradient in the model
    return found.means()


class _Products:
    """Means of outer products of rows, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, rows: Tensor) -> None:
        rows = rows.detach().flatten(0, -2)
        self.sums[name] = self.sums.get(name, 0.0) + (rows.T @ rows).double()
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def means(self) -> dict[str, Tensor]:
        """float64, ridge added."""
        return {name: _with_ridge(total / self.counts[name]) for name, total in self.sums.items()}


@contextmanager
def _watching(model: DiT, collect: Callable[[str, GatedLinear], RemovableHandle]) -> Iterator[None]:
    """Hooks that `collect` puts on every factored matrix, while it lasts."""
    hooks = [collect(name, module) for name, module in model.named_modules() if isinstance(module, GatedLinear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_ridge(covariance: Tensor) -> Tensor:
    """No direction matters more than another where all is zero, as at the outputs of a model that was never trained."""
    size = covariance.diagonal().mean()
    return covariance + (RIDGE * size if size > 0 else 1.0) * torch.eye(len(covariance), dtype=covariance.dtype)


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
    outputs = {} if spec.nested else output_covariances(model, batches(False))
    return Calibration(covariances(model, batches(False)), null, "training images", outputs)


def _draw_steps(spec: ModelSpec, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Timesteps [count] as in training; of a distilled model those of its own steps, and their spans [count]."""
    if not spec.distilled:
        return (draw_timesteps(spec.objective, count, generator),)
    counts = torch.tensor(spec.step_counts)[torch.randint(len(spec.step_counts), (count,), generator=generator)]
    steps = (torch.rand(count, generator=generator) * counts).floor()
    return TRAIN_STEPS * (1 - steps / counts), TRAIN_STEPS / counts


def calibrate_on_samples(
    model: DiT, per_class: int = 4, steps: int = 10, seed: int = 0, images: int | None = None
) -> Calibration:
    """Covariances over the model's own sampling trajectories: for checkpoints that come without calibration.

    A distilled model takes each of its step counts instead of `steps`. `images`: no more than so many, of evenly spread
    classes.
    """
    seen = trajectory_inputs(model, per_class, steps, seed, images)
    outputs = {} if model.spec.nested else output_covariances(model, seen)
    return dataclasses.replace(calibrate_on_inputs(model, seen), outputs=outputs)


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
        wanted = wanted.sort().values[torch.arange(images) * len(wanted) // images]
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
    """Covariances of inputs over sampling trajectories, this model's own or another's of the same images."""
    source, classes = "own sampling trajectories", model.spec.num_classes
    if model.spec.distilled:
        return Calibration(covariances(model, seen), {}, source)
    null = [(x, timestep, torch.full_like(labels, classes)) for x, timestep, labels in seen]
    return Calibration(covariances(model, seen), covariances(model, null), source)


def save_calibration(path: Path, calibration: Calibration) -> None:
    write_tensors(path, _packed(calibration), {"source": calibration.source})


def _packed(calibration: Calibration) -> dict[str, Tensor]:
    """As they are stored."""
    tensors: dict[str, Tensor] = {}
    for branch in BRANCHES:
        for name, covariance in getattr(calibration, branch).items():
            scale = covariance.diagonal().mean()
            rows, columns = torch.tril_indices(len(covariance), len(covariance))
            tensors[f"{name}.{branch}.covariance"] = (covariance / scale)[rows, columns].half()
            tensors[f"{name}.{branch}.scale"] = scale.float().reshape(1)
    return tensors


def keep_calibration(calibration: Calibration, checkpoint: Checkpoint) -> Calibration:
    """Beside the checkpoint for the next time; as it comes back from there, so that every time is like the first.

    Where it cannot be written it holds for this process, and is the same.
    """
    stored = _unpacked(_packed(calibration), checkpoint.spec, CALIBRATION)
    if checkpoint.path is not None:
        with suppress(UsageError, OSError):
            save_calibration(checkpoint.path / CALIBRATION, calibration)
    return stored


def load_calibration(path: Path, spec: ModelSpec) -> Calibration:
    """Read covariances back; a file of another model is an `InputError`."""
    return _unpacked(read_tensors(path), spec, str(path))


def _unpacked(tensors: Mapping[str, Tensor], spec: ModelSpec, where: str) -> Calibration:
    found: dict[str, dict[str, Tensor]] = {branch: {} for branch in BRANCHES}
    for branch in BRANCHES:
        kept = any(name.endswith(f".{branch}.covariance") for name in tensors)
        if (branch == "null" and spec.distilled) or (branch == "outputs" and not kept):
            continue
        for shape in spec.matrices():
            size = shape.outputs if branch == "outputs" else shape.inputs
            found[branch][shape.name] = _covariance(where, tensors, f"{shape.name}.{branch}", size)
    return Calibration(found["pooled"], found["null"], "stored with the checkpoint", found["outputs"])


def _covariance(where: str, tensors: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """One of them [size, size], float64."""
    packed, scale = (tensors.get(f"{name}.{part}") for part in ("covariance", "scale"))
    wanted = size * (size + 1) // 2
    if packed is None or scale is None or packed.shape != (wanted,) or scale.shape != (1,):
        got = "nothing" if packed is None else f"shape {tuple(packed.shape)}"
        raise InputError(f"{where}: {name}: file has {got}, model wants {wanted} values")
    if not (torch.isfinite(packed).all() and torch.isfinite(scale).all() and scale > 0):
        raise InputError(f"{where}: {name}: holds NaN or infinity; remove the file or calibrate anew")
    rows, columns = torch.tril_indices(size, size)
    covariance = torch.zeros(size, size, dtype=torch.float64)
    covariance[rows, columns] = packed.double() * scale.double()
    return covariance + covariance.tril(-1).T
