"""Operators that decompress weights when a package is opened, and those that quantize activations as it runs.

Compressed weights hold: a palette (constexpr_lut_to_dense) and indices into it, of 1 to 8 bits; integers with a scale
and an offset of every block (constexpr_blockwise_shift_scale, from iOS 18), channel or tensor
(constexpr_affine_dequantize).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from kind_edge.exporters.mil_blob import unpack_bits
from kind_edge.exporters.mil_operator import Arguments, Array, Operator

_INTEGER_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def lut_to_dense(a: Arguments) -> Array:
    """iOS 16: one palette for the tensor, indices packed in bytes. iOS 18: a palette for every block of the tensor."""
    return _one_palette(a) if "shape" in a else _palettes_of_blocks(a)


def _one_palette(a: Arguments) -> Array:
    lut, shape, packed = a["lut"], a.ints("shape"), a["indices"]
    bits, count = (len(lut) - 1).bit_length(), math.prod(shape)
    if len(lut) != 1 << bits or bits > 8 or packed.size != math.ceil(bits * count / 8):
        a.refuse(f"{packed.size} bytes of indices into a palette of {len(lut)} for a tensor of {shape}")
    indices = packed if bits == 8 else unpack_bits(packed, bits, count)
    return lut[indices].reshape(shape)


def _palettes_of_blocks(a: Arguments) -> Array:
    """indices [*D], lut [*G, palette size, 1] with G dividing D, axis by axis -> [*D]."""
    indices, lut = a["indices"], a["lut"]
    if lut.ndim != indices.ndim + 2 or lut.shape[-1] != 1:
        a.refuse(
            f"a lut of {list(lut.shape)} for indices of {list(indices.shape)}; palettes of vectors are not run here"
        )
    if indices.size and indices.max() >= lut.shape[-2]:
        a.refuse(f"index {indices.max()} into a palette of {lut.shape[-2]}")
    groups = lut.shape[:-2]
    palette = _of_blocks(a, np.arange(math.prod(groups)).reshape(groups), indices.shape)
    return lut.reshape(-1, lut.shape[-2])[palette, indices]


def _of_blocks(a: Arguments, values: Array, shape: tuple[int, ...]) -> Array:
    """One value per block -> one per element."""
    if values.ndim != len(shape) or any(size % blocks for blocks, size in zip(values.shape, shape, strict=True)):
        a.refuse(f"blocks of {list(values.shape)} in a tensor of {list(shape)}")
    for axis, (blocks, size) in enumerate(zip(values.shape, shape, strict=True)):
        values = np.repeat(values, size // blocks, axis)
    return values


def blockwise_shift_scale(a: Arguments) -> Array:
    data = a["data"].astype(np.float32)
    if (offset := a.get("offset")) is not None:
        data = data - _of_blocks(a, offset.astype(np.float32), data.shape)
    return data * _of_blocks(a, a["scale"], data.shape)


def _along_axis(a: Arguments, name: str, rank: int) -> Array:
    """A scalar, or a vector along the axis, as it is broadcast."""
    values = a[name].astype(np.float32)
    if values.ndim == 0:
        return values
    shape = [1] * rank
    shape[a.integer("axis")] = -1
    return values.reshape(shape)


def _dequantized(a: Arguments, name: str) -> Array:
    data = a[name].astype(np.float32)
    if "zero_point" in a:
        data = data - _along_axis(a, "zero_point", data.ndim)
    return data * _along_axis(a, "scale", data.ndim)


def quantize(a: Arguments) -> Array:
    """Ties go to even."""
    x, wanted = a["input"], a.text("output_dtype")
    if wanted not in _INTEGER_LIMITS:
        a.refuse(f"output_dtype {wanted!r}, want one of {', '.join(_INTEGER_LIMITS)}")
    levels = np.round(x / _along_axis(a, "scale", x.ndim))
    if "zero_point" in a:
        levels = levels + _along_axis(a, "zero_point", x.ndim)
    return np.clip(levels, *_INTEGER_LIMITS[wanted]).astype(wanted)


def constexpr_cast(a: Arguments) -> Array:
    if a.text("output_dtype") != a.declared.dtype:
        a.refuse(f"to {a.text('output_dtype')!r}, and the result is declared as {a.declared}")
    return a["source_val"]


CONSTEXPR: Mapping[str, Operator] = {
    "constexpr_lut_to_dense": Operator("indices lut shape? vector_axis?", lut_to_dense),
    "constexpr_blockwise_shift_scale": Operator("data scale offset?", blockwise_shift_scale),
    "constexpr_affine_dequantize": Operator(
        "quantized_data zero_point scale axis", lambda a: _dequantized(a, "quantized_data")
    ),
    "constexpr_cast": Operator("source_val output_dtype", constexpr_cast),
    "quantize": Operator("input scale output_dtype zero_point? axis?", quantize),
    "dequantize": Operator("input scale zero_point? axis?", lambda a: _dequantized(a, "input")),
}
