"""Models of random weights, written as the exporter writes its own: what calibration runs.

Made with onnx alone, so that they need no torch and no checkpoint; a test holds them to the exporter, operator by
operator, before and after ONNX Runtime's own fusions.

Symbols: B batch (free in the graph), N tokens, D width, m inputs, n outputs, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kind_edge.budget.denoiser_graph import Affine, BakedModulation, Denoiser, Linear, shared_product, write
from kind_edge.budget.onnx_writer import FLOAT, HALF, Floats, Graph

Branch = Literal["attn", "mlp"]

KEPT_CLASSES = 2
"""Tailors in a table: one is gathered, however many there are."""

_PERIOD = 4099
"""Values drawn for one weight: a prime, so that no two columns of it are equal."""


@dataclass(frozen=True)
class Layer:
    """How one matrix is stored: dense at rank 0; `tailor_rank` 0 is a form without tailors."""

    precision: str
    rank: int = 0
    tailor_rank: int = 0


@dataclass(frozen=True)
class Network:
    """A denoiser as it is exported; `blocks` lists the branches of each block.

    `layer` is every matrix of it; those of the MLPs are `mlp_layer`, where that is given.
    """

    image_size: int
    channels: int
    patch_size: int
    output_channels: int
    width: int
    heads: int
    hidden: int
    blocks: tuple[tuple[Branch, ...], ...]
    layer: Layer
    mlp_layer: Layer | None = None
    null_branch: bool = False
    steps: int = 4


def network(shape: Network) -> bytes:
    """The whole denoiser, with a baked modulation table.

    Inputs: sample float32 [B, ch, H, W], step_index int32 [B] and, with tailors, class_index int64 [B].
    """
    return bytes(write(random_denoiser(shape)).SerializeToString())


def random_denoiser(shape: Network) -> Denoiser:
    """The weights of a network."""
    random, width, patch = _Random(), shape.width, shape.patch_size
    linears = {}
    for block, branches in enumerate(shape.blocks):
        for kind in branches:
            parts = dict.fromkeys("qkvo", (width, width))
            if kind == "mlp":
                parts = {"fc1": (width, shape.hidden), "fc2": (shape.hidden, width)}
            layer = (shape.mlp_layer if kind == "mlp" else None) or shape.layer
            for part, (inputs, outputs) in parts.items():
                linears[f"blocks.{block}.{kind}.{part}"] = random.linear(inputs, outputs, layer)
    values = shape.output_channels * patch**2
    return Denoiser(
        image_size=shape.image_size,
        channels=shape.channels,
        patch_size=patch,
        output_channels=shape.output_channels,
        width=width,
        heads=shape.heads,
        blocks=shape.blocks,
        linears=linears,
        patches=Affine(random.weight(width, shape.channels, patch, patch), random.weight(width)),
        positions=random.weight((shape.image_size // patch) ** 2, width),
        modulation=BakedModulation(random.weight(shape.steps, (3 * sum(map(len, shape.blocks)) + 2) * width)),
        final=Affine(random.weight(width, values), random.weight(values)),
        switches=bool(shape.layer.tailor_rank),
        kept_classes=KEPT_CLASSES,
        null_branch=shape.null_branch,
    )


def chain(inputs: int, outputs: int, pairs: int, layer: Layer) -> bytes:
    """`pairs` times m -> n -> m on x [B, N, m], without biases."""
    graph, random, half = Graph(), _Random(), layer.precision == "fp16"
    x = graph.node("Cast", ["x"], to=HALF) if half else "x"
    for _ in range(pairs):
        for ends in ((inputs, outputs), (outputs, inputs)):
            x = shared_product(graph, random.linear(*ends, layer), x) or x
    x = graph.node("Cast", [x], to=FLOAT) if half else x
    return bytes(graph.model("probe", [("x", FLOAT, ["batch", "tokens", inputs])], {x: None}).SerializeToString())


class _Random:
    """Weights of a usual scale."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def weight(self, *shape: int) -> Floats:
        """Repeated random values: their times are the same, and drawing millions takes longer than measuring them."""
        scale = np.float32(1 / math.sqrt(shape[-2] if len(shape) > 1 else 1))
        return np.resize(self._random.standard_normal(_PERIOD, dtype=np.float32) * scale, shape)

    def linear(self, inputs: int, outputs: int, layer: Layer) -> Linear:
        shapes = ((inputs, layer.rank), (layer.rank, outputs)) if layer.rank else ((inputs, outputs),)
        shared = tuple(self.weight(*shape) for shape in shapes)
        v = u = None
        if layer.tailor_rank:
            v, u = (self.weight(KEPT_CLASSES, layer.tailor_rank, size) for size in (inputs, outputs))
        return Linear(shared, self.weight(outputs), v, u, layer.precision)
