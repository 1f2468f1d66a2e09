"""What is asked of `adapt`, and the model that its run begins with: the new classes alone on the old learngene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kind_edge.errors import UsageError, nearest
from kind_edge.model.checkpoint import Checkpoint, checkpoint_hash
from kind_edge.model.diffusion import add_noise, draw_timesteps
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import GatedLinear
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData

NEAREST = "nearest"
NEAREST_IMAGES = 32
"""Of every new class, to find the old tailor that fits it best."""

LABELS = "y_embed.weight"


@dataclass(frozen=True)
class Request:
    """What is added to which checkpoint. `start`: None (as nothing), the name of an old class, or "nearest".

    An old class that is called "nearest" is meant by its name.
    """

    source: Checkpoint
    classes: tuple[str, ...]
    start: str | None = None
    learngene_only: bool = False

    def __post_init__(self) -> None:
        spec, old = self.source.spec, self.source.class_names
        if not spec.factored or not any(spec.ranks(shape.name).tailor for shape in spec.matrices()):
            raise UsageError(f"{self.source.path} has no tailors, so it cannot learn new ones; give a model that has")
        if spec.distilled:
            raise UsageError(
                f"{self.source.path} is distilled, and a tailor learned from images alone would not fit its few steps; "
                "adapt the model that it was distilled from, and distil what comes of it: distill --onto this one"
            )
        if not self.classes:
            raise UsageError("--classes: name at least one class of the data")
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise UsageError(f"--classes: {name!r} is named twice")
            if name in old and not self.learngene_only:
                raise UsageError(
                    f"--classes: the model knows {name!r} already; leave it out, rename it with --class-map, or start "
                    "a new domain with --learngene-only"
                )
        if self.start not in (None, NEAREST, *old):
            raise UsageError(
                f"--from: unknown class {self.start!r}; did you mean: {nearest(str(self.start), old)}? Or give --from "
                f"{NEAREST}: each new class starts with the old one that fits it best"
            )

    @property
    def kept(self) -> tuple[str, ...]:
        """The old classes that stay."""
        return () if self.learngene_only else self.source.class_names

    def choices(self) -> dict[str, Any]:
        """What makes two runs the same, beside their configuration."""
        assert self.source.path is not None
        names = {"classes": list(self.classes), "start": self.start, "learngene_only": self.learngene_only}
        return {"checkpoint_sha256": checkpoint_hash(self.source.path), **names}


@torch.no_grad()
def begin(request: Request, config: TrainConfig, origins: Sequence[str] | None) -> DiT:
    """The model of the new classes: shared weights of the checkpoint, frozen; tailors as they start.

    Without `origins` tailors start as nothing: V and s are dealt from random matrices as in training, U is zero (as in
    LoRA), and so is what they add. A random product would be noise in every layer of a learngene that already works,
    to be unlearned first: on three new classes of Fashion-MNIST (D 64, 4 blocks, 7 old classes; one run each) held-out
    loss was 0.575 with random U and 0.506 with zero after 3,600 images, 0.439 and 0.415 after 12,000. An old class's
    tailor is a better start still where one is near (the nearest there: 0.428 and 0.383).
    Label rows start as the null row, which is what the learngene was trained beside.
    """
    source = request.source
    model = initialise(DiT(config.spec), config.seed)
    own = {name for name in source.tensors if ".tailors." in name} | {LABELS}
    model.load_state_dict({n: t for n, t in source.float_tensors().items() if n not in own}, strict=False)
    rows = None if origins is None else [source.class_names.index(name) for name in origins]
    for name, layer in model.named_modules():
        if not isinstance(layer, GatedLinear):
            continue
        if rows is None:
            layer.tailors.U.zero_()
            continue
        for part, tailor in layer.tailors.named_parameters():
            tailor.copy_(source.tensors[f"{name}.tailors.{part}"][rows])
    model.requires_grad_(False)
    if model.y_embed is not None:
        like = [-1] * len(request.classes) if rows is None else rows
        model.y_embed.weight.copy_(source.tensors[LABELS][[*like, -1]])
        # The null row lies in the same tensor, but no image of the run has the null label, and `join` drops the row.
        model.y_embed.weight.requires_grad_(True)
    return model


def origins_of(request: Request, data: TrainingData, seed: int = 0) -> tuple[str, ...] | None:
    """The old class whose tailor each new class starts with; None for tailors that start as nothing.

    The nearest is the one with which the model denoises some of the class's images best.
    """
    names = request.source.class_names
    if request.start is None:
        return None
    if request.start in names:
        return (request.start,) * len(request.classes)
    model = request.source.model()
    closest = []
    for label in range(len(request.classes)):
        x = data.batch((data.labels == label).nonzero().flatten()[:NEAREST_IMAGES])
        losses = [_denoising_loss(model, x, old, seed) for old in range(len(names))]
        closest.append(names[losses.index(min(losses))])
    return tuple(closest)


@torch.no_grad()
def _denoising_loss(model: DiT, x: Tensor, label: int, seed: int) -> float:
    """Of images [b, ch, H, W] under the tailor of a class, with the same noise for every class."""
    stream = torch.Generator().manual_seed(seed)
    timestep = draw_timesteps(model.spec.objective, len(x), stream)
    noise = torch.randn(x.shape, generator=stream)
    noised, target = add_noise(model.spec.objective, x, noise, timestep)
    prediction = model(noised, timestep, torch.full((len(x),), label))[:, : x.shape[1]]
    return float((prediction - target).square().mean())
