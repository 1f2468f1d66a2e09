"""Operators of ML programs that compute: element by element, reductions, products, normalisation, attention.

The result of each is rounded once, at its end; a device may round inside an operator too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kind_edge.exporters.mil_operator import Arguments, Array, Operator, round_to_fp16

_CASTS = {"bool": np.bool_, "int8": np.int8, "uint8": np.uint8, "fp16": np.float32, "fp32": np.float32}
_CASTS |= dict.fromkeys(("int16", "uint16", "int32"), np.int64)


def cast(a: Arguments) -> Array:
    """Towards zero where a fraction is lost."""
    x, wanted = a["x"], a.text("dtype")
    if wanted not in _CASTS or a.declared.dtype != wanted:
        a.refuse(f"to {wanted!r}, and the result is declared as {a.declared}; want one of {', '.join(_CASTS)}")
    return x.astype(_CASTS[wanted])


def real_div(a: Arguments) -> Array:
    x, y = a["x"], a["y"]
    if x.dtype.kind == "f":
        return x / y
    if np.any(y == 0) or np.any(x % y):
        a.refuse("integers that do not divide; what comes of them is a matter of the runtime")
    return x // y


def gelu(a: Arguments) -> Array:
    x, mode = a["x"], a.text("mode", "EXACT")
    if mode == "EXACT":
        from scipy.special import erf

        return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(np.float32(1.702) * x)
    a.refuse(f"mode {mode!r} is not known here")


def _sigmoid(x: Array) -> Array:
    return np.float32(1) / (1 + np.exp(-x))


def _softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def rsqrt(a: Arguments) -> Array:
    epsilon = a.get("epsilon", 1e-12).astype(np.float32)
    return 1 / np.sqrt(a["x"] + (round_to_fp16(epsilon) if a.declared.dtype == "fp16" else epsilon))


def reduction(reduce: Callable[..., Array]) -> Operator:
    def run(a: Arguments) -> Array:
        x = a["x"]
        return np.asarray(reduce(x, axis=tuple(a.ints("axes", range(x.ndim))), keepdims=a.flag("keep_dims")))

    return Operator("x axes? keep_dims?", run)


def layer_norm(a: Arguments) -> Array:
    x = a["x"]
    axes = tuple(sorted(axis % x.ndim for axis in a.ints("axes", range(x.ndim))))
    centred = x - x.mean(axes, keepdims=True)
    epsilon = a.get("epsilon", 1e-5).astype(np.float32)
    result = centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + epsilon)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    if (gamma := a.get("gamma")) is not None:
        result = result * gamma.reshape(shape)
    if (beta := a.get("beta")) is not None:
        result = result + beta.reshape(shape)
    return result


def batch_norm(a: Arguments) -> Array:
    x = a["x"]

    def per_channel(values: Array) -> Array:
        return values.reshape(-1, *[1] * (x.ndim - 2))

    scale = 1 / np.sqrt(a["variance"] + a.get("epsilon", 1e-5).astype(np.float32))
    scale = scale if (gamma := a.get("gamma")) is None else scale * gamma
    result = (x - per_channel(a["mean"])) * per_channel(scale)
    return result if (beta := a.get("beta")) is None else result + per_channel(beta)


def linear(a: Arguments) -> Array:
    product = a["x"] @ a["weight"].T
    return product if (bias := a.get("bias")) is None else product + bias


def matmul(a: Arguments) -> Array:
    x, y = a["x"], a["y"]
    x = x.swapaxes(-1, -2) if a.flag("transpose_x") else x
    y = y.swapaxes(-1, -2) if a.flag("transpose_y") else y
    return x @ y


def scaled_dot_product_attention(a: Arguments) -> Array:
    """query [.., L, E], key [.., S, E], value [.., S, V] -> [.., L, V]; a mask of bool says who takes part."""
    query, key, value = a["query"], a["key"], a["value"]
    scores = (query @ key.swapaxes(-1, -2)) * np.float32(1 / math.sqrt(query.shape[-1]))
    if (mask := a.get("attn_mask")) is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    return _softmax(scores, -1) @ value


def conv(a: Arguments) -> Array:
    """x [B, C, *D], weight [O, C / groups, *K] -> [B, O, *D']."""
    x, weight, groups = a["x"], a["weight"], a.integer("groups", 1)
    kernel = weight.shape[2:]
    ones = [1] * len(kernel)
    strides, dilations = a.ints("strides", ones), a.ints("dilations", ones)
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    padding = _padding(a, reach, strides)
    if {*kernel, *strides} == {1} and not np.any(
        padding
    ):  # a matrix product, in the Neural Engine's layout all of them
        columns = x.reshape(len(x), groups, x.shape[1] // groups, -1)
        result = (weight.reshape(groups, -1, weight.shape[1]) @ columns).reshape(len(x), -1, *x.shape[2:])
    else:
        padded = np.pad(x, [(0, 0), (0, 0), *padding])
        result = np.stack([_conv_one(image, weight, reach, strides, dilations, groups) for image in padded])
    return result if (bias := a.get("bias")) is None else result + bias.reshape(-1, *ones)


def _conv_one(
    x: Array, weight: Array, reach: Sequence[int], strides: Sequence[int], dilations: Sequence[int], groups: int
) -> Array:
    """x [C, *D], padded -> [O, *D']: one product of the weight with what lies under it at every place."""
    axes = tuple(range(1, x.ndim))
    under = np.lib.stride_tricks.sliding_window_view(x, tuple(reach), axes)  # [C, *places, *reach]
    under = under[(slice(None), *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]
    places = under.shape[1 : x.ndim]
    columns = np.moveaxis(under, axes, range(-len(axes), 0))  # [C, *K, *D']
    columns = columns.reshape(groups, -1, math.prod(places))
    return (weight.reshape(groups, len(weight) // groups, -1) @ columns).reshape(-1, *places)


def _padding(a: Arguments, reach: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    kind = a.text("pad_type", "valid")
    if kind == "valid":
        return [(0, 0)] * len(reach)
    if kind == "custom":
        pad = a.ints("pad")
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind == "same" and set(strides) == {1} and all(size % 2 for size in reach):
        return [(size // 2, size // 2) for size in reach]
    a.refuse(f"pad_type {kind!r} with strides {list(strides)} is not run here")


def _binary(compute: Callable[[Array, Array], Array]) -> Operator:
    return Operator("x y", lambda a: np.asarray(compute(a["x"], a["y"])))


def _unary(compute: Callable[[Array], Array]) -> Operator:
    return Operator("x", lambda a: np.asarray(compute(a["x"])))


MATH: Mapping[str, Operator] = {
    "cast": Operator("x dtype", cast),
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": Operator("x y", real_div),
    "floor_div": _binary(np.floor_divide),
    "pow": _binary(np.power),
    "minimum": _binary(np.minimum),
    "maximum": _binary(np.maximum),
    "equal": _binary(np.equal),
    "not_equal": _binary(np.not_equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "logical_not": _unary(np.logical_not),
    "select": Operator("cond a b", lambda a: np.where(a["cond"], a["a"], a["b"])),
    "clip": Operator("x alpha beta", lambda a: np.clip(a["x"], a["alpha"], a["beta"])),
    "abs": _unary(np.abs),
    "exp": _unary(np.exp),
    "cos": _unary(np.cos),
    "sin": _unary(np.sin),
    "tanh": _unary(np.tanh),
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "sigmoid": _unary(_sigmoid),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "gelu": Operator("x mode?", gelu),
    "rsqrt": Operator("x epsilon?", rsqrt),
    "softmax": Operator("x axis?", lambda a: _softmax(a["x"], a.integer("axis", -1))),
    "reduce_mean": reduction(np.mean),
    "reduce_sum": reduction(np.sum),
    "reduce_max": reduction(np.max),
    "layer_norm": Operator("x axes? gamma? beta? epsilon?", layer_norm),
    "batch_norm": Operator("x mean variance gamma? beta? epsilon?", batch_norm),
    "linear": Operator("x weight bias?", linear),
    "matmul": Operator("x y transpose_x? transpose_y?", matmul),
    "conv": Operator("x weight bias? strides? pad_type? pad? dilations? groups?", conv),
    "scaled_dot_product_attention": Operator("query key value attn_mask?", scaled_dot_product_attention),
}
