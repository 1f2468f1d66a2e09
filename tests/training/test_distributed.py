"""Two processes learn what one learns, whoever exchanges the gradient, and exchange touched tailors alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kind_edge.errors import UsageError
from kind_edge.training.config import preset
from kind_edge.training.distributed import check_division
from kind_edge.training.train import train

SCRIPT = """
import pathlib, sys
import torch
from kind_edge.model.spec import ModelSpec
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.distributed import Alone, join
from kind_edge.training.loop import train_step
from kind_edge.training.data import in_memory
from kind_edge.training.state import averaged_tensors, load_state, save_state, start

torch.set_default_dtype(torch.float64)  # Adam turns the rounding of a tiny gradient into a whole step
folder, exchanged = pathlib.Path(sys.argv[1]), [0]
reduce = torch.distributed.all_reduce

def counted(tensor, *rest, **options):
    exchanged[0] += tensor.numel()
    return reduce(tensor, *rest, **options)

torch.distributed.all_reduce = counted

def learn(classes, processes):
    spec = ModelSpec(8, 1, 4, 16, 1, 2, classes, learngene_rank=4, tailor_rank=2)
    config = TrainConfig(spec, images=12 * 4, batch_size=12, warmup_steps=2, accumulation=2)
    labels = torch.arange(max(60, classes)) % classes
    images = torch.randint(256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = in_memory(images.numpy(), labels, tuple(map(str, range(classes))), "0")
    batches = ClassBatches(labels, classes, 12, 0)
    state = start(config, processes)
    losses = [train_step(config, state, data, batches) for _ in range(2)]
    if classes == 10 and processes.count > 1:
        save_state(folder, config, state)
        state = load_state(folder, config, processes)
    exchanged[0] = 0
    losses += [train_step(config, state, data, batches) for _ in range(2)]
    touched = sum(len(batches(step).labels.unique()) for step in (2, 3))
    return {
        "losses": losses, "average": averaged_tensors(config, state), "rows": state.tailors.weight[:20].clone(),
        "exchanged": exchanged[0], "touched": touched * state.tailors.layout.values,
        "network": type(state.network).__name__,
    }

together, results = join(torch.device("cpu")), {}
for classes in (10, 1000):
    results["alone", classes] = learn(classes, Alone(torch.device("cpu")))
    for how in ("ddp", "fsdp"):
        together.sharded = how == "fsdp"
        results[how, classes] = learn(classes, together)
if together.rank == 0:
    torch.save(results, folder / "results.pt")
together.wait()
torch.distributed.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def results(folder: Path, world: int) -> dict[tuple[str, int], dict[str, Any]]:
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
        for classes in (10, 1000):
            got = run[how, classes]
            for what in ("losses", "average", "rows"):
                torch.testing.assert_close(got[what], run["alone", classes][what], rtol=1e-9, atol=1e-9)
            # The rows of the batch's classes; beside them a loss per step, and FSDP2's norm of the gradient.
            assert 0 < got["exchanged"] - got["touched"] < 200, (how, classes, got["exchanged"], got["touched"])


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
