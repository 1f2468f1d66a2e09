"""Healing: for a given time, what is left of a cut model learns from the full one what cutting took away.

No image is needed. A pool of images is drawn by the cut model itself, each at its own step of the plan's sampler. At
every state that an image comes to, the cut model learns what the full one predicts there (of the image's class and,
where there is a guidance branch, of none), and goes on by its own prediction: it is taught where it is going to be, and
at no other timesteps (imitation on the learner's own states: Ross et al., "A Reduction of Imitation Learning and
Structured Prediction to No-Regret Online Learning", 2011). Ranks, classes and everything but factors and biases stay.

The time is divided among as many steps as the machine affords, so two runs are alike but not equal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kind_edge.errors import InputError
from kind_edge.model.checkpoint import Checkpoint, partial_files, read_metadata, read_tensors, write_tensors
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import GatedLinear
from kind_edge.model.names import SHARED
from kind_edge.model.sampling import step_span
from kind_edge.model.spec import Form
from kind_edge.training.loop import stop_requests
from kind_edge.training.tailors import BETAS

POOL = 48
"""Images that are drawn at a time."""
RATE = 2e-3
WARMUP_STEPS = 20
LONGEST_GRADIENT = 1.0
SAVE_EVERY_S = 20.0
SAVING_SHARE = 0.05
"""Of the time, at most; a large model is saved less often."""
JUDGED_WALKS = 64
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Rows(NamedTuple):
    """A sampler as one row per network evaluation, [S] each: d = p x + q prediction; x' = a x + b d + c d before."""

    timestep: Tensor
    p: Tensor
    q: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


def sampler_rows(table: Any) -> Rows:
    """Of a sampler's table, which has these columns as arrays."""
    return Rows(*(torch.from_numpy(getattr(table, name)).float() for name in Rows._fields))


@dataclass(frozen=True)
class Lesson:
    """Who learns from whom, and how the cut model is going to be run.

    `kept`: positions of the cut model's classes in the full one. `guidance` is what the sampling loop does. Only
    *switch* knows its classes apart: else one folded model stands for all of them. `whole`: the cut model is of
    another size, so all of its weights learn.
    """

    full: Checkpoint
    cut: Checkpoint
    kept: tuple[int, ...]
    form: Form
    rows: Rows
    guidance: float
    null_branch: bool
    seed: int = 0
    whole: bool = False

    def labels(self, kept_index: Tensor) -> tuple[Tensor, Tensor]:
        """Class indices [B] of the cut and of the full model, of images whose class is the `kept_index`-th kept one."""
        own = kept_index if self.form == "switch" else torch.full_like(kept_index, len(self.kept))
        return own, torch.tensor(self.kept)[kept_index]

    def null_labels(self, count: int) -> tuple[Tensor, Tensor]:
        nulls = (self.cut.spec.num_classes, self.full.spec.num_classes)
        return torch.full((count,), nulls[0]), torch.full((count,), nulls[1])


@dataclass(frozen=True)
class HealingProgress:
    """`seconds` of `total_s` are over, `loss` is the mean over about the last fifty steps."""

    seconds: float
    total_s: float
    step: int
    loss: float


@dataclass(frozen=True)
class Healed:
    checkpoint: Checkpoint
    seconds: float
    steps: int


@dataclass
class Pool:
    """Images on their way: states and the d before [B, ch, H, W], the row of the sampler and the kept class [B].

    `classes`: how many there are to begin anew as, however few the pool holds at a time.
    """

    x: Tensor
    before: Tensor
    row: Tensor
    kept_index: Tensor
    classes: int
    generator: torch.Generator

    @classmethod
    def of(cls, lesson: Lesson, count: int, seed: int) -> Pool:
        spec, generator = lesson.cut.spec, torch.Generator().manual_seed(seed)
        x = torch.randn(count, spec.channels, spec.image_size, spec.image_size, generator=generator)
        row = torch.zeros(count, dtype=torch.long)
        classes = len(lesson.kept)
        kept_index = torch.randperm(max(count, classes), generator=generator)[:count] % classes
        return cls(x, torch.zeros_like(x), row, kept_index, classes, generator)

    def advance(self, rows: Rows, prediction: Tensor, moving: Tensor | None = None) -> None:
        """One row on for all (or for those `moving` [B]); who has arrived begins anew, as another class."""
        p, q, a, b, c = (column[self.row].view(-1, 1, 1, 1) for column in rows[1:])
        d = p * self.x + q * prediction[:, : self.x.shape[1]]
        x, row = a * self.x + b * d + c * self.before, self.row + 1
        arrived = row == len(rows.timestep)
        fresh = torch.randn(x.shape, generator=self.generator)
        other = torch.randint(self.classes, row.shape, generator=self.generator)
        wide = arrived.view(-1, 1, 1, 1)
        x, d, row = torch.where(wide, fresh, x), torch.where(wide, 0.0, d), torch.where(arrived, 0, row)
        moving = torch.ones_like(arrived) if moving is None else moving
        wide = moving.view(-1, 1, 1, 1)
        self.x, self.before = torch.where(wide, x, self.x), torch.where(wide, d, self.before)
        self.row = torch.where(moving, row, self.row)
        self.kept_index = torch.where(moving & arrived, other, self.kept_index)


