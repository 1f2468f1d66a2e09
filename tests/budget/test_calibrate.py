"""Calibration through a runner: a real subprocess with the example, and every way in which a runner can fail."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from kind_edge.budget import runner
from kind_edge.budget.calibrate import Measured, all_probes, measure_with, measured_profile
from kind_edge.budget.operator_table import KINDS
from kind_edge.budget.probe_graph import Layer
from kind_edge.budget.probes import (
    ALL_CORES,
    BATCHES,
    LOWEST,
    ONE_THREAD,
    PRECISIONS,
    TAILOR_RANKS,
    Probe,
    Shapes,
    model_of,
    operator_table,
    table_probes,
)
from kind_edge.errors import GateError, InputError, KindEdgeError, UsageError

FEW = [probe for probe in all_probes() if probe.name in ("tiny-1", "tiny-128-threads1", "ends-128-2x49")]
EXAMPLE = f"{shlex.quote(sys.executable)} -P {shlex.quote(runner.__file__)} --threads 1"


def script(folder: Path, body: str) -> str:
    """A runner in Python whose folder is FOLDER and whose request is REQUEST."""
    path = folder / "runner"
    head = "import json, sys\nfrom pathlib import Path\nFOLDER = Path(sys.argv[1])\n"
    read = "REQUEST = json.loads((FOLDER / 'request.json').read_text())\n"
    path.write_text(f"#!{sys.executable}\n{head}{read}{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return shlex.quote(str(path))


ANSWER = """
answer = {"version": 2, "device": "a phone", "system": "Android 16", "runtime": "onnxruntime 1", "threads": 4,
          "ram_bytes": 8e9, "latency_us": {model["name"]: 10.0 for model in REQUEST["models"]}}
