"""The decoder of a latent model on its way into a bundle: what it costs, what it must draw, what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kind_edge.budget.decoder import DecoderCost
from kind_edge.deploy.parity import psnr_db
from kind_edge.model.autoencoder import Autoencoder, LatentDecoder

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan

TILINGS = (1, 2, 4)
"""Pieces along a side that may be decoded one by one."""
FEWEST_LATENTS = 8
"""Along a side of a piece: below, what is decoded twice is more than what is saved."""

_ACTIVATION_COPIES = 2
"""Of a convolution's output: the next operator's stands beside it. One more is its input."""
_OPERATORS = {"GroupNorm": 5, "SiLU": 2}
"""Of a graph, for a layer of the module; others are one."""
_AROUND, _LOOP = 20, 24
"""Operators: scaling and clipping; cutting tiles and putting them together."""


def decoder_costs(autoencoder: Autoencoder) -> tuple[DecoderCost, ...]:
    """The cost of the decoder for one image: whole, and in tiles. Counted from shapes; no weight is read."""
    found = list(_costs(autoencoder))
    return (found[0], *(_tiled(cost, found[0]) for cost in found[1:]))


def _costs(autoencoder: Autoencoder) -> Iterator[DecoderCost]:
    empty = autoencoder.empty_decoder()
    kernels = [parameter for parameter in empty.parameters() if parameter.ndim == 4]
    for count in TILINGS:
        size = autoencoder.tiles(count).size
        if count > 1 and size < FEWEST_LATENTS:
            return
        flops, widest, operators = _traced(empty, int(autoencoder.config["latent_channels"]), size)
        yield DecoderCost(
            params=sum(parameter.numel() for parameter in empty.parameters()),
            flops=count**2 * flops,
            activation_bytes_peak=4 * widest,
            kernels=len(kernels),
            kernel_params=sum(kernel.numel() for kernel in kernels),
            kernel_outputs=sum(len(kernel) for kernel in kernels),
            operators=operators + _AROUND + (_LOOP if count > 1 else 0),
            autoencoder_sha256=autoencoder.sha256,
            tiles=count,
        )


def _tiled(cost: DecoderCost, whole: DecoderCost) -> DecoderCost:
    return DecoderCost(**{**vars(cost), "whole": whole})


def _traced(decoder: LatentDecoder, channels: int, size: int) -> tuple[int, int, int]:
    """FLOPs, the most values alive round a convolution, and operators, of one image of size x size latents."""
    alive: list[int] = []
    operators = 0

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal operators
        operators += _OPERATORS.get(type(module).__name__, 1)
        if isinstance(module, nn.Conv2d):
            alive.append(inputs[0].numel() + _ACTIVATION_COPIES * output.numel())

    leaves = [module for module in decoder.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decoder(torch.zeros(1, channels, size, size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops(), max(alive), operators


def planned_decoder(decoders: tuple[DecoderCost, ...], plan: Plan) -> DecoderCost | None:
    """The one in as many tiles as the plan says; None where it counts none that is known."""
    return next((each for each in decoders if each.tiles == plan.decoder.get("tiles")), None)


def tile_count(plan: Plan) -> int:
    """Pieces along a side that the plan's decoder takes an image in."""
    return int(plan.decoder.get("tiles", 1))


def decoder_facts(autoencoder: Autoencoder, plan: Plan, latents: NDArray[np.float32]) -> dict[str, Any]:
    """What the manifest says of the decoder. Tiles know less of one another than the whole: how far that shows."""
    count = tile_count(plan)
    facts: dict[str, Any] = {
        "autoencoder": autoencoder.kind,
        "sha256": autoencoder.sha256,
        "image_channels": autoencoder.image_channels,
        "tiles": count,
    }
    if count > 1:
        tiles = autoencoder.tiles(count)
        whole, pieces = (autoencoder.decode(torch.from_numpy(latents[:1]), each).numpy() for each in (1, count))
        facts |= {"tile_latents": tiles.size, "tiled_psnr_db": round(psnr_db(whole, pieces), 2)}
    return facts
