"""Operators of ML programs that move values and compute none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from kind_edge.exporters.mil_operator import Arguments, Array, Operator

FIRST_OPSET_WITHOUT_NEGATIVE_INDICES = 7


def reshape(a: Arguments) -> Array:
    """Sizes of 0 are taken over from x, one of -1 is what is left."""
    x, sizes = a["x"], a.ints("shape")
    sizes = [x.shape[axis] if size == 0 and len(sizes) == x.ndim else size for axis, size in enumerate(sizes)]
    rest = math.prod(size for size in sizes if size != -1)
    fits = x.size == rest if -1 not in sizes else rest > 0 and x.size % rest == 0
    if sizes.count(-1) > 1 or not fits:
        a.refuse(f"{list(x.shape)} cannot become {sizes}")
    return x.reshape(sizes)


def squeeze(a: Arguments) -> Array:
    x = a["x"]
    axes = {axis % x.ndim for axis in a.ints("axes", range(x.ndim))}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes or size != 1])


def concat(a: Arguments) -> Array:
    if a.flag("interleave"):
        a.refuse("interleave is not run here")
    return np.concatenate([np.atleast_1d(value) for value in a.many("values")], a.integer("axis"))


def split(a: Arguments) -> tuple[Array, ...]:
    x, axis = a["x"], a.integer("axis")
    whole = x.shape[axis]
    if "split_sizes" in a:
        sizes = a.ints("split_sizes")
    else:
        count = a.integer("num_splits")
        sizes = [whole // count] * count
    if sum(sizes) != whole:
        a.refuse(f"sizes {sizes} of an axis of {whole}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def slice_by_index(a: Arguments) -> Array:
    x = a["x"]
    begin, end, stride = a.ints("begin"), a.ints("end"), a.ints("stride", [1] * x.ndim)
    no = [0] * x.ndim
    begin_mask, end_mask, squeeze_mask = (a.ints(f"{name}_mask", no) for name in ("begin", "end", "squeeze"))
    if min(stride, default=1) < 1:
        a.refuse(f"strides {stride}; only positive ones are run here")
    where: list[int | slice] = []
    for axis in range(x.ndim):
        if squeeze_mask[axis]:
            where.append(begin[axis])
        else:
            first, last = None if begin_mask[axis] else begin[axis], None if end_mask[axis] else end[axis]
            where.append(slice(first, last, stride[axis]))
    return np.asarray(x[tuple(where)])


def slice_by_size(a: Arguments) -> Array:
    x, sizes = a["x"], a.ints("size")
    starts = [start % whole for start, whole in zip(a.ints("begin"), x.shape, strict=True)]
    ends = [w if size == -1 else start + size for start, size, w in zip(starts, sizes, x.shape, strict=True)]
    return x[tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))]


def _indices(a: Arguments, size: int) -> Array:
    """Up to iOS 16 negative ones count from the end. What lies outside is undefined on a device, so it is refused."""
    indices = a["indices"].astype(np.int64)
    lowest = 0 if a.opset >= FIRST_OPSET_WITHOUT_NEGATIVE_INDICES else -size
    if indices.size and (indices.min() < lowest or indices.max() >= size):
        a.refuse(f"indices {indices.min()} to {indices.max()} of an axis of {size}")
    return indices


def gather(a: Arguments) -> Array:
    if a.integer("batch_dims", 0):
        a.refuse("batch_dims is not run here")
    x, axis = a["x"], a.integer("axis", 0)
    return np.take(x, _indices(a, x.shape[axis]), axis)


def gather_along_axis(a: Arguments) -> Array:
    x, axis = a["x"], a.integer("axis", 0)
    return np.take_along_axis(x, _indices(a, x.shape[axis]), axis)


def pixel_shuffle(a: Arguments) -> Array:
    """[B, C f f, H, W] -> [B, C, H f, W f]."""
    x, f = a["x"], a.integer("upscale_factor")
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels // (f * f), f, f, height, width).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, -1, height * f, width * f)


def upsample_nearest_neighbor(a: Arguments) -> Array:
    """Whole factors only: with others, which pixel is nearest is a matter of the runtime."""
    x = a["x"]
    for axis, name in ((-2, "scale_factor_height"), (-1, "scale_factor_width")):
        factor = float(a.get(name, 1))
        if factor != int(factor):
            a.refuse(f"{name} {factor}; only whole numbers are run here")
        x = np.repeat(x, int(factor), axis)
    return x


def fill(a: Arguments) -> Array:
    return np.full(a.ints("shape"), a.get("value", 0.0))


LAYOUT: Mapping[str, Operator] = {
    "identity": Operator("x", lambda a: a["x"]),
    "reshape": Operator("x shape", reshape),
    "transpose": Operator("x perm", lambda a: a["x"].transpose(a.ints("perm"))),
    "expand_dims": Operator("x axes", lambda a: np.expand_dims(a["x"], tuple(a.ints("axes")))),
    "squeeze": Operator("x axes?", squeeze),
    "concat": Operator("values axis interleave?", concat),
    "stack": Operator("values axis", lambda a: np.stack(a.many("values"), a.integer("axis"))),
    "split": Operator("x axis num_splits? split_sizes?", split),
    "slice_by_index": Operator("x begin end stride? begin_mask? end_mask? squeeze_mask?", slice_by_index),
    "slice_by_size": Operator("x begin size", slice_by_size),
    "gather": Operator("x indices axis? batch_dims? validate_indices?", gather),
    "gather_along_axis": Operator("x indices axis? validate_indices?", gather_along_axis),
    "tile": Operator("x reps", lambda a: np.tile(a["x"], a.ints("reps"))),
    "shape": Operator("x", lambda a: np.array(a["x"].shape, np.int64)),
    "fill": Operator("shape value?", fill),
    "pixel_shuffle": Operator("x upscale_factor", pixel_shuffle),
    "upsample_nearest_neighbor": Operator("x scale_factor_height? scale_factor_width?", upsample_nearest_neighbor),
}
