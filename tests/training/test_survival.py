"""Nothing that happens to a run loses it: kill -9 at any moment, a full disk, a loss that is no number."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from kind_edge.errors import GateError, UsageError
from kind_edge.model.spec import ModelSpec
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData, in_memory
from kind_edge.training.loop import run, train_step
from kind_edge.training.nested import nested_config
from kind_edge.training.state import STATE, TrainState, in_second_stage, load_state, save_state, start

SPEC = ModelSpec(8, 1, 4, 16, 1, 2, 9, learngene_rank=4, tailor_rank=2)
CONFIG = TrainConfig(SPEC, images=16 * 6, batch_size=6, warmup_steps=2, nested_share=1.0)
NESTED = nested_config(CONFIG)
LABELS = torch.arange(27) % 9
IMAGES = torch.randint(256, (27, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
DATA = in_memory(IMAGES.numpy(), LABELS, tuple("abcdefghi"), "0")

SERVER = """
import os, sys, pathlib
import torch
from kind_edge.training import loop
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.state import STATE
from kind_edge.training.train import train_stages

loop.SAVE_EVERY_S, loop.SAVE_SHARE = 0.0, float("inf")  # after every step
labels = torch.arange(27) % 9
images = torch.randint(256, (27, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
data = in_memory(images.numpy(), labels, tuple("abcdefghi"), "0")
config = TrainConfig.from_dict(eval(sys.argv[1]), "test")

def train(folder):
    split = DataSplit(data, data.of_classes(()))
    train_stages(config, split, folder, resume=(folder / STATE).exists())

for line in sys.stdin:  # a fork for every run, so that torch is imported once
    pid = os.fork()
    if pid == 0:
        train(pathlib.Path(line.strip()))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def stored_step(folder: Path) -> tuple[bool, int]:
    """Which stage, and how far it is."""
    if not (folder / STATE).exists():
        return False, 0
    nested = in_second_stage(folder)
    return nested, load_state(folder, NESTED if nested else CONFIG, whole=CONFIG if nested else None).step


def wait_for_saves(path: Path, count: int) -> None:
    """Until another process has written the file that many times."""
    seen = {path.stat().st_mtime_ns if path.exists() else 0}
    deadline = time.monotonic() + 60
    while len(seen) <= count and time.monotonic() < deadline:
        time.sleep(0.001)
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SERVER, repr(CONFIG.to_dict())]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def started(folder: Path) -> int:
        folder.mkdir(exist_ok=True)
        assert server.stdin is not None
        server.stdin.write(f"{folder}\n")
        server.stdin.flush()
        return int(answer())

    def answer() -> str:
        assert server.stdout is not None
        return server.stdout.readline()

    try:
        started(tmp_path / "undisturbed")
        assert int(answer()) == 0
        seed = random.randrange(2**32)
        print("seed of the kills:", seed)
        moments = random.Random(seed)
        reached = []
        for _ in range(4):
            pid = started(tmp_path / "killed")
            wait_for_saves(tmp_path / "killed" / STATE, moments.randrange(1, 7))
            time.sleep(moments.uniform(0, 0.03))  # about a step and its save
            os.kill(pid, signal.SIGKILL)
            assert int(answer()) == signal.SIGKILL
            reached.append(stored_step(tmp_path / "killed"))
        assert reached == sorted(set(reached))
        assert reached[-1] < (True, NESTED.steps)
        started(tmp_path / "killed")
        assert int(answer()) == 0
    finally:
        server.kill()
        server.communicate()
    assert stored_step(tmp_path / "killed") == (True, NESTED.steps)
    assert not list((tmp_path / "killed").glob("*.partial"))
    wanted, got = (load_file(tmp_path / name / STATE) for name in ("undisturbed", "killed"))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name


def trained(steps: int) -> TrainState:
    state, batches = start(CONFIG), ClassBatches(LABELS, 9, 6, CONFIG.seed)
    for _ in range(steps):
        train_step(CONFIG, state, DATA, batches)
    return state


def test_a_full_disk_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    state = trained(1)
    save_state(tmp_path, CONFIG, state)
    old = (tmp_path / STATE).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: Usage(1000))
        patched.setattr("kind_edge.model.checkpoint.save_file", None)
        with pytest.raises(UsageError, match=r"needs .*KiB, but its disk has 1000 B left; the earlier .* is untouched"):
            save_state(tmp_path, CONFIG, state)
    assert (tmp_path / STATE).read_bytes() == old


def test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_old_state(tmp_path: Path) -> None:
    save_state(tmp_path, CONFIG, trained(1))
    old = (tmp_path / STATE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))  # the system refuses the second half
    try:
        with pytest.raises(UsageError, match=r"cannot be written \(.*the earlier .* is untouched"):
            save_state(tmp_path, CONFIG, trained(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert (tmp_path / STATE).read_bytes() == old
    assert load_state(tmp_path, CONFIG).step == 1


@pytest.mark.parametrize("poison", ["image", "gradient"])
def test_a_loss_or_a_gradient_that_is_no_number_stops_before_anything_is_updated(
    poison: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kind_edge.training.loop.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("kind_edge.training.loop.SAVE_SHARE", math.inf)

    class Poisoned(TrainingData):
        steps = 0

        def batch(self, indices: torch.Tensor) -> torch.Tensor:
            Poisoned.steps += 1
            images = super().batch(indices)
            return images * math.nan if poison == "image" and Poisoned.steps == 4 else images

    state = start(CONFIG)
    if poison == "gradient":  # a finite loss, as torch.where hides the branch not taken from it but not from its slope
        next(iter(state.parameters().values())).register_hook(lambda g: g * (math.nan if state.step == 3 else 1))
    data = Poisoned(LABELS, DATA.class_names, DATA.shape, "0", DATA.shards, DATA.rows)
    with pytest.raises(GateError, match=r"the (loss|gradient) became nan at step 4; step 3 is saved and still good"):
        run(CONFIG, state, data, lambda s: save_state(tmp_path, CONFIG, s), lambda _: None)
    wanted = trained(3)
    good = load_state(tmp_path, CONFIG)
    assert good.step == 3
    for name, parameter in wanted.parameters().items():
        assert torch.equal(parameter, good.parameters()[name]), name
        assert torch.equal(parameter, state.parameters()[name]), f"{name} in memory"
    assert torch.equal(wanted.tailors.weight, good.tailors.weight)


def test_a_loss_that_explodes_is_named(tmp_path: Path) -> None:
    state = trained(1)
    torch.nn.init.constant_(state.model.final.linear.bias, 1e3)
    with pytest.raises(GateError, match=r"the loss became 1e\+06 at step 2; nothing has been saved yet"):
        run(CONFIG, state, DATA, lambda _: None, lambda _: None)


def test_a_configuration_that_differs_is_refused_before_work(tmp_path: Path) -> None:
    save_state(tmp_path, CONFIG, trained(1))
    other = dataclasses.replace(CONFIG, seed=5, spec=dataclasses.replace(SPEC, depth=2))
    with pytest.raises(UsageError, match=r"model.depth was 1, now 2; seed was 0, now 5"):
        load_state(tmp_path, other)
