"""The work in an ONNX graph: multiply-accumulates of its matrix products, counted from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_PRODUCTS = {
    "MatMul": "matmul", "MatMulInteger": "matmul", "QLinearMatMul": "matmul", "FusedMatMul": "matmul",
    "DynamicQuantizeMatMul": "matmul", "MatMulIntegerToFloat": "matmul", "MatMulNBits": "matmul",
    "Gemm": "gemm", "QGemm": "gemm",
    "Attention": "attention", "MultiHeadAttention": "attention",
    "Conv": "conv", "ConvInteger": "conv", "QLinearConv": "conv", "FusedConv": "conv",
}  # fmt: skip

_FILTER_INPUT = {"QLinearConv": 3}
"""Where a convolution's filter is not input 1."""

_ON_THE_WAY = {
    "Mul", "Div", "Add", "Sub", "Cast", "Where", "Identity", "Reshape", "Transpose", "QuantizeLinear",
    "DequantizeLinear", "DynamicQuantizeLinear", "Softmax",
}  # fmt: skip
"""What may stand between the two products of an attention that is written out."""
_ELEMENT_FLOPS = {"LayerNormalization": 4, "SimplifiedLayerNormalization": 4, "Gelu": 1, "Sigmoid": 1}
"""FLOPs per element of the output that the convention `paper` counts beside products (a SiLU has one Sigmoid)."""

Shape = tuple[int, ...]


def graphs_of(graph: Any) -> Iterator[Any]:
    """The graph and every graph inside it (bodies of Loop, If and Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from graphs_of(inner)


def value_shapes(model: Any) -> dict[str, Shape]:
    """Shapes of all values whose shape can be told, every free dimension 1."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    constants = {tensor.name for tensor in fixed.graph.initializer}
    for graph in graphs_of(fixed.graph):
        for value in graph.input:
            for dimension in value.type.tensor_type.shape.dim:
                if value.name not in constants and not dimension.dim_value:
                    dimension.dim_value = 1
        # What the file says of inner values may still hold the free dimensions.
        del graph.value_info[:]
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        inferred = fixed
    shapes: dict[str, Shape] = {}
    for graph in graphs_of(inferred.graph):
        shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            tensor_type = value.type.tensor_type
            if tensor_type.HasField("shape"):
                dims = tensor_type.shape.dim
                if all(dim.HasField("dim_value") for dim in dims):
                    shapes.setdefault(value.name, tuple(dim.dim_value for dim in dims))
    return shapes


def count_macs(nodes: Sequence[Any], shapes: Mapping[str, Shape]) -> tuple[int, list[str]]:
    """Multiply-accumulates of all matrix products, and the names of those without shapes."""
    total, uncounted = 0, []
    for node in nodes:
        if node.op_type in _PRODUCTS:
            macs = _macs(node, shapes)
            if macs is None:
                uncounted.append(node.name or node.output[0])
            total += macs or 0
    return total, uncounted


def _macs(node: Any, shapes: Mapping[str, Shape]) -> int | None:
    """Of one product: values of the output times the length of the sum behind each."""
    kind = _PRODUCTS[node.op_type]
    output, first = shapes.get(node.output[0]), shapes.get(node.input[0])
    if output is None and node.op_type == "MatMulNBits" and first is not None:  # unknown to ONNX's own inference
        output = (*first[:-1], _attribute(node, "N"))
    if kind == "conv":
        weight = shapes.get(node.input[_FILTER_INPUT.get(node.op_type, 1)])
        return None if output is None or weight is None else math.prod(output) * math.prod(weight[1:])
    if output is None or first is None:
        return None
    if kind == "attention":  # q K^T and its product with v: as many sums as there are keys, twice
        keys = shapes.get(node.input[1])
        return None if keys is None else math.prod(output) * keys[-2] + math.prod(first) * keys[-2]
    if kind == "gemm":
        return math.prod(output) * first[0 if _attribute(node, "transA") else 1]
    return math.prod(output) * first[-1]


def _attribute(node: Any, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def paper_flops(nodes: Sequence[Any], shapes: Mapping[str, Shape]) -> int:
    """FLOPs as the KIND authors count them: two per MAC of every linear layer and convolution, four per element of a
    LayerNorm, one of a GELU, a SiLU and a convolution's bias; attention's products are left out."""
    attention = _attention_products(nodes)
    total = 0
    for node in nodes:
        size = math.prod(shapes.get(node.output[0], (0,)))
        total += _ELEMENT_FLOPS.get(node.op_type, 0) * size
        kind = _PRODUCTS.get(node.op_type)
        if kind is not None and kind != "attention" and node.output[0] not in attention:
            biased = kind == "conv" and node.op_type in ("Conv", "FusedConv") and len(node.input) > 2
            total += 2 * (_macs(node, shapes) or 0) + biased * size
    return total


def _attention_products(nodes: Sequence[Any]) -> set[str]:
    """Outputs of the products before and after every Softmax: q K^T, and that with v."""
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: set[str] = set()
    for softmax in (node for node in nodes if node.op_type == "Softmax"):
        before = _products_from(softmax, lambda node: [makers[n] for n in node.input[:1] if n in makers])
        after = _products_from(softmax, lambda node: [each for n in node.output[:1] for each in readers.get(n, [])])
        found |= {node.output[0] for node in (*before, *after)}
    return found


def _products_from(start: Any, step: Callable[[Any], list[Any]]) -> list[Any]:
    """The first products that `step` leads to, past what only scales, masks or rearranges."""
    found, front, seen = [], [start], {id(start)}
    while front:
        for node in step(front.pop()):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op_type in _PRODUCTS:
                found.append(node)
            elif node.op_type in _ON_THE_WAY:
                front.append(node)
    return found
