"""Measuring a model's sensitivity: one matrix at a time is cut, and the model's output compared with the whole one's.

The model runs on inputs of its own making, so no data is needed: images that it draws, noised to random timesteps of
training; of a distilled model, the states of its own walks from noise. With y its output, the increase of the loss is

    E |y_cut - y|^2 / E |y - target|^2      what the diffusion loss gains, the model being its minimum
    E |y_cut - y|^2 / E |y|^2               of a distilled model, whose target no single image knows

Blocks before the one that is cut see nothing of it, so each of their outputs is computed once.
Symbols: B batch, N tokens, D width, n x m a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kind_edge.budget.influence import Curve, MatrixInfluence, Sensitivity
from kind_edge.budget.loss import branch_of
from kind_edge.budget.whole_model import model_cost
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.diffusion import TRAIN_STEPS, add_noise, draw_timesteps
from kind_edge.model.dit import DiT, patchify, unpatchify
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.sampling import denoiser, sample
from kind_edge.model.spec import ModelSpec, recommended
from kind_edge.model.truncation import SortedFactors, fold_matrix

OnProgress = Callable[[int, int], None]

LEARNGENE_SHARES = (0.75, 0.5, 0.25, 0.125, 0.0)
TAILOR_SHARES = (0.75, 0.5, 0.25, 0.0)
"""Ranks at which every matrix is measured, as shares of its own."""

NULL_SHARE = 0.1
"""Of the inputs of a model with a null branch, as in its training."""

IMAGES, LEAST_IMAGES, CHUNK = 120, 8, 40
"""At most and at least so many inputs, and how many are evaluated together: as many as a core's cache holds."""

MOST_FLOPS = 3e12
"""Of the whole measurement, where LEAST_IMAGES allow it: about two minutes of one core."""

DRAWING_STEPS = 10
"""Sampler steps of the images that an ordinary model draws for itself."""


@dataclass(frozen=True)
class Inputs:
    """A chunk [B, ch, H, W] with its conditions [B], classes by the gate; `target` None: no single image knows it."""

    x: Tensor
    timestep: Tensor
    gate: ClassGate
    span: Tensor | None
    target: Tensor | None


def measure_sensitivity(
    checkpoint: Checkpoint,
    sha256: str,
    calibration: Calibration | None,
    seed: int = 0,
    images: int | None = None,
    on_progress: OnProgress | None = None,
) -> Sensitivity:
    """The table of a checkpoint: every matrix cut at a few ranks and stored in int8, and every branch dropped.

    `images`: inputs; large models get by with fewer. `on_progress` is told how many matrices are done, of how many.
    """
    spec, model = checkpoint.spec, checkpoint.model()
    everyone, names = list(range(spec.num_classes)), [shape.name for shape in spec.matrices()]
    with torch.no_grad():
        probe = _Probe(model, own_inputs(checkpoint, model, images or _images(spec), seed))
        matrices: dict[str, MatrixInfluence] = {}
        for done, name in enumerate(names):
            folded = fold_matrix(checkpoint, name, everyone, "switch", calibration)
            matrices[name] = _influence(probe, name, folded.shared, folded.tailors)
            if on_progress:
                on_progress(done + 1, len(names))
        branches = {branch: probe.without(branch) for branch in dict.fromkeys(branch_of(name) for name in names)}
    seen = sum(len(each.x) for each in probe.inputs)
    return Sensitivity(sha256, {"images": seen, "seed": seed}, matrices, branches)


def int8_losses(checkpoint: Checkpoint, seed: int = 0, images: int | None = None) -> dict[str, float]:
    """Of the table, only what int8 costs, by matrix."""
    spec, model = checkpoint.spec, checkpoint.model()
    with torch.no_grad():
        probe = _Probe(model, own_inputs(checkpoint, model, images or _images(spec), seed))
        return {shape.name: _int8(probe, shape.name) for shape in spec.matrices()}


def _images(spec: ModelSpec) -> int:
    cuts = len(LEARNGENE_SHARES) + len(TAILOR_SHARES) + 1
    evaluations = cuts * len(list(spec.matrices())) * (spec.depth + 1) / (2 * spec.depth)  # half the blocks on average
    return int(min(IMAGES, max(LEAST_IMAGES, MOST_FLOPS / (evaluations * model_cost(spec, "exact").flops))))


