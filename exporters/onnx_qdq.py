"""Static quantization for NPUs: every tensor of the static graph with a calibrated range, in 8 or in 16 bits.

Quantize and dequantize nodes lie round every operator, as ONNX Runtime and QNN want them to find integer kernels:

    matrices      int8 per output channel, their bias in int32 at the scale of the products
    activations   uint8 or uint16, one range per tensor; reshapes and transposes hand theirs on
    tailors       int8 at 1/127, as they span [-1, 1] in the static graph

A kind of operators may be wide (16 bits) in an 8-bit model; where widths meet, a pair of nodes converts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kind_edge.exporters.activation_ranges import covariances, histograms
from kind_edge.exporters.rounding import round_matrix
from kind_edge.exporters.trajectories import Call

OPSET = 21
"""From here on the standard's own QuantizeLinear knows 16 bits."""

WIDE_KINDS: Mapping[str, str] = {
    "residual": r"sample|tokens|patches(\..*)?|blocks\.\d+\.(attn|mlp)\.(gated|out)",
    "norms": r".*\.(norm|scaled|in)",
    "outputs": r".*\.(attn\.o|mlp\.fc2)\.(out|shared\.(weight|u)\.product)",
    "tailors": r".*\.tailors\.(thin|scaled|out|scale\.picked)",
    "thin": r".*\.shared\.v\.product",
    "attention": r".*\.attn\.(scores|softmax|mixed|[qkv]\.(out|shared\.(weight|u)\.product))",
    "activation": r".*\.mlp\.(gelu|fc1\.(out|shared\.(weight|u)\.product))",
    "modulation": r".*\.(shift|scale|gate)",
    "final": r"final(\..*)?|prediction",
}
"""What may be wide where the rest has 8 bits: names of operators by kind."""

ENDS = ("patches", "final")
"""Matrices outside the blocks, which may be wide in a 16-bit model like those of the blocks."""

_HANDED_ON = ("Reshape", "Transpose", "DepthToSpace")


class Rounding(NamedTuple):
    """How a tensor is stored: real = (integer - zero) * scale."""

    scale: NDArray[np.float32]
    zero: NDArray[Any]
    axis: int | None = None


class Calibration(NamedTuple):
    """What was measured: the range of every activation by bits, and the matrices rounded for what they multiply."""

    ranges: Mapping[str, Mapping[int, tuple[float, float]]]
    matrices: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]]


def calibrate(static: onnx.ModelProto, calls: Sequence[Call]) -> Calibration:
    """Everything that rounding needs to know of the static graph, measured once."""
    floats = _floats(static)
    names = [value.name for value in static.graph.input if value.name in floats]
    names += [n.output[0] for n in static.graph.node if n.op_type not in _HANDED_ON and n.output[0] in floats]
    found = histograms(static, names, calls)
    ranges = {name: {bits: histogram.range(2**bits) for bits in (8, 16)} for name, histogram in found.items()}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in static.graph.initializer}
    products = [node for node in static.graph.node if node.op_type == "Gemm"]
    vary = covariances(static, [node.input[0] for node in products], calls)
    matrices = {n.input[1]: round_matrix(constants[n.input[1]], vary[n.input[0]], 8) for n in products}
    (patches,) = (node for node in static.graph.node if node.op_type == "Conv")
    weight = constants[patches.input[1]]
    matrices[patches.input[1]] = round_matrix(weight.reshape(len(weight), -1), _of_patches(calls, weight.shape), 8)
    return Calibration(ranges, matrices)


def _of_patches(calls: Sequence[Call], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The covariance of the values in a patch, in the order of the convolution's weight [D, ch, P, P]."""
    samples = np.concatenate([call.feeds["sample"] for call in calls]).astype(np.float64)  # [.., ch, H, W]
    _, channels, side, _ = shape
    grid = samples.shape[-1] // side
    apart = samples.reshape(-1, channels, grid, side, grid, side).transpose(0, 2, 4, 1, 3, 5)
    patches = apart.reshape(-1, channels * side * side)
    return np.asarray(patches.T @ patches / len(patches))


def quantize_static(
    static: onnx.ModelProto, found: Calibration, bits: int, wide: Collection[str] = ()
) -> onnx.ModelProto:
    """The static graph with activations of `bits` (8 or 16); `static` is not changed. Ensures: inputs and outputs as
    there.

    `wide`: in an 8-bit model those of WIDE_KINDS whose activations have 16; in a 16-bit model the matrices, by name
    ("blocks.0.attn.q", or of ENDS), whose weights have 16.
    """
    build = _Quantizer(static, found, bits, wide)
    for node in static.graph.node:
        build.node(node)
    nodes = build.finished([value.name for value in static.graph.output])
    graph = helper.make_graph(nodes, static.graph.name, static.graph.input, static.graph.output, build.initializers)
    return helper.make_model(
        graph, producer_name=static.producer_name, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10
    )


def _floats(model: onnx.ModelProto) -> set[str]:
    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}


