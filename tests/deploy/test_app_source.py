"""Every name, shape, type and number in the Kotlin class is the model's own."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kind_edge.deploy.android import PACKAGER
from kind_edge.deploy.session import open_session

TYPES = {"FloatBuffer": "tensor(float)", "IntBuffer": "tensor(int32)", "LongBuffer": "tensor(int64)"}
INPUT = re.compile(r'inputs\["(\w+)"\] = OnnxTensor.createTensor\(environment, (\w+)\.wrap')


def constant(kotlin: str, name: str) -> str:
    found = re.search(rf"val {name} = (.+)", kotlin)
    assert found, name
    return found[1]


def floats(kotlin: str, name: str) -> np.ndarray:
    return np.array([float(each) for each in re.findall(r"([-+.\de]+)f\b", constant(kotlin, name))], np.float32)


@pytest.mark.slow
def test_agrees_with_the_model(packaged: Path) -> None:
    kotlin = (packaged / "android" / "KindEdge.kt").read_text()
    manifest = json.loads((packaged / "manifest.json").read_text())
    inputs = {each.name: each for each in open_session(packaged / manifest["default_model"]).get_inputs()}
    assert {name: TYPES[buffer] for name, buffer in INPUT.findall(kotlin)} == {n: i.type for n, i in inputs.items()}
    sides = [int(constant(kotlin, name)) for name in ("CHANNELS", "HEIGHT", "WIDTH")]
    assert sides == inputs["sample"].shape[1:]
    assert constant(kotlin, "CLASSES") == 'listOf("shirt", "bag")'
    assert constant(kotlin, "NULL_INDEX") == "2"
    assert constant(kotlin, "GUIDANCE") == "1.5f"
    tables = manifest["sampler"]["tables"]
    assert int(constant(kotlin, "ROWS")) == len(tables["p"])
    for column in "pqabc":
        np.testing.assert_array_equal(floats(kotlin, column.upper()), np.float32(tables[column]))
    assert kotlin.count("{") == kotlin.count("}")


@pytest.mark.slow
def test_follows_another_model(packaged: Path, tmp_path: Path) -> None:
    """No classes to choose, no guidance, a timestep in the place of a row, a decoder of latents."""
    values: dict[str, Any] = json.loads((packaged / "manifest.json").read_text())
    values = copy.deepcopy(values)
    entry = values["models"][values["default_model"]]
    entry["inputs"] = [
        {"name": "sample", "dtype": "float32", "shape": ["batch", 1, 8, 8]},
        {"name": "timestep", "dtype": "float32", "shape": ["batch"]},
    ]
    values["sampler"] |= {"null_index": None, "guidance": 1.0}
    values["models"]["onnx/decoder.onnx"] = {"role": "decoder", "precision": "fp32", "inputs": [], "outputs": []}
    PACKAGER.write(tmp_path, values)
    kotlin = (tmp_path / "android" / "KindEdge.kt").read_text()
    assert dict(INPUT.findall(kotlin)) == {"sample": "FloatBuffer", "timestep": "FloatBuffer"}
    np.testing.assert_array_equal(floats(kotlin, "TIMESTEP"), np.float32(values["sampler"]["tables"]["timestep"]))
    assert "className" not in kotlin
    assert "NULL_INDEX" not in kotlin
    assert "return decode(sample)" in kotlin
    assert "onnx/decoder.onnx" in kotlin
    entry["precision"] = "int8"
    values["models"]["onnx/decoder.int8-weights.onnx"] = values["models"]["onnx/decoder.onnx"]
    (tmp_path / "again").mkdir()
    PACKAGER.write(tmp_path / "again", values)
    assert "onnx/decoder.int8-weights.onnx" in (tmp_path / "again" / "android" / "KindEdge.kt").read_text()
    assert kotlin.count("{") == kotlin.count("}")
