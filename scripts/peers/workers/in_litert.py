"""LiteRT (TensorFlow Lite) through its XNNPACK delegate: fp32, and dynamic int8 by the AI Edge quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from worker import Engine, Opened, serve


def load() -> str:
    from importlib.metadata import version

    import ai_edge_litert.interpreter  # noqa: F401

    return f"ai-edge-litert {version('ai-edge-litert')}"


def make(source: Path, target: Path, precision: str) -> None:
    import litert_torch
    import torch

    for batch in (1, 2):
        program = torch.export.load(source / f"dense.b{batch}.pt2")
        model = litert_torch.convert(program.module(), program.example_inputs[0])
        path = target / f"b{batch}.tflite"
        model.export(str(path))
        if precision == "int8":
            from ai_edge_quantizer import quantizer, recipe

            done = quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32()).quantize()
            path.unlink()
            done.export_model(str(path), overwrite=True)


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(target / f"b{batch}.tflite"), num_threads=threads)
    interpreter.allocate_tensors()
    inputs = sorted(interpreter.get_input_details(), key=lambda each: each["name"])  # in the order of the arguments
    output = interpreter.get_output_details()[0]["index"]
    by_rank = {len(each["shape"]): each for each in inputs}
    shape = tuple(int(size) for size in by_rank[4]["shape"][1:])

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        for each, values in zip(inputs, (sample, timestep, class_index), strict=True):
            interpreter.set_tensor(each["index"], np.asarray(values, each["dtype"]))
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return Opened(predict, shape)


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
