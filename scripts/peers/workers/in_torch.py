"""PyTorch: the exported program as it is, and compiled by inductor for a fixed batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from worker import Engine, Opened, serve


def load() -> str:
    import torch

    return f"torch {torch.__version__}"


def make(source: Path, target: Path, precision: str) -> None:
    for batch in (1, 2):
        shutil.copyfile(source / f"dense.b{batch}.pt2", target / f"b{batch}.pt2")


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    import torch

    torch.set_num_threads(threads)
    program = torch.export.load(target / f"b{batch}.pt2")
    shape = tuple(program.example_inputs[0][0].shape[1:])
    network: Any = program.module()
    if precision == "compiled":
        network = torch.compile(network, dynamic=False)

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        with torch.inference_mode():
            return network(*map(torch.from_numpy, (sample, timestep, class_index))).numpy()

    return Opened(predict, shape)


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
