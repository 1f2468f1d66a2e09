"""Measurements carry their conditions, see memory that is really used, and survive the death of what they measure."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.bench import bench_image, bench_model, evaluation, percentile
from kind_edge.deploy.measuring import MeasuringProcess
from kind_edge.deploy.runtime import load_bundle
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


def test_a_process_that_dies_is_a_failed_gate(ballast_model: Path) -> None:
    with MeasuringProcess(evaluation(ballast_model, threads=1, warmups=0).request) as process:
        assert process.answer()["cold_load_ms"] > 0
        assert len(process.ask(2, untimed=1)) == 2
        os.kill(process.process_id, signal.SIGKILL)
        with pytest.raises(GateError, match=r"ballast\.onnx: the measuring process was killed by signal 9"):
            process.ask(1)


def test_loading_a_bundle_leaves_the_heap_of_the_process_alone(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only our own processes change how glibc keeps memory; this one stands for somebody's server."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the C library was asked for something"))
    assert load_bundle(make_bundle()).generate("bag").shape == (1, 6, 5, 1)
