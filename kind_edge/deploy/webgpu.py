"""A model's graph as ONNX Runtime's WebGPU takes it: the same weights and the same function, other nodes.

It binds a buffer for every input and output of an operator, and WebGPU promises 8 of them: a Split into more than 7
fails when it runs, and becomes a tree here. It has no kernel for ONNX's Attention, which would go to the CPU and back
in every block, and becomes the products that it stands for. (ONNX Runtime's own MultiHeadAttention has a kernel, but
that of 1.31 is no closer to the CPU's values than 25 to 46 dB.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MOST_OUTPUTS = 7
"""Of one operator with one input: WebGPU's default of `maxStorageBuffersPerShaderStage` is 8."""


def for_webgpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with the nodes that WebGPU takes; `model` is not changed. Ensures: the same inputs and outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if (other := webgpu_nodes(model)) is not None:
        del result.graph.node[:]
        result.MergeFrom(other)
    return result


def webgpu_nodes(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """What takes the place of the nodes; None where WebGPU takes them as they are.

    A model of all nodes, in order, and of the small constants that are new: merged, as protobuf merges messages, into
    the model without its nodes, whatever its weights are.
    """
    types = _types(model) if any(_is_wide(node) or _is_plain_attention(node) for node in model.graph.node) else {}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, onnx.TensorProto] = {}
    for node in model.graph.node:
        if _is_wide(node) and (sizes := _sizes(node, constants, types)):
            nodes += _tree(node, sizes, made)
        elif _is_plain_attention(node) and node.input[0] in types:
            nodes += _products(node, types[node.input[0]], made)
        else:
            nodes.append(node)
    if nodes == list(model.graph.node):
        return None
    result = onnx.ModelProto()
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(made.values())
    return result


def _is_wide(node: onnx.NodeProto) -> bool:
    return node.op_type == "Split" and len(node.output) > MOST_OUTPUTS


def _is_plain_attention(node: onnx.NodeProto) -> bool:
    """Of queries, keys and values [B, N, D], all with as many heads and the usual scale: what both operators are."""
    given = _attributes(node)
    heads = given.pop("q_num_heads", None)
    plain = len(node.input) == 3 and len(node.output) == 1 and given.pop("kv_num_heads", None) == heads
    return node.op_type == "Attention" and not node.domain and heads is not None and plain and not given


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Type and shape of every value that shape inference knows, as far as its last axis."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {each.name: each.type.tensor_type for each in [*graph.value_info, *graph.input]}
    return {name: each for name, each in found.items() if each.shape.dim and each.shape.dim[-1].dim_value}


def _sizes(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], types: Mapping[str, onnx.TypeProto.Tensor]
) -> list[int]:
    """What a Split cuts its axis into; nothing where only running it would tell, or of one from before opset 13."""
    given, known = _attributes(node), types.get(node.input[0])
    if len(node.input) > 1:
        sizes = constants.get(node.input[1])
        return [] if sizes is None else [int(size) for size in numpy_helper.to_array(sizes)]
    total = known.shape.dim[given.get("axis", 0)].dim_value if known and "split" not in given else 0
    if not total:
        return []
    piece = -(-total // len(node.output))  # the last one is smaller where it does not come out even
    return [min(piece, total - at) for at in range(0, total, piece)]


def _products(
    node: onnx.NodeProto, queries: onnx.TypeProto.Tensor, made: dict[str, onnx.TensorProto]
) -> Iterator[onnx.NodeProto]:
    """softmax((q d^-1/2) k^T) v of every head; constants go into `made`."""
    name = node.output[0]  # a node need not have one of its own
    heads, width = helper.get_node_attr_value(node, "q_num_heads"), queries.shape.dim[-1].dim_value
    dtype = helper.tensor_dtype_to_np_dtype(queries.elem_type)
    apart, together = (_constant("sizes", np.array(sizes), made) for sizes in ([0, 0, heads, -1], [0, 0, -1]))
    scale = _constant("scale", np.array((width // heads) ** -0.5, dtype), made)

    def add(kind: str, inputs: Sequence[str], what: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}.{what}"], f"{name}.{what}", **attributes)

    orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    yield add("Mul", [node.input[0], scale], "scaled")
    for value, (part, order) in zip([f"{name}.scaled", *node.input[1:]], orders.items(), strict=True):
        yield add("Reshape", [value, apart], f"{part}.apart")
        yield add("Transpose", [f"{name}.{part}.apart"], part, perm=order)
    yield add("MatMul", [f"{name}.q", f"{name}.k"], "scores")
    yield add("Softmax", [f"{name}.scores"], "shares", axis=-1)
    yield add("MatMul", [f"{name}.shares", f"{name}.v"], "mixed")
    yield add("Transpose", [f"{name}.mixed"], "back", perm=[0, 2, 1, 3])
    yield helper.make_node("Reshape", [f"{name}.back", together], node.output, node.name)


def _constant(what: str, values: NDArray[Any], made: dict[str, onnx.TensorProto]) -> str:
    """A small constant, shared by all who want the same."""
    name = "_".join(["webgpu", what, values.dtype.name, *map(str, values.ravel().tolist())])
    made[name] = numpy_helper.from_array(values, name)
    return name


def _tree(node: onnx.NodeProto, sizes: Sequence[int], made: dict[str, onnx.TensorProto]) -> Iterator[onnx.NodeProto]:
    """The Split as Splits of Splits, of at most `MOST_OUTPUTS` each; their sizes go into `made`."""
    leaves = list(node.output)
    per_branch = 1
    while len(leaves) > per_branch * MOST_OUTPUTS:
        per_branch *= MOST_OUTPUTS
    starts = range(0, len(leaves), per_branch)
    branches = [leaves[at : at + per_branch] for at in starts]
    widths = [sum(sizes[at : at + per_branch]) for at in starts]
    names = [leaf[0] if len(leaf) == 1 else f"{leaf[0]}.to.{leaf[-1]}" for leaf in branches]
    constant = _constant("sizes", np.array(widths), made)
    axis = _attributes(node).get("axis", 0)
    yield helper.make_node("Split", [node.input[0], constant], names, node.name, axis=axis)
    for at, name, branch in zip(starts, names, branches, strict=True):
        if len(branch) > 1:
            inner = helper.make_node("Split", [name], branch, name, axis=axis)
            yield from _tree(inner, sizes[at : at + len(branch)], made)
