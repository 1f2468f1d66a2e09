"""The nodes that WebGPU takes: the same function, no Split into more buffers than it binds, no Attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.webgpu import MOST_OUTPUTS, for_webgpu, webgpu_nodes

SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
"""A Vulkan driver in software, in Debian's package of Chromium, with Vulkan's loader beside it."""


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=60), even=st.booleans())
@settings(max_examples=10)
def test_a_split_of_any_width_gives_the_same_pieces(sizes: list[int], even: bool) -> None:
    total = 2 * len(sizes) - 1 if even else sum(sizes)  # the last of equal pieces may be smaller
    outputs = [f"piece.{i}" for i in range(len(sizes))]
    named = [] if even else ["sizes"]
    how = {"num_outputs": len(sizes)} if even else {}
    split = helper.make_node("Split", ["x", *named], outputs, "split", axis=1, **how)
    graph = helper.make_graph(
        [split], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", total])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in outputs],
        [] if even else [numpy_helper.from_array(np.array(sizes), "sizes")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    x = np.arange(2 * total, dtype=np.float32).reshape(2, total)
    changed = for_webgpu(model)
    assert max(len(node.output) for node in changed.graph.node) <= MOST_OUTPUTS
    for before, after in zip(run(model, {"x": x}), run(changed, {"x": x}), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (webgpu_nodes(model) is None) == (len(sizes) <= MOST_OUTPUTS)


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    shape = [axis.dim_value or 2 for axis in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"sample": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    for value in model.graph.input:
        if value.name != "sample":
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feeds[value.name] = np.array([1, 0], dtype)
    return feeds


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_denoiser_computes_the_same(exported_bundle: Path, precision: str) -> None:
    from kind_edge.exporters.onnx_fp16 import halve

    model = onnx.load_model(exported_bundle / "b" / "onnx" / "denoiser.onnx")
    model = halve(model) if precision == "fp16" else model
    before = model.SerializeToString()
    changed, feeds = for_webgpu(model), feeds_of(model)
    assert model.SerializeToString() == before
    assert not {"Attention", "MultiHeadAttention"} & {node.op_type for node in changed.graph.node}
    assert max(len(node.output) for node in changed.graph.node) <= MOST_OUTPUTS
    (wanted,), (found,) = run(model, feeds), run(changed, feeds)
    np.testing.assert_allclose(found, wanted, atol=1e-5 if precision == "fp32" else 2e-2)


def test_files_of_others_are_changed_where_their_shapes_say_how() -> None:
    """Nodes without names, more than one Attention, a Split whose sizes only running it would tell."""
    pieces = [f"piece.{i}" for i in range(8)]
    nodes = [
        helper.make_node("Attention", ["x", "x", "x"], ["once"], q_num_heads=2, kv_num_heads=2),
        helper.make_node("Attention", ["once", "x", "once"], ["twice"], q_num_heads=2, kv_num_heads=2),
        helper.make_node("Constant", [], ["sizes"], value_ints=[1] * 8),
        helper.make_node("Split", ["twice", "sizes"], pieces, axis=2),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 1]) for name in pieces],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    changed, x = for_webgpu(model), np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    assert [node.op_type for node in changed.graph.node].count("Softmax") == 2
    assert list(changed.graph.node)[-2:] == nodes[-2:]
    for before, after in zip(run(model, {"x": x}), run(changed, {"x": x}), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime_ep_webgpu") is None, reason="no onnxruntime-ep-webgpu on this machine")
@pytest.mark.skipif(not SWIFTSHADER.exists(), reason="no Vulkan driver in software: scripts/fetch-chromium brings one")
def test_all_of_it_runs_on_webgpu(exported_bundle: Path) -> None:
    """Of the provider itself, on a driver in software: the values are the CPU's, and only integers are left to it."""
    model = exported_bundle / "b" / "onnx" / "denoiser.onnx"
    script = """
import dataclasses, json, sys, tempfile
from pathlib import Path
import numpy as np
from kind_edge.deploy.bench_worker import random_inputs
from kind_edge.deploy.placement import check_placement
from kind_edge.deploy.providers import is_simulated
from kind_edge.deploy.session import open_session
path = Path(sys.argv[1])
reference, session = open_session(path, 1), open_session(path, 1, "webgpu")
feeds = random_inputs(reference)
wanted, found = (each.run(None, feeds)[0].astype(np.float64) for each in (reference, session))
with tempfile.TemporaryDirectory() as folder:
    placement = check_placement(path, feeds, "webgpu", 1, Path(folder))
sqnr_db = 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum())
simulated = is_simulated("WebGpuExecutionProvider")
print(json.dumps({"sqnr_db": sqnr_db, "outside": placement.outside, "simulated": simulated}))
"""
    environment = {
        **os.environ,
        "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1",
        "VK_ICD_FILENAMES": str(SWIFTSHADER),
        "LD_LIBRARY_PATH": str(SWIFTSHADER.parent),
    }
    command = [sys.executable, "-P", "-c", script, str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sqnr_db"] >= 100
    assert {name.rsplit("(", 1)[1] for name in found["outside"]} <= {"Less)", "Where)"}, "of the class index alone"
    assert found["simulated"]
