"""New classes for a trained model: tailors of their own on a learngene that stays as it is.

The run is an ordinary one of a model that has the new classes alone: its shared weights are the checkpoint's, frozen,
and its tailors (with the label rows, where the model has labels) are all that is trained. No old tailor takes part, so
none can change; at the end the new rows are put behind the old ones, whose bytes are copied.

No image is trained with its gate closed: the null branch is the learngene, and nothing of it learns.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kind_edge._version import __version__
from kind_edge.errors import InputError, UsageError, unknown
from kind_edge.model.calibration import Calibration, calibrate_on_images, load_calibration, save_calibration
from kind_edge.model.checkpoint import (
    CALIBRATION,
    HELDOUT,
    HELDOUT_IMAGES,
    HELDOUT_LATENTS,
    Checkpoint,
    checkpoint_hash,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    weight_files,
    write_tensors,
)
from kind_edge.model.diffusion import add_noise, draw_timesteps
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import GatedLinear
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import DataSplit, TrainingData
from kind_edge.training.distributed import Alone, launched_processes
from kind_edge.training.loop import Progress, run
from kind_edge.training.losses import NestedLoss
from kind_edge.training.nested import CALIBRATION_IMAGES
from kind_edge.training.open import dataset_at, open_data
from kind_edge.training.state import TrainState, averaged_tensors, load_state, save_state, start_from
from kind_edge.training.train import check_output, hardware, heldout_tensors, pick_device

IMAGES = 60_000
WARMUP_STEPS = 100
AS_TRAINED = ("batch_size", "learning_rate", "weight_decay", "gradient_clip")
"""Of the run that made the checkpoint, what its new tailors are trained with, too."""

NEAREST = "nearest"
NEAREST_IMAGES = 32
"""Of every new class, to find the old tailor that fits it best."""

LABELS = "y_embed.weight"


@dataclass(frozen=True)
class Request:
    """What is added to which checkpoint. `start`: None (random), "nearest", or the name of an old class."""

    source: Checkpoint
    classes: tuple[str, ...]
    start: str | None = None
    learngene_only: bool = False

    def __post_init__(self) -> None:
        spec, old = self.source.spec, self.source.class_names
        if not spec.factored or not any(spec.ranks(shape.name).tailor for shape in spec.matrices()):
            raise UsageError(f"{self.source.path} has no tailors, so it cannot learn new ones; give a model that has")
        if spec.distilled:
            raise UsageError(
                f"{self.source.path} is distilled, and a tailor learned from images alone would not fit its few steps; "
                "adapt the model that it was distilled from, and distil that again"
            )
        if not self.classes:
            raise UsageError("--classes: name at least one class of the data")
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise UsageError(f"--classes: {name!r} is named twice")
            if name in old and not self.learngene_only:
                raise UsageError(
                    f"--classes: the model knows {name!r} already; leave it out, rename it with --class-map, or start "
                    "a new domain with --learngene-only"
                )
        if self.start not in (None, NEAREST, *old):
            raise unknown("class", str(self.start), [*old, NEAREST])

    @property
    def kept(self) -> tuple[str, ...]:
        """The old classes that stay."""
        return () if self.learngene_only else self.source.class_names

    def choices(self) -> dict[str, Any]:
        """What makes two runs the same, beside their configuration."""
        assert self.source.path is not None
        names = {"classes": list(self.classes), "start": self.start, "learngene_only": self.learngene_only}
        return {"checkpoint_sha256": checkpoint_hash(self.source.path), **names}


def adapt(
    checkpoint: Path,
    data: Path,
    classes: Sequence[str],
    output: Path,
    *,
    start: str | None = None,
    learngene_only: bool = False,
    images: int | None = None,
    class_map: Path | None = None,
    autoencoder: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train tailors for `classes` of `data` into folder `output`, which becomes a checkpoint of old and new classes.

    `data`, `class_map` and `autoencoder` are as in `open_data`; `start` and `learngene_only` as in `Request` (with
    `learngene_only` the old classes are dropped). An interrupted run goes on with `resume`.

    Raises:
        UsageError: a class that the data does not have or the model has already, a model without tailors, data of
            another shape than the model's, or an `output` that holds something.
        InputError: the checkpoint or the data cannot be read.
    """
    place = pick_device(device)
    if launched_processes() > 1:
        raise UsageError("adapt trains little, so it runs in one process: start it without a launcher")
    check_output(output, resume)
    request = Request(load_checkpoint(checkpoint), tuple(classes), start, learngene_only)
    config = adapt_config(request, dataset_at(data), images)
    split = open_data(
        config, data, only=classes, class_map=class_map, autoencoder=autoencoder, device=place, report=on_note
    )
    return adapt_to(request, config, split, output, device=place, resume=resume, on_progress=on_progress)