def own_inputs(checkpoint: Checkpoint, model: DiT, images: int, seed: int) -> tuple[Inputs, ...]:
    """What the model is measured on; classes in equal shares."""
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(seed)
    size = min(images, CHUNK)
    groups = min(spec.num_classes, size)
    found = []
    for chunk in range(max(1, images // size)):
        classes = ((torch.arange(groups) + chunk * groups) % spec.num_classes).sort().values
        labels = classes.repeat_interleave(size // groups)
        noise = torch.randn(len(labels), spec.channels, spec.image_size, spec.image_size, generator=generator)
        make = _walked if spec.distilled else _noised
        found.append(make(checkpoint, model, noise, classes, labels, generator))
    return tuple(found)


def _noised(
    checkpoint: Checkpoint, model: DiT, noise: Tensor, classes: Tensor, labels: Tensor, generator: torch.Generator
) -> Inputs:
    """Images that the model draws, noised as in training."""
    spec = checkpoint.spec
    walk = denoiser(model, DRAWING_STEPS, recommended(spec, checkpoint.provenance).guidance)
    drawn = sample(walk, noise, labels, spec.objective, DRAWING_STEPS)
    drawn = drawn.clamp(-1, 1) if spec.pixels_per_latent == 1 else drawn
    timestep = draw_timesteps(spec.objective, len(drawn), generator)
    noised, target = add_noise(spec.objective, drawn, torch.randn(drawn.shape, generator=generator), timestep)
    closed = torch.rand(len(drawn), generator=generator) < NULL_SHARE
    return Inputs(noised, timestep, ClassGate.grouped(classes, closed, spec.num_classes), None, target)


def _walked(
    checkpoint: Checkpoint, model: DiT, noise: Tensor, classes: Tensor, labels: Tensor, generator: torch.Generator
) -> Inputs:
    """One state of each image's walk, at any step of a walk of any step count."""
    spec = checkpoint.spec
    choice = torch.randint(len(spec.step_counts), (len(noise),), generator=generator)
    x, timestep = noise.clone(), torch.full((len(noise),), float(TRAIN_STEPS))
    for number, count in enumerate(spec.step_counts):
        own = (choice == number).nonzero().flatten()
        at = torch.randint(count, (len(own),), generator=generator)
        x[own], timestep[own] = _states(model, count, noise[own], labels[own], at)
    span = TRAIN_STEPS / torch.tensor(spec.step_counts)[choice].float()
    return Inputs(x, timestep, ClassGate.grouped(classes, labels < 0, spec.num_classes), span, None)


def _states(model: DiT, count: int, noise: Tensor, labels: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where walks of `count` steps stand before step `at` [B], and the timesteps [B] of that."""
    seen: list[tuple[Tensor, Tensor]] = []
    walk = denoiser(model, count, model.spec.inside_guidance or 1.0)

    def record(x: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        seen.append((x, timestep))
        return walk(x, timestep, classes)

    if len(noise):
        sample(record, noise, labels, model.spec.objective, count)
    states = [torch.stack([each[axis] for each in seen])[at, torch.arange(len(at))] for axis in (0, 1) if seen]
    return (states[0], states[1]) if states else (noise, at.float())


class _Probe:
    """The whole model's outputs on its inputs, block by block, and what changes when one part of it is changed."""

    def __init__(self, model: DiT, inputs: tuple[Inputs, ...]) -> None:
        self.model, self.inputs = model, inputs
        self.conditions = [model.condition(each.timestep, each.gate.class_index, each.span) for each in inputs]
        self.before: list[list[Tensor]] = []
        self.outputs: list[Tensor] = []
        for own, condition in zip(inputs, self.conditions, strict=True):
            x = patchify(model.patch_embed, model.pos_embed, own.x).contiguous()
            states = [x]
            for block in model.blocks:
                states.append(block(states[-1], condition, own.gate))
            self.before.append(states[:-1])
            self.outputs.append(self._final(states[-1], condition))
        wanted = [0 if own.target is None else own.target for own in inputs]
        self.energy = _squares(out - target for out, target in zip(self.outputs, wanted, strict=True))

    def _final(self, x: Tensor, condition: Tensor) -> Tensor:
        model, channels = self.model, self.model.spec.channels
        return unpatchify(x, model.final.adaln(condition), model.final.linear, model.spec)[:, :channels]

    def change(self, block: int) -> float:
        """Of the output, with the model as it is now changed in `block`, as a share of the loss."""

        def changes() -> Iterator[Tensor]:
            for own, condition, before, whole in zip(
                self.inputs, self.conditions, self.before, self.outputs, strict=True
            ):
                x = before[block]
                for each in self.model.blocks[block:]:
                    x = each(x, condition, own.gate)
                yield self._final(x, condition) - whole

        return _squares(changes()) / self.energy

    def without(self, branch: str) -> float:
        _, block, kind = branch.split(".")
        with _replaced(self.model.blocks[int(block)], kind, _Nothing()):
            return self.change(int(block))


def _squares(parts: Iterator[Tensor]) -> float:
    """Mean over parts of equal size."""
    means = [float(part.double().square().mean()) for part in parts]
    return sum(means) / len(means)


class _Nothing(nn.Module):
    def forward(self, x: Tensor, gate: object) -> Tensor:
        return torch.zeros_like(x)


@contextmanager
def _replaced(owner: nn.Module, name: str, part: nn.Module) -> Iterator[None]:
    whole = getattr(owner, name)
    setattr(owner, name, part)
    try:
        yield
    finally:
        setattr(owner, name, whole)


def _influence(probe: _Probe, name: str, shared: SortedFactors, tailors: tuple[SortedFactors, ...]) -> MatrixInfluence:
    block = int(name.split(".")[1])
    layer = probe.model.get_submodule(name)
    assert isinstance(layer, GatedLinear)

    def cut(part: str, factors: list[SortedFactors], rank: int) -> float:
        tensors = [[getattr(each.cut(rank), key) for each in factors] for key in "UsV"]
        values = [torch.stack(each).float() if part == "tailors" else each[0].float() for each in tensors]
        with _replaced(layer, part, _Kept(*values)):
            return probe.change(block)

    def curve(part: str, factors: list[SortedFactors], shares: tuple[float, ...]) -> Curve:
        full = len(factors[0].s) if factors else 0
        ranks = sorted({int(share * full) for share in shares} - {full})
        lost = [sum(float(each.energy[rank:].sum()) for each in factors) / len(factors) for rank in ranks]
        return Curve.through(lost, [cut(part, factors, rank) for rank in ranks])

    of_learngene = curve("learngene", [shared], LEARNGENE_SHARES)
    return MatrixInfluence(of_learngene, curve("tailors", list(tailors), TAILOR_SHARES), _int8(probe, name))


def _int8(probe: _Probe, name: str) -> float:
    owner, own = name.rsplit(".", 1)
    layer = probe.model.get_submodule(name)
    assert isinstance(layer, GatedLinear)
    with _replaced(probe.model.get_submodule(owner), own, _Int8Linear(layer)):
        return probe.change(int(name.split(".")[1]))


class _Kept(nn.Module):
    """Factors in the place of a layer's own."""

    def __init__(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        super().__init__()
        self.U, self.s, self.V = u, s, v

    def leading(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        return self.U, self.s, self.V


class _Int8Linear(nn.Module):
    """A layer as an int8 file computes it: thin factors per channel, activations per image, tailors per component."""

    def __init__(self, layer: GatedLinear) -> None:
        super().__init__()
        own, tailors = layer.learngene, layer.tailors
        self.v, self.u = _rounded_weight(own.V * own.s, 0), _rounded_weight(own.U, 1)
        self.tailor_v = _rounded_weight(tailors.V * tailors.s.unsqueeze(-2), 1)
        self.tailor_u, self.bias = _rounded_weight(tailors.U, 1), layer.bias

    def forward(self, x: Tensor, gate: ClassGate) -> Tensor:
        """x [B, N, m] -> [B, N, n]."""
        y = _rounded_activation(_rounded_activation(x) @ self.v) @ self.u.T + self.bias
        is_open = gate.class_index < len(self.tailor_u)
        index = gate.class_index[is_open]
        y[is_open] += x[is_open] @ self.tailor_v[index] @ self.tailor_u[index].mT
        return y


def _rounded_weight(weight: Tensor, axis: int) -> Tensor:
    """Symmetric int8 with one scale for all along `axis`."""
    if weight.numel() == 0:
        return weight
    scale = weight.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def _rounded_activation(x: Tensor) -> Tensor:
    """uint8 with one range for each image, zero in it, as dynamic quantization does at batch 1."""
    if x.numel() == 0:
        return x
    low, high = x.amin((1, 2), keepdim=True).clamp_max(0), x.amax((1, 2), keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale
