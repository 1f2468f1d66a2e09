"""A model file may hold further functions, each of some classes: every one is verified as a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kind_edge.deploy import verify
from kind_edge.deploy.manifest import Manifest
from kind_edge.errors import InputError

Array = NDArray[Any]
CLASSES = ("coat", "bag", "shirt")
PAIR = ["shirt", "coat"]
DENOISER, SAMPLER = "coreml/Denoiser.mlpackage", "coreml/Sampler.mlpackage"
STEPS = 2


def manifest(functions: Any) -> Manifest:
    def tensors(**kinds: str) -> list[dict[str, Any]]:
        return [{"name": n, "dtype": t, "shape": ["batch"] + [1, 2, 2] * (t == "float32")} for n, t in kinds.items()]

    models = {
        DENOISER: {
            "role": "denoiser", "outputs": tensors(prediction="float32"),
            "inputs": tensors(sample="float32", step_index="int32", class_index="int32"),
        },
        SAMPLER: {
            "role": "sampler", "outputs": tensors(image="float32"),
            "inputs": tensors(noise="float32", class_index="int32"),
        },
    }  # fmt: skip
    tables = {name: [0.0] * STEPS for name in ("timestep", *"pqabc")}
    return Manifest.from_dict({
        "schema_version": 1, "name": "tiny", "classes": list(CLASSES), "default_model": DENOISER,
        "image": {"channels": 1, "height": 2, "width": 2},
        "models": {path: {**entry, "precision": "fp16", "functions": functions} for path, entry in models.items()},
        "files": {f"{path}/Manifest.json": {"bytes": 1, "sha256": ""} for path in models},
        "sampler": {"kind": "euler", "steps": STEPS, "guidance": 2.0, "null_index": 3, "tables": tables,
                    "prediction_channels": 1},
    })  # fmt: skip


def reference() -> dict[str, Array]:
    classes, steps = (grid.ravel() for grid in np.meshgrid(np.arange(4), np.arange(STEPS), indexing="ij"))
    sample = np.random.default_rng(0).standard_normal((len(classes), 1, 2, 2)).astype(np.float32)
    shown = np.array([0, 2])
    return {
        "sample": sample, "step_index": steps.astype(np.int32), "timestep": steps.astype(np.float32),
        "class_index": classes, "prediction": predict(sample, classes),
        "noise": sample[:2], "image_class": shown, "image": predict(sample[:2], shown),
    }  # fmt: skip


def predict(sample: Array, classes: Array) -> Array:
    return sample + classes[:, None, None, None].astype(np.float32)


class Packages:
    """An exporter whose packages have a function `pair`, for which the classes are numbered anew."""

    def __init__(self, pair: tuple[int, ...]) -> None:
        self.pair = np.array(pair)

    def open(self, path: Path) -> Callable[[dict[str, Array]], Array]:
        def run(inputs: dict[str, Array]) -> Array:
            first = inputs["noise" if path.name.startswith("Sampler") else "sample"]
            own = self.pair[inputs["class_index"]] if path.name.endswith("#pair") else inputs["class_index"]
            return predict(first, own)

        return run


def test_functions_are_verified_with_their_own_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "exporter", lambda name: Packages((2, 0, 3)))
    described = manifest({"pair": PAIR})
    report = verify.verify_models(tmp_path, described, reference())
    assert report.failures == ()
    assert {described.entry_of(file).role for file in report.parity} == {"denoiser", "sampler"}
    assert list(report.parity) == [DENOISER, f"{DENOISER}#pair", SAMPLER, f"{SAMPLER}#pair"]
    whole, pair, _, images = report.files
    assert {point["class"] for point in whole.points} == {*CLASSES, "null"}
    assert [(point["class"], point["step_index"]) for point in pair.points] == [
        (name, step) for name in (*PAIR, "null") for step in range(STEPS)
    ]
    assert sorted(point["class"] for point in images.points) == ["coat", "shirt"]


def test_a_function_with_its_classes_mixed_up_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "exporter", lambda name: Packages((0, 2, 3)))
    report = verify.verify_models(tmp_path, manifest({"pair": PAIR}), reference())
    assert {failure.split(":")[0] for failure in report.failures} == {f"{DENOISER}#pair", f"{SAMPLER}#pair"}
    assert not any("null" in failure for failure in report.failures)


def test_a_function_of_unknown_classes_is_refused() -> None:
    with pytest.raises(InputError, match=r"functions: \['sock'\] are no classes"):
        manifest({"pair": ["sock"]})
