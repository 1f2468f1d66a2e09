"""Measuring a machine: probes in a folder, timed here or by a command that reaches a device, and the profile of them.

The command is given the folder as its last argument and prints one JSON object on the last line of stdout. What it is
asked and what it answers is told in `kind_edge.budget.runner`, which is the command for any machine with Python.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.budget import runner
from kind_edge.budget.precision import ARITHMETICS
from kind_edge.budget.probes import ALL_CORES, ONE_THREAD, Probe, operator_table, operator_us, table_probes
from kind_edge.budget.profile import ComputeUnit, DeviceProfile, Figure
from kind_edge.budget.roofline import (
    activation_bytes_per_s,
    memory_bytes_per_s,
    own_probes,
    throughput_flops_per_s,
)
from kind_edge.errors import GateError, InputError, UsageError

RUNNER_TIMEOUT_S = 1800.0
"""Probes take about two minutes here; a phone may be ten times as slow, and the folder has to reach it first."""

OnProgress = Callable[[float], None]

_ANSWER_KEYS = ("version", "device", "system", "runtime", "threads", "ram_bytes", "latency_us")
_DERIVED_APP_SHARE = 0.35
_MAINS_SHARE, _DEVICE_SHARE = 1.0, 0.5


@dataclass(frozen=True)
class Measured:
    """What a run of probes found, and on what. `latency_us` by probe name."""

    device: str
    system: str
    runtime: str
    threads: int
    ram_bytes: float
    latency_us: Mapping[str, float]

    def source(self, threads: int) -> str:
        return f"measured: {self.device}, threads: {threads}, {self.runtime}, no spinning"


def all_probes(one_thread: bool = True) -> list[Probe]:
    """Every probe, each name once; large and small files mixed, so that a disturbance hits no one kind alone.

    Without `one_thread`: of a device that has one core, whose models cannot run on more.
    """
    kinds = [table_probes(ALL_CORES), own_probes(), *([table_probes(ONE_THREAD)] if one_thread else [])]
    probes = {probe.name: probe for kind in kinds for probe in kind}
    by_session: dict[tuple[str, int | None], list[Probe]] = {}
    for probe in probes.values():
        by_session.setdefault((probe.file, probe.threads), []).append(probe)
    groups = list(by_session.values())
    return [probe for index in np.random.default_rng(0).permutation(len(groups)) for probe in groups[index]]


def measure_here(threads: int, probes: Sequence[Probe], on_progress: OnProgress | None = None) -> dict[str, float]:
    """Microseconds of probes on this machine: two minutes for all, a few seconds for the roofline's."""
    with probes_folder(probes) as folder:
        return runner.measure(folder, threads, on_progress=on_progress)


