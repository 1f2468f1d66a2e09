"""A whole training run: data, loop, and what is left at the end: a checkpoint with calibration and held-out images."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kind_edge._version import __version__
from kind_edge.errors import UsageError
from kind_edge.model.calibration import save_calibration
from kind_edge.model.checkpoint import (
    CALIBRATION,
    CONFIG,
    HELDOUT,
    HELDOUT_IMAGES,
    HELDOUT_LATENTS,
    Checkpoint,
    partial_files,
    save_checkpoint,
    write_tensors,
)
from kind_edge.model.provenance import code_revision
from kind_edge.model.spec import DEFAULT_GUIDANCE, DEFAULT_STEPS, default_sampler
from kind_edge.training.beginning import begin_with, check_same_classes, origin_of
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import DataSplit, TrainingData
from kind_edge.training.distributed import Processes, check_division, check_sharding, check_shared, first_process, join
from kind_edge.training.loop import Progress, run
from kind_edge.training.losses import Loss, NestedLoss
from kind_edge.training.nested import calibrated, nested_config, start_nested
from kind_edge.training.open import open_data
from kind_edge.training.state import (
    STATE,
    TrainState,
    averaged_tensors,
    check_state,
    data_choices,
    in_second_stage,
    load_state,
    notes_its_data,
    save_state,
    start,
    start_from,
)


def pick_device(name: str) -> torch.device:
    """ "auto" takes a CUDA GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu or auto")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {name!r}, want auto, cpu or cuda")
    return torch.device(name)


def is_begun(output: Path, resume: bool, on_note: Callable[[str], None] = lambda _: None) -> bool:
    """Whether there is a run in the folder to go on with; a folder that holds something else is refused.

    Where nothing has been saved yet, `resume` begins: whoever starts a killed job again cannot know how far it was.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; choose another -o")
    if resume and (output / STATE).exists():
        return True
    held = {path.name for path in output.iterdir()} if output.exists() else set()
    if held - {path.name for path in partial_files(output / STATE)}:  # what a kill in the first save leaves behind
        fault = f"--resume: {output} holds no run to continue, but other files" if resume else f"{output} is not empty"
        begun = not resume and STATE in held
        raise UsageError(f"{fault}; {'add --resume to go on with the run in it' if begun else 'choose another -o'}")
    if resume:
        on_note(f"--resume: nothing has been saved in {output} yet; the run begins")
    return False


def train(
    config: TrainConfig,
    output: Path,
    *,
    data: Path | None = None,
    class_map: Path | None = None,
    autoencoder: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    begin: Checkpoint | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train into folder `output`, which becomes a checkpoint; an interrupted run goes on with `resume`.

    `data`, `class_map` and `autoencoder` are as in `open_data`; `on_note` is told what becomes of the data. With
    `begin` the weights start as those of a checkpoint of the configuration's shape, and not at random.

    Raises:
        UsageError: the folder holds something already and `resume` is not given, or it holds another run; or the
            data's classes are not those of `begin`.
        InputError: the data or the saved state cannot be read.
        GateError: the run diverged.
    """
    place = pick_device(device)
    check_division(config)
    check_sharding(config)
    on_note = on_note if first_process() else lambda _: None
    resume = is_begun(output, resume, on_note)
    if resume:
        check_begun(config, output, on_note, origin_of(begin))
    processes = join(place)
    check_shared(processes, resume, output)
    split = open_data(
        config, data, class_map=class_map, autoencoder=autoencoder, device=processes.device, report=on_note
    )
    if begin is not None:
        check_same_classes(begin, split.training.class_names)
    output.mkdir(parents=True, exist_ok=True)
    return train_stages(
        config, split, output, processes, resume=resume, begin=begin, on_progress=on_progress, on_note=on_note
    )


