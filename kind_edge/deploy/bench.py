"""How long a model takes and how much memory, measured in a process of its own, with the conditions beside the numbers.

Method: load once in a fresh process, warm up, then time single calls; percentiles interpolate linearly between runs. A
call begins with arrays in the host's memory and ends with arrays there, so that on an accelerator both copies and all
of its work are inside, nothing still queued.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.deploy.bundle import open_bundle, verified_manifest
from kind_edge.deploy.measuring import MeasuringProcess
from kind_edge.deploy.placement import Placement
from kind_edge.deploy.providers import CPU, resolve_provider
from kind_edge.errors import InputError, UsageError


@dataclass(frozen=True)
class Conditions:
    """What a latency is worth nothing without. `threads` None: ONNX Runtime's choice, one per physical core.

    `simulated`: the provider's unit is simulated on the CPU, and the times say nothing about it.
    """

    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    threads: int | None
    runtime: str
    provider: str
    spinning: bool
    system: str
    simulated: bool = False


@dataclass(frozen=True)
class LatencyReport:
    """Latencies in milliseconds of single calls: one evaluation of a model (`batch` of them), or one whole image.

    `cold_load_ms` is opening the file in a fresh process, the file itself perhaps in the system's cache.
    `peak_memory_bytes` is the most resident memory from loading to the last run, minus what the process held with
    Python, numpy and onnxruntime imported; None where the system does not tell. Memory of a GPU is not in it.
    `placement`: what another provider than the CPU left to others.
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
    placement: Placement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        if self.placement is None:
            del values["placement"]
        return values


@dataclass(frozen=True)
class Subject:
    """What is measured: `request` is the measuring process's, `file` the model behind it."""

    request: Mapping[str, Any]
    file: Path

    @property
    def kind(self) -> str:
        """ "evaluation" or "image"."""
        return str(self.request["subject"])


def bench_model(
    path: Path | str,
    threads: int | None = None,
    warmups: int = 10,
    runs: int = 50,
    provider: str = "cpu",
    batch: int = 1,
    allow_fallback: bool = False,
) -> LatencyReport:
    """Time one call of any ONNX model: random inputs of the declared shapes, dynamic sizes `batch`, integers 0.

    Raises `UsageError` for a provider that is not there (naming those that are) or cannot run the model's Loop,
    `InputError` for a file that is no model, `GateError` if the provider leaves work to the CPU (unless
    `allow_fallback`: then the report says how much) or the process dies.
    """
    subject = evaluation(path, threads, warmups, provider, batch)
    return _measure(subject, runs, allow_fallback)


def bench_image(
    path: Path | str,
    model: str | None = None,
    threads: int | None = None,
    warmups: int = 1,
    runs: int = 5,
    provider: str = "cpu",
    allow_fallback: bool = False,
) -> LatencyReport:
    """Time one image of a bundle: the whole sampling loop with guidance, through `load_bundle(...).generate`.

    `model` as in `load_bundle`. Errors as in `bench_model`; the bundle's hashes are checked first.
    """
    with open_bundle(path) as folder:
        return _measure(image(folder, str(path), model, threads, warmups, provider), runs, allow_fallback)


def evaluation(
    path: Path | str, threads: int | None = None, warmups: int = 10, provider: str = "cpu", batch: int = 1
) -> Subject:
    """One call of a model file."""
    conditions = {"threads": threads, "warmups": warmups, "provider": provider, "batch": batch}
    return Subject({"subject": "evaluation", "path": str(Path(path).resolve()), **conditions}, Path(path))


def image(
    folder: Path,
    where: str,
    model: str | None = None,
    threads: int | None = None,
    warmups: int = 1,
    provider: str = "cpu",
) -> Subject:
    """One whole image of an opened bundle, which the user named `where`; its hashes are checked."""
    from kind_edge.deploy.runtime import choose_model  # needs numpy, which reading a report does not

    file = choose_model(verified_manifest(folder, where), model).path
    conditions = {"threads": threads, "warmups": warmups, "provider": provider, "batch": 1}
    return Subject({"subject": "image", "path": str(folder.resolve()), "model": file, **conditions}, folder / file)


def place(subject: Subject, allow_fallback: bool) -> Placement | None:
    """Where the nodes of a subject's model run, found out in a process of its own; None on the CPU. Refuses first of
    all what needs no measurement: an unknown provider, a file that is not there."""
    warmups, provider = subject.request["warmups"], subject.request["provider"]
    if warmups < 0:
        raise UsageError(f"warmups {warmups}: want no negative number")
    name = resolve_provider(provider)
    if not subject.file.is_file():
        raise InputError(f"{subject.file}: no such model file")
    if name == CPU:
        return None
    request = {"subject": "placement", "path": str(subject.file.resolve()), "allow_fallback": allow_fallback}
    with MeasuringProcess({**subject.request, **request}) as process:
        found = process.answer()
    return Placement(**{**found, **{key: tuple(found[key]) for key in ("outside", "products_outside")}})


def report(
    subject: Subject,
    loaded: Mapping[str, Any],
    latencies_ms: list[float],
    peak_memory_bytes: int | None,
    placement: Placement | None,
) -> LatencyReport:
    """All that is known of a measured subject; `loaded` is what its process said when it was ready."""
    ordered, conditions = sorted(latencies_ms), loaded["conditions"]
    return LatencyReport(
        subject=subject.kind,
        file=subject.file.name,
        size_bytes=subject.file.stat().st_size,
        batch=subject.request["batch"],
        warmups=subject.request["warmups"],
        runs=len(ordered),
        cold_load_ms=loaded["cold_load_ms"],
        mean_ms=sum(ordered) / len(ordered),
        p50_ms=percentile(ordered, 50),
        p90_ms=percentile(ordered, 90),
        p99_ms=percentile(ordered, 99),
        peak_memory_bytes=peak_memory_bytes,
        conditions=Conditions(**{**conditions, "instruction_sets": tuple(conditions["instruction_sets"])}),
        placement=placement,
    )


def percentile(ordered: list[float], percent: float) -> float:
    """The percentile of values in ascending order, linear between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _measure(subject: Subject, runs: int, allow_fallback: bool) -> LatencyReport:
    if runs < 1:
        raise UsageError(f"runs {runs}: want at least 1 run")
    placement = place(subject, allow_fallback)
    with MeasuringProcess(subject.request) as process:
        loaded = process.answer()
        latencies_ms = process.ask(runs)
        peak = process.finish()["peak_memory_bytes"]
    return report(subject, loaded, latencies_ms, peak, placement)
