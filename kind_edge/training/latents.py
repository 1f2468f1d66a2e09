"""Pixels to latents, once and for all: the encoder of a diffusers autoencoder from a local folder.

Kept is the mean of the encoder's distribution. Autoencoders for diffusion are trained with so small a KL weight that
its spread is far below the noise that training adds; the mean alone takes half the space, makes held-out losses and
calibration repeatable, and is all that `AutoencoderTiny` has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kind_edge.errors import InputError, UsageError
from kind_edge.model.spec import ModelSpec

KINDS = ("AutoencoderKL", "AutoencoderTiny")
ENCODE_BATCH = 8


@dataclass(frozen=True, eq=False)
class Encoder:
    """`encode` turns pixels uint8 [b, channels, size, size] into scaled latents float16 [b, ch, H, W]."""

    kind: str
    channels: int
    size: int
    shape: tuple[int, int, int]
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float16]]
    scaling: Mapping[str, Any]


def autoencoder_files(folder: Path) -> list[tuple[str, Path]]:
    """Config and weights of an autoencoder; `InputError` if the folder holds none of a kind that is known."""
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"--autoencoder {folder}: no autoencoder of diffusers ({error}); want a folder with config.json and "
            f"safetensors weights of {' or '.join(KINDS)}, often the sub-folder vae of a pipeline"
        ) from error
    if kind not in KINDS:
        raise InputError(f"--autoencoder {folder}: config.json describes {kind!r}, want {' or '.join(KINDS)}")
    weights = sorted(folder.glob("*.safetensors*"))
    if not weights:
        raise InputError(
            f"--autoencoder {folder}: has no *.safetensors; save it anew with save_pretrained (pickles are not read)"
        )
    return [(path.name, path) for path in (config, *weights)]


def open_encoder(folder: Path, spec: ModelSpec, device: torch.device) -> Encoder:
    """Load an autoencoder in float32 and check that it makes the latents that the model works on.

    Raises:
        InputError: the weights do not load.
        UsageError: its latents have another shape than `spec` says.
    """
    import diffusers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    try:
        model = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"--autoencoder {folder}: {kind} does not load ({text}); copy it again") from error
    model = model.to(device, torch.float32).eval().requires_grad_(False)
    channels, size = int(model.config.in_channels), spec.image_size * spec.pixels_per_latent
    if channels not in (1, 3):
        raise UsageError(f"--autoencoder {folder}: takes {channels} channels, want 1 (grey) or 3 (red, green, blue)")
    scale = _scaling(model.config, device)

    @torch.inference_mode()
    def encode(pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
        parts = []
        for part in torch.from_numpy(pixels).split(ENCODE_BATCH):
            encoded = model.encode(part.to(device).float().div_(127.5).sub_(1))
            latents = encoded.latent_dist.mean if kind == "AutoencoderKL" else encoded.latents
            parts.append(scale(latents).half().cpu())
        out = torch.cat(parts)
        if not torch.isfinite(out).all():
            raise InputError(f"--autoencoder {folder}: its latents are not finite in float16; check its scaling_factor")
        return out.numpy()

    shape = _shape(encode, channels, size)
    wanted = (spec.channels, spec.image_size, spec.image_size)
    if shape != wanted:
        raise UsageError(
            f"--autoencoder {folder}: makes latents of {' x '.join(map(str, shape))} from {size} x {size} pixels, the "
            f"model's channels, image_size and pixels_per_latent ({spec.pixels_per_latent}) want "
            f"{' x '.join(map(str, wanted))}; change the model, or take another autoencoder"
        )
    return Encoder(kind, channels, size, wanted, encode, _scaling_facts(model.config))


def _shape(encode: Callable[[NDArray[np.uint8]], NDArray[np.float16]], channels: int, size: int) -> tuple[int, ...]:
    return encode(np.zeros((1, channels, size, size), dtype=np.uint8)).shape[1:]


def _scaling_facts(config: Any) -> dict[str, Any]:
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {name: config[name] for name in names if config.get(name) is not None}


def _scaling(config: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From an encoder's latents to the network's scale, as diffusers' pipelines do it."""
    factor, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return lambda latents: (latents - shift) * factor
    means, stds = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return lambda latents: (latents - means) * factor / stds
