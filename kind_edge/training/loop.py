"""The training loop: AdamW, EMA, warm-up and cosine, clipping, and a resume that continues bit for bit on a CPU.

Everything random is a function of (seed, step), so a run's state is its weights, its optimizer and its step.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kind_edge.errors import GateError
from kind_edge.model.diffusion import draw_timesteps
from kind_edge.model.gated_linear import ClassGate
from kind_edge.training.batches import Batch, ClassBatches, generator, part_layout
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData
from kind_edge.training.distributed import Processes, local, whole
from kind_edge.training.losses import DiffusionLoss, Examples, Loss
from kind_edge.training.spectral import spectral_penalty
from kind_edge.training.state import TrainState, follow

FIRST_SAVE_S = 10.0
"""Early, because it tells whether there is room for the state, and how long saving takes."""
SAVE_EVERY_S = 120.0
SAVE_SHARE = 0.05
"""Of the run's time that saving takes, at most: where a state is so large that writing it takes long, it is rarer."""
EXPLODED = 100.0
"""A loss above this has diverged: a network that predicts zero scores 1 to 2, whatever the objective."""


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    loss: float
    images_per_s: float
    left_s: float


def learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@dataclass(frozen=True)
class Noised:
    """What a step does to its images: noise [B, ch, H, W], timesteps [B], and which gates it closes [B]."""

    noise: Tensor
    timestep: Tensor
    closed: Tensor

    @classmethod
    def draw(cls, config: TrainConfig, step: int, shape: tuple[int, ...]) -> Noised:
        stream = generator(config.seed, step, 0)
        noise = torch.randn(shape, generator=stream)
        timestep = draw_timesteps(config.spec.objective, shape[0], stream)
        return cls(noise, timestep, torch.rand(shape[0], generator=stream) < config.null_share)


def train_step(
    config: TrainConfig, state: TrainState, data: TrainingData, batches: ClassBatches, loss_of: Loss | None = None
) -> float:
    """One optimizer step; returns the loss, by default the ordinary one.

    Raises `GateError` where the loss or its gradient is no number or has exploded: before anything is updated.
    """
    batch = batches(state.step)
    noised = Noised.draw(config, state.step, (len(batch.images), *data.shape))
    touched, row_of_image = batch.labels.unique(return_inverse=True)
    state.optimizer.zero_grad(set_to_none=True)
    gradient = torch.zeros(len(touched), state.tailors.layout.values, device=state.processes.device)
    loss = torch.zeros(1, device=state.processes.device)
    for part in parts_of(config, state.processes):
        heads = part.first_of_groups
        state.tailors.fill(state.slots, batch.labels[heads])
        with state.processes.last(state.network, part.last):
            share = part_loss(config, state, data, batch, noised, part.images, loss_of) / config.accumulation
            _penalised(config, state, share).backward()
        loss += share.detach()
        state.tailors.collect(state.slots, row_of_image[heads], gradient)
    state.processes.mean_(gradient)
    state.processes.mean_(loss)
    norm = clip(state, gradient, config.gradient_clip)
    _refuse_divergence(state, float(loss), float(norm))
    rate = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.tailors.update(touched, gradient, state.step, rate, config.weight_decay, config.ema_decay)
    follow(config, state)
    state.step += 1
    return float(loss)


@dataclass(frozen=True)
class Part:
    """What one process does of a batch in one go."""

    images: slice
    first_of_groups: slice
    last: bool


def parts_of(config: TrainConfig, processes: Processes) -> Iterator[Part]:
    """This process's share of a batch, in as many parts as accumulation asks for.

    The batch is sorted by class and cut where it stands, so that a part has few classes.
    """
    size, group = part_layout(config.spec.num_classes, config.batch_size, processes.count * config.accumulation)
    first = processes.rank * config.accumulation
    for number in range(first, first + config.accumulation):
        low, high = number * size, (number + 1) * size
        yield Part(slice(low, high), slice(low, high, group), number == first + config.accumulation - 1)


