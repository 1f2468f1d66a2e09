"""Multiply-accumulates counted from a graph agree with the loops that its operators stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.graph_facts import graph_facts
from kind_edge.deploy.inspection import inspect
from kind_edge.errors import InputError


def save(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], **constants: np.ndarray) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("nodes", "shape", "constants", "macs"),
    [
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], ["batch", 7, 5], {"w": floats(5, 3)}, 7 * 5 * 3),
        ([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], ["batch", 5], {"w": floats(3, 5)}, 5 * 3),
        ([helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)], [5, 4], {"w": floats(5, 3)}, 4 * 5 * 3),
        (
            [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=2)],
            ["batch", 4, 6, 6],
            {"w": floats(8, 2, 2, 2)},
            8 * 3 * 3 * 2 * 2 * 2,
        ),
        (
            # A shape that is computed in the graph, as exporters do to keep the batch free.
            [
                helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
                helper.make_node("Concat", ["s", "rest"], ["target"], axis=0),
                helper.make_node("Reshape", ["x", "target"], ["flat"]),
                helper.make_node("MatMul", ["flat", "w"], ["y"]),
            ],
            ["batch", 3, 4],
            {"rest": np.array([12]), "w": floats(12, 2)},
            12 * 2,
        ),
    ],
    ids=["MatMul", "Gemm", "Gemm transposed", "Conv", "computed shape"],
)
def test_macs(
    tmp_path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], constants: dict[str, np.ndarray], macs: int
) -> None:
    facts = graph_facts(save(tmp_path / "m.onnx", nodes, shape, **constants))
    assert (facts.macs, facts.uncounted) == (macs, ())
    assert facts.flops == 2 * macs
    assert facts.parameters == sum(value.size for value in constants.values())
    assert sum(facts.constant_bytes.values()) == sum(value.nbytes for value in constants.values())


def test_a_product_without_shapes_is_named_not_hidden(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Unknown", ["x"], ["z"], domain="somebody.else"),
        helper.make_node("MatMul", ["z", "w"], ["y"], name="lost"),
    ]
    facts = graph_facts(save(tmp_path / "m.onnx", nodes, ["batch", 5], w=floats(5, 3)))
    assert (facts.macs, facts.uncounted) == (0, ("lost",))
    assert facts.operators == {"somebody.else.Unknown": 1, "MatMul": 1}


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"], ids=["empty", "text", "cut off"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx: not an ONNX model"):
        inspect(path)


def test_a_folder_of_neither_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a checkpoint nor a bundle"):
        inspect(tmp_path)
