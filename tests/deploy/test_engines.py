"""Exported files where users load them: ONNX Runtime from Python and from node, and OpenVINO, an engine of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kind_edge.deploy.manifest import Manifest, ModelEntry, read_manifest
from kind_edge.deploy.parity import gates_db, psnr_db, sqnr_db
from kind_edge.deploy.verify import load_reference
from kind_edge.exporters.ort_format import convert
from kind_edge.registry import exporter

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "tests" / "node"
DENOISER, INT8, SAMPLER = "onnx/denoiser.onnx", "onnx/denoiser.int8.onnx", "onnx/sampler.onnx"
SMALL = {"onnx/denoiser.ort": DENOISER, "onnx/denoiser.int8.ort": INT8, "onnx/sampler.ort": SAMPLER}

Arrays = Mapping[str, NDArray[Any]]
Engine = Callable[[Path, Arrays, int], NDArray[Any]]
"""A file, its inputs, and how many rows go into one call."""


@dataclass(frozen=True)
class Case:
    """A model of the bundle with inputs of the stored reference; it knows how far an output is from the stored one."""

    file: Path
    entry: ModelEntry
    inputs: Arrays
    wanted: NDArray[Any]
    groups: tuple[NDArray[np.bool_], ...]

    @property
    def rows_per_call(self) -> int:
        return 1 if self.entry.precision == "int8" else len(self.wanted)

    @property
    def gate_db(self) -> float:
        return gates_db(self.entry.role)[self.entry.precision]

    def worst_db(self, output: NDArray[Any]) -> float:
        distance = psnr_db if self.entry.role == "sampler" else sqnr_db
        assert output.shape == self.wanted.shape
        return min(distance(self.wanted[group], output[group]) for group in self.groups)


def case_of(bundle: Path, manifest: Manifest, path: str, file: Path) -> Case:
    entry, reference = manifest.models[path], load_reference(bundle)
    if entry.role == "sampler":
        guidance = np.array(manifest.sampler.guidance, np.float32)
        given = {"noise": reference["noise"], "class_index": reference["image_class"], "guidance": guidance}
        wanted, keys = reference["image"], np.arange(len(reference["image"]))
    else:
        given, wanted = dict(reference), reference["prediction"]
        keys = reference["class_index"] * 1000 + reference["step_index"]
    groups = tuple(keys == key for key in np.unique(keys))
    return Case(file, entry, {name: given[name] for name in entry.input_names()}, wanted, groups)


@pytest.fixture(scope="module")
def cases(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every kind of file of the bundle, and the same in ORT format."""
    bundle, small = exported_bundle / "b", tmp_path_factory.mktemp("small")
    manifest = read_manifest(bundle)
    found = {path: case_of(bundle, manifest, path, bundle / path) for path in (DENOISER, INT8, SAMPLER)}
    for path, source in SMALL.items():
        convert(bundle / source, small / Path(path).name)
        found[path] = case_of(bundle, manifest, source, small / Path(path).name)
    return found


def in_calls(run: Callable[[Arrays], NDArray[Any]], inputs: Arrays, rows_per_call: int) -> NDArray[Any]:
    count = max(len(array) for array in inputs.values() if array.ndim)
    slices = [slice(at, at + rows_per_call) for at in range(0, count, rows_per_call)]
    cut = [{name: array[part] if array.ndim else array for name, array in inputs.items()} for part in slices]
    return np.concatenate([run(part) for part in cut])


@pytest.mark.parametrize("path", [DENOISER, INT8, SAMPLER, *SMALL])
def test_onnx_runtime_in_python(path: str, cases: Mapping[str, Case]) -> None:
    case = cases[path]
    output = in_calls(exporter("onnx").open(case.file), case.inputs, case.rows_per_call)
    assert case.worst_db(output) >= case.gate_db


@pytest.mark.parametrize("path", [DENOISER, INT8, SAMPLER])
def test_openvino(path: str, cases: Mapping[str, Case]) -> None:
    """On processors with bfloat16 it would compute in that by itself, far below our gate: it is told float32."""
    import openvino

    case = cases[path]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(case.file), "CPU", settings)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert {each.any_name for each in compiled.inputs} == set(case.entry.input_names())
    output = in_calls(lambda inputs: compiled(dict(inputs))[0].copy(), case.inputs, case.rows_per_call)
    assert case.worst_db(output) >= case.gate_db


@pytest.fixture(scope="module")
def from_node(node_folder: Path, cases: Mapping[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What onnxruntime-node makes of every file: one process for all of them."""
    folder, request = tmp_path_factory.mktemp("node"), []
    for number, case in enumerate(cases.values()):
        inputs = {}
        for name, array in case.inputs.items():
            file = f"{number}.{name}"
            (folder / file).write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())
            inputs[name] = {"type": str(array.dtype), "dims": list(array.shape), "file": file}
        rows = case.rows_per_call
        request.append({"model": str(case.file), "result": f"{number}.out", "rowsPerCall": rows, "inputs": inputs})
    (folder / "request.json").write_text(json.dumps(request))
    command = ["node", str(NODE / "run.mjs"), str(node_folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {
        path: np.fromfile(folder / f"{number}.out", "<f4").reshape(case.wanted.shape)
        for number, (path, case) in enumerate(cases.items())
    }


@pytest.mark.parametrize("path", [DENOISER, INT8, SAMPLER, *SMALL])
def test_onnx_runtime_in_node(path: str, cases: Mapping[str, Case], from_node: Mapping[str, NDArray[Any]]) -> None:
    assert cases[path].worst_db(from_node[path]) >= cases[path].gate_db


def test_a_wrong_output_would_be_seen(cases: Mapping[str, Case]) -> None:
    case = cases[DENOISER]
    wrong = case.wanted.copy()
    wrong[case.groups[-1]] *= 1 + 2e-5
    assert 90 < case.worst_db(wrong) < case.gate_db
