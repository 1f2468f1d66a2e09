"""Measurements carry their conditions, see memory that is really used, and refuse a silent fallback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.bench import bench_image, bench_model, percentile
from kind_edge.deploy.placement import node_macs, profile
from kind_edge.errors import GateError, InputError, UsageError

BALLAST = 12 * 2**20
"""Floats that the model multiplies by its input: 48 MiB of weights, and as much again in the output."""


@pytest.fixture(scope="module")
def ballast_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Gather", ["product", "index"], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "ballast",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", BALLAST // 16])],
        [numpy_helper.from_array(np.ones((16, BALLAST // 16), np.float32), "w")],
    )
    path = tmp_path_factory.mktemp("bench") / "ballast.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_report_of_a_model(ballast_model: Path) -> None:
    own_ballast = np.ones(64 * 2**20, np.uint8)  # the parent's memory must not appear in the child's account
    report = bench_model(ballast_model, threads=1, warmups=1, runs=7)
    assert own_ballast.nbytes > 0
    assert report.size_bytes == ballast_model.stat().st_size
    assert 0 < report.p50_ms <= report.p90_ms <= report.p99_ms
    assert report.cold_load_ms > 1
    assert report.peak_memory_bytes is not None
    assert 4 * BALLAST <= report.peak_memory_bytes < 20 * BALLAST
    assert report.conditions.threads == 1
    assert report.conditions.spinning is False
    assert report.conditions.runtime.startswith("onnxruntime ")
    assert json.loads(json.dumps(report.to_dict()))["conditions"]["cpu"]


def test_report_of_an_image(make_bundle: Callable[..., Path]) -> None:
    folder = make_bundle()
    started = time.perf_counter()
    report = bench_image(folder, model="int8", threads=1, runs=2)
    elapsed_ms = (time.perf_counter() - started) * 1e3
    assert (report.subject, report.file, report.runs, report.batch) == ("image", "denoiser.int8.onnx", 2, 1)
    assert 0 < report.p50_ms < elapsed_ms
    (folder / "onnx/denoiser.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="0 bytes"):
        bench_image(folder)


def test_provider_that_leaves_the_work_to_the_cpu_is_an_error(ballast_model: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no provider that takes no node")
    with pytest.raises(GateError, match="'AzureExecutionProvider' leaves 100% of the work to the CPU"):
        bench_model(ballast_model, threads=1, warmups=0, runs=1, provider="AzureExecutionProvider")


def test_macs_of_a_profiled_run(ballast_model: Path, tmp_path: Path) -> None:
    feeds = {"x": np.ones((1, 16), np.float32), "index": np.zeros(1, np.int64)}
    placement = profile(ballast_model, feeds, "cpu", 1, tmp_path)
    assert placement.cpu_macs == BALLAST
    assert placement.nodes == placement.cpu_nodes >= 2


@pytest.mark.parametrize(
    ("name", "inputs", "output", "macs"),
    [
        ("MatMul", [[2, 3, 5], [5, 7]], [2, 3, 7], 2 * 3 * 7 * 5),
        ("Gemm", [[5, 3], [5, 7]], [3, 7], 3 * 7 * 5),  # transA
        ("Conv", [[1, 4, 8, 8], [6, 2, 3, 3]], [1, 6, 8, 8], 6 * 8 * 8 * 2 * 9),  # two groups
        ("Add", [[2, 3], [2, 3]], [2, 3], 0),
    ],
)
def test_macs_of_a_node(name: str, inputs: list[list[int]], output: list[int], macs: int) -> None:
    node = {
        "op_name": name,
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": output}],
    }
    assert node_macs(node) == macs


def test_refusals(tmp_path: Path, ballast_model: Path) -> None:
    with pytest.raises(UsageError, match="unknown provider 'cdua'; did you mean: cuda"):
        bench_model(ballast_model, provider="cdua")
    with pytest.raises(UsageError, match=r"'qnn' is not in the installed onnxruntime; available here: .*cpu"):
        bench_model(ballast_model, provider="qnn")
    with pytest.raises(InputError, match="no such model file"):
        bench_model(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match="at least 1 run"):
        bench_model(ballast_model, runs=0)
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        bench_model(tmp_path / "broken.onnx")


def test_percentiles_are_linear_between_neighbours() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    for percent in (0, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
