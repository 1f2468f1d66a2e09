"""Latency of a model file on an Android device: ONNX Runtime's own `onnxruntime_perf_test`, through `adb shell`.

The program and `libonnxruntime.so` come from a build of ONNX Runtime for Android (`build.sh --android
--build_shared_lib`) and lie in FOLDER on the device. It takes a model and, in `test_data_set_0` beside it, a tensor
(TensorProto) for each of its inputs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kind_edge.deploy.bench import Conditions, LatencyReport
from kind_edge.errors import GateError, InputError, UsageError

FOLDER, PROGRAM = "/data/local/tmp", "onnxruntime_perf_test"
_PLACE = f"{FOLDER}/kind-edge"
_TIMEOUT_S = 1800
_WARMUPS = 1
"""The program's own."""
_FACTS = ("ro.product.model", "ro.soc.model", "ro.build.version.release")
_TIMES = {
    "cold_load_ms": r"Session creation time cost: *([\d.e+-]+) *s",
    "mean_ms": r"Average inference time cost(?: total)?: *([\d.e+-]+) *ms",
    "p50_ms": r"P50 Latency: *([\d.e+-]+) *s",
    "p90_ms": r"P90 Latency: *([\d.e+-]+) *s",
    "p99_ms": r"P99 Latency: *([\d.e+-]+) *s",
}
_MEMORY = r"Peak working set size: *(\d+) *bytes"


@dataclass(frozen=True)
class Steps:
    """The commands of one measurement, in their order; `clear` runs whatever happens."""

    ask: tuple[str, ...]
    clear: tuple[str, ...]
    push: tuple[str, ...]
    measure: tuple[str, ...]


def steps(runner: str, folder: Path, file: str, runs: int, threads: int | None, provider: str) -> Steps:
    """Commands that measure `file` in the local `folder`; `UsageError` for a runner that is not `adb ... shell`."""
    try:
        words = tuple(shlex.split(runner))
    except ValueError as error:
        raise UsageError(f"--runner {runner!r}: cannot be split into words ({error})") from error
    if len(words) < 2 or words[-1] != "shell":
        raise UsageError(f'--runner {runner!r}: want "adb shell", or "adb -s SERIAL shell" where there are several')
    options = f"-m times -r {runs} -e {provider} -D -s" + (f" -x {threads}" if threads else "")
    run = f"cd {FOLDER} && LD_LIBRARY_PATH=. ./{PROGRAM} {options} {_PLACE}/{shlex.quote(file)}"
    return Steps(
        ask=(*words, "; ".join(f"getprop {name}" for name in _FACTS) + "; nproc"),
        clear=(*words, f"rm -rf {_PLACE}"),
        push=(*words[:-1], "push", f"{folder}/.", _PLACE),
        measure=(*words, run),
    )


def bench_on_phone(path: Path, runner: str, threads: int | None, runs: int, provider: str = "cpu") -> LatencyReport:
    """One model file at batch 1, with the same inputs as `bench` here.

    Raises `UsageError` if adb cannot be started, `GateError` if a command fails on the device, `InputError` for an
    answer without figures.
    """
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as temporary:
        todo = steps(runner, Path(temporary), path.name, runs, threads, provider)
        _fill(Path(temporary), path)
        told = [line.strip() for line in _run(todo.ask).splitlines() if line.strip()]
        _run(todo.clear)
        try:
            _run(todo.push)
            answer = _run(todo.measure)
        finally:
            _run(todo.clear)
    cores = int(told[-1]) if told and told[-1].isdecimal() else 0
    name = ", ".join(told[:-1]) or "an Android device"
    here = Conditions(name, (), cores, threads, f"onnxruntime ({PROGRAM})", provider, False, "Android")
    return report(answer, path, runs, here)


def report(answer: str, path: Path, runs: int, here: Conditions) -> LatencyReport:
    """What `onnxruntime_perf_test -s` prints, as figures."""
    found = {name: re.search(pattern, answer) for name, pattern in _TIMES.items()}
    if missing := [name for name, match in found.items() if match is None]:
        raise InputError(f"{PROGRAM}: its answer lacks {', '.join(missing)}: {answer.strip()[-300:]!r}")
    times = {name: float(match[1]) * (1 if name == "mean_ms" else 1e3) for name, match in found.items() if match}
    memory = re.search(_MEMORY, answer)
    return LatencyReport(
        subject="evaluation",
        file=path.name,
        size_bytes=path.stat().st_size,
        batch=1,
        warmups=_WARMUPS,
        runs=runs,
        cold_load_ms=times["cold_load_ms"],
        mean_ms=times["mean_ms"],
        p50_ms=times["p50_ms"],
        p90_ms=times["p90_ms"],
        p99_ms=times["p99_ms"],
        peak_memory_bytes=int(memory[1]) if memory else None,
        conditions=here,
    )


def _fill(folder: Path, path: Path) -> None:
    """The model, and its inputs as the program looks for them."""
    from onnx import numpy_helper

    from kind_edge.deploy.bench_worker import random_inputs
    from kind_edge.deploy.session import open_session

    inputs = folder / "test_data_set_0"
    inputs.mkdir()
    for number, (name, values) in enumerate(random_inputs(open_session(path)).items()):
        (inputs / f"input_{number}.pb").write_bytes(numpy_helper.from_array(values, name).SerializeToString())
    shutil.copyfile(path, folder / path.name)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=_TIMEOUT_S,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--runner {command[0]}: cannot be started ({error.strerror}); check its path") from error
    except subprocess.TimeoutExpired as error:
        raise GateError(f"--runner {command[0]}: no answer within {_TIMEOUT_S} s; is the device reachable?") from error
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip())[-500:] or "it says nothing"
        raise GateError(
            f"{' '.join(command)}: exit code {done.returncode}: {told}; "
            f"{PROGRAM} and libonnxruntime.so must lie in {FOLDER} on the device"
        )
    return done.stdout
