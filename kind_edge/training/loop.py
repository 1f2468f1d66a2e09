"""The training loop: AdamW, EMA, warm-up and cosine, clipping, and a resume that continues bit for bit on a CPU.

Everything random is a function of (seed, step), so a run's state is its weights, its optimizer and its step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import check_tensors, read_metadata, read_tensors, write_tensors
from kind_edge.model.diffusion import draw_timesteps, loss_per_image
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import ClassGate
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData

STATE = "state.safetensors"
SAVE_EVERY_S = 120.0
_ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    loss: float
    images_per_s: float
    left_s: float


@dataclass
class TrainState:
    """All that changes during a run. `seconds` is the time spent training, over all its sessions."""

    model: DiT
    ema: DiT
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Mean over about the last hundred steps."""


class ClassBatches:
    """Batches sorted into equal groups by class; every class is gone through in a new random order each epoch."""

    def __init__(self, labels: Tensor, num_classes: int, batch_size: int, seed: int) -> None:
        self.members = [(labels == c).nonzero().flatten() for c in range(num_classes)]
        empty = [c for c, members in enumerate(self.members) if len(members) == 0]
        if empty:
            raise InputError(f"no training image has class {empty[0]}; every class of the model needs some")
        self.group_count = min(num_classes, batch_size)
        self.group_size = batch_size // self.group_count
        self.seed = seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The classes [G] of a step's batch and the images [G*M] of their groups."""
        classes = torch.arange(len(self.members))
        if self.group_count < len(self.members):
            order = torch.randperm(len(self.members), generator=_generator(self.seed, step, 1))
            classes = order[: self.group_count].sort().values
        return classes, torch.cat([self._draw(int(c), step) for c in classes])

    def _draw(self, c: int, step: int) -> Tensor:
        members = self.members[c]
        per_epoch = max(1, len(members) // self.group_size)
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(members), generator=_generator(self.seed, epoch, 2 + c))
        wanted = torch.arange(position * self.group_size, (position + 1) * self.group_size) % len(members)
        return members[order[wanted]]


def _generator(seed: int, *path: int) -> torch.Generator:
    """An independent stream for every (seed, path): a splitmix-style fold into 63 bits."""
    value = seed
    for part in path:
        value = ((value ^ part) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & (2**63 - 1)
        value ^= value >> 29
    return torch.Generator().manual_seed(value)


def start(config: TrainConfig, device: torch.device) -> TrainState:
    model = initialise(DiT(config.spec), config.seed).to(device)
    ema = DiT(config.spec).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    decay = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    rest = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return TrainState(model, ema, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True))


def learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def train_step(config: TrainConfig, state: TrainState, data: TrainingData, batches: ClassBatches) -> Tensor:
    """One optimizer step; returns the loss."""
    device = next(state.model.parameters()).device
    generator = _generator(config.seed, state.step, 0)
    classes, chosen = batches(state.step)
    x = data.batch(chosen).to(device)
    noise = torch.randn(x.shape, generator=generator).to(device)
    timestep = draw_timesteps(config.spec.objective, len(x), generator).to(device)
    closed = torch.rand(len(x), generator=generator) < config.null_share
    gate = ClassGate.grouped(classes.to(device), closed.to(device), config.spec.num_classes)
    loss = loss_per_image(
        config.spec.objective, lambda noised, t: state.model(noised, t, gate), x, noise, timestep
    ).mean()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    state.optimizer.step()
    decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
    with torch.no_grad():  # or the average would keep the graph of every step since the first
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)
    state.step += 1
    return loss.detach()


def run(
    config: TrainConfig,
    state: TrainState,
    data: TrainingData,
    save: Callable[[TrainState], None],
    report: Callable[[Progress], None],
) -> TrainState:
    """Train to the configured number of images; saves every two minutes, at the end, and when interrupted."""
    batches = ClassBatches(data.labels, config.spec.num_classes, config.batch_size, config.seed)
    began, first, saved = time.monotonic(), state.step, time.monotonic()
    seconds_before = state.seconds
    try:
        while state.step < config.steps:
            loss = float(train_step(config, state, data, batches))
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss became {loss} at step {state.step}; lower the learning rate and start again"
                )
            state.loss = loss if math.isnan(state.loss) else state.loss + 0.01 * (loss - state.loss)
            elapsed = time.monotonic() - began
            state.seconds = seconds_before + elapsed
            per_step = elapsed / (state.step - first)
            left_s = per_step * (config.steps - state.step)
            report(Progress(state.step, config.steps, state.loss, config.batch_size / per_step, left_s))
            if time.monotonic() - saved > SAVE_EVERY_S:
                save(state)
                saved = time.monotonic()
    except KeyboardInterrupt:
        save(state)
        raise
    save(state)
    return state


def save_state(folder: Path, state: TrainState) -> None:
    """Write everything that `load_state` needs into one file, by renaming a finished one into place."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in state.ema.state_dict().items()}
    for parameter, moments in state.optimizer.state.items():
        tensors |= {f"adam.{key}.{names[id(parameter)]}": value for key, value in moments.items()}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    numbers = {"step": state.step, "seconds": state.seconds, "loss": state.loss}
    write_tensors(folder / STATE, tensors, {key: repr(value) for key, value in numbers.items()})


def load_state(folder: Path, config: TrainConfig, device: torch.device) -> TrainState:
    """The state of an interrupted run; a state of another model is refused."""
    path = folder / STATE
    if not path.exists():
        raise UsageError(f"--resume: {folder} holds no run to continue ({STATE} is missing)")
    tensors, numbers = read_tensors(path), read_metadata(path)
    state = start(config, device)
    for prefix, model in (("model.", state.model), ("ema.", state.ema)):
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        check_tensors(config.spec, {name: tuple(t.shape) for name, t in own.items()}, str(path))
        model.load_state_dict(own)
    for name, parameter in state.model.named_parameters():
        moments = {key: tensors[k] for key in _ADAM if (k := f"adam.{key}.{name}") in tensors}
        if len(moments) == len(_ADAM):  # none before the first step
            state.optimizer.state[parameter] = {key: value.to(device) for key, value in moments.items()}
    state.step, state.seconds, state.loss = int(numbers["step"]), float(numbers["seconds"]), float(numbers["loss"])
    return state
