"""The precisions in which a model can be written: where each runs, how close it must stay, what its weights take.

fp32, fp16      floating point throughout; fp16 with float32 inputs and outputs
int8            dynamic: weights per channel, activations with the range of each call
int8-qdq        static: quantize and dequantize nodes with calibrated ranges; shapes are fixed
a16w8           the same with 16-bit activations
int8-weights    weights alone, in blocks with a scale each; activations stay in floating point
int4            the same with 4 bits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from kind_edge.errors import UsageError

Precision = Literal["fp32", "fp16", "int8", "int8-qdq", "a16w8", "int8-weights", "int4"]
Arithmetic = Literal["fp32", "fp16", "int8"]
"""What a compute unit multiplies in: profiles hold figures for these."""
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)
Unit = Literal["cpu", "gpu", "npu"]


@dataclass(frozen=True)
class PrecisionTraits:
    """One precision.

    `units`: those that run its ONNX files, fastest kind first, with what each multiplies in.
    `gate_db`: the least SQNR of a prediction, worst over classes and timesteps; `image_gate_db`: the least PSNR of a
    whole image from the same noise.
    `int8_losses`: what rounding costs in quality, in units of what int8 was measured to cost a model (its sensitivity);
    by the power of the errors of the shipped model's files.
    `weight_bits` are those of a quantized weight, `block` the weights that share a scale (0: a whole output channel).
    `operator_bytes`: what one operator takes in a static file beside its weights, with the nodes that quantize round
    it; measured on our own exports. 0: as in all other files.
    `static`: the file has one fixed batch, and class indices of 32 bits, as NPUs want them.
    """

    name: Precision
    units: Mapping[Unit, Arithmetic]
    gate_db: float
    image_gate_db: float
    int8_losses: float
    weight_bits: int
    block: int = 0
    operator_bytes: int = 0
    static: bool = False

    def arithmetic(self, unit: Unit) -> Arithmetic:
        """What a unit multiplies it in. A unit that is not among `units` runs it in another format (Core ML), as it is
        called."""
        return self.units.get(unit, cast(Arithmetic, self.name))


BLOCK = 32

PRECISIONS: Mapping[Precision, PrecisionTraits] = MappingProxyType({
    traits.name: traits
    for traits in (
        PrecisionTraits("fp32", {"cpu": "fp32", "gpu": "fp32"}, 100.0, 80.0, 0.0, 32),
        PrecisionTraits("fp16", {"cpu": "fp16", "gpu": "fp16"}, 50.0, 50.0, 0.0, 16),
        # Activation ranges are found at run time: CPU kernels only.
        PrecisionTraits("int8", {"cpu": "int8"}, 25.0, 25.0, 1.0, 8),
        PrecisionTraits(
            "int8-qdq", {"npu": "int8", "cpu": "int8"}, 25.0, 20.0, 13.0, 8, operator_bytes=930, static=True
        ),
        # NPUs multiply 16 by 8 bits at about half the rate of 8 by 8, as fp16; CPU kernels do it in fp32.
        PrecisionTraits("a16w8", {"npu": "fp16", "cpu": "fp32"}, 35.0, 30.0, 0.6, 8, operator_bytes=750, static=True),
        PrecisionTraits("int8-weights", {"cpu": "fp32"}, 35.0, 30.0, 0.5, 8, BLOCK, operator_bytes=105),
        PrecisionTraits("int4", {"cpu": "fp32"}, 12.0, 12.0, 90.0, 4, BLOCK, operator_bytes=95),
    )
})  # fmt: skip


def precisions_of(unit: Unit) -> tuple[Precision, ...]:
    """Those whose ONNX files a unit runs."""
    return tuple(name for name, traits in PRECISIONS.items() if unit in traits.units)


def check_unit(precision: str, unit: str) -> None:
    """`UsageError` where a unit cannot run a precision; says what can. "auto" leaves either open."""
    if "auto" in (precision, unit) or unit in PRECISIONS[precision].units:  # type: ignore[index]
        return
    able = " or ".join(PRECISIONS[precision].units)  # type: ignore[index]
    raise UsageError(
        f"--precision {precision}: runs on {able}, not on {unit}; choose --unit {able}, "
        f"or for --unit {unit} one of {', '.join(precisions_of(unit))}"  # type: ignore[arg-type]
    )


def denoiser_path(precision: str) -> str:
    """Where a denoiser lies in a bundle."""
    return "onnx/denoiser.onnx" if precision == "fp32" else f"onnx/denoiser.{precision}.onnx"


def decoder_precision(precision: str) -> Precision:
    """Of the decoder that is loaded beside a model of that precision.

    Its convolutions keep their quality with weights of eight bits and activations in floating point, and are as fast.
    With dynamic ranges they are several times slower in ONNX Runtime, and coarser.
    """
    return cast(Precision, precision) if precision in ("fp32", "fp16") else "int8-weights"


def decoder_path(precision: str) -> str:
    """Where a decoder lies in a bundle."""
    return "onnx/decoder.onnx" if precision == "fp32" else f"onnx/decoder.{precision}.onnx"
