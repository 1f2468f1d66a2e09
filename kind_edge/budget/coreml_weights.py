"""How Core ML packages may hold their weights, and how many bytes of the weight file that takes.

Arithmetic is fp16 always. Every target has palettes of one table per weight, and int8; iOS18 adds palettes by groups of
channels, scales by class and component of a tailor, and blocks of four bits.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Target = Literal["iOS16", "iOS17", "iOS18"]
TARGETS: tuple[Target, ...] = get_args(Target)
Layout = Literal["tokens", "channels"]
Weights = Literal["fp16", "int8", "int4", "palette4", "palette6", "palette8", "mixed"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

SMALLEST = 1024
"""Weights of fewer elements are left as they are: a table of their own would cost what it saves."""
BLOCK = 32
LARGEST_LUT_SHARE = 0.05
MIXED_BITS = 6
"""What matrices of measured bits come to, about, before anything is measured."""

_ALIGNMENT = 64
"""Every entry of a weight file starts at a multiple of it, behind a header as long."""

Shape = tuple[int, ...]


def weights_for(precision: str, target: Target) -> Weights:
    """What a plan's precision is in Core ML."""
    if precision in ("fp32", "fp16"):
        return "fp16"
    if precision == "int4":
        return "int4" if target == "iOS18" else "palette4"
    return "int8"


def blocks_of(shape: Shape, weights: Weights) -> Shape:
    """Elements that share a scale, along every axis (0: all of it)."""
    if len(shape) == 3:  # tailors [K, m, r] and [K, r, n]: what is long is shared
        long = 1 if shape[1] >= shape[2] else 2
        size = block_of(shape[long]) if weights == "int4" else 0
        return (1, size, 1) if long == 1 else (1, 1, size)
    return (1, block_of(shape[1]), *(0,) * (len(shape) - 2))


def block_of(size: int) -> int:
    """The divisor of a length that is nearest to BLOCK; 0, the whole of it, where none is near: ranks may be prime."""
    near = [each for each in range(BLOCK // 2, 2 * BLOCK + 1) if size % each == 0]
    return min(near, key=lambda each: abs(each - BLOCK), default=0)


def palette_group(shape: Shape, bits: int, target: Target) -> int:
    """Rows that share a table: the fewest whose table (fp16) takes at most 5 % of what their indices take.

    Before iOS18 all of them.
    """
    rows, each = int(shape[0]), math.prod(shape[1:])
    fits = (
        group
        for group in range(1, rows)
        if rows % group == 0 and 16 * 2**bits <= LARGEST_LUT_SHARE * bits * group * each
    )
    return int(next(fits, rows)) if target == "iOS18" else rows


def palette_bytes(shape: Shape, bits: int, target: Target) -> int:
    """Indices and tables; of 16 bits the weights themselves."""
    elements = math.prod(shape)
    if bits == 16:
        return 2 * elements
    return elements * bits // 8 + (2 << bits) * shape[0] // palette_group(shape, bits, target)


def entry_bytes(values_bytes: int) -> int:
    """What one entry takes in the weight file, with its header."""
    return _ALIGNMENT + -(-values_bytes // _ALIGNMENT) * _ALIGNMENT


def stored_bytes(shape: Shape, weights: Weights, target: Target) -> int:
    """One compressible weight in the weight file: its values, and the scales or the table that belong to them."""
    elements = math.prod(shape)
    if weights == "fp16" or elements < SMALLEST:
        return entry_bytes(2 * elements)
    if weights in ("int8", "int4"):
        scales = shape[0]
        if weights == "int4" or (target == "iOS18" and len(shape) == 3):
            blocks = blocks_of(shape, weights)
            scales = math.prod(size // (block or size) for size, block in zip(shape, blocks, strict=True))
        zeros = entry_bytes(scales) if target != "iOS18" else 0
        return entry_bytes(elements // (1 if weights == "int8" else 2)) + entry_bytes(2 * scales) + zeros
    bits = MIXED_BITS if weights == "mixed" else int(weights.removeprefix("palette"))
    indices = elements * bits // 8
    return entry_bytes(indices) + entry_bytes(palette_bytes(shape, bits, target) - indices)