def check_begun(
    config: TrainConfig,
    output: Path,
    on_note: Callable[[str], None],
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse another run's state, as far as that can be told without the data."""
    nested = nested_config(config)
    second = nested is not None and in_second_stage(output)
    whole = config if nested and second else None
    metadata = check_state(output, nested if nested and second else config, origin, whole)
    warn_of_unnoted(metadata, output, on_note)


def warn_of_unnoted(metadata: Mapping[str, str], output: Path, on_note: Callable[[str], None]) -> None:
    if not notes_its_data(metadata):
        on_note(
            f"warning: the run in {output} was saved by an earlier kind-edge, which did not note its data; make sure "
            "that data and classes are those that it was started with"
        )


def train_stages(
    config: TrainConfig,
    split: DataSplit,
    output: Path,
    processes: Processes | None = None,
    *,
    resume: bool = False,
    begin: Checkpoint | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """`train` with data that is open already. Every process calls this."""
    nested, origin = nested_config(config), origin_of(begin)
    choices = {**data_choices(split.training), **origin}
    if nested is not None and resume and in_second_stage(output):
        state = load_state(output, nested, processes, choices=choices, whole=config)
    else:
        if resume:
            first = load_state(output, config, processes, choices=choices)
        elif begin is None:
            first = start(config, processes)
        else:
            first = start_from(config, begin_with(begin, config), processes)
        if nested is None:
            return train_to_end(config, first, split, output, on_progress, origin=origin)
        run(config, first, split.training, lambda s: save_state(output, config, s, choices), on_progress)
        done = Checkpoint(config.spec, split.training.class_names, averaged_tensors(config, first), {})
        on_note("second stage: the learngene is put in order, and each cut of it learns what the whole predicts")
        state = start_nested(nested, done, split.training, first.processes)
        state.seconds, state.saved = first.seconds, "the first stage"
    loss = NestedLoss(config.spec.objective, config.seed)
    seen = config.steps * config.batch_size
    return train_to_end(
        nested, state, split, output, on_progress, loss_of=loss, whole=config, seen_before=seen, origin=origin
    )


def train_to_end(
    config: TrainConfig,
    state: TrainState,
    split: DataSplit,
    output: Path,
    on_progress: Callable[[Progress], None],
    *,
    loss_of: Loss | None = None,
    whole: TrainConfig | None = None,
    seen_before: int = 0,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Train what is left of a stage, the last one, saving into `output`, which becomes a checkpoint.

    `whole` is the configuration of the run that it is the last stage of, `seen_before` the images of earlier ones,
    `origin` what the run notes of the checkpoint that it began from. Every process calls this.
    """
    choices = {**data_choices(split.training), **origin}
    run(config, state, split.training, lambda s: save_state(output, config, s, choices, whole), on_progress, loss_of)
    weights = averaged_tensors(config, state)
    if state.processes.rank == 0:
        seen = seen_before + state.step * config.batch_size
        finish(whole or config, state, weights, output, split, seen, origin)
    state.processes.wait()
    return output


def finish(
    config: TrainConfig,
    state: TrainState,
    weights: dict[str, Tensor],
    output: Path,
    split: DataSplit,
    images_seen: int,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the checkpoint from the averaged weights, in fp16, and what planning needs beside it."""
    data = split.training
    provenance = {
        "command": "kind-edge " + shlex.join(sys.argv[1:]),
        "config": config.to_dict(),
        **({"stated": config.stated.to_dict()} if config.stated.to_dict() else {}),
        "data": dict(split.facts),
        "data_sha256": data.sha256,
        "hardware": hardware(state.processes.device),
        "seconds": round(state.seconds, 1),
        "images_seen": images_seen,
        "final_loss": state.loss,
        "tools": training_tools(),
        "recommended": _recommended(config, origin),
        **origin,
    }
    checkpoint = Checkpoint(state.model.spec, data.class_names, weights, provenance)
    if config.spec.factored:
        save_calibration(output / CALIBRATION, calibrated(checkpoint, data))
    save_heldout(output, split.heldout)
    save_checkpoint(output, checkpoint, torch.float16)
    assert (output / CONFIG).exists()


def training_tools() -> dict[str, str]:
    """Versions; of a source tree also its commit."""
    revision = code_revision()
    versions = {"kind_edge": __version__, "torch": torch.__version__}
    return versions | ({"revision": revision} if revision else {})


def _recommended(config: TrainConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    """How to sample: as the model that the run began from, else as most models."""
    usual = {
        "steps": DEFAULT_STEPS,
        "guidance": DEFAULT_GUIDANCE,
        "sampler": default_sampler(config.spec.objective),
    }
    return {**usual, **origin.get("begun_from", {}).get("recommended", {})}


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def save_heldout(output: Path, heldout: TrainingData) -> None:
    tensors = heldout_tensors(heldout)
    if tensors:
        write_tensors(output / HELDOUT, tensors)


def heldout_tensors(heldout: TrainingData) -> dict[str, torch.Tensor]:
    """All held-out items as they are kept: uint8 images, or float16 latents in the network's scale; {} for none."""
    count = len(heldout.labels)
    if count == 0:
        return {}
    items = heldout.stored(torch.arange(count))
    name = HELDOUT_IMAGES if items.dtype == torch.uint8 else HELDOUT_LATENTS
    labels = heldout.labels.to(torch.uint8 if len(heldout.class_names) <= 256 else torch.int32)
    return {name: items, "labels": labels}
