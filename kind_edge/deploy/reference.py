"""What every artefact is compared with: inputs, and what the gated forward of the truncated checkpoint says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.budget.plan import Plan
from kind_edge.deploy.decoder import tile_count
from kind_edge.deploy.verify import TIMESTEPS
from kind_edge.errors import InputError
from kind_edge.model.autoencoder import Autoencoder
from kind_edge.model.checkpoint import HELDOUT, HELDOUT_IMAGES, HELDOUT_LATENTS, Checkpoint, read_tensors
from kind_edge.model.diffusion import add_noise
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.sampling import denoiser, sample, step_span
from kind_edge.model.spec import Form, ModelSpec

IMAGES_PER_POINT = 2
IMAGE_CLASSES, DECODED_CLASSES = 10, 3
"""Of which whole images are compared; fewer where each of them has to be decoded."""


@dataclass(frozen=True)
class Heldout:
    """Images that training never saw: [n, ch, H, W], pixels in [-1, 1] or scaled latents, with their classes."""

    images: torch.Tensor
    labels: torch.Tensor

    def of_classes(self, classes: list[int]) -> Heldout:
        """Only these classes, numbered anew by their order."""
        chosen = [self.images[self.labels == c] for c in classes]
        labels = [torch.full((len(images),), i) for i, images in enumerate(chosen)]
        return Heldout(torch.cat(chosen), torch.cat(labels))


def load_heldout(folder: Path, spec: ModelSpec) -> Heldout | None:
    """The checkpoint's held-out images, if it has any; `InputError` for what cannot be images of this model."""
    path = folder / HELDOUT
    if not path.exists():
        return None
    tensors = read_tensors(path)
    latent = spec.pixels_per_latent > 1
    name, dtype = (HELDOUT_LATENTS, torch.float16) if latent else (HELDOUT_IMAGES, torch.uint8)
    if set(tensors) != {name, "labels"} or len(tensors[name]) != len(tensors["labels"]):
        raise InputError(f"{path}: want tensors {name} [n, ch, H, W] and labels [n]")
    images, labels = tensors[name], tensors["labels"]
    shape = (len(labels), spec.channels, spec.image_size, spec.image_size)
    if tuple(images.shape) != shape or labels.ndim != 1 or images.dtype != dtype:
        raise InputError(f"{path}: {name} are {images.dtype} {tuple(images.shape)}, want {dtype} {shape}")
    if not torch.isfinite(images).all():
        raise InputError(f"{path}: {name} hold NaN or infinity; remove the file, or train anew")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= spec.num_classes:
        raise InputError(f"{path}: labels must be 0 to {spec.num_classes - 1}, at least one")
    return Heldout(images.float() if latent else images.float() / 127.5 - 1, labels.long())


def make_reference(
    truncated: Checkpoint, form: Form, timesteps: torch.Tensor, heldout: Heldout | None, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Inputs and gated outputs for every kept class, the null class (*switch*) and five of the sampler's steps.

    A distilled model is deployed without the null class, and its span is that of as many steps as there are timesteps.
    Images are held-out ones of the class, noised to the step (plain noise where there are none). `heldout` is numbered
    like the truncated checkpoint. Arrays: sample, step_index, timestep, class_index, prediction, all [points, ...].
    """
    spec = truncated.spec
    kept = len(truncated.class_names)
    labels = range(kept if spec.distilled else kept + 1) if form == "switch" else range(1)
    steps = np.unique(np.linspace(0, len(timesteps) - 1, TIMESTEPS).round().astype(int))
    generator = torch.Generator().manual_seed(seed)
    points = [(c, int(s)) for c in labels for s in steps for _ in range(IMAGES_PER_POINT)]
    classes = torch.tensor([c for c, _ in points])
    step_index = torch.tensor([s for _, s in points])
    shape = (len(points), spec.channels, spec.image_size, spec.image_size)
    noise = torch.randn(shape, generator=generator)
    t = timesteps[step_index].float()
    sample = noise
    if heldout is not None and len(heldout.images):
        sample = add_noise(spec.objective, _pick(heldout, classes, generator), noise, t)[0]
    with torch.no_grad():
        prediction = truncated.model()(sample, t, _gate(form, classes, kept), step_span(spec, len(timesteps), t))
    return {
        "sample": sample.numpy(),
        "step_index": step_index.to(torch.int32).numpy(),
        "timestep": t.numpy(),
        "class_index": classes.numpy(),
        "prediction": prediction.numpy(),
    }


def make_images(
    truncated: Checkpoint,
    plan: Plan,
    autoencoder: Autoencoder | None = None,
    seed: int = 0,
    every_class: bool = False,
) -> dict[str, NDArray[Any]]:
    """Images by the gated model through diffusers' scheduler: what a sampler must draw. Of ten classes or of all.

    Arrays: noise and image [n, ch, H, W], the image clipped to [0, 1]; image_class [n]. Without a switch there is one.
    With an autoencoder also latent [n, ch, h, w], and image [n, C, H, W] is what it makes of that, in the plan's tiles.
    """
    spec, kept = truncated.spec, len(truncated.class_names)
    most = kept if every_class else IMAGE_CLASSES if autoencoder is None else DECODED_CLASSES
    shown = np.unique(np.linspace(0, kept - 1, most).round().astype(np.int64)) if plan.form == "switch" else [0]
    shape = (len(shown), spec.channels, spec.image_size, spec.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    classes = torch.from_numpy(shown) if plan.form == "switch" else torch.full((1,), kept)
    denoise = denoiser(truncated.model(), plan.steps, plan.strength)
    images = sample(denoise, noise, classes, spec.objective, plan.steps, plan.sampler)
    found = {"noise": noise.numpy(), "image_class": np.asarray(shown)}
    if autoencoder is None:
        return found | {"image": ((images + 1) / 2).clamp(0, 1).numpy()}
    return found | {"latent": images.numpy(), "image": autoencoder.decode(images, tile_count(plan)).numpy()}


def _gate(form: Form, classes: torch.Tensor, kept: int) -> ClassGate:
    """switch opens the class's own gate; in single and union every kept class is in the learngene already."""
    return ClassGate.of(classes if form == "switch" else torch.full_like(classes, kept), kept)


def _pick(heldout: Heldout, classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One random held-out image per point, of its class where there is one."""
    images = []
    for c in classes.tolist():
        own = (heldout.labels == c).nonzero().flatten()
        pool = own if len(own) else torch.arange(len(heldout.labels))
        images.append(heldout.images[pool[int(torch.randint(len(pool), (1,), generator=generator))]])
    return torch.stack(images)