"""


def test_the_example_measures_in_a_subprocess() -> None:
    measured = measure_with(EXAMPLE, FEW)
    assert set(measured.latency_us) == {probe.name for probe in FEW}
    assert 0.1 < measured.latency_us["tiny-1"] < measured.latency_us["ends-128-2x49"] < 1e6
    assert measured.threads == 1
    assert measured.runtime.startswith("onnxruntime ")


def test_a_runner_sees_every_model_it_is_asked_for(tmp_path: Path) -> None:
    body = ANSWER + "assert all((FOLDER / m['file']).stat().st_size for m in REQUEST['models'])\n"
    measured = measure_with(script(tmp_path, body + "print('chatter')\nprint(json.dumps(answer))"), FEW)
    assert measured.device == "a phone"
    assert measured.latency_us == dict.fromkeys((probe.name for probe in FEW), 10.0)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("sys.exit('device offline')", GateError, "exit code 1: device offline"),
        ("sys.exit(3)", GateError, "exit code 3: it says nothing"),
        ("import time; time.sleep(60)", GateError, "no answer within"),
        ("pass", InputError, "stdout is nothing"),
        ("print('ready')", InputError, "stdout is 'ready'"),
        ("print('[1]')", InputError, "lacks everything"),
        (ANSWER + "del answer['threads']; print(json.dumps(answer))", InputError, "lacks threads"),
        (ANSWER + "answer['version'] = 1; print(json.dumps(answer))", InputError, "version 1, want 2"),
        (ANSWER + "answer['latency_us'].popitem(); print(json.dumps(answer))", InputError, "1 of 3 models are missing"),
        (ANSWER + "answer['latency_us']['tiny-1'] = -1; print(json.dumps(answer))", InputError, "tiny-1: got -1"),
        (ANSWER + "answer['latency_us'] = [1]; print(json.dumps(answer))", InputError, "microseconds by name"),
        (ANSWER + "answer['ram_bytes'] = 'much'; print(json.dumps(answer))", InputError, "ram_bytes: got 'much'"),
    ],
)
def test_a_failing_runner_is_refused(body: str, kind: type[KindEdgeError], message: str, tmp_path: Path) -> None:
    timeout_s = 0.5 if "sleep" in body else 60.0
    with pytest.raises(kind, match=message):
        measure_with(script(tmp_path, body), FEW, timeout_s)


@pytest.mark.parametrize(
    ("command", "message"),
    [("/no/such/runner --fast", "cannot be started"), ("adb 'shell", "cannot be split"), (" ", "is empty")],
)
def test_a_command_that_is_none_is_refused(command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_with(command, FEW)


def test_probes_have_names_of_their_own_and_share_files() -> None:
    probes = all_probes()
    assert len({probe.name for probe in probes}) == len(probes)
    assert len({probe.file for probe in probes}) < len(probes) / 2
    json.dumps([probe.inputs for probe in probes])


LAYER = r"(fp32|int8)-(dense|rank(\d+))(?:-tailors(\d+))?"
TINY_US = {"tiny-1": 5.0, "tiny-128": 132.0, "tiny-1-threads1": 5.0, "tiny-128-threads1": 132.0}


def test_disturbed_times_still_make_a_table() -> None:
    """Where every probe takes as long, all differences vanish: no part may be free, or below zero."""
    latency_us = {probe.name: TINY_US.get(probe.name, 100.0) for probe in all_probes()}
    table = operator_table(latency_us)
    assert all(min(getattr(table, kind).values()) > 0 for kind in KINDS)
    profile = measured_profile("mine", Measured("d", "s", "r", 2, 8e9, latency_us))
    assert profile.unit("cpu").overhead_us.value == pytest.approx(1.0)
    assert profile.operators("cpu", "int8") is not None
    assert profile.operators("cpu", "fp16") is None
    assert profile.unit("cpu").one_thread is not None
    assert "threads: 1" in profile.unit("cpu").one_thread.source
    alone = {probe.name: TINY_US.get(probe.name, 100.0) for probe in all_probes(one_thread=False)}
    assert measured_profile("mine", Measured("d", "s", "r", 1, 8e9, alone)).unit("cpu").one_thread is None


@pytest.mark.parametrize("shapes", [ALL_CORES, ONE_THREAD])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_measured_model_is_predicted_as_it_was_measured(shapes: Shapes, precision: str) -> None:
    """Whatever a model of one storage took is the sum of its parts, and of no part that was not in it."""
    random = np.random.default_rng(0)
    storages = {("dense", 0, 0): Layer(precision)}
    storages |= {("factored", rank, 0): Layer(precision, rank) for rank in (LOWEST, *shapes.ranks)}
    storages |= {("factored", LOWEST, rank): Layer(precision, LOWEST, rank) for rank in TAILOR_RANKS}

    def took_us(probe: Probe) -> float:
        if "tiny" in probe.name:
            return TINY_US[probe.name]
        us = 100.0
        for times, (_, stored, rank, tailor) in zip((4, 8), re.findall(LAYER, probe.name), strict=False):
            us += 300 + times * (500 if stored == "dense" else 30 + int(rank)) + times * 10 * int(tailor or 0)
        return us * float(random.uniform(0.99, 1.01))

    latency_us = {probe.name: took_us(probe) for probe in table_probes(shapes)}
    table = operator_table(latency_us, shapes)
    for (storage, rank, tailor), layer in storages.items():
        for width, batch in itertools.product(shapes.widths, BATCHES):
            parts: dict[int, float] = {}
            for outputs in (width, 4 * width):
                where = (precision, batch, 49, width, outputs)
                parts[outputs] = table.layer_us(storage, *where, *([rank] if rank else []))
                parts[outputs] += table.layer_us("tailor", *where, tailor) if tailor else 0.0
            branches = table.branch_us("attention", batch, 49, width) + table.branch_us("mlp", batch, 49, width)
            block = branches + 4 * parts[width] + 2 * parts[4 * width]
            whole = table.ends_us(batch, 49, width) + shapes.widths[width].blocks * block
            measured = latency_us[shapes.named(model_of(shapes, width, layer, layer).at(batch, 49))]
            assert whole == pytest.approx(measured, rel=1e-9), (storage, rank, tailor, width, batch)
