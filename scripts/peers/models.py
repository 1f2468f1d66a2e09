"""What every engine is given: the dense twin as a user would export it, at the shipped shape and at that of DiT-B/2.

Files are made once and kept in the user's cache, under a name that changes with the weights and with PyTorch's version.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from studies.store import TWIN

from kind_edge.model.cache import cache_base
from kind_edge.model.checkpoint import checkpoint_hash, load_checkpoint
from kind_edge.model.spec import ModelSpec, named_spec

if TYPE_CHECKING:
    import torch

LARGE = "DiT-B/2"
LARGE_CLASSES = 150
BATCHES = (1, 2)
CALIBRATION_IMAGES, CALIBRATION_STEPS = 30, 8


def cache() -> Path:
    """Where environments and model files of the peers are kept."""
    return cache_base() / "peers"


@dataclass(frozen=True)
class Dense:
    """The dense twin in the forms that exporters write: one ONNX file, and programs of a fixed batch."""

    spec: ModelSpec
    folder: Path

    @property
    def onnx(self) -> Path:
        return self.folder / "dense.onnx"

    @property
    def onnx_int8(self) -> Path:
        return self.folder / "dense.int8.onnx"

    @property
    def our_int8(self) -> Path:
        """The same denoiser by our exporter's int8: per channel, products with constant matrices alone."""
        return self.folder / "ours" / "dense.int8.onnx"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.npz"

    def program(self, batch: int) -> Path:
        return self.folder / f"dense.b{batch}.pt2"


def dense_twin() -> Dense:
    """The trained twin of the shipped model's shape."""
    import torch

    key = checkpoint_hash(TWIN)[:12]
    checkpoint = load_checkpoint(TWIN)
    return _made(checkpoint.spec, f"twin-{key}-torch-{torch.__version__}", checkpoint.model)


def large_dense() -> Dense:
    """DiT-B/2 with random weights: its pictures are noise, its time is that of a trained one."""
    import torch

    from kind_edge.model.dit import DiT

    spec = named_spec(LARGE, LARGE_CLASSES, learned_sigma=False, label_embedding=True, objective="flow")

    def model() -> DiT:
        return randomised(DiT(spec))

    return _made(spec, f"{LARGE.replace('/', '-')}-torch-{torch.__version__}", model)


def randomised(model: Any) -> Any:
    """Weights that leave nothing zero, with outputs of about the size of the inputs."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model


def _made(spec: ModelSpec, name: str, model: Callable[[], Any]) -> Dense:
    """All files of a model; those that are there are taken as they are."""
    import torch

    made = Dense(spec, cache() / "models" / name)
    made.folder.mkdir(parents=True, exist_ok=True)
    missing = [path for path in (made.onnx, *map(made.program, BATCHES)) if not path.exists()]
    if missing:
        network = _wrapped(model())
        if made.onnx in missing:
            whole(made.onnx, lambda path: to_onnx(network, spec, path))
        for batch in BATCHES:
            if made.program(batch) in missing:
                program = torch.export.export(network, _inputs(spec, batch))
                whole(made.program(batch), lambda path, program=program: torch.export.save(program, path))  # type: ignore[misc]
    if not made.onnx_int8.exists():
        whole(made.onnx_int8, lambda path: to_int8(made.onnx, path))
    if not made.our_int8.exists():
        made.our_int8.parent.mkdir(exist_ok=True)
        whole(made.our_int8, lambda path: to_our_int8(made.onnx, path))
    if not made.calibration.exists():
        whole(made.calibration, lambda path: np.savez(path, **calibration_states(made)))
    return made


def calibration_states(made: Dense) -> dict[str, np.ndarray]:
    """What quantizers with fixed ranges look at: the two rows of every guided step of a few images, [n, 2, ...]."""
    from kind_edge.deploy.session import open_session
    from peers.samplers import FloatArray, IndexArray, draw, flow_table

    spec, session = made.spec, open_session(made.onnx)
    images = CALIBRATION_IMAGES if made.spec.width <= 256 else 1
    seen: dict[str, list[np.ndarray]] = {"sample": [], "timestep": [], "class_index": []}

    def predict(sample: FloatArray, timestep: FloatArray, class_index: IndexArray) -> FloatArray:
        feeds = {"sample": sample, "timestep": timestep, "class_index": class_index}
        for name, values in feeds.items():
            seen[name].append(values)
        return np.asarray(session.run(None, feeds)[0])

    random = np.random.default_rng(1)
    for image in range(images):
        noise = random.standard_normal((1, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)
        classes = np.array([image % spec.num_classes])
        draw(predict, flow_table("euler", CALIBRATION_STEPS), 1.75, noise, classes, spec.num_classes)
    return {name: np.stack(values) for name, values in seen.items()}


def whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under another name, and give it its own when it is complete."""
    partial = path.with_name("partial-" + path.name)
    write(partial)
    partial.replace(path)


def to_onnx(network: torch.nn.Module, spec: ModelSpec, path: Path) -> None:
    """As PyTorch's documentation has it: nothing but a dynamic batch is asked for."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=1024)
    names = ["sample", "timestep", "class_index"]
    with _quiet():
        torch.onnx.export(
            network.eval(),
            _inputs(spec, 2),
            path,
            dynamo=True,
            input_names=names,
            output_names=["prediction"],
            dynamic_shapes={name: {0: batch} for name in names},
            external_data=False,
            verbose=False,
        )


def to_int8(source: Path, target: Path) -> None:
    """`quantize_dynamic` with its defaults. It refuses the shapes that the exporter noted, so those go first."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load_model(source)
    del model.graph.value_info[:]
    with _quiet():
        quantize_dynamic(model, target)


def to_our_int8(source: Path, target: Path) -> None:
    import onnx

    from kind_edge.exporters.onnx_int8 import quantize_int8

    model = onnx.load_model(source)
    del model.graph.value_info[:]
    onnx.save_model(quantize_int8(model), target)


def _wrapped(model: Any) -> torch.nn.Module:
    """Plain inputs: sample [B, ch, H, W], timestep [B], class_index [B]."""
    import torch

    from kind_edge.model.gated_linear import ClassGate

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_index: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.model(sample, timestep, ClassGate(class_index, None, None, None))
            return output

    return Network().eval().requires_grad_(False)


def _inputs(spec: ModelSpec, batch: int) -> tuple[torch.Tensor, ...]:
    import torch

    sample = torch.zeros(batch, spec.channels, spec.image_size, spec.image_size)
    return sample, torch.full((batch,), 500.0), torch.zeros(batch, dtype=torch.int64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and quantizers talk of their own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