class _Stored(NamedTuple):
    """A quantized tensor. `bits` 0: a weight, which operators of any width take as it is."""

    integers: str
    bits: int
    rounding: Rounding


class _Quantizer:
    def __init__(self, static: onnx.ModelProto, found: Calibration, bits: int, wide: Collection[str]) -> None:
        self.found, self.bits = found, bits
        self.wide = [re.compile(WIDE_KINDS[name] if bits == 8 else _products_of(name)) for name in wide]
        self.floats = _floats(static)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in static.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._stored: dict[str, _Stored] = {}
        self._reals: dict[tuple[str, int], str] = {}
        self._known: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
        self._source: dict[str, str] = {}  # whose values a reshaped tensor has
        for value in static.graph.input:
            if value.name in self.floats:
                own = self._bits(value.name)
                self._round(value.name, value.name, own, self._measured(value.name, own))

    def finished(self, outputs: Sequence[str]) -> list[onnx.NodeProto]:
        """All nodes; the outputs are real numbers again."""
        for name in outputs:
            stored = self._stored[name]
            self._dequantize(stored.integers, stored.rounding, name)
        return self.nodes

    def node(self, node: onnx.NodeProto) -> None:
        """One operator between dequantized inputs and its quantized output."""
        copy, name = onnx.NodeProto(), node.output[0]
        copy.CopyFrom(node)
        self.nodes.append(copy)
        if name not in self.floats:  # arithmetic of indices
            self._keep(node.input)
            return
        bits = self._bits(name)
        at = self.nodes.pop()  # after what dequantizes its inputs
        if node.op_type in _HANDED_ON:
            _, bits, rounding = self._stored[node.input[0]]
            self._source[name] = self._source.get(node.input[0], node.input[0])
            at.input[0] = self._real(node.input[0], bits)
            self._keep(node.input[1:])
        elif node.op_type == "Gather":
            bits, rounding = self._table_rounding(node.input[0], bits)
            at.input[0] = self._constant(node.input[0], rounding)
            self._keep(node.input[1:])
        else:
            rounding = self._measured(name, bits)
            at.input[:] = self._operands(node, bits)
        at.output[0] = f"{name}.r"
        self.nodes.append(at)
        self._round(at.output[0], name, bits, rounding)

    def _operands(self, node: onnx.NodeProto, bits: int) -> list[str]:
        """Inputs of an operator that computes: activations in its own width, constants as such operators want them."""
        if node.op_type not in ("Gemm", "Conv", "LayerNormalization"):
            return [self._operand(name, bits) for name in node.input]
        x, name, *bias = node.input
        weight = _ONES
        if self.bits == 16 and self._is_wide(node.name):
            weight = _per_channel(self.constants[name], np.int16)
        elif name in self.found.matrices:
            integers, scale = self.found.matrices[name]
            weight = Rounding(scale[:, 0], np.zeros(len(scale), np.int8), 0)
            self.constants[name] = (integers * scale).reshape(
                self.constants[name].shape
            )  # rounds to these very integers
        inputs = [self._real(x, bits), self._constant(name, weight)]
        if bias:
            scale = (self._scale(x, bits) * weight.scale).astype(np.float32)
            zero = np.zeros(scale.shape, np.int32)
            own = Rounding(scale, zero, weight.axis)  # its scale is that of one product, so it is not shared
            inputs.append(self._constant(bias[0], own, f"{node.name}.bias"))
        return inputs

    def _operand(self, name: str, bits: int) -> str:
        if name not in self.constants:
            return self._real(name, bits)
        values = self.constants[name]
        return self._constant(name, _between(float(values.min()), float(values.max()), bits))

    def _table_rounding(self, name: str, bits: int) -> tuple[int, Rounding]:
        """Of a table that is gathered from: thin factors of tailors are weights, everything else activations."""
        if re.search(r"\.tailors\.[uv]$", name):
            return 0, Rounding(np.array(1 / 127, np.float32), np.array(0, np.int8))
        values = self.constants[name]
        return bits, _between(float(values.min()), float(values.max()), bits)

    def _bits(self, name: str) -> int:
        return 16 if self._is_wide(name) else self.bits

    def _is_wide(self, name: str) -> bool:
        return any(each.fullmatch(name) for each in self.wide)

    def _measured(self, name: str, bits: int) -> Rounding:
        return _between(*self.found.ranges[self._source.get(name, name)][bits], bits)

    def _scale(self, name: str, bits: int) -> NDArray[np.float32]:
        stored = self._stored[name]
        return stored.rounding.scale if stored.bits == bits else self._measured(name, bits).scale

    def _keep(self, names: Sequence[str]) -> None:
        """Constants of integers, as they are; each once."""
        for name in names:
            if name in self.constants and (name, -1) not in self._reals:
                self._reals[name, -1] = name
                self.initializers.append(numpy_helper.from_array(self.constants[name], name))

    def _constant(self, name: str, rounding: Rounding, stored_as: str | None = None) -> str:
        """A constant, stored in integers; its real values."""
        key = stored_as or name
        if (key, 0) not in self._reals:
            integers = f"{key}.{rounding.zero.dtype}"
            self.initializers.append(numpy_helper.from_array(_integers(self.constants[name], rounding), integers))
            self._reals[key, 0] = self._dequantize(integers, rounding, f"{key}.r")
        return self._reals[key, 0]

    def _real(self, name: str, bits: int) -> str:
        """An activation, dequantized from as many bits."""
        stored = self._stored[name]
        if (name, bits) not in self._reals:
            own = stored.bits or bits
            if (name, own) not in self._reals:
                self._reals[name, own] = self._dequantize(stored.integers, stored.rounding, f"{name}.r{own}")
            if own != bits:
                rounding = self._measured(name, bits)
                integers = self._quantize(self._reals[name, own], rounding, f"{name}.q{bits}")
                self._reals[name, bits] = self._dequantize(integers, rounding, f"{name}.r{bits}")
        return self._reals[name, bits]

    def _round(self, real: str, name: str, bits: int, rounding: Rounding) -> None:
        self._stored[name] = _Stored(self._quantize(real, rounding, f"{name}.q"), bits, rounding)

    def _quantize(self, real: str, rounding: Rounding, output: str) -> str:
        return self._convert("QuantizeLinear", real, rounding, output)

    def _dequantize(self, integers: str, rounding: Rounding, output: str) -> str:
        return self._convert("DequantizeLinear", integers, rounding, output)

    def _convert(self, kind: str, x: str, rounding: Rounding, output: str) -> str:
        scale = self._shared(rounding.scale, f"{output}.scale")
        zero = self._shared(rounding.zero, f"{output}.zero")
        axis = {} if rounding.axis is None else {"axis": rounding.axis}
        name = f"{output}.dq" if output in self.floats else output  # an operator has the name of its output already
        self.nodes.append(helper.make_node(kind, [x, scale, zero], [output], name, **axis))
        return output

    def _shared(self, values: NDArray[Any], name: str) -> str:
        """A scale or a zero point; equal ones are one constant, as names would outweigh them."""
        key = (values.tobytes(), str(values.dtype), values.shape)
        if key not in self._known:
            self._known[key] = name
            self.initializers.append(numpy_helper.from_array(values, name))
        return self._known[key]


