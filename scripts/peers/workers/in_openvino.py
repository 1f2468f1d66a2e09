"""OpenVINO: fp32, and int8 by NNCF's post-training quantization with states of real sampling as calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from worker import Engine, Opened, serve

_FILE = "model.xml"


def load() -> str:
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}"


def make(source: Path, target: Path, precision: str) -> None:
    import openvino

    model = openvino.convert_model(source / "dense.onnx")
    if precision == "int8":
        import nncf

        with np.load(source / "calibration.npz") as states:
            rows = [{name: states[name][at] for name in states.files} for at in range(len(states["sample"]))]
        model = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(model, target / _FILE, compress_to_fp16=False)


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    import openvino

    core = openvino.Core()
    model = core.read_model(target / _FILE)
    shape = tuple(dimension.get_length() for dimension in list(model.input("sample").partial_shape)[1:])
    model.reshape({"sample": [batch, *shape], "timestep": [batch], "class_index": [batch]})
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision == "fp32":  # else it takes bf16 where the processor has it
        options["INFERENCE_PRECISION_HINT"] = "f32"
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        return request.infer({"sample": sample, "timestep": timestep, "class_index": class_index})[0].copy()

    return Opened(predict, shape)


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
