"""Half precision of an exported graph; inputs and outputs stay float32, and so do the operators that need it.

ONNX Runtime's own conversion names a cast after its tensor and so makes two of one name where two operators in fp32
share an input; this one casts a tensor once, where it is first needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT_KINDS: Mapping[str, tuple[str, ...]] = {
    "norms": (
        "LayerNormalization",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
    ),
    "softmax": ("Softmax", "Attention"),
    "activation": ("Gelu", "FastGelu", "BiasGelu", "QuickGelu"),
}
"""Kinds of operators that may stay in fp32."""
_WHOLE_INPUTS = {"Resize": (1, 2)}
"""Inputs that ONNX wants in float32 whatever the operator computes in."""

_TIMESTEP = ("Sin", "Cos")
"""Features of a timestep: angles of up to 1000, of which half precision keeps not even the sign of the sine."""

_LARGEST = float(np.finfo(np.float16).max)


def halve(model: onnx.ModelProto, wide: Collection[str] = ()) -> onnx.ModelProto:
    """A new model in fp16, but for the kinds of operators in `wide`; `model` is not changed.

    Ensures: the same inputs and outputs.
    """
    kept = {kind for name in wide for kind in FLOAT_KINDS[name]}
    named = _timestep_features(model)
    build = _Halver(model)
    for node in model.graph.node:
        build.node(node, in_half=node.op_type not in kept and node.name not in named)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(build.nodes)
    used = {name for node in build.nodes for name in node.input}
    result.graph.initializer.extend(tensor for name, tensor in build.constants.items() if name in used)
    return result


class _Halver:
    """Nodes one after the other; `_half` and `_whole` name the tensor of every float value in either type."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.outputs = {value.name for value in model.graph.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self._whole = {name: name for name in self.floats & {value.name for value in model.graph.input}}
        self._half: dict[str, str] = {}
        for name, tensor in list(self.constants.items()):
            if tensor.data_type == TensorProto.FLOAT:
                values16 = np.clip(numpy_helper.to_array(tensor), -_LARGEST, _LARGEST).astype(np.float16)
                self._whole[name], self._half[name] = name, f"{name}.fp16"
                self.constants[f"{name}.fp16"] = numpy_helper.from_array(values16, f"{name}.fp16")

    def node(self, node: onnx.NodeProto, in_half: bool) -> None:
        """One operator between inputs of its own type."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        whole = _WHOLE_INPUTS.get(node.op_type, ())
        copy.input[:] = [self._as(name, in_half and index not in whole) for index, name in enumerate(node.input)]
        self.nodes.append(copy)
        for index, name in enumerate(node.output):
            if name not in self.floats:
                continue
            own = self._half if in_half else self._whole
            own[name] = f"{name}.fp16" if in_half and name in self.outputs else name
            copy.output[index] = own[name]
            if in_half and name in self.outputs:
                self.nodes.append(helper.make_node("Cast", [own[name]], [name], f"{name}.cast", to=TensorProto.FLOAT))
        for attribute in copy.attribute:
            if in_half and copy.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16

    def _as(self, name: str, in_half: bool) -> str:
        """The tensor in the type that is wanted, cast once."""
        wanted, there = (self._half, self._whole) if in_half else (self._whole, self._half)
        if name not in wanted and name in there:
            kind = TensorProto.FLOAT16 if in_half else TensorProto.FLOAT
            wanted[name] = f"{name}.{'half' if in_half else 'whole'}"
            self.nodes.append(helper.make_node("Cast", [there[name]], [wanted[name]], wanted[name], to=kind))
        return wanted.get(name, name)


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
