"""The gate: every layer of it fails when it should, says where, and nothing else makes it fail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from kind_edge.deploy.manifest import Manifest, ModelEntry, TensorInfo, read_manifest
from kind_edge.deploy.parity import EXACT_DB, FileParity, VerifyReport, sqnr_db
from kind_edge.deploy.session import open_session
from kind_edge.deploy.verify import REFERENCE_FILE, load_reference, verify_model, verify_models
from kind_edge.errors import GateError, InputError

FP32, INT8 = "onnx/denoiser.onnx", "onnx/denoiser.int8.onnx"
Reference = dict[str, NDArray[Any]]
Check = Callable[..., FileParity]


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def inputs_of_points() -> Reference:
    """Two images for each of two classes and null, at two of the four steps."""
    points = [(c, s) for c in range(3) for s in (0, 3) for _ in range(2)]
    rng = np.random.default_rng(0)
    return {
        "sample": rng.normal(size=(len(points), 1, 6, 5)).astype(np.float32),
        "step_index": np.array([s for _, s in points], np.int32),
        "timestep": np.zeros(len(points), np.float32),
        "class_index": np.array([c for c, _ in points], np.int64),
    }


def reference_of(path: Path, one_by_one: bool = False) -> Reference:
    """What the file itself answers."""
    inputs, session = inputs_of_points(), open_session(path)
    feeds = {name: inputs[name] for name in ("sample", "step_index", "class_index")}
    count = len(inputs["sample"])
    batches = [slice(i, i + 1) for i in range(count)] if one_by_one else [slice(0, count)]
    outputs = [session.run(None, {name: array[at] for name, array in feeds.items()})[0] for at in batches]
    return {**inputs, "prediction": np.concatenate(outputs)}


@pytest.fixture
def own(bundle: Path) -> Reference:
    return reference_of(bundle / FP32)


@pytest.fixture
def check(bundle: Path, manifest: Manifest, own: Reference) -> Check:
    """Verify the fp32 file (or another entry for it) against its own answers (or others)."""

    def run(entry: ModelEntry | None = None, **changes: NDArray[Any]) -> FileParity:
        return verify_model(bundle, entry or manifest.models[FP32], {**own, **changes}, manifest.classes)

    return run


def with_noise(prediction: NDArray[Any], decibels: float, at: slice = slice(None)) -> NDArray[Any]:
    """The same with noise of exactly that SQNR in each of the chosen images."""
    noisy, rng = prediction.astype(np.float64), np.random.default_rng(1)
    for image in noisy[at]:
        noise = rng.normal(size=image.shape)
        image += noise * math.sqrt((image**2).sum() / 10 ** (decibels / 10) / (noise**2).sum())
    return noisy


def test_a_file_that_answers_the_same_passes(check: Check) -> None:
    parity = check()
    assert (parity.worst_db, parity.gate_db, parity.failures) == (EXACT_DB, 100, ())
    assert {(p["class"], p["step_index"]) for p in parity.points} == {
        (name, step) for name in ("sneaker", "bag", "null") for step in (0, 3)
    }
    report = VerifyReport((parity,))
    assert report.require() is report
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_small_noise_in_one_point_fails_that_point(check: Check, own: Reference) -> None:
    noisy = with_noise(own["prediction"], 90, slice(6, 8))  # class 1 at step 3
    parity = check(prediction=noisy)
    assert parity.failures == ("bag at step 3: 90.0 dB, want 100 dB or more",)
    assert parity.worst_db == pytest.approx(90, abs=0.05)
    with pytest.raises(GateError, match=r"parity failed: onnx/denoiser\.onnx: bag at step 3: 90\.0 dB") as caught:
        VerifyReport((check(), parity)).require()
    assert caught.value.exit_code == 1
    assert check(prediction=with_noise(own["prediction"], 110)).failures == ()


def test_every_failure_is_listed(check: Check, own: Reference) -> None:
    report = VerifyReport((check(prediction=with_noise(own["prediction"], 50)),))
    assert len(report.failures) == 6
    with pytest.raises(GateError) as caught:
        report.require()
    assert str(caught.value).count("dB, want 100 dB") == 6


def test_the_gate_depends_on_the_precision(check: Check, own: Reference, manifest: Manifest) -> None:
    entry = manifest.models[FP32]
    for precision, gate in (("fp16", 50), ("int8", 25)):
        claimed = dataclasses.replace(entry, precision=precision)
        assert check(claimed, prediction=with_noise(own["prediction"], gate + 0.1)).failures == ()
        assert len(check(claimed, prediction=with_noise(own["prediction"], gate - 0.1)).failures) == 6
    with pytest.raises(InputError, match=r"denoiser\.onnx.*precision 'fp64'"):
        check(dataclasses.replace(entry, precision="fp64"))


def test_int8_is_evaluated_image_by_image(bundle: Path, manifest: Manifest) -> None:
    """Dynamic quantization has one range for a whole batch, so images of a batch would change each other."""
    alone, together = reference_of(bundle / INT8, one_by_one=True), reference_of(bundle / INT8)
    assert verify_model(bundle, manifest.models[INT8], alone, manifest.classes).worst_db == EXACT_DB
    worst = verify_model(bundle, manifest.models[INT8], together, manifest.classes).worst_db
    assert worst is not None
    assert worst < 100


def changed_input(entry: ModelEntry, which: str, **changes: Any) -> ModelEntry:
    inputs = tuple(dataclasses.replace(t, **changes) if t.name == which else t for t in entry.inputs)
    return dataclasses.replace(entry, inputs=inputs)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("sample", {"name": "x"}, ("inputs are ['x', 'step_index', 'class_index'], want sample", "unknown input 'x'")),
        ("step_index", {"name": "step"}, ("unknown input 'step'",)),
        ("step_index", {"dtype": "int64"}, ("input step_index is int64, want int32",)),
        ("class_index", {"dtype": "int32"}, ("input class_index is int32, want int64",)),
        ("sample", {"dtype": "float16"}, ("input sample is float16, want float32",)),
        (
            "sample",
            {"shape": ("batch", 1, 5, 6)},
            ("input sample has shape ['batch', 1, 5, 6], want [batch, 1, 6, 5]",),
        ),
        ("class_index", {"shape": ("batch", 1)}, ("input class_index has shape ['batch', 1], want [batch, ]",)),
    ],
)
def test_a_wrong_interface_fails(
    name: str, changes: dict[str, Any], words: tuple[str, ...], check: Check, manifest: Manifest
) -> None:
    parity = check(changed_input(manifest.models[FP32], name, **changes))
    assert parity.worst_db is None
    for word in words:
        assert any(word in failure for failure in parity.failures), parity.failures


def test_a_wrong_output_fails(check: Check, own: Reference, manifest: Manifest) -> None:
    entry = manifest.models[FP32]
    output = entry.outputs[0]
    named = dataclasses.replace(entry, outputs=(dataclasses.replace(output, name="noise"),))
    assert check(named).failures == ("outputs are ['noise'], want prediction alone",)
    more = dataclasses.replace(entry, outputs=(output, TensorInfo("extra", "float32", ("batch",))))
    assert "want prediction alone" in check(more).failures[0]
    typed = dataclasses.replace(entry, outputs=(dataclasses.replace(output, dtype="float16"),))
    assert check(typed).failures == ("prediction is float32, the manifest says float16, want float32",)
    half = own["prediction"][:, :1]
    assert check(prediction=half).failures == ("prediction has shape [12, 2, 6, 5], want [12, 1, 6, 5]",)


def test_values_that_are_not_finite_fail(bundle: Path, check: Check) -> None:
    model = onnx.load_model(bundle / FP32)
    scales = next(t for t in model.graph.initializer if t.name == "scales")
    values = onnx.numpy_helper.to_array(scales).copy()
    values[3] = np.nan  # at step 3 alone
    scales.CopyFrom(onnx.numpy_helper.from_array(values, "scales"))
    onnx.save_model(model, bundle / FP32)
    assert check().failures == (f"prediction holds {6 * 2 * 30} values that are not finite",)


def test_a_file_that_is_not_what_the_manifest_says(bundle: Path, check: Check) -> None:
    model = onnx.load_model(bundle / FP32)
    model.graph.input[1].name = model.graph.node[0].input[1] = "row"
    onnx.save_model(model, bundle / FP32)
    with pytest.raises(InputError, match=r"denoiser\.onnx: ONNX Runtime cannot run it"):
        check()
    (bundle / FP32).write_bytes(b"not a model")
    with pytest.raises(InputError, match="ONNX Runtime cannot load it"):
        check()


def test_a_reference_with_a_gap_proves_nothing(bundle: Path, manifest: Manifest, own: Reference) -> None:
    points = [(c, s) for c in range(3) for s in range(4)]
    whole = {name: np.concatenate([array[:1]] * len(points)) for name, array in own.items()}
    whole["class_index"] = np.array([c for c, _ in points])
    whole["step_index"] = np.array([s for _, s in points], np.int32)
    assert len(verify_models(bundle, manifest, whole).files) == len(manifest.models)
    for gap in (whole["class_index"] != 2, whole["step_index"] != 3, np.arange(len(points)) != 5):
        with pytest.raises(InputError, match=r"reference\.npz: .* 3 classes at 4 timesteps"):
            verify_models(bundle, manifest, {name: array[gap] for name, array in whole.items()})


def test_sqnr_is_the_formula_in_float64() -> None:
    reference = np.array([3.0, -4.0], np.float32)
    assert sqnr_db(reference, reference + np.array([0.003, 0.004])) == pytest.approx(60, abs=1e-4)
    assert sqnr_db(reference, reference) == EXACT_DB
    assert sqnr_db(np.zeros(2), np.ones(2)) == -EXACT_DB
    tiny = np.full(4, 1e-30, np.float32)  # squares that float32 could not hold
    assert sqnr_db(tiny, tiny * np.float32(1.1)) == pytest.approx(20, abs=0.01)


def test_the_stored_reference_is_read_back_or_refused(tmp_path: Path) -> None:
    path = tmp_path / REFERENCE_FILE
    path.parent.mkdir()
    stored = {**inputs_of_points(), "prediction": np.zeros((12, 2, 6, 5), np.float32)}
    np.savez(path, **stored)
    loaded = load_reference(tmp_path)
    assert all((loaded[name] == array).all() for name, array in stored.items())
    np.savez(path, sample=stored["sample"])
    with pytest.raises(InputError, match=r"reference\.npz: .*prediction"):
        load_reference(tmp_path)
    np.savez(path, **{**stored, "prediction": np.array([{}], object)})
    with pytest.raises(InputError, match="cannot read the stored reference"):
        load_reference(tmp_path)
    path.write_bytes(b"PK but no zip")
    with pytest.raises(InputError, match="cannot read the stored reference"):
        load_reference(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="cannot read the stored reference"):
        load_reference(tmp_path)
