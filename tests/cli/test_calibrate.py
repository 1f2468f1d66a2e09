"""`profiles calibrate` through a runner, and what `plan` makes of the profile that it writes."""

from __future__ import annotations

import shlex
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUNNER = """#!{python}
import json, pathlib, sys
models = json.loads((pathlib.Path(sys.argv[1]) / "request.json").read_text())["models"]
sizes = {{m["name"]: max(i["shape"][0] for i in m["inputs"].values()) for m in models}}
latency_us = {{name: 500.0 * size for name, size in sizes.items()}}
latency_us |= {{f"tiny-{{n}}{{threads}}": 4.0 + n for n in (1, 128) for threads in ("", "-threads1")}}
print(json.dumps({{"version": 2, "device": "a board", "system": "Linux", "runtime": "onnxruntime 1", "threads": 4,
                   "ram_bytes": 8e9, "latency_us": latency_us}}))
"""


@pytest.fixture
def runner(tmp_path: Path) -> str:
    """A device on which every call takes half a millisecond per row of the batch."""
    path = tmp_path / "run probes"
    path.write_text(RUNNER.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return shlex.quote(str(path))


def test_a_runner_makes_a_profile_to_plan_with(
    call: Callable[..., Any], checkpoint: Path, runner: str, tmp_path: Path
) -> None:
    board = tmp_path / "new" / "board.toml"
    made = call("profiles", "calibrate", "--runner", runner, "-o", board, "--json").json()
    assert (made["name"], made["title"], made["file"]) == ("board", "a board", str(board))
    assert made["measured_times"] > 400
    figures = call("profiles", "show", board, "--json").json()["figures"]
    both = ("cpu.measured_times", "cpu.measured_times_on_one_thread")
    assert sum(figures[name]["value"] for name in both) == made["measured_times"]
    assert "%" not in call("profiles", "show", board).out.split("measured_times")[1].splitlines()[0]
    asked = ("plan", checkpoint, "--profile", board, "--steps", 2, "--unit", "cpu")
    free = call(*asked, "--json").json()
    assert free["latency_source"] == "measured table"
    assert free["sustained_image_latency_s"] == pytest.approx(2 * free["image_latency_s"], rel=1e-3)
    between = f"{free['image_latency_s'] * 1.02:.6f}s"  # sustained, even the smallest model takes longer here
    assert call(*asked, "--max-latency", between, "--burst", "--json").json()["burst"] is True
    held = call("-q", *asked, "--max-latency", between, "--json")
    assert held.code == 3 or held.json()["sustained_image_latency_s"] <= free["image_latency_s"] * 1.02 + 1e-6
    assert "measured table" in call(*asked).out


def test_refusals(call: Callable[..., Any], tmp_path: Path) -> None:
    where = call("profiles", "calibrate", "--runner", "adb shell measure")
    assert (where.code, where.out) == (2, "")
    assert "-o FILE.toml" in where.err
    assert call("profiles", "calibrate", "--runner", "true", "-o", tmp_path / "board.json").code == 2
    nowhere = call("profiles", "calibrate", "--runner", tmp_path / "none", "-o", tmp_path / "board.toml")
    assert nowhere.code == 2
    assert not (tmp_path / "board.toml").exists()
