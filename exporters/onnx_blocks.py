"""Weights alone in 4 or 8 bits, in blocks of 32 inputs that share a scale; activations stay in floating point.

Products with constant matrices become MatMulNBits, which widens a block as it multiplies. Gemm has no such kernel, and
becomes MatMul and Add first. Tailors are gathered by class at run time: in 8 bits as in dynamic int8, in 4 bits by
GatherBlockQuantized, with blocks along every component.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kind_edge.budget.precision import BLOCK
from kind_edge.exporters.activation_ranges import covariances
from kind_edge.exporters.onnx_int8 import quantize_gathered, weights_of
from kind_edge.exporters.rounding import round_matrix
from kind_edge.exporters.trajectories import Call

_CONTRIB = "com.microsoft"

Rounded = Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]]
"""Integers [n, m] and scales [n, blocks] by the matrix's name."""


def without_gemm(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with every Gemm of a constant matrix as MatMul and Add; `model` is not changed."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        scaled = {attributes.get(key, 1.0) for key in ("alpha", "beta")} != {1.0}
        if node.op_type != "Gemm" or node.input[1] not in constants or attributes.get("transA") or scaled:
            nodes.append(node)
            continue
        x, name, *bias = (each for each in node.input if each)
        if attributes.get("transB"):
            weight, name = numpy_helper.to_array(constants[name]), f"{name}.turned"
            constants[name] = numpy_helper.from_array(np.ascontiguousarray(weight.T), name)
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [x, name], [product], f"{node.name}.product"))
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], [node.output[0]], node.name))
    return _with(result, nodes, constants)


def products_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Products with a constant matrix, in the order of the graph."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def round_blocks(model: onnx.ModelProto, calls: Sequence[Call], bits: Collection[int]) -> Mapping[int, Rounded]:
    """Every matrix in blocks of so many bits, rounded for what it multiplies in these calls."""
    products = products_of(model)
    vary = covariances(model, [node.input[0] for node in products], calls)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: dict[str, list[NDArray[np.float64]]] = {}
    for node in products:  # a weight that blocks have in common multiplies something in each
        seen.setdefault(node.input[1], []).append(vary[node.input[0]])
    weights = {name: (numpy_helper.to_array(constants[name]).T, np.mean(own, axis=0)) for name, own in seen.items()}
    return {
        each: {name: round_matrix(weight, inputs, each, BLOCK) for name, (weight, inputs) in weights.items()}
        for each in bits
    }


def quantize_blocks(
    model: onnx.ModelProto, rounded: Mapping[int, Rounded], bits: int, wide: Collection[str] = ()
) -> onnx.ModelProto:
    """A new model with weights of 4 or 8 bits; `model`, without Gemm, is not changed. Ensures: the same inputs and
    outputs.

    The matrices named in `wide` ("blocks.0.attn.q"), without their tailors, have 8 bits in a model of 4, and stay as
    they are in a model of 8.
    """
    kept = weights_of(wide)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    chosen = {node.name for node in products_of(result)}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        own = 8 if kept and node.name in chosen and node.input[1].startswith(kept) else bits
        if node.name not in chosen or (own == bits == 8 and kept and node.input[1].startswith(kept)):
            nodes.append(node)
            continue
        name = node.input[1]
        for tensor in _packed(name, *rounded[own][name], own):
            constants[tensor.name] = tensor
        m, n = constants[name].dims
        attributes = {"K": m, "N": n, "bits": own, "block_size": BLOCK, "domain": _CONTRIB}
        inputs = [node.input[0], f"{name}.blocks", f"{name}.scales"]
        nodes.append(helper.make_node("MatMulNBits", inputs, list(node.output), node.name, **attributes))
    if not any(each.domain == _CONTRIB for each in result.opset_import):
        result.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    result = _with(result, nodes, constants)
    return quantize_gathered(result, ()) if bits == 8 else _gather_blocks(result)


def _with(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> onnx.ModelProto:
    """The model with these nodes and the constants that they use; in place."""
    used = {name for node in nodes for name in node.input}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    return model


def _packed(
    name: str, integers: NDArray[np.int8], scales: NDArray[np.float32], bits: int
) -> Iterator[onnx.TensorProto]:
    """integers [n, m] as MatMulNBits wants them: [n, blocks, bytes], unsigned round the middle, low half first."""
    n, m = integers.shape
    blocks = scales.shape[1]
    middle = 2 ** (bits - 1)
    unsigned = np.full((n, blocks * BLOCK), middle, np.uint8)
    unsigned[:, :m] = integers.astype(np.int16) + middle
    unsigned = unsigned.reshape(n, blocks, BLOCK)
    packed = unsigned if bits == 8 else unsigned[..., ::2] | unsigned[..., 1::2] << 4
    yield numpy_helper.from_array(packed, f"{name}.blocks")
    yield numpy_helper.from_array(scales, f"{name}.scales")


def _gather_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Tables that are gathered along their classes (K x rows x width, a component a row) in 4 bits; in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or len(table.dims) != 3 or table.data_type != TensorProto.FLOAT:
            nodes.append(node)
            continue
        for tensor in _nibbles(table.name, numpy_helper.to_array(table)):
            constants[tensor.name] = tensor
        inputs = [f"{table.name}.int4", node.input[1], f"{table.name}.scales"]
        attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK, "domain": _CONTRIB}
        nodes.append(helper.make_node("GatherBlockQuantized", inputs, [node.output[0]], node.name, **attributes))
    return _with(model, nodes, constants)


def _nibbles(name: str, table: NDArray[np.float32]) -> Iterator[onnx.TensorProto]:
    """A table [K, r, n] in 4 bits with a scale per block of its last axis; nothing is known of what it multiplies."""
    classes, rank, length = table.shape
    rows = table.reshape(classes * rank, length)
    integers, scales = round_matrix(rows, np.eye(length), 4, BLOCK)
    packed = integers.reshape(-1) & 0xF
    packed = np.append(packed, 0) if len(packed) % 2 else packed
    nibbles = (packed[::2] | packed[1::2] << 4).astype(np.uint8)
    yield helper.make_tensor(f"{name}.int4", TensorProto.INT4, table.shape, nibbles.tobytes(), raw=True)
    yield numpy_helper.from_array(scales.reshape(classes, rank, -1), f"{name}.scales")