def _products_of(matrix: str) -> str:
    """Names of the operators that multiply by a matrix, or by its two thin ones."""
    return rf"{re.escape(matrix)}(\.shared)?(\.(weight|v|u))?(\.product)?"


_ONES = Rounding(np.array(1 / 255, np.float32), np.array(0, np.uint8))
"""Of the weights of a normalisation, which are all 1."""


def _between(low: float, high: float, bits: int) -> Rounding:
    """Unsigned integers over a range, with zero among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = np.float32(max(high - low, 1e-4) / levels)
    zero = int(np.clip(np.rint(-low / scale), 0, levels))
    return Rounding(np.array(scale), np.array(zero, np.uint8 if bits == 8 else np.uint16))


def _per_channel(weight: NDArray[np.float32], kind: type[np.signedinteger[Any]]) -> Rounding:
    """Symmetric, a scale for every output: the first axis."""
    top = np.abs(weight).reshape(len(weight), -1).max(1)
    scale = (np.where(top == 0, 1, top) / np.iinfo(kind).max).astype(np.float32)
    return Rounding(scale, np.zeros(len(weight), kind), 0)


def _integers(values: NDArray[np.float32], rounding: Rounding) -> NDArray[Any]:
    scale, zero, axis = rounding
    shape = (-1, *[1] * (values.ndim - 1)) if axis is not None else ()
    limits = np.iinfo(zero.dtype)
    whole = np.rint(values.astype(np.float64) / scale.reshape(shape)) + zero.reshape(shape)
    return np.asarray(np.clip(whole, limits.min, limits.max), zero.dtype)
