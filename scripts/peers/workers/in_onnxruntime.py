"""ONNX Runtime with its defaults: fp32 as PyTorch exports it, int8 as `quantize_dynamic` makes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from worker import Engine, Opened, serve

_FILE = "model.onnx"


def load() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def make(source: Path, target: Path, precision: str) -> None:
    shutil.copyfile(source / ("dense.int8.onnx" if precision == "int8" else "dense.onnx"), target / _FILE)


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = target / precision if precision.endswith(".onnx") else target / _FILE
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        return session.run(None, {"sample": sample, "timestep": timestep, "class_index": class_index})[0]

    return Opened(predict, tuple(session.get_inputs()[0].shape[1:]))


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
