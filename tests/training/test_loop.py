"""The loop learns, resumes bit for bit, keeps its schedule, and never leaves half a state file."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import kind_edge.model.checkpoint as checkpoint_module
from kind_edge.errors import GateError, InputError, UsageError
from kind_edge.model.checkpoint import read_metadata, read_tensors, write_tensors
from kind_edge.model.spec import ModelSpec
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import in_memory
from kind_edge.training.loop import Progress, learning_rate, run, train_step
from kind_edge.training.state import STATE, TrainState, load_state, save_state, start

SPEC = ModelSpec(8, 1, 4, 16, 1, 2, 3, learngene_rank=4, tailor_rank=2)
CONFIG = TrainConfig(SPEC, images=6 * 12, batch_size=12, warmup_steps=2, ema_decay=0.9, null_share=0.2)
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(36) % 3
# Each class has a brightness of its own, so there is something to learn.
IMAGES = (torch.randint(40, (36, 1, 8, 8), generator=GENERATOR) + 100 * LABELS.view(-1, 1, 1, 1)).to(torch.uint8)
DATA = in_memory(IMAGES.numpy(), LABELS, ("a", "b", "c"), "0")


def train_on(config: TrainConfig, state: TrainState, steps: int | None = None) -> list[float]:
    batches = ClassBatches(LABELS, 3, config.batch_size, config.seed)
    count = config.steps - state.step if steps is None else steps
    return [train_step(config, state, DATA, batches) for _ in range(count)]


def everything(config: TrainConfig, state: TrainState, folder: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and both moments of every parameter, by name."""
    folder.mkdir(exist_ok=True)
    save_state(folder, config, state)
    return load_file(folder / STATE)


def test_the_loss_falls() -> None:
    config = dataclasses.replace(CONFIG, images=12 * 150, learning_rate=5e-3, warmup_steps=5)
    losses = train_on(config, start(config))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_a_resumed_run_is_the_same_run(objective: str, tmp_path: Path) -> None:
    sigma = {"objective": objective, "learned_sigma": objective == "epsilon", "label_embedding": objective == "epsilon"}
    config = dataclasses.replace(CONFIG, spec=dataclasses.replace(SPEC, **sigma))
    whole = start(config)
    losses = train_on(config, whole)
    first = start(config)
    before = train_on(config, first, 3)
    save_state(tmp_path, config, first)
    second = load_state(tmp_path, config)
    assert second.step == 3
    assert before + train_on(config, second) == losses
    wanted, got = everything(config, whole, tmp_path / "whole"), everything(config, second, tmp_path / "resumed")
    assert set(wanted) == set(got)
    assert any(name.startswith("adam.exp_avg_sq.") for name in wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name


def test_only_the_seed_decides(tmp_path: Path) -> None:
    a, b, other = (start(dataclasses.replace(CONFIG, seed=seed)) for seed in (3, 3, 4))
    seed3, seed4 = dataclasses.replace(CONFIG, seed=3), dataclasses.replace(CONFIG, seed=4)
    torch.manual_seed(111)
    losses = train_on(seed3, a)
    torch.manual_seed(222)
    assert train_on(seed3, b) == losses
    assert train_on(seed4, other) != losses


def test_run_saves_at_the_end_and_reports_every_step(tmp_path: Path) -> None:
    reports: list[Progress] = []
    state = run(CONFIG, start(CONFIG), DATA, lambda s: save_state(tmp_path, CONFIG, s), reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].left_s == 0
    assert state.loss == reports[-1].loss
    again = load_state(tmp_path, CONFIG)
    assert (again.step, again.seconds, again.loss) == (6, state.seconds, state.loss)


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs, saved = [0.0], iter((2.0, 10.0, 0.0)), list[float]()  # seconds; the last save is the one at the end

    def save(_: TrainState) -> None:
        saved.append(now[0])
        now[0] += next(costs)

    def step(config: TrainConfig, state: TrainState, *_: object) -> float:
        state.step, now[0] = state.step + 1, now[0] + 1
        return 0.0

    monkeypatch.setattr("kind_edge.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("kind_edge.training.loop.train_step", step)
    run(dataclasses.replace(CONFIG, images=12 * 330), start(CONFIG), DATA, save, lambda _: None)
    assert saved[:2] == [11, 11 + 2 + 121]  # the first soon, the next after two minutes,
    assert saved[2:] == [342]  # and the one after ten seconds' saving not within 200: here at the end


def test_an_interrupted_run_saves_and_goes_on(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    whole = start(CONFIG)
    train_on(CONFIG, whole)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, start(CONFIG), DATA, lambda s: save_state(tmp_path, CONFIG, s), interrupt)
    second = load_state(tmp_path, CONFIG)
    assert second.step == 4
    run(CONFIG, second, DATA, lambda _: None, lambda _: None)
    wanted, got = everything(CONFIG, whole, tmp_path / "whole"), everything(CONFIG, second, tmp_path / "resumed")
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name


def test_a_loss_that_explodes_stops_the_run() -> None:
    state = start(CONFIG)
    state.model.final.linear.bias.data.fill_(math.inf)
    with pytest.raises(GateError, match=r"loss became .* at step 1"):
        run(CONFIG, state, DATA, lambda _: None, lambda _: None)


@pytest.mark.parametrize("written", [0, 1000])
def test_a_save_that_fails_leaves_the_old_state(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = start(CONFIG)
    save_state(tmp_path, CONFIG, state)
    old = (tmp_path / STATE).read_bytes()
    train_on(CONFIG, state, 1)

    def half(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"x" * written)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, CONFIG, state)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert (tmp_path / STATE).read_bytes() == old
    save_state(tmp_path, CONFIG, state)
    assert load_state(tmp_path, CONFIG).step == 1


def test_resuming_needs_a_run_of_the_same_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--resume: .* holds no run"):
        load_state(tmp_path, CONFIG)
    save_state(tmp_path, CONFIG, start(CONFIG))
    other = dataclasses.replace(CONFIG, spec=dataclasses.replace(SPEC, tailor_rank=3), learning_rate=0.5)
    with pytest.raises(UsageError, match=r"learning_rate was 0.0015, now 0.5; model.tailor_rank was 2, now 3; give"):
        load_state(tmp_path, other)
    tensors, metadata = read_tensors(tmp_path / STATE), read_metadata(tmp_path / STATE)
    tensors["tailors.weight"] = tensors["tailors.weight"][:, 1:].contiguous()
    write_tensors(tmp_path / STATE, tensors, metadata)
    with pytest.raises(InputError, match=r"tailors.weight: file has \(3, .*\), model wants \(3, "):
        load_state(tmp_path, CONFIG)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:500])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_state(tmp_path, CONFIG)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = dataclasses.replace(CONFIG, images=12 * 100, warmup_steps=10, learning_rate=0.4)
    rates = [learning_rate(config, step) for step in range(config.steps + 1)]
    cosine = [0.2 * (1 + math.cos(math.pi * step / 100)) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 * cosine[step] for step in range(10)])
    assert rates[10:] == pytest.approx(cosine[10:])
    assert rates[-1] == 0
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 0) == 0.4
