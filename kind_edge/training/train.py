"""A whole training run: data, loop, and what is left at the end: a checkpoint with calibration and held-out images."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kind_edge._version import __version__
from kind_edge.errors import UsageError
from kind_edge.model.calibration import calibrate_on_images, save_calibration
from kind_edge.model.checkpoint import CALIBRATION, CONFIG, HELDOUT, Checkpoint, save_checkpoint, write_tensors
from kind_edge.model.spec import default_sampler
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import CLASS_NAMES, IMAGE_SIDE, FashionMNIST, load_fashion_mnist
from kind_edge.training.distributed import check_division, join
from kind_edge.training.loop import Progress, run
from kind_edge.training.source import InMemoryImages
from kind_edge.training.state import STATE, TrainState, averaged_tensors, load_state, save_state, start

CALIBRATION_IMAGES = 1024
HELDOUT_PER_CLASS = 50


def pick_device(name: str) -> torch.device:
    """ "auto" takes a CUDA GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu or auto")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {name!r}, want auto, cpu or cuda")
    return torch.device(name)


def train(
    config: TrainConfig,
    output: Path,
    *,
    data: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Train into folder `output`, which becomes a checkpoint; an interrupted run goes on with `resume`.

    Raises `UsageError` if the folder holds something already and `resume` is not given.
    """
    place = pick_device(device)
    check_division(config)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; choose another -o")
    if not resume and output.exists() and any(output.iterdir()):
        begun = (output / STATE).exists()
        advice = "add --resume to go on with the run in it" if begun else "choose another -o"
        raise UsageError(f"{output} exists and is not empty; {advice}")
    dataset = load_fashion_mnist(data)
    wanted = {"num_classes": len(CLASS_NAMES), "image_size": IMAGE_SIDE, "channels": 1}
    for name, value in wanted.items():
        if getattr(config.spec, name) != value:
            raise UsageError(f"the model has {name} {getattr(config.spec, name)}, Fashion-MNIST has {value}")
    processes = join(place)
    output.mkdir(parents=True, exist_ok=True)
    images, labels = tensors(dataset.train_images, dataset.train_labels)
    source = InMemoryImages(images.to(processes.device), labels, CLASS_NAMES, dataset.data_sha256)
    state = load_state(output, config, processes) if resume else start(config, processes)
    run(config, state, source, lambda s: save_state(output, config, s), on_progress)
    weights = averaged_tensors(config, state)
    if processes.rank == 0:
        finish(config, state, weights, output, dataset)
    processes.wait()
    return output


def tensors(images: object, labels: object) -> tuple[Tensor, Tensor]:
    """NumPy images [n, H, W] and labels as uint8 [n, 1, H, W] and int64 [n]."""
    return torch.tensor(images).unsqueeze(1), torch.tensor(labels).long()


def finish(
    config: TrainConfig, state: TrainState, weights: dict[str, Tensor], output: Path, dataset: FashionMNIST
) -> None:
    """Write the checkpoint from the averaged weights, in fp16, and what planning needs beside it."""
    provenance = {
        "command": "kind-edge " + shlex.join(sys.argv[1:]),
        "config": config.to_dict(),
        "data_sha256": dataset.data_sha256,
        "hardware": hardware(state.processes.device),
        "seconds": round(state.seconds, 1),
        "images_seen": state.step * config.batch_size,
        "final_loss": state.loss,
        "tools": {"kind_edge": __version__, "torch": torch.__version__},
        "recommended": {"steps": 20, "guidance": 1.5, "sampler": default_sampler(config.spec.objective)},
    }
    checkpoint = Checkpoint(config.spec, CLASS_NAMES, weights, provenance)
    if config.spec.factored:
        chosen = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))[
            :CALIBRATION_IMAGES
        ]
        images, labels = tensors(dataset.train_images[chosen.numpy()], dataset.train_labels[chosen.numpy()])
        calibration = calibrate_on_images(checkpoint.model(), images.float() / 127.5 - 1, labels)
        save_calibration(output / CALIBRATION, calibration)
    save_heldout(output, dataset)
    save_checkpoint(output, checkpoint, torch.float16)
    assert (output / CONFIG).exists()


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def save_heldout(output: Path, dataset: FashionMNIST) -> None:
    """The first test images of every class."""
    images, labels = tensors(dataset.test_images, dataset.test_labels)
    chosen = torch.cat([(labels == c).nonzero().flatten()[:HELDOUT_PER_CLASS] for c in range(len(CLASS_NAMES))])
    write_tensors(output / HELDOUT, {"images": images[chosen], "labels": labels[chosen].to(torch.uint8)})
