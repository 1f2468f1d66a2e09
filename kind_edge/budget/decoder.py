"""What turning latents into pixels costs: the decoder that was given, or that of Stable Diffusion's autoencoder.

Where nobody said which decoder it will be, the latter is assumed, from shapes alone: Rombach et al. (2022); diffusers'
`AutoencoderKL` with 128, 256, 512, 512 channels and three residual blocks per level. At 20 steps it is as much work as
half of a small transformer's image, so a budget that forgets it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kind_edge.budget.formulas import attention_macs, linear_macs
from kind_edge.budget.precision import Precision, Unit, decoder_precision
from kind_edge.budget.profile import DeviceProfile
from kind_edge.model.spec import ModelSpec

_LEVELS = (512, 512, 256, 128)
_BLOCKS_PER_LEVEL = 3
_PIXEL_CHANNELS = 3

_SCALE_BYTES = 4


@dataclass(frozen=True)
class DecoderCost:
    """One image: `flops` of convolutions, linears and attention; `activation_bytes_peak` in fp32.

    What is known of a decoder that was given: `kernel_params` of its `params`, in so many `kernels`, can be stored in a
    byte each, with a scale per each of their `kernel_outputs`; `operators` of its graph; `autoencoder_sha256`. An image
    is decoded in `tiles` x `tiles` overlapping pieces, and `whole` is the same decoder with one (None: this is it).
    """

    params: int
    flops: int
    activation_bytes_peak: int
    kernels: int = 0
    kernel_params: int = 0
    kernel_outputs: int = 0
    operators: int = 0
    autoencoder_sha256: str = ""
    tiles: int = 1
    whole: DecoderCost | None = None

    def weight_bytes(self, precision: Precision) -> int:
        """Of the file beside a model of that precision."""
        stored = decoder_precision(precision)
        if stored == "fp32" or not self.autoencoder_sha256:  # what is only assumed may not come any smaller
            return 4 * self.params
        if stored == "fp16":
            return 2 * self.params
        return 4 * (self.params - self.kernel_params) + self.kernel_params + _SCALE_BYTES * self.kernel_outputs

    def graph_operators(self, precision: Precision) -> int:
        """Of the graph of that file; a kernel in eight bits is widened by one, and has one more name."""
        return self.operators + 2 * self.kernels * (decoder_precision(precision) == "int8-weights")

    def latency_s(self, profile: DeviceProfile, unit: Unit, precision: Precision, sustained: bool) -> float:
        """Of one image beside a model of that precision on that unit. Convolutions are bound by arithmetic.

        Where the unit multiplies in neither, the decoder runs on the fastest one that does.
        """
        if not self.flops:
            return 0.0
        arithmetic: Precision = "fp16" if decoder_precision(precision) == "fp16" else "fp32"
        if not profile.unit(unit).has(arithmetic):
            able = profile.units_for(arithmetic)
            unit = max(able, key=lambda name: profile.throughput(name, arithmetic, sustained))
        return self.flops / profile.throughput(unit, arithmetic, sustained)

    def to_dict(self, precision: Precision) -> dict[str, Any]:
        """What a plan says of it; nothing of what is only assumed."""
        if not self.autoencoder_sha256:
            return {}
        return {
            "autoencoder_sha256": self.autoencoder_sha256,
            "precision": decoder_precision(precision),
            "tiles": self.tiles,
            "params": self.params,
            "flops": self.flops,
            "weight_bytes": self.weight_bytes(precision),
        }


NO_DECODER = DecoderCost(0, 0, 0)


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
    """What is assumed of a decoder for one image of a latent model; all zero for a pixel model."""
    if spec.pixels_per_latent == 1:
        return NO_DECODER
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