def part_loss(
    config: TrainConfig,
    state: TrainState,
    data: TrainingData,
    batch: Batch,
    noised: Noised,
    part: slice,
    loss_of: Loss | None = None,
) -> Tensor:
    """The mean loss of a part of the batch, whose tailors lie in the slots."""
    device = state.processes.device
    drawn = (batch.labels, noised.noise, noised.timestep, noised.closed)
    examples = Examples(data.batch(batch.images[part]).to(device), *(tensor[part].to(device) for tensor in drawn))

    def predict(sample: Tensor, timestep: Tensor, *, share: float = 1.0, span: Tensor | None = None) -> Tensor:
        gate = ClassGate.gathered(examples.labels, examples.closed, config.spec.num_classes, share)
        # Every other size of the learngene would be compiled anew.
        stance = torch.compiler.set_stance("force_eager") if share < 1 else contextlib.nullcontext()
        with stance, torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            prediction: Tensor = state.network(sample, timestep, gate, span)
        return prediction.float()

    return (loss_of or DiffusionLoss(config.spec.objective))(predict, examples, state.step)


def _penalised(config: TrainConfig, state: TrainState, share: Tensor) -> Tensor:
    """A part's share of the loss, and of the penalty on its weights, if there is one."""
    if not config.spectral_penalty:
        return share
    return share + config.spectral_penalty / config.accumulation * spectral_penalty(state.model)


def clip(state: TrainState, tailor_gradient: Tensor, longest: float) -> Tensor:
    """Scale the gradient of everything that a step updates, as one vector, to this length at most; its length."""
    own = [p.grad for p in state.parameters().values() if p.grad is not None]
    norm = torch.hypot(whole(torch.nn.utils.get_total_norm(own)), tailor_gradient.norm())
    scale = (longest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*map(local, own), tailor_gradient], scale)
    return norm


def _refuse_divergence(state: TrainState, loss: float, norm: float) -> None:
    if math.isfinite(norm) and loss < EXPLODED:  # false for NaN, too
        return
    what = "gradient" if loss < EXPLODED else "loss"
    kept = f"{state.saved} is saved and still good" if state.saved else "nothing has been saved yet"
    raise GateError(
        f"the {what} became {norm if what == 'gradient' else loss:.3g} at step {state.step + 1}; {kept}; look at the "
        "images, or lower the learning rate and start again with another -o"
    )


def run(
    config: TrainConfig,
    state: TrainState,
    data: TrainingData,
    save: Callable[[TrainState], None],
    report: Callable[[Progress], None],
    loss_of: Loss | None = None,
) -> TrainState:
    """Train to the configured number of images, on the ordinary loss unless another is given.

    Saves after ten seconds, then every two minutes (more rarely where saving takes long), at the end, and when
    interrupted: Ctrl-C and a scheduler's SIGTERM end the run after the
    present step, saved, with a `KeyboardInterrupt`; a second one ends it at once, and what was saved before stands.
    Only the first of several processes reports.
    """
    batches = ClassBatches(data.labels.cpu(), config.spec.num_classes, config.batch_size, config.seed)
    began, first, seconds_before = time.monotonic(), state.step, state.seconds
    next_save = began + min(FIRST_SAVE_S, SAVE_EVERY_S)
    with stop_requests() as stop:
        while state.step < config.steps:
            loss = train_step(config, state, data, batches, loss_of)
            state.loss = loss if math.isnan(state.loss) else state.loss + 0.01 * (loss - state.loss)
            elapsed = time.monotonic() - began
            state.seconds = seconds_before + elapsed
            per_step = elapsed / (state.step - first)
            left_s = per_step * (config.steps - state.step)
            if state.processes.rank == 0:
                report(Progress(state.step, config.steps, state.loss, config.batch_size / per_step, left_s))
            stopping, due = _agree(state.processes, stop.is_set(), time.monotonic() > next_save)
            if stopping or due:
                next_save = _timed(save, state)
            if stopping:
                raise KeyboardInterrupt
    save(state)
    return state


def _timed(save: Callable[[TrainState], None], state: TrainState) -> float:
    """Save; when the next time is."""
    began = time.monotonic()
    save(state)
    ended = time.monotonic()
    return ended + max(SAVE_EVERY_S, (ended - began) / SAVE_SHARE)


def _agree(processes: Processes, *wishes: bool) -> list[bool]:
    """What any process wishes, all do: they save and stop after the same step."""
    return [wish > 0 for wish in processes.mean_(torch.tensor(wishes, device=processes.device).float()).tolist()]


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second one is a `KeyboardInterrupt`."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
