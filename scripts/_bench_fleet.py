"""Many bundles in one go over one: the command line's own time, imports included, in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROFILES = (
    "apple-a17pro", "apple-a18", "apple-m4", "dimensity-9300", "exynos-2400", "jetson-orin-nano", "raspberry-pi-5",
    "snapdragon8g3", "snapdragon8elite", "tensor-g4",
)  # fmt: skip
SETS = {
    "one": ["sneaker"],
    "two": ["sneaker", "bag"],
    "shoes": ["sneaker", "sandal", "ankle-boot"],
    "tops": ["t-shirt", "pullover", "coat", "shirt"],
}
ROUNDS = 3


def fleet() -> dict[str, Any]:
    """Seconds of each round: one bundle (the README's command), then all of them; medians, and their ratio."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sets = Path(folder, "sets.yaml")
        sets.write_text(json.dumps(SETS))  # which is YAML too
        one = ["--profile", "snapdragon8g3", "--classes", ",".join(SETS["two"])]
        many = ["--profiles", ",".join(PROFILES), "--classes-file", str(sets)]
        _seconds([*one, "-o", f"{folder}/first"])  # the machine is measured once, and files are in memory
        for number in range(ROUNDS):
            one_s, _ = _seconds([*one, "-o", f"{folder}/one-{number}"])
            fleet_s, made = _seconds([*many, "-o", f"{folder}/fleet-{number}"])
            rows.append({"one_s": one_s, "fleet_s": fleet_s, "bundles": len(made["bundles"])})
    one_s, fleet_s = (statistics.median(row[name] for row in rows) for name in ("one_s", "fleet_s"))
    return {"rounds": rows, "one_s": one_s, "fleet_s": fleet_s, "fleet_over_one": fleet_s / one_s, "cores": _cores()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seconds(options: list[str]) -> tuple[float, dict[str, Any]]:
    """Of one command in a process of its own, and what it says."""
    command = [sys.executable, "-P", "-m", "kind_edge.cli", "-q", "export", *options, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - started, json.loads(done.stdout)
