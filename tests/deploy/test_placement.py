"""Where the nodes of a run were executed, judged on traces that real providers left."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.deploy.bench import bench_model
from kind_edge.deploy.placement import (
    Placement,
    is_product,
    node_macs,
    node_records,
    placement_of,
    require_control_flow,
    summary,
    trace,
)
from kind_edge.deploy.providers import CONTROL_FLOW, PLUGINS, PROVIDERS, resolve_provider, short_name
from kind_edge.errors import GateError, UsageError

TRACES = Path(__file__).with_name("traces")
"""Of onnxruntime-openvino 1.24.1 and of onnxruntime-qnn 2.7.0 beside onnxruntime 1.31.1, on x86-64 Linux: the node
events of one run there and of one on the CPU, thread lists left out."""


def recorded(name: str) -> Placement:
    """What we make of a stored trace; its file begins with the provider's short name."""
    provider = name.split("-")[0]
    runs = {who: node_records(events) for who, events in json.loads((TRACES / f"{name}.json").read_text()).items()}
    return placement_of(runs[provider], PROVIDERS[provider], sum(map(node_macs, runs["cpu"])))


def test_a_provider_that_takes_all_is_right() -> None:
    placement = recorded("qnn-tiny-product")
    assert (placement.nodes, placement.outside, placement.share_outside) == (1, (), 0.0)
    assert placement.fault() is None


def test_other_nodes_outside_are_listed_and_right() -> None:
    placement = recorded("openvino-leftover")  # a sum in double, which OpenVINO's provider does not take
    assert placement.outside == ("widen (Cast)", "total (ReduceSum)", "narrow (Cast)")
    assert summary(placement) == "Cast x2, ReduceSum"
    assert placement.fault() is None


def test_a_small_product_outside_is_a_fault() -> None:
    placement = recorded("openvino-tiny-product")  # [64, 256] by [256, 2] beside [64, 256] by [256, 256]
    assert placement.share_outside == pytest.approx(2 / 258)
    fault = placement.fault()
    assert fault is not None
    assert "leaves 0.8% of the MACs and 3 of 4 nodes" in fault
    assert "small (MatMul)" in fault
    assert "large" not in fault


def test_a_free_batch_keeps_everything_off_the_npu() -> None:
    placement = recorded("qnn-dynamic")
    assert placement.share_outside == 1.0
    assert placement.products_outside == ("large (MatMul)", "second (MatMul)")


@pytest.mark.parametrize("share", [0.009, 0.011])
def test_work_that_is_no_matrix_product_may_be_a_hundredth(share: float) -> None:
    assert (Placement("cuda", 9, ("patches (Conv)",), (), share).fault() is None) == (share < 0.01)


@pytest.mark.parametrize(
    "operator",
    [
        "MatMul", "Gemm", "Attention", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits", "QGemm", "FusedMatMul",
        "MultiHeadAttention", "QLinearMatMul", "MatMulIntegerToFloat", "GroupQueryAttention", "QAttention", "FusedGemm",
    ],
)  # fmt: skip
def test_every_kin_of_a_product_is_known(operator: str) -> None:
    record = {"name": "n", "op_name": operator, "provider": "CPUExecutionProvider"}
    assert is_product(operator)
    assert placement_of([record], PROVIDERS["cuda"], 10**9).fault() is not None
    assert not any(map(is_product, ("Gather", "Shape", "Softmax", "LayerNormalization", "Gelu", "Conv", "Mul")))


@pytest.mark.parametrize(
    ("name", "inputs", "output", "macs"),
    [
        ("MatMul", [[2, 3, 5], [5, 7]], [2, 3, 7], 2 * 3 * 7 * 5),
        ("MatMul", [[2, 3, 5]], [2, 3, 7], 2 * 3 * 7 * 5),  # packed weights are not in the trace
        ("FusedMatMul", [[2, 5, 3], [2, 5, 7]], [2, 3, 7], 2 * 3 * 7 * 5),  # transA
        ("Gemm", [[5, 3], [5, 7]], [3, 7], 3 * 7 * 5),  # transA
        ("Conv", [[1, 4, 8, 8], [6, 2, 3, 3]], [1, 6, 8, 8], 6 * 8 * 8 * 2 * 9),  # two groups
        ("QLinearConv", [[1, 4, 8, 8], [], [], [6, 4, 3, 3]], [1, 6, 8, 8], 6 * 8 * 8 * 4 * 9),
        ("Attention", [[2, 4, 9, 8], [2, 4, 7, 8], [2, 4, 7, 6]], [2, 4, 9, 6], 2 * 4 * 9 * 7 * (8 + 6)),
        ("MultiHeadAttention", [[2, 9, 32], [2, 7, 32], [2, 7, 32]], [2, 9, 32], 2 * 9 * 7 * 64),
        ("Attention", [[2, 9, 32], [32, 96], [96]], [2, 9, 32], 2 * 9 * 32 * 96 + 2 * 2 * 9 * 9 * 32),  # with weights
        ("Add", [[2, 3], [2, 3]], [2, 3], 0),
    ],
)
def test_macs_of_a_node(name: str, inputs: list[list[int]], output: list[int], macs: int) -> None:
    record = {
        "op_name": name,
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": output}],
    }
    assert node_macs(record) == macs


