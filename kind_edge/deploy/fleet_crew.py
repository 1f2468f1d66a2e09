"""The processes of a fleet export: each opens the model once and does one task after the other."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kind_edge.deploy.fleet_tasks import Failure, Order, Task

if TYPE_CHECKING:
    from kind_edge.deploy.fleet_worker import Worker

OnStage = Callable[[int, str], None]
OnCount = Callable[[int, int], None]


class Crew:
    """Numbered workers; `stage` is told (worker, what begins), `count` how far a measurement of the model is.

    One worker works in this process. Several are processes with an equal share of the cores; left in whatever way, the
    block ends them. A worker that dies fails its task, and another takes its place.
    """

    def __init__(self, order: Order, workers: int, cores: int, stage: OnStage, count: OnCount) -> None:
        self._order, self._stage, self._count = order, stage, count
        self._threads = max(1, cores // workers)
        self._team: list[_Process | _Here] = []
        self._alone = workers == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for each in self._team:
            each.end()

    def grow(self, workers: int) -> None:
        """To so many."""
        while len(self._team) < workers:
            self._team.append(_Here(self) if self._alone else _Process(self._order, self._threads))

    def idle(self) -> list[int]:
        return [number for number, each in enumerate(self._team) if each.task is None]

    @property
    def busy(self) -> bool:
        return any(each.task is not None for each in self._team)

    def task(self, number: int) -> Task | None:
        """What a worker is doing."""
        return self._team[number].task

    def start(self, number: int, task: Task) -> None:
        self._team[number].start(task)

    def answers(self) -> Iterator[tuple[Task, Any]]:
        """Wait until something happens; tasks that are done with their answers, in the order of the workers."""
        running = {each.events: number for number, each in enumerate(self._team) if each.task is not None}
        for events in [e for e in running if e is None] or wait([e for e in running if e is not None]):
            number = running[events]  # type: ignore[index]
            worker = self._team[number]
            task = worker.task
            kind, value = worker.receive()
            if kind == "stage":
                self._stage(number, value)
            elif kind == "count":
                self._count(*value)
            else:
                if kind == "death":
                    self._team[number] = _Process(self._order, self._threads)
                assert task is not None
                worker.task = None
                yield task, value


class _Here:
    """The only worker, in this process."""

    events = None

    def __init__(self, crew: Crew) -> None:
        from kind_edge.deploy.fleet_worker import Worker

        self.task: Task | None = None
        self._worker = Worker(crew._order, lambda text: crew._stage(0, text), crew._count)

    def start(self, task: Task) -> None:
        self.task = task

    def receive(self) -> tuple[str, Any]:
        assert self.task is not None
        return "answer", self._worker.do(self.task)

    def end(self) -> None:
        """Nothing is left of it."""


class _Process:
    """A worker in a fresh interpreter."""

    def __init__(self, order: Order, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.events, theirs = context.Pipe()
        self.task: Task | None = None
        self._process = context.Process(target=_serve, args=(theirs, order, threads))
        self._process.start()
        theirs.close()

    def start(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(ConnectionError):  # it died meanwhile, which `receive` tells
            self.events.send(task)

    def receive(self) -> tuple[str, Any]:
        """("stage", text), ("count", (done, total)), ("answer", value), or ("death", Failure)."""
        try:
            kind, value = self.events.recv()
            return kind, value
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            told = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = "; signal 9 mostly means that memory ran out" if code == -signal.SIGKILL else ""
            return "death", Failure("GateError", f"the process that made this {told}{hint}", 1)

    def end(self) -> None:
        """At once: what it had begun is removed by whoever knows where."""
        self._process.kill()
        self._process.join()
        self.events.close()


def _serve(events: Connection, order: Order, threads: int) -> None:
    """A process's whole life. Interrupts are the parent's affair, which ends this one; and so does its death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what libraries print is no result
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    worker = _worker(events, order, threads)
    while True:
        try:
            task = events.recv()
        except EOFError:
            return
        events.send(("answer", worker.do(task) if not isinstance(worker, Failure) else worker))


def _worker(events: Connection, order: Order, threads: int) -> Worker | Failure:
    import torch

    from kind_edge.deploy.fleet_worker import Worker, failure_of

    torch.set_num_threads(threads)
    try:
        return Worker(
            order, lambda text: events.send(("stage", text)), lambda *counted: events.send(("count", counted))
        )
    except Exception as error:  # noqa: BLE001 - it is the answer to every task
        return failure_of(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
