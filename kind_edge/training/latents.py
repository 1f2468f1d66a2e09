"""Pixels to latents, once and for all: the encoder of a diffusers autoencoder from a local folder.

Kept is the mean of the encoder's distribution. Autoencoders for diffusion are trained with so small a KL weight that
its spread is far below the noise that training adds; the mean alone takes half the space, makes held-out losses and
calibration repeatable, and is all that `AutoencoderTiny` has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError
from kind_edge.model.autoencoder import load_autoencoder, scaling, scaling_facts
from kind_edge.model.spec import ModelSpec

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


def open_encoder(folder: Path, spec: ModelSpec, device: torch.device) -> Encoder:
    """Load an autoencoder in float32 and check that it makes the latents that the model works on.

    Raises:
        InputError: the weights do not load.
        UsageError: its latents have another shape than `spec` says.
    """
    model = load_autoencoder(folder).to(device)
    kind = type(model).__name__
    channels, size = int(model.config.in_channels), spec.image_size * spec.pixels_per_latent
    if channels not in (1, 3):
        raise UsageError(f"--autoencoder {folder}: takes {channels} channels, want 1 (grey) or 3 (red, green, blue)")
    scale = scaling(model.config, device)

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
    return Encoder(kind, channels, size, wanted, encode, scaling_facts(model.config))


def _shape(encode: Callable[[NDArray[np.uint8]], NDArray[np.float16]], channels: int, size: int) -> tuple[int, ...]:
    return encode(np.zeros((1, channels, size, size), dtype=np.uint8)).shape[1:]
