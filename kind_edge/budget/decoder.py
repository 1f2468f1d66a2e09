"""What turning latents into pixels costs: the decoder of Stable Diffusion's autoencoder, from shapes alone.

Rombach et al. (2022); diffusers' `AutoencoderKL` with 128, 256, 512, 512 channels and three residual blocks per level.
At 20 steps it is as much work as half of a small transformer's image, so a budget that forgets it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kind_edge.budget.formulas import attention_macs, linear_macs
from kind_edge.model.spec import ModelSpec

_LEVELS = (512, 512, 256, 128)
_BLOCKS_PER_LEVEL = 3
_PIXEL_CHANNELS = 3
PIXELS_PER_LATENT = 2 ** (len(_LEVELS) - 1)


@dataclass(frozen=True)
class DecoderCost:
    """One image: `flops` of convolutions, linears and attention; `activation_bytes_peak` in fp32."""

    params: int
    flops: int
    activation_bytes_peak: int


@dataclass(frozen=True)
class _Convolution:
    side: int
    inputs: int
    outputs: int
    kernel: int = 3

    @property
    def weights(self) -> int:
        return self.kernel**2 * self.inputs * self.outputs


def decoder_cost(spec: ModelSpec) -> DecoderCost:
    """The decoder's cost for one image of a latent model; all zero for a pixel model."""
    if spec.pixels_per_latent == 1:
        return DecoderCost(0, 0, 0)
    convolutions = list(_convolutions(spec.image_size, spec.channels))
    width, tokens = _LEVELS[0], spec.image_size**2
    macs = sum(layer.side**2 * layer.weights for layer in convolutions)
    macs += 4 * linear_macs(tokens, width, width) + attention_macs(tokens, width)
    params = sum(layer.weights + layer.outputs for layer in convolutions) + 4 * (width + 1) * width
    widest = max(layer.side**2 * (layer.inputs + 2 * layer.outputs) for layer in convolutions)
    return DecoderCost(params, 2 * macs, 4 * widest)


def _convolutions(side: int, channels: int) -> Iterator[_Convolution]:
    yield _Convolution(side, channels, channels, kernel=1)
    yield _Convolution(side, channels, _LEVELS[0])
    for _ in range(2):  # around the attention
        yield from _residual_block(side, _LEVELS[0], _LEVELS[0])
    inputs = _LEVELS[0]
    for level, outputs in enumerate(_LEVELS):
        for _ in range(_BLOCKS_PER_LEVEL):
            yield from _residual_block(side, inputs, outputs)
            inputs = outputs
        if level < len(_LEVELS) - 1:
            side *= 2
            yield _Convolution(side, outputs, outputs)
    yield _Convolution(side, inputs, _PIXEL_CHANNELS)


def _residual_block(side: int, inputs: int, outputs: int) -> Iterator[_Convolution]:
    yield _Convolution(side, inputs, outputs)
    yield _Convolution(side, outputs, outputs)
    if inputs != outputs:
        yield _Convolution(side, inputs, outputs, kernel=1)
