"""The training engine at the shape of DiT-S/2: does a step's cost grow with the classes, and does a low rank save time?

Steps of three runs are interleaved, so that what else the machine does hits all alike; the ratios of each round are
taken, and their median and range are shown. On a CPU every run has one thread, and its seconds are processor time,
which the load of other programs does not stretch; on a GPU they are wall-clock time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from kind_edge.training.config import TrainConfig

RANK_SHARE, TAILOR_RANK = 0.3, 3
RUNS = {"classes_10": 10, "classes_1000": 1000, "dense": 10}
ROUNDS, BATCH, WARM_UP = 3, 64, 1


def configuration(name: str, batch: int) -> TrainConfig:
    """DiT-S/2 on 32 x 32 x 4 latents (256 tokens): active rank 0.3 D, or dense."""
    from kind_edge.model.spec import named_spec
    from kind_edge.training.config import TrainConfig

    spec = named_spec("DiT-S/2", RUNS[name], learned_sigma=False, label_embedding=name == "dense", objective="flow")
    if name != "dense":
        learngene = int(RANK_SHARE * spec.width) - TAILOR_RANK
        spec = dataclasses.replace(spec, factored=True, learngene_rank=learngene, tailor_rank=TAILOR_RANK)
    return TrainConfig(spec, batch_size=batch, images=10**6)


def stepper(config: TrainConfig) -> Callable[[], float]:
    """A run that has its weights; each call trains one step and returns its seconds."""
    import torch

    from kind_edge.model.dit import DiT
    from kind_edge.training.batches import ClassBatches
    from kind_edge.training.data import in_memory
    from kind_edge.training.distributed import Alone
    from kind_edge.training.loop import train_step
    from kind_edge.training.state import start_from
    from kind_edge.training.train import pick_device

    classes, spec, device = config.spec.num_classes, config.spec, pick_device("auto")
    model = DiT(spec)
    for parameter in model.parameters():  # speed does not depend on the values
        torch.nn.init.normal_(parameter, std=0.02)
    labels = torch.arange(4 * 1000) % classes
    images = torch.randint(256, (len(labels), spec.channels, spec.image_size, spec.image_size), dtype=torch.uint8)
    data = in_memory(images.numpy(), labels, tuple(map(str, range(classes))), "random")
    state, batches = (
        start_from(config, model, Alone(device)),
        ClassBatches(labels, classes, config.batch_size, config.seed),
    )

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step() -> float:
        started = clock()
        train_step(config, state, data, batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    return step


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training() -> dict[str, Any]:
    """One process per run, as a peak of memory is a process's own; they take turns, one step at a time."""
    processes = {name: _start(name) for name in RUNS}
    try:
        for _ in range(WARM_UP):
            for process in processes.values():
                _ask(process, "step")
        rounds = [{name: _ask(process, "step") for name, process in processes.items()} for _ in range(ROUNDS)]
        peaks = {name: _ask(process, "peak") for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    growth = [r["classes_1000"] / r["classes_10"] for r in rounds]
    saving = [r["classes_10"] / r["dense"] for r in rounds]
    rows = [
        {
            "run": name,
            "step_s_median": statistics.median(r[name] for r in rounds),
            "step_s_least": min(r[name] for r in rounds),
            "step_s_most": max(r[name] for r in rounds),
            "images_per_s": BATCH / statistics.median(r[name] for r in rounds),
            "peak_bytes": peaks[name],
        }
        for name in RUNS
    ]
    return {
        "runs": rows,
        "classes_1000_over_10": statistics.median(growth),
        "classes_1000_over_10_least": min(growth),
        "classes_1000_over_10_most": max(growth),
        "kind_over_dense": statistics.median(saving),
        "kind_over_dense_least": min(saving),
        "kind_over_dense_most": max(saving),
        "rounds": ROUNDS,
        "batch_size": BATCH,
        "rank_share": RANK_SHARE,
    }


def _start(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", __file__, name, str(BATCH)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(process: subprocess.Popen[str], what: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    return float(json.loads(process.stdout.readline()))


def main() -> None:
    """One run, told on its standard input when to step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("batch", type=int)
    arguments = parser.parse_args()
    step = stepper(configuration(arguments.name, arguments.batch))
    for line in sys.stdin:
        print(step() if line.strip() == "step" else peak_bytes(), flush=True)
        _give_back_memory()


def _give_back_memory() -> None:
    """Only one of the three runs steps at a time; the others need not hold the memory of a step meanwhile."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
