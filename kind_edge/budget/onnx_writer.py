"""ONNX graphs, written operator by operator: equal models give equal bytes. Needs onnx and numpy alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Value = str
Floats = NDArray[np.float32]
Ends = Sequence[tuple[str, int, Sequence[int | str]]]
"""Inputs or outputs: name, ONNX type, shape."""

OPSET, IR_VERSION = 23, 11
"""The first opset that has Attention, and what its files are written in."""

FLOAT, INT32, INT64, HALF = 1, 6, 7, 10


class Graph:
    """An ONNX graph under construction. Constants are made once per name; a node is named like its first output."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._quantized: dict[Value, tuple[Value, Value, Value]] = {}
        self._counts: Counter[str] = Counter()

    def node(self, kind: str, inputs: Sequence[Value], output: str | None = None, **attributes: Any) -> Value:
        """One operator with one output; `output` names it."""
        return self.nodes(kind, inputs, [output or self._name(kind)], **attributes)[0]

    def nodes(self, kind: str, inputs: Sequence[Value], outputs: Sequence[str] | int, **attributes: Any) -> list[Value]:
        """One operator with several outputs: their names, or how many."""
        names = [self._name(kind) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(self._onnx.helper.make_node(kind, list(inputs), names, names[0], **attributes))
        return names

    def _name(self, kind: str) -> str:
        self._counts[kind] += 1
        return f"{kind}_{self._counts[kind]}"

    def constant(self, values: NDArray[Any], name: str | None = None) -> Value:
        """A constant; with a name, the one of that name."""
        name = name or self._name("constant")
        if name not in self._constants:
            self._constants[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def integers(self, *values: int) -> Value:
        """A small int64 vector, shared by all who want the same."""
        return self.constant(np.array(values, np.int64), "_".join(map(str, ("sizes", *values))))

    def number(self, value: float) -> Value:
        """A float32 scalar, shared likewise."""
        return self.constant(np.array(value, np.float32), f"number_{value:g}")

    def filled(self, rows: int, columns: int) -> Value:
        """A weight that the runtime makes when it loads the model, so that its bytes need not be in the file."""
        small = self._onnx.numpy_helper.from_array(np.array([1e-3], np.float32))
        return self.node("ConstantOfShape", [self.integers(rows, columns)], value=small)

    def product(self, x: Value, weight: Floats, precision: str = "fp32", name: str | None = None) -> Value:
        """x times a constant matrix: one MatMul, or the five operators of dynamic int8, one scale per column.

        Products of the same x share its quantization, as the quantizer has it.
        """
        if precision != "int8":
            typed = weight.astype(np.float16) if precision == "fp16" else weight
            return self.node("MatMul", [x, self.constant(typed, name)])
        if x not in self._quantized:
            quantized = self.nodes("DynamicQuantizeLinear", [x], 3)
            self._quantized[x] = (quantized[0], quantized[1], quantized[2])
        values, scale, zero = self._quantized[x]
        steps = np.maximum(np.abs(weight).max(0), 1e-9) / np.float32(127)
        integers = self.constant(np.rint(weight / steps).astype(np.int8))
        zeros = self.constant(np.zeros(weight.shape[1], np.int8))
        sums = self.node("Cast", [self.node("MatMulInteger", [values, integers, zero, zeros])], to=FLOAT)
        return self.node("Mul", [sums, self.node("Mul", [scale, self.constant(steps)])])

    def model(self, name: str, inputs: Ends, outputs: Mapping[Value, Sequence[int | str] | None]) -> Any:
        """The `onnx.ModelProto`. Outputs are float32, of a shape or of any."""
        helper = self._onnx.helper
        ends = [helper.make_tensor_value_info(value, kind, shape) for value, kind, shape in inputs]
        results = [helper.make_tensor_value_info(value, FLOAT, shape) for value, shape in outputs.items()]
        graph = helper.make_graph(self._nodes, name, ends, results, initializer=list(self._constants.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="kind-edge")
