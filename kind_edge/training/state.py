"""What changes during a run: weights, averages, optimizer and step. Everything random is a function of (seed, step)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import partial_files, read_metadata, read_tensors, write_tensors
from kind_edge.model.dit import DiT, initialise
from kind_edge.training.batches import part_layout
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData
from kind_edge.training.distributed import Alone, Processes, local, shared_as, whole
from kind_edge.training.tailors import BETAS, Slots, Tailors, decay_at

STATE = "state.safetensors"
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_OF_DATA = ("class_names", "data_sha256")


@dataclass
class TrainState:
    """The model's own parameters (learngene and what is dense), the tailors, and how far the run is.

    Parameters of the model that require no gradient are frozen: no step and no file has anything to do with them.
    """

    model: DiT
    """Its layers hold the tailors of the current batch alone, in `slots`."""
    network: nn.Module
    """The model as it is called: the same, or wrapped for several processes."""
    processes: Processes
    slots: Slots
    tailors: Tailors
    average: dict[str, Tensor]
    """EMA of the model's own parameters."""
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    """Time spent training, over all sessions of the run."""
    loss: float = math.nan
    """Mean over about the last hundred steps."""
    saved: str = ""
    """Which step of the run lies in its file, in words; nothing before the first save."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name: all but tailors and what is frozen."""
        return own_parameters(self.model, self.tailors)


def own_parameters(model: DiT, tailors: Tailors) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in tailors.layout.shapes}


def start(config: TrainConfig, processes: Processes | None = None) -> TrainState:
    """A fresh run, on this process's CPU unless told otherwise."""
    return start_from(config, initialise(DiT(config.spec), config.seed), processes)


def start_from(config: TrainConfig, model: DiT, processes: Processes | None = None) -> TrainState:
    """A run that begins with these weights. The model becomes the run's own."""
    processes = processes or Alone(torch.device("cpu"))
    model = model.to(processes.device)
    tailors = Tailors.of(model)
    size, group = part_layout(config.spec.num_classes, config.batch_size, processes.count * config.accumulation)
    slots = tailors.lend(model, size // group)
    if config.compile:
        for block in model.blocks:
            block.compile()
    network = processes.wrap(model, slots)
    own = own_parameters(model, tailors)
    decay = [p for name, p in own.items() if not name.endswith("bias")]
    rest = [p for name, p in own.items() if name.endswith("bias")]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)
    average = {name: p.detach().clone() for name, p in own.items()}
    return TrainState(model, network, processes, slots, tailors, average, optimizer)


@torch.no_grad()
def follow(config: TrainConfig, state: TrainState) -> None:
    """Move the average of the model's own parameters towards their present values."""
    weights = [local(parameter.detach()) for parameter in state.parameters().values()]
    if weights:  # there are none where all but the tailors is frozen
        average = [local(tensor) for tensor in state.average.values()]
        torch._foreach_lerp_(average, weights, 1 - decay_at(config.ema_decay, state.step))


def averaged_tensors(config: TrainConfig, state: TrainState) -> dict[str, Tensor]:
    """The averaged weights under the names of a checkpoint, on the CPU; what is frozen is not among them.

    Every process has to ask for them.
    """
    rows = state.tailors.current_average(state.step, config.ema_decay)
    tensors = {"pos_embed": state.model.pos_embed, **state.average, **dict(state.tailors.layout.views(rows))}
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def data_choices(data: TrainingData) -> dict[str, object]:
    """What a run learns from, as part of the `choices` of its state: other data, or other labels, are another run."""
    return dict(zip(_OF_DATA, (list(data.class_names), data.sha256), strict=True))


def save_state(
    folder: Path,
    config: TrainConfig,
    state: TrainState,
    choices: Mapping[str, object] | None = None,
    whole: TrainConfig | None = None,
) -> None:
    """Write everything that `load_state` needs into one file, by renaming a finished one into place.

    Every process calls this, the first one writes. `choices`: what else than the configuration makes the run what it
    is, as JSON. `whole`: the configuration of the run of which this is the second stage.

    Raises:
        UsageError: the disk has no room for it; the file of an earlier save is still whole.
    """
    tensors = _tensors(state)
    if state.processes.rank == 0:
        for left in partial_files(folder / STATE):  # by a process that was killed; a run has one writer
            left.unlink()
        numbers = {"step": state.step, "seconds": state.seconds, "loss": state.loss}
        metadata = {key: repr(value) for key, value in numbers.items()}
        metadata |= {"stage": "second" if whole else "first", "config": json.dumps(_identity(whole or config, choices))}
        write_tensors(folder / STATE, tensors, metadata)
    state.processes.wait()
    state.saved = f"step {state.step}"