@given(st.lists(st.sampled_from(["CPUExecutionProvider", "CUDAExecutionProvider"]), min_size=1, max_size=9))
def test_the_share_is_what_is_elsewhere(providers: list[str]) -> None:
    shapes = {"input_type_shape": [{"float": [4, 8]}], "output_type_shape": [{"float": [4, 2]}]}
    records: list[dict[str, Any]] = [
        {"name": f"n{i}", "op_name": "MatMul", "provider": provider, **shapes} for i, provider in enumerate(providers)
    ]
    placement = placement_of(records, PROVIDERS["cuda"], 64 * len(records))
    elsewhere = providers.count("CPUExecutionProvider")
    assert placement.share_outside == pytest.approx(elsewhere / len(providers))
    assert len(placement.products_outside) == elsewhere
    assert placement_of(records * 3, PROVIDERS["cuda"], 64).nodes == len(records)  # as a Loop runs them


@pytest.mark.parametrize("provider", sorted(PROVIDERS))
def test_a_loop_is_refused_where_no_control_flow_is(provider: str) -> None:
    require_control_flow("denoiser.onnx", {"MatMul", "Gather"}, provider)
    if provider in CONTROL_FLOW:
        require_control_flow("sampler.onnx", {"Loop"}, PROVIDERS[provider])
        return
    with pytest.raises(UsageError, match=rf"sampler\.onnx holds a Loop, which provider '{provider}' does not run"):
        require_control_flow("sampler.onnx", {"Loop"}, PROVIDERS[provider])


@pytest.mark.parametrize(
    ("provider", "package"),
    [("cuda", "onnxruntime-gpu"), ("qnn", "onnxruntime-qnn"), ("openvino", "onnxruntime-openvino"),
     ("coreml", "macOS"), ("xnnpack", "onnxruntime-android"), ("webgpu", "onnxruntime-ep-webgpu")],
)  # fmt: skip
def test_a_missing_provider_is_named_with_its_package(provider: str, package: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    installed = provider in PLUGINS and importlib.util.find_spec(PLUGINS[provider])
    if installed or PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip(f"{provider} is installed here")
    with pytest.raises(UsageError, match=f"'{provider}' is not in the .*; available here: .*cpu.*{package}"):
        resolve_provider(provider)
    assert short_name(PROVIDERS[provider]) == short_name(provider.upper()) == provider


def test_a_plugin_without_its_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime_ep_webgpu.py").write_text("def get_library_path():\n    return '/nothing/there.so'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="the library of onnxruntime_ep_webgpu cannot be loaded"):
        resolve_provider("webgpu")


AZURE = "AzureExecutionProvider"
"""In every onnxruntime of PyPI, and takes no node: an accelerator that leaves all its work to the CPU."""


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "only")],
        "one product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")],
    )
    path = tmp_path_factory.mktemp("placement") / "denoiser.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_silent_fallback_is_an_error_and_a_loud_one_is_measured(denoiser: Path, tmp_path: Path) -> None:
    import numpy as np

    (record,) = trace(denoiser, {"x": np.ones((3, 8), np.float32)}, "cpu", 1, tmp_path)
    assert (record["name"], node_macs(record)) == ("only", 3 * 8 * 4)
    onnxruntime = pytest.importorskip("onnxruntime")
    if AZURE not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no provider that takes no node")
    with pytest.raises(GateError, match=r"leaves 100\.0% of the MACs and 1 of 1 nodes .*: only \(MatMul\)"):
        bench_model(denoiser, threads=1, warmups=0, runs=1, provider=AZURE)
    report = bench_model(denoiser, threads=1, warmups=0, runs=1, provider=AZURE, allow_fallback=True)
    assert report.to_dict()["placement"]["products_outside"] == ("only (MatMul)",)
    assert "placement" not in bench_model(denoiser, threads=1, warmups=0, runs=1).to_dict()
