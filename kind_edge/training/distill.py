"""`kind-edge distill`: a run whose student starts as its teacher, and what is left at the end."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kind_edge.errors import InputError, UsageError
from kind_edge.model.calibration import calibrate_on_samples, save_calibration
from kind_edge.model.checkpoint import (
    CALIBRATION,
    HELDOUT,
    Checkpoint,
    checkpoint_hash,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.spec import DEFAULT_GUIDANCE, DEFAULT_STEPS, default_sampler
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData, in_memory
from kind_edge.training.distill_onto import Onto
from kind_edge.training.distributed import (
    Processes,
    check_division,
    check_shared,
    first_process,
    join,
    launched_processes,
)
from kind_edge.training.loop import Progress, run
from kind_edge.training.sampled import check_judgeable, judged_labels, sample_checkpoint, score
from kind_edge.training.state import TrainState, averaged_tensors, load_state, save_state, start_from
from kind_edge.training.train import hardware, is_begun, pick_device, training_tools
from kind_edge.training.walks import STEP_COUNTS, TEACHER_STEPS, DistillationLoss

DEFAULT_STEP_COUNT = 4
IMAGES = 48_000
BATCH_SIZE = 40
RATE_SHARE = 0.3
"""Of the teacher's learning rate: the weights are good ones already."""
WARMUP_STEPS = 50
EMA_DECAY = 0.998
CALIBRATION_WALKS = 32
"""Per class and step count."""
JUDGED_IMAGES = 2_000
"""Per step count, where the judge knows the classes."""


@dataclass(frozen=True)
class Request:
    """What is distilled, which guidance goes inside, and the distilled model that new classes are to join, if any."""

    teacher: Checkpoint
    guidance: float
    onto: Onto | None = None

    def __post_init__(self) -> None:
        spec = self.teacher.spec
        if spec.distilled:
            counts = ", ".join(map(str, spec.step_counts))
            raise UsageError(f"{self.teacher.path} is distilled already, for {counts} steps; give its teacher")
        if spec.objective != "flow":
            raise UsageError(
                f"{self.teacher.path} has the {spec.objective} objective; only flow models are distilled so far"
            )
        if not 1 <= self.guidance < 1000:
            raise UsageError(f"--guidance: got {self.guidance:g}, want at least 1 (1 is none)")
        if self.onto is not None and self.guidance != self.onto.student.spec.inside_guidance:
            inside = self.onto.student.spec.inside_guidance
            raise UsageError(
                f"--guidance {self.guidance:g}: {self.onto.student.path} has {inside} inside; leave it out"
            )

    @property
    def taught(self) -> Checkpoint:
        """The teacher, of those classes that are learned."""
        return self.teacher if self.onto is None else self.onto.newcomers()

    def choices(self) -> dict[str, Any]:
        """What makes two runs the same, beside their configuration."""
        assert self.teacher.path is not None
        own = {"teacher_sha256": checkpoint_hash(self.teacher.path), "guidance": self.guidance}
        return own | (self.onto.choices() if self.onto else {})


