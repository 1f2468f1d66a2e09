"""A small but real bundle: ONNX models built node by node, tables of a made-up sampler, hashes and all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.bundle import write_manifest, writing_bundle

ROOT = Path(__file__).resolve().parents[2]

ROWS, CLASSES, SHAPE = 4, ("sneaker", "bag"), (1, 6, 5)
SCALES = np.array([0.9, -0.4, 0.7, 0.2], np.float32)
BIASES = np.array([0.5, -0.3, 0.1], np.float32)  # sneaker, bag, null
TABLES = {
    "timestep": [1.0, 0.75, 0.5, 0.25],
    "p": [0.1, 0.0, -0.2, 0.3],
    "q": [1.0, 0.8, 1.1, 0.9],
    "a": [1.0, 0.9, 1.05, 1.0],
    "b": [-0.3, -0.2, 0.4, -0.5],
    "c": [0.0, 0.1, -0.2, 0.05],
}
Tensor = tuple[str, int, list[int | str]]


def save_model(path: Path, nodes: list[Any], inputs: list[Tensor], output: Tensor, **constants: np.ndarray) -> None:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    infos = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in [*inputs, output]]
    graph = helper.make_graph(nodes, "test", infos[:-1], infos[-1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def save_denoiser(path: Path, quantized: bool) -> None:
    """prediction = SCALES[row] * sample + BIASES[class], and a second channel as of a learned variance.

    Quantized, the sample passes through eight bits with one range for the whole batch, as in dynamic quantization.
    """
    source = "rounded" if quantized else "sample"
    rounding = [
        helper.make_node("DynamicQuantizeLinear", ["sample"], ["codes", "step", "zero"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["rounded"]),
    ]
    nodes = (rounding if quantized else []) + [
        helper.make_node("Gather", ["scales", "step_index"], ["scale"]),
        helper.make_node("Gather", ["biases", "class_index"], ["bias"]),
        helper.make_node("Mul", [source, "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["mean"]),
        helper.make_node("Neg", ["mean"], ["variance"]),
        helper.make_node("Concat", ["mean", "variance"], ["prediction"], axis=1),
    ]
    inputs: list[Tensor] = [
        ("sample", TensorProto.FLOAT, ["batch", *SHAPE]),
        ("step_index", TensorProto.INT32, ["batch"]),
        ("class_index", TensorProto.INT64, ["batch"]),
    ]
    constants = {"scales": SCALES.reshape(-1, 1, 1, 1), "biases": BIASES.reshape(-1, 1, 1, 1)}
    save_model(path, nodes, inputs, ("prediction", TensorProto.FLOAT, ["batch", 2, *SHAPE[1:]]), **constants)


def save_sampler(path: Path) -> None:
    """image = sigmoid(noise + guidance * BIASES[class]): what a sampler's inputs and outputs look like."""
    nodes = [
        helper.make_node("Gather", ["biases", "class_index"], ["bias"]),
        helper.make_node("Mul", ["bias", "guidance"], ["pushed"]),
        helper.make_node("Add", ["noise", "pushed"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["image"]),
    ]
    inputs: list[Tensor] = [
        ("noise", TensorProto.FLOAT, ["batch", *SHAPE]),
        ("class_index", TensorProto.INT64, ["batch"]),
        ("guidance", TensorProto.FLOAT, []),
    ]
    output: Tensor = ("image", TensorProto.FLOAT, ["batch", *SHAPE])
    save_model(path, nodes, inputs, output, biases=BIASES.reshape(-1, 1, 1, 1))


def manifest_values(guidance: float = 1.5) -> dict[str, Any]:
    """The manifest of the bundle below, without `files`."""

    def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    index = tensor("class_index", "int64", "batch")
    denoiser = {
        "role": "denoiser",
        "inputs": [tensor("sample", "float32", "batch", *SHAPE), tensor("step_index", "int32", "batch"), index],
        "outputs": [tensor("prediction", "float32", "batch", 2, *SHAPE[1:])],
    }
    sampler = {
        "role": "sampler",
        "precision": "fp32",
        "inputs": [tensor("noise", "float32", "batch", *SHAPE), index, tensor("guidance", "float32")],
        "outputs": [tensor("image", "float32", "batch", *SHAPE)],
    }
    return {
        "schema_version": 1,
        "name": "test",
        "classes": list(CLASSES),
        "image": {"channels": SHAPE[0], "height": SHAPE[1], "width": SHAPE[2]},
        "models": {
            "onnx/denoiser.onnx": denoiser | {"precision": "fp32"},
            "onnx/denoiser.int8.onnx": denoiser | {"precision": "int8"},
            "onnx/sampler.onnx": sampler,
        },
        "default_model": "onnx/denoiser.onnx",
        "sampler": {
            "kind": "euler",
            "steps": ROWS,
            "guidance": guidance,
            "null_index": len(CLASSES),
            "tables": TABLES,
            "prediction_channels": 2,
        },
        "tools": {"kind_edge": "0.1.0"},
    }


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write the bundle and return its folder."""

    def make(name: str = "bundle", guidance: float = 1.5) -> Path:
        with writing_bundle(tmp_path / name) as folder:
            save_denoiser(folder / "onnx/denoiser.onnx", quantized=False)
            save_denoiser(folder / "onnx/denoiser.int8.onnx", quantized=True)
            save_sampler(folder / "onnx/sampler.onnx")
            write_manifest(folder, manifest_values(guidance))
        return tmp_path / name

    return make


@pytest.fixture
def bundle_values() -> Callable[..., dict[str, Any]]:
    return manifest_values


@pytest.fixture
def reference_loop() -> Callable[..., np.ndarray]:
    """The loop in float64, written out: noise [n, 1, H, W], class indices [n] and guidance to images in [-1, 1]."""

    def loop(noise: np.ndarray, classes: np.ndarray, guidance: float) -> np.ndarray:
        x, before = noise.astype(np.float64), np.zeros(noise.shape)
        for i in range(ROWS):
            of_class = SCALES[i] * x + BIASES[classes].reshape(-1, 1, 1, 1)
            of_null = SCALES[i] * x + BIASES[-1]
            d = TABLES["p"][i] * x + TABLES["q"][i] * (of_null + guidance * (of_class - of_null))
            x, before = TABLES["a"][i] * x + TABLES["b"][i] * d + TABLES["c"][i] * before, d
        return x.clip(-1, 1)

    return loop


@pytest.fixture(scope="session")
def packaged(tiny_folder: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A guided model's bundle of shirt and bag, exported under two limits, with its Kotlin. Only to be read."""
    from kind_edge.deploy.pipeline import export

    def make(folder: Path) -> None:
        asked: dict[str, Any] = {"profile": "raspberry-pi-5", "max_flops": "60%", "max_size": "80%"}
        export(tiny_folder, **asked, classes=["shirt", "bag"], formats=["android"], output=folder / "b")

    return made_once("packaged", make) / "b"


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """The packages of tests/node."""
    return npm_packages("node", "onnxruntime-node is not tested")


@pytest.fixture(scope="session")
def typescript_folder() -> Path:
    """The packages of tests/typescript."""
    return npm_packages("typescript", "kind-edge.d.ts is not compiled")


def npm_packages(name: str, untested: str) -> Path:
    """The packages of a folder of tests, installed once for each lock file under build/."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(f"node and npm are not on this machine: {untested}")
    source = ROOT / "tests" / name
    digest = hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = ROOT / "build" / name / digest
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            for file in ("package.json", "package-lock.json"):
                shutil.copy(source / file, folder)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}  # no CUDA libraries
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"npm could not install {name}: {done.stderr[-2000:]}"
            (folder / ".ready").touch()
    return folder


def folded(folder: Path, plan: Any) -> Any:
    """The model that `export` folds of a checkpoint's folder and a plan."""
    import torch

    from kind_edge.deploy.merge import fold, truncate
    from kind_edge.deploy.request import open_model
    from kind_edge.deploy.sampler_table import sampler_table

    model = open_model(folder)
    timesteps = torch.from_numpy(sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps).timestep)
    return fold(truncate(model.checkpoint, plan, model.calibration), plan, timesteps)


@pytest.fixture(scope="session")
def fold_plan() -> Callable[[Path, Any], Any]:
    return folded


@pytest.fixture(scope="session")
def packed(tiny_folder: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A bundle of all four classes, cut, in int8, with packs and Kotlin. Only to be read."""
    from kind_edge.deploy import pipeline

    asked: dict[str, Any] = {"profile": "raspberry-pi-5", "max_flops": "60%", "precision": "int8"}
    asked["formats"] = ["packs", "android"]
    return made_once("packs", lambda place: pipeline.export(tiny_folder, **asked, output=place / "b")) / "b"