def measure_with(command: str, probes: Sequence[Probe] | None = None, timeout_s: float = RUNNER_TIMEOUT_S) -> Measured:
    """The same through `COMMAND FOLDER`.

    Raises `UsageError` for a command that cannot be started, `GateError` for one that fails or takes too long,
    `InputError` for an answer that is not what it must be.
    """
    wanted = list(probes or all_probes())
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--runner {command!r}: cannot be split into words ({error})") from error
    if not words:
        raise UsageError("--runner: the command is empty")
    with probes_folder(wanted) as folder:
        try:
            done = subprocess.run(
                [*words, str(folder)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
                errors="replace", check=False,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"--runner {words[0]}: cannot be started ({error.strerror}); check its path") from error
        except subprocess.TimeoutExpired as error:
            raise GateError(
                f"--runner {words[0]}: no answer within {timeout_s:g} s; is the device reachable?"
            ) from error
    if done.returncode:
        told = done.stderr.strip()[-500:] or "it says nothing on stderr"
        raise GateError(f"--runner {words[0]}: exit code {done.returncode}: {told}")
    return _answer(done.stdout, [probe.name for probe in wanted], f"--runner {words[0]}")


def measured_profile(name: str, measured: Measured, with_table: bool = True) -> DeviceProfile:
    """The profile of a measured device: its operator table, and roofline figures for what the table does not hold."""
    latency_us, source = measured.latency_us, measured.source(measured.threads)
    rates = throughput_flops_per_s(latency_us)
    whole = Figure(1.0, "M", "by construction: the throughput measured is the one reached")
    shapes = (ALL_CORES, ONE_THREAD) if with_table and measured.threads > 1 else (ALL_CORES,) if with_table else ()
    tables = [
        dataclasses.replace(operator_table(latency_us, each), source=measured.source(each.threads or measured.threads))
        for each in shapes
    ]
    cpu = ComputeUnit(
        name="cpu",
        peak_flops_per_s={p: Figure(rates[p], "M", source) for p in ARITHMETICS},
        efficiency=dict.fromkeys(ARITHMETICS, whole),
        sustained_share=Figure(_DEVICE_SHARE, "E", "derived: usual for passively cooled devices"),
        overhead_us=Figure(operator_us(latency_us), "M", source),
        table=tables[0] if tables else None,
        one_thread=tables[1] if tables[1:] else None,
    )
    ram = measured.ram_bytes
    return DeviceProfile(
        name=name,
        title=measured.device,
        os=measured.system,
        execution_providers=("cpu-mlas",),
        units={"cpu": cpu},
        memory_bytes_per_s=Figure(memory_bytes_per_s(latency_us), "M", source),
        activation_bytes_per_s=Figure(activation_bytes_per_s(latency_us), "M", source),
        ram_bytes=Figure(ram, "M", "the operating system"),
        app_memory_limit_bytes=Figure(ram * _DERIVED_APP_SHARE, "E", "derived: 0.35 of RAM, the share that iOS grants"),
    )


@contextmanager
def probes_folder(probes: Sequence[Probe]) -> Iterator[Path]:
    """A temporary folder with the models of probes, and the request."""
    with tempfile.TemporaryDirectory(prefix="kind-edge-probes-") as name:
        folder, models = Path(name), []
        for probe in probes:
            if not (folder / probe.file).exists():
                (folder / probe.file).write_bytes(probe.build())
            inputs = {key: {"dtype": dtype, "shape": list(shape)} for key, (dtype, shape) in probe.inputs.items()}
            fixed = {} if probe.threads is None else {"threads": probe.threads}
            models.append({"name": probe.name, "file": probe.file, "inputs": inputs, **fixed})
        (folder / runner.REQUEST).write_text(json.dumps({"version": runner.VERSION, "models": models}))
        yield folder


def _answer(stdout: str, names: Sequence[str], where: str) -> Measured:
    """The last line, checked."""
    lines = stdout.strip().splitlines()
    try:
        answer: Any = json.loads(lines[-1])
    except (IndexError, ValueError, RecursionError) as error:
        last = repr(lines[-1][:80]) if lines else "nothing"
        raise InputError(f"{where}: the last line on stdout is {last}, want one JSON object") from error
    if not isinstance(answer, dict) or (missing := [key for key in _ANSWER_KEYS if key not in answer]):
        lacking = ", ".join(missing) if isinstance(answer, dict) else "everything"
        raise InputError(f"{where}: the answer lacks {lacking}; want an object with {', '.join(_ANSWER_KEYS)}")
    if answer["version"] != runner.VERSION:
        raise InputError(f"{where}: answers in version {answer['version']!r:.20}, want {runner.VERSION}")
    texts = {key: answer[key] for key in ("device", "system", "runtime")}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: {key}: got {value!r:.40}, want some text")
    numbers = {key: _number(answer[key], f"{where}: {key}") for key in ("threads", "ram_bytes")}
    latency_us = answer["latency_us"]
    if not isinstance(latency_us, dict):
        raise InputError(f"{where}: latency_us: got {latency_us!r:.40}, want microseconds by name")
    if lost := [name for name in names if name not in latency_us]:
        shown = ", ".join(lost[:3])
        raise InputError(f"{where}: latency_us: {len(lost)} of {len(names)} models are missing, such as {shown}")
    times = {name: _number(latency_us[name], f"{where}: latency_us.{name}") for name in names}
    return Measured(**texts, threads=int(numbers["threads"]), ram_bytes=numbers["ram_bytes"], latency_us=times)


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{where}: got {value!r:.40}, want a number above zero")
    return float(value)