def distill(
    checkpoint: Path,
    output: Path,
    *,
    guidance: float | None = None,
    onto: Path | None = None,
    images: int | None = None,
    device: str = "auto",
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Distil a checkpoint into folder `output`, which becomes a checkpoint of few steps and no guidance branch.

    `guidance` goes inside; the teacher's recommended one unless given. `onto`: a model that was distilled before; it
    gets the classes of the teacher that it has not, and is otherwise the same. `images`: walks of the student in all,
    `IMAGES` for all of the teacher's classes unless given. An interrupted run goes on with `resume`.

    Raises:
        UsageError: a teacher that cannot be distilled, or not onto this model, or an `output` that holds something.
        InputError: the checkpoint cannot be read.
    """
    place = pick_device(device)
    resume = is_begun(output, resume, on_note if first_process() else lambda _: None)
    teacher = load_checkpoint(checkpoint)
    before = None if onto is None else Onto(load_checkpoint(onto), teacher)
    if before is not None and launched_processes() > 1:
        raise UsageError("--onto trains little, so it runs in one process: start it without a launcher")
    if guidance is None and before is not None:
        guidance = before.student.spec.inside_guidance
    advice = teacher.provenance.get("recommended", {})
    request = Request(
        teacher, float(advice.get("guidance", DEFAULT_GUIDANCE) if guidance is None else guidance), before
    )
    share = request.taught.spec.num_classes / teacher.spec.num_classes
    config = distill_config(request, round(IMAGES * share) if images is None else images)
    check_division(config)
    processes = join(place)
    check_shared(processes, resume, output)
    return distill_to(request, config, output, processes, resume=resume, on_progress=on_progress)


def distill_to(
    request: Request,
    config: TrainConfig,
    output: Path,
    processes: Processes | None = None,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """`distill` with everything chosen. Every process calls this."""
    choices, data = request.choices(), blank_data(request.taught)
    model = student(request.teacher, config) if request.onto is None else request.onto.begin(config.seed)
    state = load_state(output, config, processes, model, choices) if resume else start_from(config, model, processes)
    output.mkdir(parents=True, exist_ok=True)
    teacher = request.taught.model().to(state.processes.device)
    loss = DistillationLoss(teacher, request.guidance, config.seed)
    run(config, state, data, lambda s: save_state(output, config, s, choices), on_progress, loss)
    weights = averaged_tensors(config, state)
    if state.processes.rank == 0:
        finish(request, config, state, weights, output)
    state.processes.wait()
    return output


def distill_config(request: Request, images: int = IMAGES, seed: int = 0) -> TrainConfig:
    """A run of the student, trained the way its teacher was, as far as it says how."""
    spec = dataclasses.replace(request.taught.spec, step_counts=STEP_COUNTS, inside_guidance=request.guidance)
    if request.onto is not None:
        spec = dataclasses.replace(spec, step_counts=request.onto.student.spec.step_counts)
    trained = request.teacher.provenance.get("config", {})
    base = TrainConfig(spec, dataset="files", images=images, batch_size=BATCH_SIZE, seed=seed)
    kept = {key: trained[key] for key in ("weight_decay", "gradient_clip", "null_share") if key in trained}
    return dataclasses.replace(
        base,
        **{**kept, **({} if request.onto is None else {"null_share": 0.0})},
        learning_rate=float(trained.get("learning_rate", base.learning_rate)) * RATE_SHARE,
        warmup_steps=min(WARMUP_STEPS, base.steps),
        ema_decay=EMA_DECAY,
        nested_share=0.0,
    )


@torch.no_grad()
def student(teacher: Checkpoint, config: TrainConfig) -> DiT:
    """The teacher, to which the span of a step means nothing yet."""
    model = initialise(DiT(config.spec), config.seed)
    model.load_state_dict(teacher.float_tensors(), strict=False)
    assert model.span_embed is not None
    model.span_embed.fc2.weight.zero_()
    return model


def blank_data(teacher: Checkpoint) -> TrainingData:
    """One blank image per class: a walk starts from noise, and looks at labels alone."""
    spec = teacher.spec
    blank = np.zeros((spec.num_classes, spec.channels, spec.image_size, spec.image_size), np.uint8)
    return in_memory(blank, torch.arange(spec.num_classes), teacher.class_names, "")


def finish(request: Request, config: TrainConfig, state: TrainState, weights: dict[str, Tensor], output: Path) -> None:
    """Write the student from its averaged weights, in fp16, and what planning needs beside it."""
    teacher = request.teacher
    advice = {"steps": DEFAULT_STEP_COUNT, "guidance": request.guidance, "sampler": default_sampler("flow")}
    old = {key: value for key, value in teacher.provenance.items() if key not in ("quality", "recommended")}
    distilled = {
        "command": "kind-edge " + shlex.join(sys.argv[1:]),
        **request.choices(),
        "teacher_guidance": request.guidance,
        "teacher_steps": int(teacher.provenance.get("recommended", {}).get("steps", DEFAULT_STEPS)),
        "teacher_steps_in_training": TEACHER_STEPS,
        "config": config.to_dict(),
        "hardware": hardware(state.processes.device),
        "seconds": round(state.seconds, 1),
        "images_seen": state.step * config.batch_size,
        "final_loss": state.loss,
        "tools": training_tools(),
    }
    provenance = {**old, "distilled": distilled, "recommended": advice}
    if request.onto is None:
        done = Checkpoint(config.spec, teacher.class_names, weights, provenance)
    else:
        distilled["before"] = request.onto.student.provenance.get("distilled")
        done = request.onto.join(weights, provenance)
    if config.spec.factored:
        save_calibration(output / CALIBRATION, calibrate_on_samples(done.model(), CALIBRATION_WALKS))
    assert teacher.path is not None
    if (teacher.path / HELDOUT).exists():
        write_tensors(output / HELDOUT, read_tensors(teacher.path / HELDOUT))
    dtype = torch.float16 if request.onto is None else None  # else what was there keeps its bytes
    save_checkpoint(output, done, dtype)
    quality = quality_by_steps(load_checkpoint(output))
    if quality:
        save_checkpoint(output, dataclasses.replace(done, provenance={**done.provenance, **quality}), dtype)


def quality_by_steps(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the shipped judge says of each step count, as provenance; nothing where it does not know the classes."""
    try:
        judged_labels(checkpoint.class_names)
        check_judgeable(checkpoint.spec)
    except InputError:
        return {}
    reports = {
        str(count): dataclasses.asdict(score(sample_checkpoint(checkpoint, JUDGED_IMAGES, 0, count)))
        for count in checkpoint.spec.step_counts
    }
    kept = ("images", "frechet", "recall", "precision", "class_accuracy")
    return {"quality_by_steps": {n: {key: report[key] for key in kept} for n, report in reports.items()}}
