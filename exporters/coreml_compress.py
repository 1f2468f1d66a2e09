"""Smaller weights: palettes of 4, 6 and 8 bits, int8 by channel, int4 by block. What is stored, not what is computed.

Tailors are compressed class by class where the target can, so that one class's weights do not depend on another's.
Tables (positions, labels, modulation, masks), biases, the first and the last layer stay fp16: a few kB that cost dear.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.coreml_weights import SMALLEST, Target, Weights, blocks_of, palette_group
from kind_edge.exporters.coreml_tools import quiet, require_coremltools

PREFIXES = ("p_", "b_")
"""What torch.export puts before the names of parameters and buffers; the dots of a name become underscores."""

TABLES = ("pos_embed", "y_embed", "modulation_table", "mask_", "class_map", "patch_embed", "final_")
"""Constants whose names hold one of these are left as they are."""
_BINS_PER_CLUSTER = 16


def constants(model: Any) -> Mapping[str, Any]:
    """Weights of an `MLModel` just converted: name -> array, of all that came from parameters and buffers."""
    operations = model._mil_program.functions["main"].operations
    return {op.name: op.outputs[0].val for op in operations if op.op_type == "const" and op.name.startswith(PREFIXES)}


def parameter_of(constant: str, names: Sequence[str]) -> str | None:
    """The parameter ("blocks.0.attn.q.weight") whose constant this is: it may carry "denoiser." and "_to_fp16"."""
    plain = re.sub(r"_to_(fp16|fp32|u?int\d+)$", "", constant.removeprefix("p_").removeprefix("b_"))
    return next((name for name in names if name.replace(".", "_") == plain), None)


def compressible(model: Any) -> dict[str, NDArray[np.float16]]:
    """Constants of an `MLModel` just converted that may be compressed, by name."""
    return {
        name: value
        for name, value in constants(model).items()
        if name.startswith(PREFIXES[0])
        and np.ndim(value) >= 2
        and np.size(value) >= SMALLEST
        and not any(table in name for table in TABLES)
    }


def matrix_of(constant: str) -> str | None:
    """The block matrix ("blocks.0.attn.q") that a constant is part of."""
    found = re.search(r"blocks_(\d+)_(attn|mlp)_(q|k|v|o|fc1|fc2)_", constant)
    return "blocks.{}.{}.{}".format(*found.groups()) if found else None


def compress(
    model: Any,
    weights: Weights | Mapping[str, int],
    target: Target,
    on_progress: Callable[[int, int], None] | None = None,
) -> Any:
    """A new `MLModel`; `weights` may be the bits of a palette by matrix (16: as it is), others have 8. `model` stays.

    `on_progress` is told (done, total) of the weights that get palettes: finding them takes long.
    """
    if weights == "fp16":
        return model
    require_coremltools()
    from coremltools.optimize import coreml as optimize

    names = compressible(model)
    if weights in ("int8", "int4"):
        linear = {name: _linear(optimize, value, weights, target) for name, value in names.items()}
        with quiet():
            return optimize.linear_quantize_weights(
                model, optimize.OptimizationConfig(global_config=None, op_name_configs=linear)
            )
    if isinstance(weights, Mapping):
        bits = {name: weights.get(matrix_of(name) or "", 8) for name in names}
    else:
        bits = dict.fromkeys(names, int(weights.removeprefix("palette")))
    narrow = [name for name in names if bits[name] < 16]
    palettes = {}
    for at, name in enumerate(narrow):
        tell = None if on_progress is None else functools.partial(on_progress, at, len(narrow))
        palettes[name] = _palette(optimize, names[name], bits[name], target, tell)
    with quiet():
        return optimize.palettize_weights(
            model, optimize.OptimizationConfig(global_config=None, op_name_configs=palettes)
        )


def _linear(optimize: Any, value: NDArray[Any], weights: Weights, target: Target) -> Any:
    """int8: one scale per output channel, or per class and component of a tailor; int4: one per 32 inputs or so."""
    common = {"mode": "linear_symmetric", "dtype": weights, "weight_threshold": SMALLEST - 1}
    if weights == "int8" and (target != "iOS18" or value.ndim != 3):
        return optimize.OpLinearQuantizerConfig(**common, granularity="per_channel")
    blocks = blocks_of(value.shape, weights)
    return optimize.OpLinearQuantizerConfig(**common, granularity="per_block", block_size=blocks)


def _palette(optimize: Any, value: NDArray[Any], bits: int, target: Target, tell: Callable[[], None] | None) -> Any:
    """One table per weight, or at iOS18 one per group of channels (per class of a tailor)."""

    def table(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if tell is not None:
            tell()
        return clusters(values, bits)

    common = {"mode": "custom", "lut_function": table, "weight_threshold": SMALLEST - 1}
    group = palette_group(value.shape, bits, target)
    if group == value.shape[0]:
        return optimize.OpPalettizerConfig(**common, granularity="per_tensor")
    return optimize.OpPalettizerConfig(**common, granularity="per_grouped_channel", channel_axis=0, group_size=group)


def palettized(value: NDArray[Any], bits: int, target: Target) -> NDArray[Any]:
    """The weights as they come out of their palettes."""
    groups = np.split(value, value.shape[0] // palette_group(value.shape, bits, target))
    found = [(clusters(group, bits), group.shape) for group in groups]
    return np.concatenate([table[indices].reshape(shape) for (table, indices), shape in found])


def clusters(values: NDArray[Any], bits: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """A table of 2^bits values, and for each of `values` the index of the nearest: k-means of one dimension, whose
    optimum is known, but for the width of narrow bins."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return _clusters(flat.tobytes(), flat.dtype.str, bits)


def forget_clusters() -> None:
    """Free what was kept for the next package of the same weights."""
    _clusters.cache_clear()


@functools.cache  # a denoiser and its sampler have the same weights, and clustering takes long
def _clusters(values: bytes, dtype: str, bits: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """By coremltools' own k-means, without its detour by scikit-learn for small weights, which is neither optimal nor
    always installed. Large weights are gathered into narrow bins first: its time is the number of values times 2^bits.
    """
    from coremltools._deps import _kmeans1d

    flat = np.frombuffer(values, dtype)
    points, counts = _binned(*np.unique(flat, return_counts=True), most=_BINS_PER_CLUSTER * 2**bits)
    size = min(len(points), 2**bits)
    found = np.asarray(_kmeans1d.cluster(points, size, weights=counts).centroids, np.float64)
    table = np.zeros(2**bits, flat.dtype)
    table[:size] = found
    return table, np.searchsorted((found[1:] + found[:-1]) / 2, flat.astype(np.float64)).astype(np.uint8)


def _binned(values: NDArray[Any], counts: NDArray[np.int64], most: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sorted values with their counts, as the means of at most so many bins of equal width where there are more."""
    points, weights = values.astype(np.float64), counts.astype(np.float64)
    if len(points) <= most:
        return points, weights
    place = ((points - points[0]) * (most / (points[-1] - points[0]))).astype(np.int64).clip(max=most - 1)
    total = np.bincount(place, weights)
    filled = total > 0
    return (np.bincount(place, weights * points)[filled] / total[filled]), total[filled]
