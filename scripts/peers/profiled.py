"""Where ONNX Runtime's time goes in one guided step of a denoiser, by kind of operator."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.deploy.bench_worker import random_inputs
from kind_edge.deploy.session import open_session

RUNS, WARM_UP = 60, 10


def operator_shares(path: Path, threads: int) -> dict[str, float]:
    """Operator -> its share of the time within nodes, of two rows at a time; the larger ones first."""
    with tempfile.TemporaryDirectory(prefix="kind-edge-peers-") as folder:
        session = open_session(path, threads, profile_prefix=str(Path(folder, "profile")))
        feeds = random_inputs(session, 2) | {"timestep": np.full(2, 500, np.float32)}
        for _ in range(WARM_UP + RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _shares(events)


def _shares(events: list[dict[str, Any]]) -> dict[str, float]:
    spent: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seen[event["name"]] += 1
            if seen[event["name"]] > WARM_UP:
                spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values()) or 1
    return {name: micros / total for name, micros in spent.most_common()}
