"""Our bundles through `kind_edge.deploy.runtime`, as an app loads them: the denoiser in its loop, or `sampler.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from worker import Engine, Opened, serve


def load() -> str:
    import onnxruntime

    import kind_edge.deploy.runtime

    return f"kind-edge {kind_edge.__version__} in onnxruntime {onnxruntime.__version__}"


def make(source: Path, target: Path, precision: str) -> None:
    raise NotImplementedError("bundles are made by kind_edge.deploy.pipeline")


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    """`precision` is the file: in a bundle, or by itself, and then without a loop of its own."""
    if (target / "manifest.json").exists():
        return _open_bundle(target, precision, threads)
    return _open_file(target / precision, threads)


def _open_bundle(path: Path, file: str, threads: int) -> Opened:
    from kind_edge.deploy.runtime import load_bundle

    bundle = load_bundle(path, file, threads, verify=False)
    noise = np.random.default_rng(0).standard_normal((1, *bundle.noise_shape)).astype(np.float32)
    classes = np.zeros(1, np.int64)

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        return bundle.predict(sample, 0, class_index)

    def image() -> object:
        return bundle.sample_float(noise, classes)

    if bundle.model.role == "sampler":  # the first call, which `worker` makes where there is no loop
        image()
    else:
        bundle.predict(noise, 0, classes)
    return Opened(predict, bundle.noise_shape, image)


def _open_file(path: Path, threads: int) -> Opened:
    from kind_edge.deploy.session import open_session

    session = open_session(path, threads)
    names = {each.name for each in session.get_inputs()}

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        rows = np.zeros(len(sample), np.int32)
        feeds = {"sample": sample, "timestep": timestep, "step_index": rows, "class_index": class_index}
        return session.run(None, {name: feeds[name] for name in names})[0]

    return Opened(predict, tuple(session.get_inputs()[0].shape[1:]))


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
