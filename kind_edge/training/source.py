"""What a training run reads images from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TrainingData(Protocol):
    """Labelled images in the network's own scale, drawn by index. Frozen: the same index is always the same image."""

    @property
    def labels(self) -> Tensor:
        """int64 [n], positions in `class_names`."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(ch, H, W) of one image."""

    @property
    def sha256(self) -> str:
        """Of the whole data set, for provenance."""

    def batch(self, indices: Tensor) -> Tensor:
        """The images at int64 `indices` [b]: float32 [b, ch, H, W], pixels in [-1, 1] or scaled latents."""


@dataclass(frozen=True, eq=False)
class InMemoryImages:
    """8-bit images that fit into memory."""

    images: Tensor
    """uint8 [n, ch, H, W]"""
    labels: Tensor
    class_names: tuple[str, ...]
    sha256: str

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Tensor) -> Tensor:
        return self.images[indices.to(self.images.device)].to(torch.float32) / 127.5 - 1
