"""The interleaved run: every contestant's process stays alive and is asked for a few runs a round, forth and back.

What else the machine does meanwhile hits all alike; figures are compared within a round, and the ratios of the rounds
are what is reported, with their spread.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kind_edge.errors import GateError

GUIDED, EQUAL = "guided", "equal"


class WorkerFailed(GateError):
    """An engine's process refused or died; the message says what it said."""


@dataclass(frozen=True)
class Contestant:
    """One model in one engine.

    `batch`: rows of a call in a guided step, two at once or one in each of two calls. `images`: label -> what the
    worker needs to draw an image. Those in `late` are asked for when memory has been read: an engine of fixed shapes
    loads another file for them.
    """

    name: str
    command: tuple[str, ...]
    target: Path
    precision: str
    images: Mapping[str, Mapping[str, Any]]
    late: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch: int = 1
    threads: int = 1
    single: bool = True
    """Whether it can be asked for one evaluation."""


@dataclass(frozen=True)
class Measured:
    """`image_ms`: label -> the median of each round. `evaluation_ms`: rows of a call -> likewise."""

    name: str
    runtime: str
    batch: int
    threads: int
    load_ms: float
    file_bytes: int
    peak_bytes: int
    image_ms: Mapping[str, Sequence[float]]
    evaluation_ms: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Ratio:
    """Of two contestants' times within the rounds: the median, and the range of the middle 80 %."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 1) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """How many times as long the first takes, round by round."""
    if len(slower) != len(faster) or not slower:
        raise ValueError(f"{len(slower)} and {len(faster)} rounds: want as many, and at least one")
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    tenth = round(0.1 * (len(ratios) - 1))
    return Ratio(statistics.median(ratios), ratios[tenth], ratios[-1 - tenth])


class Worker:
    """A process that answers one JSON line with another."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        own = {
            name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"
        }  # engines are told theirs
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=own
            )
        self._log, self._command = log, command

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises `WorkerFailed`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            code = self._process.wait()
            told = self._log.read_text(errors="replace")[-1000:]
            raise WorkerFailed(f"{' '.join(self._command)} ended with exit code {code}: {told}") from error
        if "error" in answer:
            raise WorkerFailed(f"{' '.join(self._command)}, asked to {do}: {answer['error']}")
        return dict(answer)

    def close(self) -> None:
        """Nothing that it holds is worth waiting for."""
        with contextlib.suppress(BrokenPipeError):
            self._process.kill()
            self._process.communicate()


@contextmanager
def working(command: Sequence[str]) -> Iterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="kind-edge-peers-") as folder:
        worker = Worker(command, Path(folder, "log"))
        try:
            yield worker
        finally:
            worker.close()


def run(contestants: Sequence[Contestant], rounds: int, runs: int) -> tuple[list[Measured], dict[str, str]]:
    """What was measured of each, and why others could not be."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        opened: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        for one in contestants:
            say(f"starting {one.name}")
            try:
                worker = stack.enter_context(working(one.command))
                asked = {"target": str(one.target), "precision": one.precision}
                asked |= {"batch": one.batch, "threads": one.threads}
                opened[one.name] = {"batch": one.batch, **worker.ask("open", **asked)}
                workers[one.name] = worker
            except WorkerFailed as error:
                failed[one.name] = " ".join(str(error).split())[-400:]
                say(f"{one.name}: {failed[one.name]}")
        left = [one for one in contestants if one.name in workers]

        def images(which: str) -> Callable[[Contestant], dict[str, float]]:
            def ask(one: Contestant) -> dict[str, float]:
                wanted: Mapping[str, Mapping[str, Any]] = getattr(one, which)
                return {label: _median(workers[one.name].ask("image", **asked, runs=runs))
                        for label, asked in wanted.items()}  # fmt: skip

            return ask

        def evaluations(one: Contestant) -> dict[str, float]:
            if not one.single:
                return {}
            asked = {str(batch): workers[one.name].ask("evaluate", batch=batch, runs=runs) for batch in (1, 2)}
            return {batch: _median(answer) for batch, answer in asked.items()}

        say(f"{rounds} rounds of images")
        early = interleaved(left, rounds, images("images"))
        peaks = {one.name: workers[one.name].ask("peak")["peak_bytes"] for one in left}
        say("equal evaluations, and single ones")
        late = interleaved(left, rounds, images("late"))
        single = interleaved(left, rounds, evaluations)
    measured = [
        Measured(
            one.name, opened[one.name]["runtime"], opened[one.name]["batch"], one.threads, opened[one.name]["load_ms"],
            file_bytes(one, opened[one.name]["batch"]), peaks[one.name],
            {**early[one.name], **late[one.name]}, single[one.name],
        )
        for one in left
    ]  # fmt: skip
    return measured, failed


def interleaved(
    contestants: Sequence[Contestant], rounds: int, ask: Callable[[Contestant], Mapping[str, float]]
) -> dict[str, dict[str, list[float]]]:
    """name -> label -> one figure a round; rounds go over the contestants forth and back."""
    found: dict[str, dict[str, list[float]]] = {one.name: {} for one in contestants}
    for number in range(rounds):
        for one in contestants if number % 2 == 0 else reversed(contestants):
            for label, value in ask(one).items():
                found[one.name].setdefault(label, []).append(value)
    return found


@dataclass(frozen=True)
class Way:
    """How an engine is quickest: rows of a call in a guided step, and threads."""

    batch: int
    threads: int


def quickest_way(
    command: Sequence[str], target: Path, precision: str, threads: int, batches: Sequence[int] = (1, 2), tries: int = 20
) -> Way:
    """Of one thread or `threads`; of two rows, one call of both or two of one (1 alone: a step is a single row)."""
    found: dict[Way, float] = {}
    for count in sorted({1, threads}):
        with working(command) as worker:
            worker.ask("open", target=str(target), precision=precision, batch=max(batches), threads=count)
            for batch in batches:
                latencies_ms = worker.ask("evaluate", batch=batch, runs=tries)["latencies_ms"]
                found[Way(batch, count)] = statistics.median(latencies_ms) * max(batches) / batch
    return min(found, key=lambda way: found[way])


def file_bytes(one: Contestant, batch: int) -> int:
    """Of what an app loads: files that are for another batch do not count, nor do other models of a bundle."""
    if (one.target / one.precision).is_file():
        return (one.target / one.precision).stat().st_size
    other = f"b{3 - batch}."
    return sum(path.stat().st_size for path in one.target.iterdir() if not path.name.startswith(other))


def _median(answer: Mapping[str, Any]) -> float:
    return statistics.median(answer["latencies_ms"])


def say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)
