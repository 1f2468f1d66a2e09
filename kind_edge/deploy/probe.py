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
from typing import Any

import torch
from torch import Tensor, nn

from kind_edge.budget.influence import Curve, MatrixInfluence, Sensitivity
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.diffusion import TRAIN_STEPS, add_noise, draw_timesteps
from kind_edge.model.dit import DiT, patchify, unpatchify
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.sampling import denoiser, sample
from kind_edge.model.spec import recommended
from kind_edge.model.truncation import SortedFactors, fold_matrix

OnProgress = Callable[[int, int], None]

LEARNGENE_SHARES = (0.75, 0.5, 0.25, 0.125, 0.0)
TAILOR_SHARES = (0.75, 0.5, 0.25, 0.0)
"""Ranks at which every matrix is measured, as shares of its own."""

NULL_SHARE = 0.1
"""Of the inputs of a model with a null branch, as in its training."""

IMAGES = 120
DRAWING_STEPS = 10
"""Sampler steps of the images that an ordinary model draws for itself."""


@dataclass(frozen=True)
class Inputs:
    """A batch [B, ch, H, W] with its conditions, and the energy [1] that changes of the output are shares of."""

    x: Tensor
    timestep: Tensor
    classes: Tensor
    span: Tensor | None
    target: Tensor | None


def measure_sensitivity(
    checkpoint: Checkpoint,
    sha256: str,
    calibration: Calibration | None,
    images: int = IMAGES,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Sensitivity:
    """The table of a checkpoint: every matrix cut at a few ranks and stored in int8, and every branch dropped."""
    model = checkpoint.model()
    with torch.no_grad():
        probe = _Probe(model, own_inputs(checkpoint, model, images, seed))
        matrices: dict[str, MatrixInfluence] = {}
        shapes, everyone = list(checkpoint.spec.matrices()), list(range(checkpoint.spec.num_classes))
        for done, shape in enumerate(shapes):
            folded = fold_matrix(
                checkpoint, shape.name, list(range(checkpoint.spec.num_classes)), "switch", calibration
            )
            matrices[shape.name] = _influence(probe, shape.name, folded.shared, folded.tailors)
            if on_progress:
                on_progress(done + 1, len(shapes))
        branches = {
            f"blocks.{block}.{kind}": probe.without(block, kind)
            for block in range(checkpoint.spec.depth)
            for kind in ("attn", "mlp")
        }
    conditions: dict[str, Any] = {"images": len(probe.inputs.x), "seed": seed}
    return Sensitivity(sha256, conditions, matrices, branches)


def own_inputs(checkpoint: Checkpoint, model: DiT, images: int, seed: int) -> Inputs:
    """What the model is measured on; classes in equal shares."""
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(images) % spec.num_classes
    noise = torch.randn(images, spec.channels, spec.image_size, spec.image_size, generator=generator)
    if spec.distilled:
        return _walked(model, noise, classes, generator)
    advice = recommended(spec, checkpoint.provenance)
    walk = denoiser(model, DRAWING_STEPS, advice.guidance)
    drawn = sample(walk, noise, classes, spec.objective, DRAWING_STEPS).clamp(-1, 1)
    timestep = draw_timesteps(spec.objective, images, generator)
    noised, target = add_noise(spec.objective, drawn, torch.randn(drawn.shape, generator=generator), timestep)
    null = torch.rand(images, generator=generator) < NULL_SHARE
    return Inputs(noised, timestep, torch.where(null, spec.num_classes, classes), None, target)


def _walked(model: DiT, noise: Tensor, classes: Tensor, generator: torch.Generator) -> Inputs:
    """One state of each image's walk: as many walks of every step count, any step of it."""
    spec, parts = model.spec, []
    for count, own in zip(spec.step_counts, torch.arange(len(noise)).tensor_split(len(spec.step_counts)), strict=True):
        states: list[tuple[Tensor, Tensor]] = []
        walk = denoiser(model, count, spec.inside_guidance or 1.0)

        def record(x: Tensor, timestep: Tensor, labels: Tensor, walk: Any = walk, states: Any = states) -> Tensor:
            states.append((x, timestep))
            predicted: Tensor = walk(x, timestep, labels)
            return predicted

        sample(record, noise[own], classes[own], spec.objective, count)
        at, row = torch.randint(count, (len(own),), generator=generator), torch.arange(len(own))
        x, timestep = (torch.stack([state[axis] for state in states])[at, row] for axis in (0, 1))
        parts.append((x, timestep, torch.full_like(timestep, TRAIN_STEPS / count)))
    x, timestep, span = (torch.cat([part[axis] for part in parts]) for axis in range(3))
    return Inputs(x, timestep, classes, span, None)


class _Probe:
    """The whole model's outputs on its inputs, block by block, and what changes when one part of it is changed."""

    def __init__(self, model: DiT, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.gate = ClassGate.of(inputs.classes, model.spec.num_classes)
        self.condition = model.condition(inputs.timestep, inputs.classes, inputs.span)
        x = patchify(model.patch_embed, model.pos_embed, inputs.x).contiguous()
        self.before = []
        for block in model.blocks:
            self.before.append(x)
            x = block(x, self.condition, self.gate)
        self.output = self._final(x)
        wanted = 0 if inputs.target is None else inputs.target
        self.energy = float((self.output - wanted).double().square().mean())

    def _final(self, x: Tensor) -> Tensor:
        model, channels = self.model, self.model.spec.channels
        return unpatchify(x, model.final.adaln(self.condition), model.final.linear, model.spec)[:, :channels]

    def change(self, block: int) -> float:
        """Of the output, with the model as it is now changed from `block` on, as a share of the loss."""
        x = self.before[block]
        for each in self.model.blocks[block:]:
            x = each(x, self.condition, self.gate)
        return float((self._final(x) - self.output).double().square().mean()) / self.energy

    def without(self, block: int, kind: str) -> float:
        with _replaced(self.model.blocks[block], kind, _Nothing()):
            return self.change(block)


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

    with _replaced(probe.model.get_submodule(name.rsplit(".", 1)[0]), name.rsplit(".", 1)[1], _Int8Linear(layer)):
        int8 = probe.change(block)
    return MatrixInfluence(
        curve("learngene", [shared], LEARNGENE_SHARES), curve("tailors", list(tailors), TAILOR_SHARES), int8
    )


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
