"""Two models side by side: both loaded, taking turns on one machine, so that its slow and quick spells meet both alike.

In every round each has a turn of a few calls, the first to go alternating; a round gives one ratio of medians. The
ratio is the median over the rounds, its interval what 95 % of resamplings of the rounds give.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.deploy.bench import LatencyReport, Subject, evaluation, image, place, report
from kind_edge.deploy.bundle import open_bundle
from kind_edge.deploy.measuring import MeasuringProcess
from kind_edge.errors import UsageError

RUNNABLE = (".onnx", ".ort")
CALLS_PER_TURN = 5
"""Timed calls of a model in one turn, after one that brings its weights back into the caches. An image is many
evaluations by itself: one to a turn, and as many turns."""
MIN_ROUNDS = 5
MAX_OTHER_LOAD = 0.05
"""Share of all cores that other processes may take before the machine counts as busy."""
_RESAMPLINGS = 2000


@dataclass(frozen=True)
class Comparison:
    """`ratio` = time of `first` / time of `second`: below 1 the first is quicker.

    `low` and `high` enclose it with 95 % confidence, `lowest` and `highest` are single rounds. `other_load` is the
    share of all cores that other processes took meanwhile, stolen time of a virtual machine included; None if not
    known.
    """

    first: LatencyReport
    second: LatencyReport
    rounds: int
    ratio: float
    low: float
    high: float
    lowest: float
    highest: float
    other_load: float | None

    @property
    def quiet(self) -> bool:
        """Whether nothing else of weight ran meanwhile, as far as is known."""
        return self.other_load is None or self.other_load <= MAX_OTHER_LOAD

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "first": self.first.to_dict(), "second": self.second.to_dict(), "quiet": self.quiet}


def compare(
    first: Path | str,
    second: Path | str,
    threads: int | None = None,
    runs: int = 50,
    provider: str = "cpu",
    allow_fallback: bool = False,
) -> Comparison:
    """Compare one evaluation of two model files (`runs` of each), or one image of two bundles (a fifth of that).

    Errors as in `bench_model`; `UsageError` for a model beside a bundle.
    """
    if str(first).endswith(RUNNABLE) != str(second).endswith(RUNNABLE):
        raise UsageError(
            f"{first} and {second}: a bundle draws a whole image, a model file is one evaluation; name two of a kind"
        )
    if runs < 1:
        raise UsageError(f"runs {runs}: want at least 1 run")
    with contextlib.ExitStack() as opened:
        subjects = [_subject(path, opened, threads, provider) for path in (first, second)]
        placements = [place(subject, allow_fallback) for subject in subjects]
        processes = [opened.enter_context(MeasuringProcess(subject.request)) for subject in subjects]
        loaded = [process.answer() for process in processes]
        calls, untimed = (CALLS_PER_TURN, 1) if subjects[0].kind == "evaluation" else (1, 0)
        watch = _Watch([process.process_id for process in processes])
        turns: tuple[list[list[float]], list[list[float]]] = ([], [])
        for number in range(max(MIN_ROUNDS, -(-runs // CALLS_PER_TURN))):
            for each in (0, 1) if number % 2 == 0 else (1, 0):
                turns[each].append(processes[each].ask(calls, untimed))
        other_load = watch.other_load()
        peaks = [process.finish()["peak_memory_bytes"] for process in processes]
        latencies_ms = [[one for turn in each for one in turn] for each in turns]
        reports = [report(*known) for known in zip(subjects, loaded, latencies_ms, peaks, placements, strict=True)]
    return judge(reports[0], reports[1], turns[0], turns[1], other_load)


def judge(
    first: LatencyReport,
    second: LatencyReport,
    turns: Sequence[Sequence[float]],
    other_turns: Sequence[Sequence[float]],
    other_load: float | None,
) -> Comparison:
    """The ratio of two models from the latencies of their turns, round by round."""
    import numpy as np

    ratios = np.array([statistics.median(a) / statistics.median(b) for a, b in zip(turns, other_turns, strict=True)])
    drawn = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLINGS, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return Comparison(
        first=first,
        second=second,
        rounds=len(ratios),
        ratio=float(np.median(ratios)),
        low=float(low),
        high=float(high),
        lowest=float(ratios.min()),
        highest=float(ratios.max()),
        other_load=other_load,
    )


def _subject(path: Path | str, opened: contextlib.ExitStack, threads: int | None, provider: str) -> Subject:
    if str(path).endswith(RUNNABLE):
        return evaluation(path, threads, provider=provider)
    folder = opened.enter_context(open_bundle(path))
    return image(folder, str(path), threads=threads, provider=provider)


class _Watch:
    """What the machine does beside us, from here to `other_load`."""

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = processes
        self._started, self._all, self._own = time.monotonic(), *self._busy_s()

    def other_load(self) -> float | None:
        import psutil

        wall_s = time.monotonic() - self._started
        everything, own = self._busy_s()
        cores = psutil.cpu_count() or 1
        return max(0.0, (everything - self._all) - (own - self._own)) / (wall_s * cores) if wall_s > 0 else None

    def _busy_s(self) -> tuple[float, float]:
        """Seconds of CPU time that were not idle, of the whole machine and of these processes with our own."""
        import psutil

        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
        return sum(times) - idle - guests, sum(self._own_s())

    def _own_s(self) -> Iterator[float]:
        import psutil

        for process in (psutil.Process(), *map(psutil.Process, self._processes)):
            spent = process.cpu_times()
            yield spent.user + spent.system
