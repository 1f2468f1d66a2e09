"""What an ONNX graph is made of: operators, constants and the multiply-accumulates of its matrix products.

Counted from shapes alone; nothing runs. Every free dimension counts as 1, so the figures are those of batch 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kind_edge.errors import InputError

_PRODUCTS = {
    "MatMul": "matmul", "MatMulInteger": "matmul", "QLinearMatMul": "matmul", "FusedMatMul": "matmul",
    "DynamicQuantizeMatMul": "matmul", "MatMulIntegerToFloat": "matmul", "MatMulNBits": "matmul",
    "Gemm": "gemm", "QGemm": "gemm",
    "Attention": "attention", "MultiHeadAttention": "attention",
    "Conv": "conv", "ConvInteger": "conv", "QLinearConv": "conv", "FusedConv": "conv",
}  # fmt: skip

_FILTER_INPUT = {"QLinearConv": 3}
"""Where a convolution's filter is not input 1."""

DEFAULT_DOMAIN = "ai.onnx"
"""What a file writes as "" mostly."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GraphFacts:
    """One ONNX file. `macs` are of one evaluation at batch 1; `uncounted` products had no shapes to count from.

    `opset` is ai.onnx's; `opsets` and `used` are by domain: its version, and the sorted names of its operators here.

    `constant_bytes` groups constants by the operator that reads them; `parameters` is how many values they hold.
    """

    file: str
    size_bytes: int
    opset: int
    precision: str
    parameters: int
    constant_bytes: Mapping[str, int]
    operators: Mapping[str, int]
    macs: int
    uncounted: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    has_subgraphs: bool
    opsets: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Of the matrix products alone: a MAC is two FLOPs."""
        return 2 * self.macs


def graph_facts(path: Path, name: str | None = None) -> GraphFacts:
    """Read one `.onnx` file. Raises `InputError` for a file that is missing or is no ONNX model."""
    import onnx

    model = load_graph(path)
    initializers = [tensor for graph in _graphs(model.graph) for tensor in graph.initializer]
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in initializers}
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    shapes = _shapes(model)
    macs, uncounted = _count(nodes, shapes)
    used = operators_by_domain(model)
    types = Counter({tensor.data_type: 0 for tensor in initializers})
    for tensor in initializers:
        types[tensor.data_type] += sizes[tensor.name]
    largest = types.most_common(1)[0][0] if types else onnx.TensorProto.FLOAT
    constants = {tensor.name for tensor in initializers}
    return GraphFacts(
        file=name or path.name,
        size_bytes=path.stat().st_size,
        opset=opsets(model).get(DEFAULT_DOMAIN, 0),
        precision=onnx.TensorProto.DataType.Name(largest).lower(),
        parameters=sum(math.prod(tensor.dims) for tensor in initializers),
        constant_bytes=_constant_bytes(nodes, sizes),
        operators=dict(Counter(_operator(node) for node in nodes).most_common()),
        macs=macs,
        uncounted=tuple(uncounted),
        inputs={value.name: _interface(value) for value in model.graph.input if value.name not in constants},
        outputs={value.name: _interface(value) for value in model.graph.output},
        has_subgraphs=len(list(_graphs(model.graph))) > 1,
        opsets={domain: opsets(model).get(domain, 0) for domain in used},
        used=used,
    )


def bytes_by_part(path: Path) -> dict[str, int]:
    """Where the bytes of an exported model lie, by the names that the exporter gives its constants."""
    parts = dict.fromkeys(("shared matrices", "tailors", "modulation table", "embeddings, final layer", "graph"), 0)
    for graph in _graphs(load_graph(path).graph):
        for tensor in graph.initializer:
            parts[_part_of(tensor.name)] += _tensor_bytes(tensor)
    parts["graph"] = path.stat().st_size - sum(parts.values())
    return {name: size for name, size in parts.items() if size > 0}


def _part_of(name: str) -> str:
    if name.startswith("tailors.") or ".tailors." in name:
        return "tailors"
    if name.startswith("blocks."):
        return "shared matrices"
    return "modulation table" if name.startswith("modulation.") else "embeddings, final layer"


def opsets(model: Any) -> dict[str, int]:
    """The version of every operator domain that a model imports."""
    return {entry.domain or DEFAULT_DOMAIN: int(entry.version) for entry in model.opset_import}


def operators_by_domain(model: Any) -> dict[str, list[str]]:
    """The operators of a graph and of every graph inside it, by domain, each once, sorted."""
    found: dict[str, set[str]] = {}
    for node in all_nodes(model):
        found.setdefault(node.domain or DEFAULT_DOMAIN, set()).add(str(node.op_type))
    return {domain: sorted(names) for domain, names in sorted(found.items())}


def all_nodes(model: Any) -> Iterator[Any]:
    """The nodes of a model's graph and of every graph inside it."""
    return (node for graph in _graphs(model.graph) for node in graph.node)


def load_graph(path: Path) -> Any:
    """The `onnx.ModelProto` of a file, weights beside it left there; `InputError` if it is none."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX model ({error})") from error
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path}: not an ONNX model: there is no graph in it")
    return model


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph and every graph inside it (bodies of Loop, If and Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _shapes(model: Any) -> dict[str, Shape]:
    """Shapes of all values whose shape can be told, every free dimension 1."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    constants = {tensor.name for tensor in fixed.graph.initializer}
    for graph in _graphs(fixed.graph):
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
    for graph in _graphs(inferred.graph):
        shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            tensor_type = value.type.tensor_type
            if tensor_type.HasField("shape"):
                dims = tensor_type.shape.dim
                if all(dim.HasField("dim_value") for dim in dims):
                    shapes.setdefault(value.name, tuple(dim.dim_value for dim in dims))
    return shapes


def _count(nodes: Sequence[Any], shapes: Mapping[str, Shape]) -> tuple[int, list[str]]:
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


def _constant_bytes(nodes: Sequence[Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of constants by the kind of operator that reads them first, largest first."""
    groups: Counter[str] = Counter()
    left = dict(sizes)
    for node in nodes:
        for name in node.input:
            if name in left:
                groups[_operator(node)] += left.pop(name)
    groups["unused"] += sum(left.values())
    return {name: count for name, count in groups.most_common() if count}


def _operator(node: Any) -> str:
    return str(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}")


def _tensor_bytes(tensor: Any) -> int:
    """Bytes of a constant as it is packed in memory; 4-bit types pack two values into one byte."""
    import onnx

    halves = {"INT4", "UINT4", "FLOAT4E2M1"}
    values: int = math.prod(tensor.dims)
    if onnx.TensorProto.DataType.Name(tensor.data_type) in halves:
        return math.ceil(values / 2)
    return int(values * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _interface(value: Any) -> str:
    """ "float [batch, 1, 28, 28]"."""
    import onnx

    tensor = value.type.tensor_type
    dims = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{dims}]"