def adapt_to(
    request: Request,
    config: TrainConfig,
    split: DataSplit,
    output: Path,
    *,
    device: torch.device,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """`adapt` with data that is open already: `split` holds the new classes alone, in the order of the request."""
    calibration, heldout = stored_calibration(request), stored_heldout(request)  # read first: they may be corrupt
    origins = origins_of(request, split.training, config.seed)
    model, alone = begin(request, config, origins), Alone(device)
    choices = request.choices()
    output.mkdir(parents=True, exist_ok=True)
    state = load_state(output, config, alone, model, choices) if resume else start_from(config, model, alone)
    nested = NestedLoss(config.spec.objective, config.seed) if config.spec.nested else None
    run(config, state, split.training, lambda s: save_state(output, config, s, choices), on_progress, nested)
    provenance = _provenance(request, config, state, split, origins)
    joined = join(request, averaged_tensors(config, state), provenance)
    if calibration is not None or not request.kept:
        measured = _measure(joined, split.training, len(request.kept))
        weights = len(request.kept), len(request.classes)
        save_calibration(output / CALIBRATION, measured if calibration is None else mix(calibration, measured, weights))
    save_heldout(output, heldout, heldout_tensors(split.heldout), len(request.kept))
    save_checkpoint(output, joined)
    return output


def adapt_config(request: Request, dataset: str, images: int | None = None, seed: int = 0) -> TrainConfig:
    """A run of the new classes alone, trained the way the checkpoint was, as far as it says how."""
    trained = request.source.provenance.get("config", {})
    values = {
        **{key: trained[key] for key in AS_TRAINED if key in trained},
        "model": dataclasses.replace(request.source.spec, num_classes=len(request.classes)).to_dict(),
        "dataset": dataset,
        "images": IMAGES if images is None else images,
        "warmup_steps": WARMUP_STEPS,
        "null_share": 0.0,
        "nested_share": 0.0,
        "seed": seed,
    }
    return TrainConfig.from_dict(values, f"{request.source.path}: provenance: config")


# --- where the new tailors start --------------------------------------------------------------------------------------


@torch.no_grad()
def begin(request: Request, config: TrainConfig, origins: Sequence[str] | None) -> DiT:
    """The model of the new classes: shared weights of the checkpoint, frozen; tailors as they start.

    Without `origins` tailors start as nothing: V and s are dealt from random matrices as in training, U is zero (as in
    LoRA), and so is what they add. A random product would be noise in every layer of a learngene that already works,
    to be unlearned first: on three new classes of Fashion-MNIST (D 64, 4 blocks, 7 old classes; one run each) held-out
    loss was 0.575 with random U and 0.506 with zero after 3,600 images, 0.439 and 0.415 after 12,000. An old class's
    tailor is a better start still where one is near (the nearest there: 0.428 and 0.383).
    Label rows start as the null row, which is what the learngene was trained beside.
    """
    source = request.source
    model = initialise(DiT(config.spec), config.seed)
    own = {name for name in source.tensors if ".tailors." in name} | {LABELS}
    model.load_state_dict({n: t for n, t in source.float_tensors().items() if n not in own}, strict=False)
    rows = None if origins is None else [source.class_names.index(name) for name in origins]
    for name, layer in model.named_modules():
        if not isinstance(layer, GatedLinear):
            continue
        if rows is None:
            layer.tailors.U.zero_()
            continue
        for part, tailor in layer.tailors.named_parameters():
            tailor.copy_(source.tensors[f"{name}.tailors.{part}"][rows])
    model.requires_grad_(False)
    if model.y_embed is not None:
        like = [-1] * len(request.classes) if rows is None else rows
        model.y_embed.weight.copy_(source.tensors[LABELS][[*like, -1]])
        # The null row lies in the same tensor, but no image of the run has the null label, and `join` drops the row.
        model.y_embed.weight.requires_grad_(True)
    return model


def origins_of(request: Request, data: TrainingData, seed: int = 0) -> tuple[str, ...] | None:
    """The old class whose tailor each new class starts with; None for a random start.

    The nearest is the one with which the model denoises some of the class's images best.
    """
    names = request.source.class_names
    if request.start is None:
        return None
    if request.start in names:
        return (request.start,) * len(request.classes)
    model = request.source.model()
    nearest = []
    for label in range(len(request.classes)):
        x = data.batch((data.labels == label).nonzero().flatten()[:NEAREST_IMAGES])
        losses = [_denoising_loss(model, x, old, seed) for old in range(len(names))]
        nearest.append(names[losses.index(min(losses))])
    return tuple(nearest)


@torch.no_grad()
def _denoising_loss(model: DiT, x: Tensor, label: int, seed: int) -> float:
    """Of images [b, ch, H, W] under the tailor of a class, with the same noise for every class."""
    stream = torch.Generator().manual_seed(seed)
    timestep = draw_timesteps(model.spec.objective, len(x), stream)
    noise = torch.randn(x.shape, generator=stream)
    noised, target = add_noise(model.spec.objective, x, noise, timestep)
    prediction = model(noised, timestep, torch.full((len(x),), label))[:, : x.shape[1]]
    return float((prediction - target).square().mean())


# --- old and new together ---------------------------------------------------------------------------------------------


def join(request: Request, trained: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Checkpoint:
    """Old classes, then new ones, then the null label. All old tensors keep their bytes; new rows take their dtype."""
    source, tensors = request.source, {}
    for name, old in _stored_tensors(source).items():
        new = trained[name].to(old.dtype) if ".tailors." in name or name == LABELS else None
        kept = [old[: len(request.kept)]]
        if new is None:
            tensors[name] = old
        elif name == LABELS:
            tensors[name] = torch.cat([*kept, new[:-1], old[-1:]])
        else:
            tensors[name] = torch.cat([*kept, new])
    classes = (*request.kept, *request.classes)
    spec = dataclasses.replace(source.spec, num_classes=len(classes))
    return Checkpoint(spec, classes, tensors, provenance)


def _stored_tensors(source: Checkpoint) -> dict[str, Tensor]:
    """As they lie in the file, `pos_embed` too, which loading may have widened."""
    assert source.path is not None
    tensors: dict[str, Tensor] = {}
    for file in weight_files(source.path):
        tensors |= read_tensors(file)
    return tensors


def _provenance(
    request: Request, config: TrainConfig, state: TrainState, split: DataSplit, origins: Sequence[str] | None
) -> dict[str, Any]:
    """That of the checkpoint, whose learngene this is, and how the new classes came; no judgement of the old whole."""
    old = {key: value for key, value in request.source.provenance.items() if key not in ("quality", "adapted")}
    count = len(request.kept) + len(request.classes)
    if isinstance(old.get("config"), Mapping):
        old["config"] = {**old["config"], "model": {**config.to_dict()["model"], "num_classes": count}}
    adapted = {
        "command": "kind-edge " + shlex.join(sys.argv[1:]),
        **request.choices(),
        "origins": None if origins is None else list(origins),
        "config": config.to_dict(),
        "data": dict(split.facts),
        "data_sha256": split.training.sha256,
        "hardware": hardware(state.processes.device),
        "seconds": round(state.seconds, 1),
        "images_seen": state.step * config.batch_size,
        "trained_values": state.tailors.weight.numel() + sum(p[:-1].numel() for p in state.parameters().values()),
        "final_loss": state.loss,
        "tools": {"kind_edge": __version__, "torch": torch.__version__},
        "before": request.source.provenance.get("adapted"),
    }
    return {**old, "adapted": adapted}


# --- what planning needs ----------------------------------------------------------------------------------------------


def stored_calibration(request: Request) -> Calibration | None:
    """Of the old classes; None where none stays, or none is stored (planning then makes one for all classes)."""
    assert request.source.path is not None
    path = request.source.path / CALIBRATION
    return load_calibration(path, request.source.spec) if request.kept and path.exists() else None


def _measure(joined: Checkpoint, data: TrainingData, first: int) -> Calibration:
    """On images of the new classes, which are numbered from `first` in the joined checkpoint."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:CALIBRATION_IMAGES]
    return calibrate_on_images(joined.model(), data.batch(chosen), data.labels[chosen] + first)


def mix(old: Calibration, new: Calibration, classes: tuple[int, int]) -> Calibration:
    """Every class counts the same, as if all had been measured at once: an expectation over classes is their mean.

    The null branch is mixed, too: its weights are the old ones, but guidance shows it images of the new classes.
    """
    share = classes[1] / sum(classes)

    def mixed(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.lerp(a[name], b[name], share) for name in a}

    source = "training images of the new classes, and what was stored of the old"
    return Calibration(mixed(old.pooled, new.pooled), mixed(old.null, new.null), source)


def stored_heldout(request: Request) -> dict[str, Tensor]:
    """The held-out items and labels of the old classes; empty where none stays or none is stored."""
    assert request.source.path is not None
    path = request.source.path / HELDOUT
    if not request.kept or not path.exists():
        return {}
    tensors = read_tensors(path)
    if set(tensors) not in ({HELDOUT_IMAGES, "labels"}, {HELDOUT_LATENTS, "labels"}):
        raise InputError(f"{path}: holds {', '.join(sorted(tensors))}; want {HELDOUT_IMAGES} and labels")
    return tensors


def save_heldout(output: Path, old: Mapping[str, Tensor], new: Mapping[str, Tensor], first: int) -> None:
    """Old items, then new ones, whose labels are counted from `first`."""
    parts = [dict(old)] if old else []
    if new:
        parts.append({**new, "labels": new["labels"].long() + first})
    if not parts:
        return
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    few = int(joined["labels"].max()) < 256
    joined["labels"] = joined["labels"].to(torch.uint8 if few else torch.int32)
    write_tensors(output / HELDOUT, joined)
