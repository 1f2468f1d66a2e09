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

from kind_edge.bounded import well_formed
from kind_edge.deploy.graph_work import count_macs, graphs_of, paper_flops, value_shapes
from kind_edge.errors import InputError

_MAX_BYTES = 2**31
_MAX_ENTRIES, _MAX_TEXT = 100, 300
"""Of the texts that a file says of itself, how many are read, and how much of each."""

DEFAULT_DOMAIN = "ai.onnx"
"""What a file writes as "" mostly."""


@dataclass(frozen=True)
class GraphFacts:
    """One ONNX file. `macs` are of one evaluation at batch 1; `uncounted` products had no shapes to count from.

    `opset` is ai.onnx's; `opsets` and `used` are by domain: its version, and the sorted names of its operators here.

    `constant_bytes` groups constants by the operator that reads them; `parameters` is how many values they hold. Of a
    file that kind-edge wrote, `part_bytes` groups all bytes by what they are, and its tailors have `tailor_classes`
    rows, one per class. `paper_flops` leave attention's products out. `metadata`: what the file says of itself.
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
    paper_flops: int = 0
    part_bytes: Mapping[str, int] = field(default_factory=dict)
    tailor_classes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    opsets: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Of the matrix products alone: a MAC is two FLOPs."""
        return 2 * self.macs


def graph_facts(path: Path, name: str | None = None) -> GraphFacts:
    """Read one `.onnx` file. Raises `InputError` for a file that is missing or is no ONNX model."""
    with well_formed(str(path)):
        return _facts(load_graph(path), path.stat().st_size, name or path.name)


def _facts(model: Any, size_bytes: int, name: str) -> GraphFacts:
    import onnx

    initializers = _initializers(model)
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in initializers}
    nodes = list(all_nodes(model))
    shapes = value_shapes(model)
    macs, uncounted = count_macs(nodes, shapes)
    used = operators_by_domain(model)
    types = Counter({tensor.data_type: 0 for tensor in initializers})
    for tensor in initializers:
        types[tensor.data_type] += sizes[tensor.name]
    largest = types.most_common(1)[0][0] if types else onnx.TensorProto.FLOAT
    ours = any(_is_ours(tensor.name) for tensor in initializers)
    return GraphFacts(
        file=name,
        size_bytes=size_bytes,
        opset=opsets(model).get(DEFAULT_DOMAIN, 0),
        precision=onnx.TensorProto.DataType.Name(largest).lower(),
        parameters=sum(math.prod(tensor.dims) for tensor in initializers),
        constant_bytes=_constant_bytes(nodes, sizes),
        operators=dict(Counter(_operator(node) for node in nodes).most_common()),
        macs=macs,
        uncounted=tuple(uncounted),
        inputs={value.name: _interface(value) for value in model.graph.input if value.name not in sizes},
        outputs={value.name: _interface(value) for value in model.graph.output},
        has_subgraphs=len(list(graphs_of(model.graph))) > 1,
        paper_flops=paper_flops(nodes, shapes),
        part_bytes=_part_bytes(initializers, size_bytes) if ours else {},
        tailor_classes=next((tensor.dims[0] for tensor in initializers if _is_tailors(tensor.name)), 0),
        metadata={entry.key: entry.value[:_MAX_TEXT] for entry in model.metadata_props[:_MAX_ENTRIES]},
        opsets={domain: opsets(model).get(domain, 0) for domain in used},
        used=used,
    )


def bytes_by_part(path: Path) -> dict[str, int]:
    """Where the bytes of an exported model lie, by the names that the exporter gives its constants."""
    with well_formed(str(path)):
        return _part_bytes(_initializers(load_graph(path)), path.stat().st_size)


def _initializers(model: Any) -> list[Any]:
    return [tensor for graph in graphs_of(model.graph) for tensor in graph.initializer]


def _part_bytes(initializers: Sequence[Any], size_bytes: int) -> dict[str, int]:
    parts = dict.fromkeys(("shared matrices", "tailors", "modulation table", "embeddings, final layer", "graph"), 0)
    for tensor in initializers:
        parts[_part_of(tensor.name)] += _tensor_bytes(tensor)
    parts["graph"] = size_bytes - sum(parts.values())
    return {name: size for name, size in parts.items() if size > 0}


def _is_tailors(name: str) -> bool:
    return name.startswith("tailors.") or ".tailors." in name


def _is_ours(name: str) -> bool:
    """Whether kind-edge gave a constant this name."""
    return _is_tailors(name) or name.startswith(("blocks.", "modulation."))


def _part_of(name: str) -> str:
    if _is_tailors(name):
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
    return (node for graph in graphs_of(model.graph) for node in graph.node)


def load_graph(path: Path) -> Any:
    """The `onnx.ModelProto` of a file, weights beside it left there; `InputError` if it is none."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path}: over 2 GiB, more than one ONNX file can hold (weights lie beside it then)")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX model ({error})") from error
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path}: not an ONNX model: there is no graph in it")
    return model


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
