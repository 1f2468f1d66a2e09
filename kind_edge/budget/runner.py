"""Times the models of a folder with ONNX Runtime: `python runner.py FOLDER`. Stands alone, to be copied to a device.

FOLDER/request.json says what to run, and the last line on stdout is the answer:

    request   {"version": 2, "models": [
                {"name": "a-49", "file": "a.onnx", "inputs": {"x": {"dtype": "float32", "shape": [1, 49, 128]}},
                 "threads": 1}]}
    answer    {"version": 2, "device": "...", "system": "...", "runtime": "...", "threads": 4, "ram_bytes": 8e9,
               "latency_us": {"a-49": 12.3}}

Floats are any ordinary numbers, integers 0. A model that names no `threads` runs on all cores; how many these are, the
answer says. A latency is the median of single calls, after warming up. Here it is that
of the calmest of several short rounds, which go over all models in turn: a disturbance hits one round, not one model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = 2
REQUEST = "request.json"
LIMIT_S = 150.0
"""Once every model has had its rounds; others follow within that time where they disagree."""

_WINDOW_S = 0.012
_MIN_RUNS = 5
_LEAST_ROUNDS, _MOST_ROUNDS = 4, 10
_AGREEMENT = 0.03
"""Where the two calmest rounds agree so well, they were undisturbed; where they do not, more rounds follow."""


def measure(
    folder: Path, threads: int, limit_s: float = LIMIT_S, on_progress: Callable[[float], None] | None = None
) -> dict[str, float]:
    """Microseconds of every model that FOLDER/request.json names: those of its calmest round."""
    return {name: min(times) for name, times in measure_rounds(folder, threads, limit_s, on_progress).items()}


def measure_rounds(
    folder: Path, threads: int, limit_s: float = LIMIT_S, on_progress: Callable[[float], None] | None = None
) -> dict[str, list[float]]:
    """The same of every round. `threads`: of models that name none. `on_progress` hears of the share that is done."""
    models = json.loads((folder / REQUEST).read_text(encoding="utf-8"))["models"]
    rounds: dict[str, list[float]] = {model["name"]: [] for model in models}
    started = time.perf_counter()
    for index in range(_MOST_ROUNDS):
        left = [model for model in models if not _agree(rounds[model["name"]])]
        # Forth and back: a slow spell of the machine at one time of a round does not meet the same models again.
        turned = left if index % 2 == 0 else left[::-1]
        runs = itertools.groupby(enumerate(turned), key=lambda pair: (pair[1]["file"], pair[1].get("threads", threads)))
        for (file, own_threads), group in runs:
            elapsed_s = time.perf_counter() - started
            if index >= _LEAST_ROUNDS and elapsed_s > limit_s:
                break
            session = _session(folder / file, own_threads)
            for done, model in group:
                rounds[model["name"]].append(_median_us(session, model["inputs"]))
                if on_progress is not None:
                    rest = elapsed_s / limit_s if index >= _LEAST_ROUNDS else 0.0
                    on_progress(min(max((index + done / len(left)) / _LEAST_ROUNDS * 0.7, rest), 1.0))
    return rounds


def _agree(times: list[float]) -> bool:
    """Whether the two calmest rounds do."""
    ordered = sorted(times)
    return len(ordered) >= _LEAST_ROUNDS and ordered[1] <= ordered[0] * (1 + _AGREEMENT)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Idle threads sleep: on shared cores spinning distorts every timing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _median_us(session: Any, inputs: dict[str, Any]) -> float:
    """The median of single calls over a short while."""
    import numpy as np

    random = np.random.default_rng(0)
    feeds = {}
    for name, value in inputs.items():
        kind, shape = np.dtype(value["dtype"]), value["shape"]
        feeds[name] = (random.standard_normal(shape) if kind.kind == "f" else np.zeros(shape)).astype(kind)
    for _ in range(2):
        session.run(None, feeds)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _MIN_RUNS or time.perf_counter() - begin < _WINDOW_S:
        start = time.perf_counter_ns()
        session.run(None, feeds)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def _ram_bytes() -> int:
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core that this process may use")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = arguments.threads or cores
    import onnxruntime as ort

    latency_us = measure(arguments.folder, threads)
    answer = {
        "version": VERSION, "device": platform.node() or platform.machine(),
        "system": f"{platform.system()} {platform.release()}", "runtime": f"onnxruntime {ort.__version__}",
        "threads": threads, "ram_bytes": _ram_bytes(), "latency_us": latency_us,
    }  # fmt: skip
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
