"""ONNX graphs of random weights with the operators that our exporter writes, in its order: what calibration runs.

Made with onnx alone, so that they need no torch and no checkpoint; a test holds them to the exporter, operator by
operator, before and after ONNX Runtime's own fusions.

Symbols: B batch (free in the graph), N tokens, D width, m inputs, n outputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Branch = Literal["attn", "mlp"]
Value = str
Floats = NDArray[np.float32]

KEPT_CLASSES = 2
"""Tailors in a table: one is gathered, however many there are."""

_OPSET, _IR_VERSION = 20, 10
_FLOAT, _INT64, _HALF = 1, 7, 10
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
    """A denoiser as it is exported; `blocks` lists the branches of each block, `layer` is every matrix of it."""

    image_size: int
    channels: int
    patch_size: int
    output_channels: int
    width: int
    heads: int
    hidden: int
    blocks: tuple[tuple[Branch, ...], ...]
    layer: Layer
    null_branch: bool = False

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Graph:
    """An ONNX graph under construction. Constants are made once per name; weights are random, of a usual scale."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._quantized: dict[Value, tuple[Value, Value, Value]] = {}
        self._random = np.random.default_rng(0)
        self._count = 0

    def node(self, kind: str, inputs: Sequence[Value], **attributes: Any) -> Value:
        """One operator with one output."""
        return self.nodes(kind, inputs, 1, **attributes)[0]

    def nodes(self, kind: str, inputs: Sequence[Value], outputs: int, **attributes: Any) -> list[Value]:
        self._count += 1
        names = [f"v{self._count}.{index}" for index in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def constant(self, values: NDArray[Any], name: str | None = None) -> Value:
        """A constant; with a name, the one of that name."""
        name = name or f"w{len(self._constants)}"
        if name not in self._constants:
            self._constants[name] = self._onnx.numpy_helper.from_array(values, name)
        return name

    def integers(self, *values: int) -> Value:
        """A small int64 vector, shared by all who want the same."""
        return self.constant(np.array(values, np.int64), f"i{values}")

    def weight(self, *shape: int) -> Floats:
        """Repeated random values: their times are the same, and drawing millions takes longer than measuring them."""
        scale = np.float32(1 / math.sqrt(shape[-2] if len(shape) > 1 else 1))
        return np.resize(self._random.standard_normal(_PERIOD, dtype=np.float32) * scale, shape)

    def filled(self, rows: int, columns: int) -> Value:
        """A weight that the runtime makes when it loads the model, so that its bytes need not be in the file."""
        small = self._onnx.numpy_helper.from_array(np.array([1e-3], np.float32))
        return self.node("ConstantOfShape", [self.integers(rows, columns)], value=small)

    def product(self, x: Value, weight: Floats, precision: str) -> Value:
        """x times a constant matrix: one MatMul, or the five operators of dynamic int8, one scale per column.

        Products of the same x share its quantization, as the quantizer has it.
        """
        if precision != "int8":
            typed = weight.astype(np.float16) if precision == "fp16" else weight
            return self.node("MatMul", [x, self.constant(typed)])
        if x not in self._quantized:
            quantized = self.nodes("DynamicQuantizeLinear", [x], 3)
            self._quantized[x] = (quantized[0], quantized[1], quantized[2])
        values, scale, zero = self._quantized[x]
        steps = np.maximum(np.abs(weight).max(0), 1e-9) / np.float32(127)
        integers = self.constant(np.rint(weight / steps).astype(np.int8))
        zeros = self.constant(np.zeros(weight.shape[1], np.int8))
        sums = self.node("Cast", [self.node("MatMulInteger", [values, integers, zero, zeros])], to=_FLOAT)
        return self.node("Mul", [sums, self.node("Mul", [scale, self.constant(steps)])])

    def model(self, inputs: Sequence[tuple[str, int, Sequence[int | str]]], output: Value) -> bytes:
        """The serialized model. `inputs`: name, ONNX type and shape; the output is float32 of any shape."""
        helper = self._onnx.helper
        ends = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
        result = helper.make_tensor_value_info(output, _FLOAT, None)
        graph = helper.make_graph(self._nodes, "probe", ends, [result], initializer=list(self._constants.values()))
        opsets = [helper.make_opsetid("", _OPSET)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString())


def network(shape: Network) -> bytes:
    """The whole denoiser, with a baked modulation table of four rows.

    Inputs: sample float32 [B, ch, H, W], step_index int32 [B] and, with tailors, class_index int64 [B].
    """
    graph, width, side = Graph(), shape.width, shape.image_size // shape.patch_size
    row = graph.node("Cast", [graph.node("Reshape", ["step_index", graph.integers(-1)])], to=_INT64)
    table = graph.weight(4, (6 * len(shape.blocks) + 2) * width)
    modulation = graph.node("Gather", [graph.constant(table), row], axis=0)
    inputs: list[tuple[str, int, Sequence[int | str]]] = [
        ("sample", _FLOAT, ["batch", shape.channels, shape.image_size, shape.image_size]),
        ("step_index", 6, ["batch"]),
    ]
    pick = None
    if shape.layer.tailor_rank:
        inputs.append(("class_index", _INT64, ["batch"]))
        pick = _Pick.of(graph, shape.null_branch)
    x = _patches(graph, shape)
    for index, branches in enumerate(shape.blocks):
        parts = _row(graph, modulation, index * 6 * width, 6, width)
        if "attn" in branches:
            x = _residual(graph, x, parts[:3], width, lambda y: _attention(graph, shape, y, pick))
        if "mlp" in branches:
            x = _residual(graph, x, parts[3:], width, lambda y: _mlp(graph, shape, y, pick))
    shift, scale = _row(graph, modulation, len(shape.blocks) * 6 * width, 2, width)
    values = shape.output_channels * shape.patch_size**2
    last = graph.node("MatMul", [_modulate(graph, x, shift, scale, width), graph.constant(graph.weight(width, values))])
    last = graph.node("Add", [last, graph.constant(graph.weight(values))])
    last = graph.node("Transpose", [last], perm=[0, 2, 1])
    last = graph.node("Reshape", [last, graph.integers(-1, values, side, side)], allowzero=1)
    return graph.model(inputs, graph.node("DepthToSpace", [last], blocksize=shape.patch_size, mode="CRD"))


@dataclass(frozen=True)
class _Pick:
    """The class index as the gathers want it, and 0 or 1 for the null class where there is one."""

    index: Value
    open: Value | None

    @classmethod
    def of(cls, graph: Graph, null_branch: bool) -> _Pick:
        index, opened = "class_index", None
        if null_branch:
            known = graph.node("Less", [index, graph.constant(np.array(KEPT_CLASSES))])
            first = graph.constant(np.array(0))
            index = graph.node("Clip", [graph.node("Where", [known, index, first]), first])
            opened = graph.node("Reshape", [graph.node("Cast", [known], to=_FLOAT), graph.integers(-1, 1, 1)])
        return cls(graph.node("Reshape", [index, graph.integers(-1)]), opened)


def chain(inputs: int, outputs: int, pairs: int, layer: Layer, back: Layer | None = None) -> bytes:
    """`pairs` times m -> n -> m on x [B, N, m], without biases; `back` is the second layer."""
    graph, x = Graph(), "x"
    ends: list[tuple[str, int, Sequence[int | str]]] = [("x", _FLOAT, ["batch", "tokens", inputs])]
    pick = None
    if layer.tailor_rank:
        ends.append(("class_index", _INT64, ["batch"]))
        pick = _Pick.of(graph, null_branch=False)
    half = layer.precision == "fp16"
    x = graph.node("Cast", [x], to=_HALF) if half else x
    for _ in range(pairs):
        x = linear(graph, x, inputs, outputs, layer, pick)
        x = linear(graph, x, outputs, inputs, back or layer, pick)
    return graph.model(ends, graph.node("Cast", [x], to=_FLOAT) if half else x)


def linear(graph: Graph, x: Value, inputs: int, outputs: int, layer: Layer, pick: _Pick | None) -> Value:
    """A layer without its bias: the shared weight, and the picked tailor."""
    if not layer.rank:
        shared = graph.product(x, graph.weight(inputs, outputs), layer.precision)
    else:
        thin = graph.product(x, graph.weight(inputs, layer.rank), layer.precision)
        shared = graph.product(thin, graph.weight(layer.rank, outputs), layer.precision)
    if pick is None:
        return shared
    rank, factors = layer.tailor_rank, []
    for shape, scales in (((inputs, rank), (1, rank)), ((rank, outputs), (rank, 1))):
        table = graph.weight(KEPT_CLASSES, *shape)
        if layer.precision != "int8":
            factors.append(graph.node("Gather", [graph.constant(table), pick.index], axis=0))
            continue
        integers = graph.constant(np.clip(np.rint(table * 40), -127, 127).astype(np.int8))
        steps = graph.constant(np.abs(graph.weight(KEPT_CLASSES, *scales)))  # equal tables would be merged
        small = graph.node("Gather", [integers, pick.index], axis=0)
        step = graph.node("Gather", [steps, pick.index], axis=0)
        factors.append(graph.node("Mul", [graph.node("Cast", [small], to=_FLOAT), step]))
    thin = graph.node("MatMul", [x, factors[0]])
    if pick.open is not None:
        thin = graph.node("Mul", [thin, pick.open])
    return graph.node("Add", [shared, graph.node("MatMul", [thin, factors[1]])])


def _linear(graph: Graph, shape: Network, x: Value, inputs: int, outputs: int, pick: _Pick | None) -> Value:
    y = linear(graph, x, inputs, outputs, shape.layer, pick)
    return graph.node("Add", [y, graph.constant(graph.weight(outputs))])


def _patches(graph: Graph, shape: Network) -> Value:
    """sample [B, ch, H, W] -> tokens [B, N, D]."""
    side, patch = shape.image_size // shape.patch_size, shape.patch_size
    kernel = graph.constant(graph.weight(shape.width, shape.channels, patch, patch))
    x = graph.node(
        "Conv", ["sample", kernel, graph.constant(graph.weight(shape.width))],
        strides=[patch, patch], kernel_shape=[patch, patch], dilations=[1, 1], group=1, pads=[0, 0, 0, 0],
    )  # fmt: skip
    x = graph.node("Reshape", [x, graph.integers(-1, shape.width, side * side)], allowzero=1)
    x = graph.node("Transpose", [x], perm=[0, 2, 1])
    return graph.node("Add", [x, graph.constant(graph.weight(side * side, shape.width))])


def _row(graph: Graph, modulation: Value, start: int, parts: int, width: int) -> list[Value]:
    """Cut [B, parts * D] from the modulation row, as [B, 1, D] each."""
    ends = [graph.integers(start), graph.integers(start + parts * width), graph.integers(1), graph.integers(1)]
    row = graph.node("Unsqueeze", [graph.node("Slice", [modulation, *ends]), graph.integers(1)])
    return graph.nodes("Split", [row], parts, axis=2, num_outputs=parts)


def _modulate(graph: Graph, x: Value, shift: Value, scale: Value, width: int) -> Value:
    ones = graph.constant(np.ones(width, np.float32), "ones")
    norm = graph.node("LayerNormalization", [x, ones], axis=-1, epsilon=1e-6, stash_type=1)
    factor = graph.node("Add", [scale, graph.constant(np.array(1, np.float32), "one")])
    return graph.node("Add", [graph.node("Mul", [norm, factor]), shift])


def _residual(graph: Graph, x: Value, modulation: list[Value], width: int, branch: Any) -> Value:
    shift, scale, gate = modulation
    return graph.node("Add", [x, graph.node("Mul", [gate, branch(_modulate(graph, x, shift, scale, width))])])


def _attention(graph: Graph, shape: Network, x: Value, pick: _Pick | None) -> Value:
    width, heads, tokens = shape.width, shape.heads, shape.tokens
    split, merged = graph.integers(-1, tokens, heads, width // heads), graph.integers(-1, tokens, width)
    parts = []
    for _ in range(3):
        y = graph.node("Reshape", [_linear(graph, shape, x, width, width, pick), split], allowzero=1)
        parts.append(graph.node("Transpose", [y], perm=[0, 2, 1, 3]))
    q, k, v = parts
    sizes = graph.node("Shape", [k], start=0)
    depth = graph.node("Slice", [sizes, graph.integers(-1), graph.integers(2**63 - 1)])
    length = graph.node("Slice", [sizes, graph.integers(-2), graph.integers(-1)])
    outer = graph.node("Slice", [sizes, graph.integers(0), graph.integers(-2)])
    flat = graph.node("Concat", [graph.integers(-1), length, depth], axis=0)
    k = graph.node("Transpose", [graph.node("Reshape", [k, flat], allowzero=0)], perm=[0, 2, 1])
    k = graph.node("Reshape", [k, graph.node("Concat", [outer, depth, length], axis=0)], allowzero=0)
    root = graph.constant(np.array([(width / heads) ** -0.25], np.float32), "root")
    scores = graph.node("MatMul", [graph.node("Mul", [q, root]), graph.node("Mul", [k, root])])
    y = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), v])
    y = graph.node("Reshape", [graph.node("Transpose", [y], perm=[0, 2, 1, 3]), merged], allowzero=1)
    return _linear(graph, shape, y, width, width, pick)


def _mlp(graph: Graph, shape: Network, x: Value, pick: _Pick | None) -> Value:
    y = graph.node("Gelu", [_linear(graph, shape, x, shape.width, shape.hidden, pick)], approximate="tanh")
    return _linear(graph, shape, y, shape.hidden, shape.width, pick)
