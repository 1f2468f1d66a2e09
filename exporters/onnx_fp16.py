"""Half precision of an exported denoiser; inputs and outputs stay float32, and so do the operators that need it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

FLOAT_KINDS: Mapping[str, tuple[str, ...]] = {
    "norms": ("LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization"),
    "softmax": ("Softmax", "Attention"),
    "activation": ("Gelu", "FastGelu", "BiasGelu", "QuickGelu"),
}
"""Kinds of operators that may stay in fp32."""

_TIMESTEP = ("Sin", "Cos")
"""Features of a timestep: angles of up to 1000, of which half precision keeps not even the sign of the sine."""


def halve(model: onnx.ModelProto, wide: Collection[str] = ()) -> onnx.ModelProto:
    """A new model in fp16, but for the kinds of operators in `wide`; `model` is not changed.

    Ensures: the same inputs and outputs.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kinds = {kind for name in wide for kind in FLOAT_KINDS[name]}
    result = convert_float_to_float16(
        copy,
        keep_io_types=True,
        op_block_list=sorted({*DEFAULT_OP_BLOCK_LIST, *kinds}),
        node_block_list=sorted(_timestep_features(copy)),
    )
    del result.graph.value_info[:]
    return _in_order(result)


def _timestep_features(model: onnx.ModelProto) -> set[str]:
    """Nodes on the way from `timestep` to the sines and cosines of its angles."""
    made = {output: node for node in model.graph.node for output in node.output}
    found: set[str] = set()
    waiting = [node for node in model.graph.node if node.op_type in _TIMESTEP]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [made[name] for name in node.input if name in made]
    return found


def _in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node after those whose outputs it takes, otherwise as they stand: conversions were put at the end."""
    waiting = list(model.graph.node)
    known = {tensor.name for tensor in model.graph.initializer} | {value.name for value in model.graph.input} | {""}
    consumers: dict[str, list[int]] = {}
    missing = []
    for index, node in enumerate(waiting):
        needed = {name for name in node.input if name not in known}
        missing.append(len(needed))
        for name in needed:
            consumers.setdefault(name, []).append(index)
    ready = [index for index, count in enumerate(missing) if not count]
    ordered: list[onnx.NodeProto] = []
    while ready:
        node = waiting[ready.pop(0)]
        ordered.append(node)
        for name in node.output:
            for index in consumers.get(name, ()):
                missing[index] -= 1
                if not missing[index]:
                    ready.append(index)
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return model
