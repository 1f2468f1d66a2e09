"""`kind-edge bench` for other providers than the CPU, and for two models in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.cli.bench import _files
from kind_edge.cli.terminal import Terminal
from kind_edge.deploy.manifest import read_manifest

AZURE = "AzureExecutionProvider"
"""In every onnxruntime of PyPI, and takes no node: an accelerator that leaves all its work to the CPU."""


@pytest.fixture(scope="module")
def has_azure() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if AZURE not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no provider that takes no node")


@pytest.mark.usefixtures("has_azure")
def test_a_fallback_exits_1_and_names_the_nodes(call: Callable[..., Any], exported_bundle: Path) -> None:
    command = ["bench", exported_bundle / "b/onnx/denoiser.onnx", "--provider", AZURE, "--runs", 1, "--threads", 1]
    refused = call("-q", *command)
    assert (refused.code, refused.out) == (1, "")
    assert "100.0% of the MACs" in refused.err
    assert "(MatMul)" in refused.err
    measured = call("-q", *command, "--allow-fallback")
    assert measured.code == 0
    assert "FALLBACK: 100.00% of the MACs" in " ".join(measured.out.split())


@pytest.mark.usefixtures("has_azure")
def test_a_sampler_is_refused_where_no_loop_runs(call: Callable[..., Any], exported_bundle: Path) -> None:
    asked = ["--provider", AZURE, "--runs", 1, "--threads", 1, "--allow-fallback"]
    answer = call("-q", "bench", exported_bundle / "b/onnx/sampler.onnx", *asked)
    assert (answer.code, answer.out) == (2, "")
    assert "sampler.onnx holds a Loop" in answer.err


@pytest.mark.usefixtures("has_azure")
def test_of_a_bundle_the_sampler_is_left_out_aloud(exported_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(exported_bundle / "b")
    files = [file for file in manifest.models if "sampler" not in file]
    assert _files(Terminal(), manifest, AZURE) == files
    assert "warning: onnx/sampler.onnx left out" in capsys.readouterr().err
    assert _files(Terminal(), manifest, "cpu") == list(manifest.models)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--provider", "qnn"], "it is in pip's onnxruntime-qnn beside onnxruntime"),
        (["--compare"], "--compare takes two models or two bundles, got 1"),
        (["other.onnx"], "one model or bundle at a time, got 2; side by side: --compare"),
    ],
)
def test_what_cannot_be_measured_exits_2(
    call: Callable[..., Any], bundle: Path, arguments: list[str], told: str
) -> None:
    answer = call("-q", "bench", bundle / "onnx/denoiser.onnx", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert told in answer.err


def test_two_models_in_turns(call: Callable[..., Any], bundle: Path) -> None:
    files = [bundle / "onnx/denoiser.onnx", bundle / "onnx/denoiser.int8.onnx"]
    values = call("-q", "bench", "--compare", *files, "--runs", 1, "--threads", 1, "--json").json()
    assert values["sources"] == [str(file) for file in files]
    assert values["lowest"] <= values["low"] <= values["ratio"] <= values["high"] <= values["highest"]
    assert (values["rounds"], values["first"]["runs"], values["second"]["file"]) == (5, 25, "denoiser.int8.onnx")
    assert isinstance(values["quiet"], bool)