class Both(NamedTuple):
    """Predictions of one model [B, ch_out, H, W]: of the class, of none where there is a null branch, and guided."""

    led: Tensor
    free: Tensor | None
    guided: Tensor


def predict(lesson: Lesson, model: DiT, pool: Pool, full: bool) -> Both:
    """What a model (the `full` one, or the cut one) says of a pool."""
    timestep = lesson.rows.timestep[pool.row].float()
    span = step_span(lesson.full.spec, len(lesson.rows.timestep), timestep)
    led = model(pool.x, timestep, lesson.labels(pool.kept_index)[full], span)
    if not lesson.null_branch:
        return Both(led, None, led)
    free = model(pool.x, timestep, lesson.null_labels(len(pool.x))[full], span)
    return Both(led, free, free + lesson.guidance * (led - free))


def heal(
    lesson: Lesson,
    seconds: float,
    state: Path,
    key: str,
    on_progress: Callable[[HealingProgress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Healed:
    """The cut checkpoint after `seconds` of learning, those before an interruption among them.

    `state` is a file in which progress is kept; one with another `key` is of another cut and begins anew. Ctrl-C and
    SIGTERM end the run after the present step, saved, with a `KeyboardInterrupt`. Raises `InputError` for a state that
    cannot be read. `clock` says what counts as time, in seconds.
    """
    teacher = lesson.full.model()
    student = rescaled(lesson.cut).model()
    learning = learned(student, lesson.whole)
    optimizer = torch.optim.Adam(learning.values(), lr=RATE, betas=BETAS, fused=True)
    spent, step = _load(state, key, learning, optimizer)
    pool = _pool(lesson, teacher, step)
    loss, began, saved, saving_s, before = math.nan, clock(), time.monotonic(), 0.0, spent
    with stop_requests() as stop:
        while spent < seconds:
            _set_rate(optimizer, min(1.0, (step + 1) / WARMUP_STEPS), spent / seconds)
            now = _step(lesson, teacher, student, pool, optimizer, list(learning.values()))
            if not math.isfinite(now):
                break  # what was learned before is judged like any other result
            step, loss = step + 1, now if math.isnan(loss) else loss + 0.02 * (now - loss)
            spent = before + clock() - began
            on_progress(HealingProgress(min(spent, seconds), seconds, step, loss))
            if stop.is_set() or time.monotonic() - saved > max(SAVE_EVERY_S, saving_s / SAVING_SHARE):
                starts = time.monotonic()
                _save(state, key, spent, step, learning, optimizer)
                saved = time.monotonic()
                saving_s = saved - starts
            if stop.is_set():
                raise KeyboardInterrupt
    _save(state, key, spent, step, learning, optimizer)
    tensors = {**lesson.cut.tensors, **{name: p.detach().clone() for name, p in learning.items()}}
    provenance = {**lesson.cut.provenance, "healed": {"seconds": round(spent, 1), "steps": step}}
    return Healed(Checkpoint(lesson.cut.spec, lesson.cut.class_names, tensors, provenance), spent, step)


def learned(student: DiT, whole: bool) -> dict[str, torch.nn.Parameter]:
    """What healing changes, made to require its gradient: factors and biases of the block matrices, or all there is."""
    layers = [name for name, module in student.named_modules() if isinstance(module, GatedLinear)]
    factored = tuple(f"{name}." for name in [*layers, SHARED])
    found = {name: p for name, p in student.named_parameters() if p.numel() and (whole or name.startswith(factored))}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def rescaled(checkpoint: Checkpoint) -> Checkpoint:
    """The same function with V's columns of length 1, and their length in s: an optimizer wants one scale in a tensor.

    Whitened factors come with columns of very different lengths.
    """
    spec, old = checkpoint.spec, checkpoint.float_tensors()
    tensors = dict(old)
    for shape in spec.matrices():
        learngene = spec.factor_name(shape.name, "s"), spec.factor_name(shape.name, "V")
        for s, v in (learngene, (f"{shape.name}.tailors.s", f"{shape.name}.tailors.V")):
            length = old[v].norm(dim=-2).clamp_min(1e-12)
            tensors[v], tensors[s] = old[v] / length.unsqueeze(-2), old[s] * length
    return Checkpoint(checkpoint.spec, checkpoint.class_names, tensors, checkpoint.provenance)


def _step(
    lesson: Lesson,
    teacher: DiT,
    student: DiT,
    pool: Pool,
    optimizer: torch.optim.Optimizer,
    learning: list[torch.nn.Parameter],
) -> float:
    """One optimizer step; the loss is a plain mean over images, branches and values.

    NaN, and nothing is changed, where loss or gradient is no number.
    """
    with torch.no_grad():
        wanted = predict(lesson, teacher, pool, full=True)
    got = predict(lesson, student, pool, full=False)
    loss = (got.led - wanted.led).square().mean()
    if got.free is not None and wanted.free is not None:
        loss = (loss + (got.free - wanted.free).square().mean()) / 2
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(learning, LONGEST_GRADIENT)
    if not math.isfinite(float(norm) + float(loss.detach())):
        return math.nan
    optimizer.step()
    pool.advance(lesson.rows, got.guided.detach())
    return float(loss.detach())


def _set_rate(optimizer: torch.optim.Optimizer, warm: float, share: float) -> None:
    """A cosine over the time, to zero at its end."""
    for group in optimizer.param_groups:
        group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@torch.no_grad()
def _pool(lesson: Lesson, teacher: DiT, step: int) -> Pool:
    """A pool that stands at all rows alike: the full model has drawn its images up to there."""
    pool, count = Pool.of(lesson, POOL, lesson.seed + step), len(lesson.rows.timestep)
    goal = torch.randperm(POOL, generator=pool.generator) * count // POOL
    for _ in range(count - 1):
        pool.advance(lesson.rows, predict(lesson, teacher, pool, full=True).guided, moving=pool.row < goal)
    return pool


@torch.no_grad()
def walk_deviation(lesson: Lesson, cut: Checkpoint) -> float:
    """How far `cut` is from the full model on states that the full one comes to, as a share of its predictions' energy.

    Over other walks than those that are learned from; of class and null branch alike.
    """
    teacher, model = lesson.full.model(), cut.model()
    pool = Pool.of(lesson, JUDGED_WALKS, lesson.seed + 2**32)
    energy = difference = 0.0
    for _ in range(len(lesson.rows.timestep)):
        wanted, got = predict(lesson, teacher, pool, full=True), predict(lesson, model, pool, full=False)
        for a, b in ((wanted.led, got.led), (wanted.free, got.free)):
            if a is not None and b is not None:
                energy += float(a.double().square().sum())
                difference += float((a - b).double().square().sum())
        pool.advance(lesson.rows, wanted.guided)
    return difference / energy


def _save(
    path: Path,
    key: str,
    seconds: float,
    step: int,
    learning: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in partial_files(path):  # by a process that was killed; a healing has one writer
        left.unlink()
    tensors = {name: parameter.detach() for name, parameter in learning.items()}
    for name, parameter in learning.items():
        moments = optimizer.state.get(parameter, {})  # none before the first step
        tensors |= {f"{moment}:{name}": moments[moment] for moment in _MOMENTS if moment in moments}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"key": key, "seconds": repr(seconds), "step": str(step)})


def _load(
    path: Path, key: str, learning: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[float, int]:
    """Seconds and steps that are over: put into `learning` and `optimizer` what they made; nothing of another cut."""
    if not path.exists():
        return 0.0, 0
    try:
        said = read_metadata(path)
        if said.get("key") != key:
            return 0.0, 0
        stored, seconds, step = read_tensors(path), float(said["seconds"]), int(said["step"])
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(stored[name])
                if step:
                    moments = {moment: stored[f"{moment}:{name}"].clone() for moment in _MOMENTS}
                    optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    except (InputError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: cannot go on from this state of healing ({error}); remove it to begin anew"
        ) from error
    return seconds, step