def _identity(config: TrainConfig, choices: Mapping[str, object] | None) -> dict[str, object]:
    return {**config.to_dict(), **({} if choices is None else {"choices": dict(choices)})}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.parameters().items():
        tensors |= {f"model.{name}": parameter, f"average.{name}": state.average[name]}
        moments = state.optimizer.state.get(parameter, {})  # none before the first step
        tensors |= {f"adam.{key}.{name}": moments[key] for key in _ADAM if key in moments}
    tensors |= {f"tailors.{name}": tensor for name, tensor in state.tailors.tensors().items()}
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def load_state(
    folder: Path,
    config: TrainConfig,
    processes: Processes | None = None,
    model: DiT | None = None,
    choices: Mapping[str, object] | None = None,
    whole: TrainConfig | None = None,
) -> TrainState:
    """The state of an interrupted run.

    `model` holds what was frozen in it, on the device (default: nothing was), and becomes the run's own; `choices` and
    `whole` are those of `save_state`.

    Raises:
        UsageError: there is none, or it is of a run with another configuration, other choices or other data.
        InputError: the file is corrupt.
    """
    path = folder / STATE
    numbers = check_state(folder, config, choices, whole)
    try:
        progress = int(numbers["step"]), float(numbers["seconds"]), float(numbers["loss"])
    except (KeyError, ValueError) as error:
        raise _strange(path, error) from error
    tensors = read_tensors(path)
    state = start_from(config, DiT(config.spec) if model is None else model, processes)
    _check(tensors, state, path)
    with torch.no_grad():
        for name, parameter in state.parameters().items():
            parameter.copy_(shared_as(tensors[f"model.{name}"], parameter))
            state.average[name].copy_(shared_as(tensors[f"average.{name}"], parameter))
            moments = {key: tensors[k] for key in _ADAM if (k := f"adam.{key}.{name}") in tensors}
            if moments:
                state.optimizer.state[parameter] = {
                    key: value.to(parameter.device) if value.ndim == 0 else shared_as(value, parameter)
                    for key, value in moments.items()
                }
        for name, tensor in state.tailors.tensors().items():
            tensor.copy_(tensors[f"tailors.{name}"])
    state.step, state.seconds, state.loss = progress
    state.saved = f"step {state.step}"
    return state


def check_state(
    folder: Path,
    config: TrainConfig,
    choices: Mapping[str, object] | None = None,
    whole: TrainConfig | None = None,
) -> dict[str, str]:
    """Refuse what `load_state` would refuse, as far as the head of the file tells; its metadata.

    Without `data_choices` the data are not compared, so that this can come before they are opened.
    """
    path = folder / STATE
    if not path.exists():
        raise UsageError(f"--resume: {folder} holds no run to continue ({STATE} is missing)")
    metadata = read_metadata(path)
    try:
        stored = json.loads(metadata["config"])
        # A second stage that was saved before 'stage' was noted has its own configuration in the place of the run's.
        asked = whole if whole is not None and "stage" in metadata else config
        _check_same_run(folder, stored, _identity(asked, choices))
    except (KeyError, ValueError, AttributeError) as error:
        raise _strange(path, error) from error
    return metadata


def notes_its_data(metadata: Mapping[str, str]) -> bool:
    """Whether a state tells what it was learned from; those of earlier versions did not."""
    return set(_OF_DATA) <= set(json.loads(metadata["config"]).get("choices", {}))


def in_second_stage(folder: Path) -> bool:
    """Whether the state in a folder is of a run's second stage (a file that cannot be read is left to `load_state`)."""
    try:
        metadata = read_metadata(folder / STATE)
        stage = metadata.get("stage")
        return stage == "second" if stage else bool(json.loads(metadata["config"])["model"]["nested"])
    except (InputError, KeyError, ValueError, TypeError):
        return False


def _strange(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not the state of a run, or of another version ({error!r}); start again")


def _check_same_run(folder: Path, stored: dict[str, object], wanted: dict[str, object]) -> None:
    """Refuse to continue another run, naming what differs. What either does not know of its data is not compared."""

    def flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
        pairs: dict[str, object] = {}
        for key, value in values.items():
            name = "" if key == "choices" else f"{prefix}{key}."
            pairs |= flat(value, name) if isinstance(value, dict) else {prefix + key: value}
        return pairs

    was, now = flat(stored), flat(json.loads(json.dumps(wanted)))
    unknown = {key for key in _OF_DATA if key not in was or key not in now}
    different = [key for key in sorted((was.keys() | now.keys()) - unknown) if was.get(key) != now.get(key)]
    if different:
        listed = "; ".join(_difference(key, was.get(key), now.get(key)) for key in different[:5])
        more = f" (and {len(different) - 5} more)" if len(different) > 5 else ""
        raise UsageError(
            f"--resume: the run in {folder} was started otherwise: {listed}{more}; "
            "give what it was started with, or another -o"
        )


def _difference(key: str, was: object, now: object) -> str:
    """Of lists of one length, their first difference."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        place = next(index for index, pair in enumerate(zip(was, now, strict=True)) if pair[0] != pair[1])
        return _difference(f"{key}[{place}]", was[place], now[place])
    return f"{key} was {was!r}, now {now!r}"


def _check(tensors: dict[str, Tensor], state: TrainState, path: Path) -> None:
    """Refuse a file whose tensors are not those of the configuration that it names."""
    wanted = {name: tensor.shape for name, tensor in _tensors(state).items()}
    faults = [f"{name}: missing, want {tuple(shape)}" for name, shape in wanted.items() if name not in tensors]
    faults += [
        f"{name}: file has {tuple(tensors[name].shape)}, model wants {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InputError(f"{path}: tensors do not match the configuration: {'; '.join(faults[:3])}{more}")
