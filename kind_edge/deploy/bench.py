"""How long a model takes and how much memory, measured in a process of its own, with the conditions beside the numbers.

Method: load once in a fresh process, warm up, then time single calls; percentiles interpolate linearly between runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge import errors
from kind_edge.deploy.bundle import open_bundle, verified_manifest
from kind_edge.deploy.session import resolve_provider
from kind_edge.errors import GateError, InputError, KindEdgeError, UsageError


@dataclass(frozen=True)
class Conditions:
    """What a latency is worth nothing without. `threads` None: ONNX Runtime's choice, one per physical core."""

    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    threads: int | None
    runtime: str
    provider: str
    spinning: bool
    system: str


@dataclass(frozen=True)
class LatencyReport:
    """Latencies in milliseconds of single calls: one evaluation of a model (`batch` of them), or one whole image.

    `cold_load_ms` is opening the file in a fresh process, the file itself perhaps in the system's cache.
    `peak_memory_bytes` is the most resident memory from loading to the last run, minus what the process held with
    Python, numpy and onnxruntime imported; None where the system does not tell. Memory of a GPU is not in it.
    """

    subject: str
    file: str
    size_bytes: int
    batch: int
    warmups: int
    runs: int
    cold_load_ms: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    peak_memory_bytes: int | None
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def bench_model(
    path: Path | str,
    threads: int | None = None,
    warmups: int = 10,
    runs: int = 50,
    provider: str = "cpu",
    batch: int = 1,
) -> LatencyReport:
    """Time one call of any ONNX model: random inputs of the declared shapes, dynamic sizes `batch`, integers 0.

    Raises `UsageError` for a provider that is not there (naming those that are), `InputError` for a file that is no
    model, `GateError` if the provider leaves work to the CPU or the process dies.
    """
    request = {"subject": "evaluation", "path": str(Path(path).resolve())}
    return _measure(request, Path(path), threads, warmups, runs, provider, batch)


def bench_image(
    path: Path | str,
    model: str | None = None,
    threads: int | None = None,
    warmups: int = 1,
    runs: int = 5,
    provider: str = "cpu",
) -> LatencyReport:
    """Time one image of a bundle: the whole sampling loop with guidance, through `load_bundle(...).generate`.

    `model` as in `load_bundle`. Errors as in `bench_model`; the bundle's hashes are checked first.
    """
    from kind_edge.deploy.runtime import choose_model  # needs numpy, which reading a report does not

    with open_bundle(path) as folder:
        file = choose_model(verified_manifest(folder, str(path)), model).path
        request = {"subject": "image", "path": str(folder.resolve()), "model": file}
        return _measure(request, folder / file, threads, warmups, runs, provider)


def _measure(
    request: Mapping[str, str],
    file: Path,
    threads: int | None,
    warmups: int,
    runs: int,
    provider: str,
    batch: int = 1,
) -> LatencyReport:
    if runs < 1 or warmups < 0:
        raise UsageError(f"runs {runs}, warmups {warmups}: want at least 1 run and no negative number")
    resolve_provider(provider)
    if not file.is_file():
        raise InputError(f"{file}: no such model file")
    asked = {"threads": threads, "warmups": warmups, "runs": runs, "provider": provider, "batch": batch}
    measured = _run_worker({**request, **asked})
    latencies = sorted(measured["latencies_ms"])
    conditions = measured["conditions"]
    conditions["instruction_sets"] = tuple(conditions["instruction_sets"])
    return LatencyReport(
        subject=request["subject"],
        file=file.name,
        size_bytes=file.stat().st_size,
        batch=batch,
        warmups=warmups,
        runs=runs,
        cold_load_ms=measured["cold_load_ms"],
        mean_ms=sum(latencies) / len(latencies),
        p50_ms=percentile(latencies, 50),
        p90_ms=percentile(latencies, 90),
        p99_ms=percentile(latencies, 99),
        peak_memory_bytes=measured["peak_memory_bytes"],
        conditions=Conditions(**conditions),
    )


def percentile(ordered: list[float], percent: float) -> float:
    """The percentile of values in ascending order, linear between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _run_worker(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run `bench_worker` in a fresh interpreter that finds this very package, and re-raise what it refuses."""
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "kind_edge.deploy.bench_worker", json.dumps(request)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search}, check=False
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        if done.returncode < 0:
            raise GateError(
                f"{request['path']}: the measuring process was killed by signal {-done.returncode}; "
                "signal 9 mostly means that memory ran out"
            ) from error
        raise KindEdgeError(f"the measuring process failed (exit {done.returncode}): {done.stderr[-2000:]}") from error
    if "error" in answer:
        kind = getattr(errors, answer["error"]["kind"], KindEdgeError)
        raise kind(answer["error"]["message"])
    return dict(answer)
