"""The program that a Mac runs, with the NumPy reference in Core ML's place: what it compares, writes and refuses."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kind_edge.deploy
from kind_edge.deploy.assemble import write_mac_program
from kind_edge.deploy.mac_results import read_mac_results
from kind_edge.errors import InputError
from kind_edge.exporters.mil_reference import load_function

Array = NDArray[Any]
PROGRAM = Path(kind_edge.deploy.__file__).parent / "templates/coreml/verify_on_mac.py"
CLASSES = ["coat", "bag", "shirt"]
DENOISER, SAMPLER = "coreml/Denoiser.mlpackage", "coreml/Sampler.mlpackage"
TYPES = {"sample": "float32", "step_index": "int32", "class_index": "int32"}
BATCH = 2
SCALES, SHIFTS = np.array([0.5, -2, 3], np.float32), np.array([0.25, -1, 4, 0], np.float32)


def predict(inputs: dict[str, Array]) -> Array:
    """A scale of the step, a shift of the class."""
    scale, shift = SCALES[inputs["step_index"]], SHIFTS[inputs["class_index"]]
    return inputs["sample"] * scale[:, None, None, None] + shift[:, None, None, None]


def body(sample: Any, step_index: Any, class_index: Any) -> dict[str, Any]:
    from coremltools.converters.mil import Builder as mb

    picked = [mb.gather(x=table, indices=i) for table, i in ((SCALES, step_index), (SHIFTS, class_index))]
    scale, shift = (mb.expand_dims(x=one, axes=[1, 2, 3]) for one in picked)
    return {"prediction": mb.add(x=mb.mul(x=sample, y=scale), y=shift)}


def points() -> dict[str, Array]:
    """Two of every class, the null class and every step: an odd number of batches."""
    classes, steps = (grid.ravel().repeat(2) for grid in np.meshgrid(np.arange(4), np.arange(3), indexing="ij"))
    sample = np.random.default_rng(0).standard_normal((len(classes), 1, 4, 4)).astype(np.float32)
    return {"sample": sample, "step_index": steps.astype(np.int32), "class_index": classes.astype(np.int64)}


@pytest.fixture
def program(mac_program: ModuleType) -> ModuleType:
    return mac_program


@pytest.fixture
def bundle(save_program: Callable[..., Path], made_once: Callable[..., Path], tmp_path: Path) -> Path:
    """With one package, that Core ML Tools wrote."""
    inputs = {
        name: array[:BATCH].astype({"f": np.float32}.get(array.dtype.kind, np.int32))
        for name, array in points().items()
    }
    package = next(made_once("mac-package", lambda at: save_program(at, body, inputs, 16)).glob("*.mlpackage"))
    folder = tmp_path / "bundle"
    for file in package.rglob("*"):
        if file.is_file():
            target = folder / DENOISER / file.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (folder / "verify").mkdir()
    reference = points()
    write(
        folder,
        {**reference, "timestep": np.zeros(len(reference["sample"]), np.float32), "prediction": predict(reference)},
    )
    return folder


def write(folder: Path, reference: dict[str, Array], **more_models: Any) -> None:
    """Reference and manifest, as far as the program reads them."""
    np.savez(folder / "verify/reference.npz", **reference)
    inputs = [{"name": name, "dtype": dtype} for name, dtype in TYPES.items()]
    models = {DENOISER: {"role": "denoiser", "inputs": inputs}, "onnx/denoiser.onnx": {}, **more_models}
    files = [file for file in (folder / "coreml").rglob("*") if file.is_file()]
    manifest = {
        "name": "tiny", "classes": CLASSES, "models": models,
        "verification": {"gates": dict.fromkeys(models, 40.0)},
        "files": {
            file.relative_to(folder).as_posix(): {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in files
        },
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run(program: ModuleType, bundle: Path, *options: str, opener: Any = None) -> tuple[int, dict[str, Any]]:
    def in_numpy(path: Path, unit: str, function: str | None) -> Any:
        return program.Opened(BATCH, load_function(path, function))

    output = bundle.parent / "out.json"
    output.unlink(missing_ok=True)
    code = program.main([str(bundle), "-o", str(output), "--runs", "3", *options], opener or in_numpy)
    return code, json.loads(output.read_text()) if output.exists() else {}


def test_every_unit_is_compared_and_timed(
    program: ModuleType, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, written = run(program, bundle)
    assert code == 0, capsys.readouterr().out
    assert (written["passed"], written["bundle"], written["schema_version"], written["runs"]) == (True, "tiny", 1, 3)
    assert written["manifest_sha256"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert written["machine"].keys() == {"model", "chip", "system", "python", "coremltools", "numpy"}
    assert [result["unit"] for result in written["results"][DENOISER]] == list(program.UNITS)
    for result in written["results"][DENOISER]:
        assert (result["batch"], result["passed"], result["failures"]) == (BATCH, True, [])
        assert [(point["class"], point["step_index"]) for point in result["points"]] == [
            (name, step) for name in [*CLASSES, "null"] for step in range(3)
        ]
        assert result["worst_sqnr_db"] == min(point["sqnr_db"] for point in result["points"]) > 100
        assert 0 < result["predict_ms"]["p50"] <= result["predict_ms"]["p90"]
        assert result["cold_load_s"] >= 0 <= result["warm_load_s"]
    assert capsys.readouterr().out.count("dB (gate 40)") == 4


def test_a_miss_and_a_unit_that_fails_are_told_and_the_rest_is_measured(program: ModuleType, bundle: Path) -> None:
    reference = dict(np.load(bundle / "verify/reference.npz"))
    wrong = (reference["class_index"] == 1) & (reference["step_index"] == 2)
    reference["prediction"][wrong] *= 1.5
    write(bundle, reference)

    def without_engine(path: Path, unit: str, function: str | None) -> Any:
        if unit == "CPU_AND_NE":
            raise RuntimeError("no Neural Engine here")
        return program.Opened(BATCH, load_function(path, function))

    code, written = run(program, bundle, "--units", "CPU_ONLY,CPU_AND_NE", opener=without_engine)
    cpu, engine = written["results"][DENOISER]
    assert (code, written["passed"]) == (1, False)
    assert len(cpu["failures"]) == 1
    assert "'class': 'bag', 'step_index': 2" in cpu["failures"][0]
    assert cpu["worst_sqnr_db"] == pytest.approx(20 * np.log10(3), abs=0.01)
    assert cpu["predict_ms"]
    assert engine["failures"] == ["RuntimeError: no Neural Engine here"]


def test_the_report_reads_what_was_written(program: ModuleType, bundle: Path) -> None:
    def only_cpu(path: Path, unit: str, function: str | None) -> Any:
        if unit != "CPU_ONLY":
            raise RuntimeError("no such unit")
        return program.Opened(BATCH, load_function(path, function))

    _, written = run(program, bundle, "--units", "CPU_ONLY,ALL", opener=only_cpu)
    file = bundle.parent / "out.json"
    read = read_mac_results(file, bundle)
    cpu, everything = read.results
    assert (cpu.package, cpu.unit, cpu.passed) == (DENOISER, "CPU_ONLY", True)
    result = written["results"][DENOISER][0]
    assert (cpu.worst_db, cpu.p50_ms, cpu.p90_ms) == (result["worst_sqnr_db"], *result["predict_ms"].values())
    assert (everything.passed, everything.worst_db) == (False, None)
    assert everything.failures == ("RuntimeError: no such unit",)
    assert "3 predictions" in read.conditions["with"]
    (bundle / "manifest.json").write_text((bundle / "manifest.json").read_text() + " ")
    with pytest.raises(InputError, match="was measured on another bundle, tiny"):
        read_mac_results(file, bundle)
    for content, complaint in (("{}", "is not what"), ("no", "not readable as JSON"), ('{"kind": "x"}', "is not what")):
        file.write_text(content)
        with pytest.raises(InputError, match=complaint):
            read_mac_results(file, bundle)


def test_functions_and_samplers(program: ModuleType, bundle: Path) -> None:
    """A function counts its own classes, from 0, and the null class last; images are compared by PSNR."""
    reference = dict(np.load(bundle / "verify/reference.npz"))
    noise = np.zeros((3, 1, 4, 4), np.float32)
    images = {"noise": noise, "image_class": np.arange(3), "image": noise + SHIFTS[:3, None, None, None] / 8 + 0.125}
    manifest_inputs = [{"name": "noise", "dtype": "float32"}, {"name": "class_index", "dtype": "int32"}]
    functions = {"pair": ["shirt", "coat"]}
    sampler = {"role": "sampler", "inputs": manifest_inputs, "functions": functions}
    write(bundle, {**reference, **images}, **{SAMPLER: sampler})

    def opener(path: Path, unit: str, function: str | None) -> Any:
        numbers = np.array([2, 0] if function == "pair" else range(4))

        def draw(inputs: dict[str, Array]) -> dict[str, Array]:
            assert inputs["class_index"].dtype == np.int32
            own = numbers[inputs["class_index"]]
            return {"image": inputs["noise"] + SHIFTS[own][:, None, None, None] / 8 + np.float32(0.126)}

        return program.Opened(BATCH, draw if path.name.startswith("Sampler") else load_function(path))

    code, written = run(program, bundle, "--units", "ALL", opener=opener)
    assert code == 0
    assert list(written["results"]) == [DENOISER, SAMPLER, f"{SAMPLER}#pair"]
    (pair,) = written["results"][f"{SAMPLER}#pair"]
    assert [(point["class"], point["psnr_db"]) for point in pair["points"]] == [
        ("coat", pytest.approx(60, abs=0.1)),
        ("shirt", pytest.approx(60, abs=0.1)),
    ]


def test_what_it_refuses(program: ModuleType, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (("--units", "GPU"), ("--runs", "0")):
        with pytest.raises(SystemExit) as stopped:
            run(program, bundle, *options)
        assert stopped.value.code == 2
    if sys.platform != "darwin":
        assert run(program, bundle, opener=program.open_with_coreml) == (2, {})
        assert "Core ML predicts on macOS alone" in capsys.readouterr().err
    weights = bundle / DENOISER / "Data/com.apple.CoreML/model.mlmodel"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert run(program, bundle) == (4, {})
    assert "model.mlmodel was changed after the export" in capsys.readouterr().err
    (bundle / "manifest.json").write_text('{"models": {}, "files": {}, "classes": []}')
    assert run(program, bundle) == (4, {})
    assert "has no Core ML package" in capsys.readouterr().err
    assert run(program, bundle / "verify") == (4, {})
    assert "not a bundle" in capsys.readouterr().err


def test_it_lies_beside_the_packages(tmp_path: Path) -> None:
    (tmp_path / "coreml").mkdir()
    write_mac_program(tmp_path, {"models": {"onnx/denoiser.onnx": {}}})
    assert list((tmp_path / "coreml").iterdir()) == []
    write_mac_program(tmp_path, {"models": {"onnx/denoiser.onnx": {}, DENOISER: {}}})
    assert (tmp_path / "coreml/verify_on_mac.py").read_bytes() == PROGRAM.read_bytes()


def test_it_stands_alone() -> None:
    """Nothing but the standard library and numpy, and coremltools where Core ML is called."""
    tree = ast.parse(PROGRAM.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"numpy", "coremltools"}
