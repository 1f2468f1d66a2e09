"""Our bundles through `kind_edge.deploy.runtime`, as an app loads them: the denoiser in its loop, or `sampler.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from worker import Engine, Opened, serve


def load() -> str:
    import onnxruntime

    import kind_edge.deploy.runtime  # noqa: F401

    return f"kind-edge, onnxruntime {onnxruntime.__version__}"


def make(source: Path, target: Path, precision: str) -> None:
    raise NotImplementedError("bundles are made by kind_edge.deploy.pipeline")


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    """`precision` is the file in the bundle; a step is one row, whatever `batch` says."""
    from kind_edge.deploy.runtime import load_bundle

    bundle = load_bundle(target, precision, threads, verify=False)
    noise = np.random.default_rng(0).standard_normal((1, *bundle.noise_shape)).astype(np.float32)
    classes = np.zeros(1, np.int64)

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        return bundle.predict(sample, 0, class_index)

    return Opened(predict, bundle.noise_shape, lambda: bundle.sample_float(noise, classes))


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
