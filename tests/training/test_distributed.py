"""Two processes learn what one learns, whoever exchanges the gradient, and exchange touched tailors alone.

What they exchange is counted where it is sent: every operation of gloo, DDP's own included, as the profiler saw it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import read_metadata
from kind_edge.training.config import preset
from kind_edge.training.distributed import Alone, check_division
from kind_edge.training.state import STATE, save_state, start
from kind_edge.training.train import train

SCRIPT = """
import contextlib, math, pathlib, sys
import torch
from kind_edge.model.spec import ModelSpec
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.distributed import Alone, join
from kind_edge.training.loop import train_step
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.state import averaged_tensors, load_state, save_state, start
from kind_edge.training.train import train_stages

torch.set_default_dtype(torch.float64)  # Adam turns the rounding of a tiny gradient into a whole step
folder = pathlib.Path(sys.argv[1])

def configured(classes, shared):
    depth = 2 if shared else 1
    spec = ModelSpec(8, 1, 4, 16, depth, 2, classes, learngene_rank=4, tailor_rank=2, shared_factors=shared)
    config = TrainConfig(spec, images=12 * 4, batch_size=12, warmup_steps=2, accumulation=2, nested_share=0.75)
    labels = torch.arange(max(60, classes)) % classes
    images = torch.randint(256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return config, in_memory(images.numpy(), labels, tuple(map(str, range(classes))), "0")

def sent_values(profile):
    return sum(math.prod(event.input_shapes[0]) for event in profile.events() if event.name.startswith("gloo:"))

def learn(classes, processes, shared=False):
    config, data = configured(classes, shared)
    batches = ClassBatches(data.labels, classes, 12, 0)
    state = start(config, processes)
    losses = [train_step(config, state, data, batches) for _ in range(2)]
    if classes == 10 and processes.count > 1:
        save_state(folder, config, state)
        state = load_state(folder, config, processes)
    counted = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    with counted if together.rank == 0 and processes.count > 1 else contextlib.nullcontext() as profile:
        losses += [train_step(config, state, data, batches) for _ in range(2)]
    touched = sum(len(batches(step).labels.unique()) for step in (2, 3))
    return {
        "losses": losses, "average": averaged_tensors(config, state), "rows": state.tailors.weight[:20].clone(),
        "sent": sent_values(profile) if profile else 0, "touched": touched * state.tailors.layout.values,
        "own": 2 * sum(parameter.numel() for parameter in state.parameters().values()),
        "network": type(state.network).__name__,
    }

def learn_in_stages(name, processes):
    config, data = configured(3, False)
    train_stages(config, DataSplit(data, data.of_classes(())), folder / name, processes)

together, results = join(torch.device("cpu")), {}
(folder / "together").mkdir(exist_ok=True)
learn_in_stages("together", together)
if together.rank == 0:
    (folder / "alone").mkdir()
    learn_in_stages("alone", Alone(torch.device("cpu")))
for classes in (10, 1000):
    results["alone", classes] = learn(classes, Alone(torch.device("cpu")))
    for how in ("ddp", "fsdp"):
        together.sharded = how == "fsdp"
        results[how, classes] = learn(classes, together)
results["alone", "shared"] = learn(10, Alone(torch.device("cpu")), shared=True)
for how in ("ddp", "fsdp"):
    together.sharded = how == "fsdp"
    results[how, "shared"] = learn(10, together, shared=True)
if together.rank == 0:
    torch.save(results, folder / "results.pt")
together.wait()
torch.distributed.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def results(folder: Path, world: int) -> dict[tuple[str, int | str], dict[str, Any]]:
    """What the script learned on `world` processes, which find each other as those of torchrun do."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * world, "\n".join(errors)[-3000:]
    return torch.load(folder / "results.pt")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    run = results(tmp_path, 2)
    names = {how: run[how, 10]["network"] for how in ("alone", "ddp", "fsdp")}
    assert names == {"alone": "DiT", "ddp": "DistributedDataParallel", "fsdp": "FSDPDiT"}
    for how in ("ddp", "fsdp"):
        for classes in (10, 1000, "shared"):
            got = run[how, classes]
            for what in ("losses", "average", "rows"):
                torch.testing.assert_close(got[what], run["alone", classes][what], rtol=1e-9, atol=1e-9)
        # The rows of the batches' classes, and what does not depend on the number of classes: a row has 588 values.
        few, many = (run[how, classes]["sent"] - run[how, classes]["touched"] for classes in (10, 1000))
        assert abs(few - many) < 100, (how, few, many)  # DDP agrees on its buckets once
        # DDP sends the gradient of every other parameter once a step; beside it a loss, position tables and the like.
        assert how == "fsdp" or 0 < many - run[how, 1000]["own"] < 588, (many, run[how, 1000]["own"])
    wanted, got = (load_file(tmp_path / name / STATE) for name in ("alone", "together"))
    assert {read_metadata(tmp_path / name / STATE)["stage"] for name in ("alone", "together")} == {"second"}
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():  # the first stage's result passes through float32
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_run_that_only_some_processes_find_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "begun").mkdir()
    save_state(tmp_path / "begun", preset("smoke"), start(preset("smoke")))
    for folder in ("begun", "not shared"):
        processes = Alone(torch.device("cpu"))
        monkeypatch.setattr(processes, "mean_", lambda begun: torch.full_like(begun, 0.5))  # one of two
        monkeypatch.setattr("kind_edge.training.train.join", lambda _, made=processes: made)
        with pytest.raises(UsageError, match="not every process finds the run in"):
            train(preset("smoke"), tmp_path / folder, data=tmp_path / "nowhere", device="cpu", resume=True)


def test_processes_that_do_not_divide_the_batch_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preset("smoke")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_division(config)  # 40 images
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="batch_size 40 cannot be divided by 3 processes x accumulation 1"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
