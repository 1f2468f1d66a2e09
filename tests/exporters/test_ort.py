"""ORT format beside ONNX: the same bytes in every process, all operators in the build's configuration, true entries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.assemble import bundle_readme
from kind_edge.deploy.bench import bench_model
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.model_files import recorded
from kind_edge.deploy.runtime import choose_model, load_bundle
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import GateError, UsageError
from kind_edge.exporters.onnx_graph import OPSET
from kind_edge.exporters.ort_export import CONFIG
from kind_edge.exporters.ort_format import convert
from kind_edge.registry import exporter

SMALL = ("onnx/denoiser.int8.ort", "onnx/denoiser.ort", "onnx/sampler.ort")


@pytest.fixture(scope="module")
def bundle(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported bundle with ORT files, as `--formats onnx,ort` leaves it before it is measured."""
    from kind_edge.deploy.assemble import manifest_of
    from kind_edge.deploy.bundle import write_manifest

    folder = tmp_path_factory.mktemp("ort") / "b"
    shutil.copytree(exported_bundle / "b", folder)
    values: dict[str, Any] = dict(read_manifest(folder).raw)
    files = exporter("ort").export(None, folder, ("fp32", "int8"))
    values["models"] = recorded(folder, {**values["models"], **{file.path: file.entry for file in files}})
    write_manifest(folder, dict(manifest_of(values, folder).raw))
    return folder


@pytest.fixture(scope="module")
def models(bundle: Path) -> Mapping[str, Any]:
    entries: Mapping[str, Any] = read_manifest(bundle).raw["models"]
    return entries


def test_every_onnx_file_has_a_twin_that_keeps_its_gate(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert [path for path in manifest.models if path.endswith(".ort")] == list(SMALL)
    report = verify_models(bundle, manifest, load_reference(bundle)).require()
    for path in SMALL:
        twin = path.replace(".ort", ".onnx")
        assert report.gates[path] == report.gates[twin]
        assert manifest.models[path].inputs == manifest.models[twin].inputs
        assert manifest.models[path].precision == manifest.models[twin].precision
    # Whoever names a precision still gets the ONNX file; a .ort is taken by its name.
    assert choose_model(manifest, "int8").path == "onnx/denoiser.int8.onnx"
    assert load_bundle(bundle, "onnx/sampler.ort").generate("bag").shape == (1, 8, 8, 1)
    assert bench_model(bundle / SMALL[1], threads=1, warmups=0, runs=1).p50_ms > 0


def test_the_same_bytes_in_every_process(bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime itself writes a table in the order of a hash map with a new seed in every process."""
    code = (
        "import sys; from pathlib import Path; from kind_edge.exporters.ort_format import convert; "
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    target = tmp_path / "again.ort"
    source = bundle / "onnx/denoiser.int8.onnx"
    subprocess.run([sys.executable, "-c", code, str(source), str(target)], env=dict(os.environ), check=True)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (target, bundle / SMALL[0])]
    assert digests[0] == digests[1]
    content = target.read_bytes()
    assert not [word for word in (str(tmp_path), str(Path.cwd()), str(Path.home())) if word.encode() in content]


def test_the_configuration_names_every_operator(bundle: Path, models: Mapping[str, Any]) -> None:
    lines = (bundle / CONFIG).read_text().splitlines()
    assert lines[:4] == ["# What a reduced build of ONNX Runtime needs for", *(f"#   {path}" for path in SMALL)]
    named: dict[str, set[str]] = {}
    for line in lines[4:]:
        domain, version, operators = line.split(";", 2)
        assert version.isdigit()
        while operators:  # Add{"inputs": {"0": ["float"]}},Identity,...
            name = operators.split(",")[0].split("{")[0]
            operators = operators[len(name) :]
            if operators.startswith("{"):
                _, end = json.JSONDecoder().raw_decode(operators)
                operators = operators[end:]
            named.setdefault(domain, set()).add(name)
            operators = operators.removeprefix(",")
    needed: dict[str, set[str]] = {}
    for path in SMALL:
        for domain, operators_used in models[path]["operators"].items():
            needed.setdefault(domain, set()).update(operators_used)
    assert named == needed
    assert "Loop" in named["ai.onnx"]
    assert '"float"' in (bundle / CONFIG).read_text()  # types are reduced as well


@pytest.mark.parametrize("reader", ["GatherBlockQuantized", "DequantizeLinear"])
def test_4_bit_tables_become_bytes_and_compute_the_same(reader: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-8, 8, (3, 5, 64)).astype(np.int8)
    scales = generator.uniform(0.5, 2, (3, 5, 2)).astype(np.float32)
    axes = {"domain": "com.microsoft", "gather_axis": 0, "quantize_axis": 2, "block_size": 32}
    node = helper.make_node("GatherBlockQuantized", ["table", "row", "scales"], ["y"], **axes)
    if reader == "DequantizeLinear":
        node = helper.make_node("DequantizeLinear", ["table", "scales"], ["y"], axis=2, block_size=32)
    graph = helper.make_graph(
        [node],
        "rows",
        [helper.make_tensor_value_info("row", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 64])],
        [
            helper.make_tensor("table", TensorProto.INT4, values.shape, values.ravel()),
            numpy_helper.from_array(scales, "scales"),
        ],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    source, target = tmp_path / "rows.onnx", tmp_path / "rows.ort"
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), source)
    if reader == "DequantizeLinear":
        with pytest.raises(UsageError, match=r"rows\.onnx: DequantizeLinear '' reads 4-bit values"):
            convert(source, target)
        return
    convert(source, target)
    rows = np.array([2, 0, 2])
    wanted = (values * np.repeat(scales, 32, axis=2))[rows]
    assert all(np.array_equal(exporter("onnx").open(file)({"row": rows}), wanted) for file in (source, target))


def test_the_manifest_records_opset_and_operators(models: Mapping[str, Any]) -> None:
    for path, entry in models.items():
        assert entry["opset"].keys() == entry["operators"].keys()
        assert all(names == sorted(set(names)) for names in entry["operators"].values()), path
    assert models["onnx/denoiser.onnx"]["opset"] == {"ai.onnx": OPSET}
    assert "Loop" in models["onnx/sampler.onnx"]["operators"]["ai.onnx"]
    assert "MatMul" in models["onnx/sampler.onnx"]["operators"]["ai.onnx"]  # inside the Loop
    assert "MatMulInteger" in models["onnx/denoiser.int8.onnx"]["operators"]["ai.onnx"]
    small = models["onnx/denoiser.int8.ort"]  # fused already: what a small build must have, not what was exported
    assert small["opset"] == {"ai.onnx": OPSET, "com.microsoft": 1}
    assert "DynamicQuantizeMatMul" in small["operators"]["com.microsoft"]
    assert small["source"] == "onnx/denoiser.int8.onnx"


def test_a_bundle_with_ort_files_says_what_they_are_for(exported_bundle: Path, bundle: Path) -> None:
    from kind_edge.budget.plan import read_plan

    plan = read_plan(bundle / "plan.json")
    assert CONFIG in bundle_readme(plan, read_manifest(bundle).raw)
    assert CONFIG not in bundle_readme(plan, read_manifest(exported_bundle / "b").raw)


def test_a_file_that_the_checker_refuses_is_no_artefact(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    wrong = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])  # Neg keeps the shape
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "wrong", [value], [wrong])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "denoiser.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(model)  # without the full check it would pass
    with pytest.raises(GateError, match=r"denoiser\.onnx: onnx\.checker refuses it"):
        recorded(tmp_path, {"denoiser.onnx": {"role": "denoiser"}})
