"""What goes where: results on stdout, everything else on stderr, moving progress on a terminal only."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from kind_edge.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PIPE_WIDTH = 100
"""Columns where no terminal says how many it has."""

OnCount = Callable[[int, int], None]


class Terminal:
    """The two streams of one command, and how talkative it is.

    `verbose` shows tracebacks and warnings, `quiet` leaves out everything but results and errors.
    """

    def __init__(self, verbose: bool = False, quiet: bool = False) -> None:
        if verbose and quiet:
            raise UsageError("-v and -q contradict each other; give one of them")
        self.verbose, self.quiet = verbose, quiet
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        # A CI log keeps every frame of an animation as a line.
        self.animated = not quiet and self.err.is_terminal and sys.stderr.isatty() and not _in_ci()

    def say_error(self, message: str) -> None:
        self.err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)

    def say_warning(self, message: str) -> None:
        self.err.print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)

    def note(self, message: str) -> None:
        """Something beside the result."""
        if not self.quiet:
            self.err.print(Text(message), soft_wrap=True)

    def line(self, message: str | Text) -> None:
        """A line of the result that is never wrapped: paths and commands can be copied."""
        self.out.print(message if isinstance(message, Text) else Text(message), soft_wrap=True)

    def next(self, *words: str, column: int = 9) -> None:
        """The command to try next, as a shell takes it: its name, then `words`; `column` is where the values begin."""
        command = shlex.join(("kind-edge", *words))
        self.line(Text.assemble((f"  {'next':{column}}", "dim"), command))

    def json(self, values: Mapping[str, Any]) -> None:
        """The one JSON object of --json."""
        sys.stdout.write(json.dumps(values, indent=2, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While others' code runs: whatever it prints is no result of ours."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    @contextlib.contextmanager
    def stages(self) -> Iterator[Stages]:
        """Told what begins now: a spinner on a terminal, a line in a log."""
        with self.working(), contextlib.ExitStack() as stack:
            stages = Stages(self, stack)
            yield stages
            stages.finish()

    def measuring(self) -> contextlib.AbstractContextManager[OnCount]:
        """A bar for what is measured before a model's first plan."""
        return self.counting("measuring what cuts cost, once for this model", at_once=False)

    @contextlib.contextmanager
    def counting(self, what: str, at_once: bool = True) -> Iterator[OnCount]:
        """A function that is told (done, total): a bar on a terminal, a line for every tenth in a log.

        The bar is there `at_once` and to the end, or only while there is something to count.
        """
        with self.working():
            if not self.animated:
                yield self._log_tenths(what)
                return
            with contextlib.ExitStack() as stack:
                shown: list[tuple[Progress, TaskID]] = []

                def show() -> None:
                    bar = stack.enter_context(self.progress_bar())
                    shown.append((bar, bar.add_task(what, total=None, details="")))

                def advance(done: int, total: int) -> None:
                    if not shown:
                        show()
                    bar, task = shown[0]
                    bar.update(task, completed=done, total=total)
                    if not at_once and done == total:
                        shown.clear()
                        stack.close()

                if at_once:
                    show()
                yield advance

    def _log_tenths(self, what: str) -> OnCount:
        last = 0

        def advance(done: int, total: int) -> None:
            nonlocal last
            if 10 * done // total > last:
                last = 10 * done // total
                self.note(f"{what}: {done} of {total}")

        return advance

    def progress_bar(self) -> Progress:
        """A bar on stderr that vanishes when it is done; every task has a field `details`."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[details]}"))
        return Progress(
            *columns, TimeRemainingColumn(compact=True), console=self.err, transient=True, refresh_per_second=4
        )


class Stages:
    """Called with the name of what begins; a stage that takes long may count, and has a bar then."""

    def __init__(self, terminal: Terminal, stack: contextlib.ExitStack) -> None:
        self.terminal, self._stack = terminal, stack
        self._current: tuple[str, float] | None = None
        self._status = terminal.err.status("starting", refresh_per_second=4) if terminal.animated else None
        self._bar: Progress | None = None
        self._tenth = 0
        if self._status is not None:
            stack.enter_context(self._status)

    def __call__(self, name: str) -> None:
        self.finish()
        self._current, self._tenth = (name, time.monotonic()), 0
        if self._status is not None:
            self._status.update(f"{name} ...")
        else:
            self.terminal.note(f"{name} ...")

    def count(self, done: float, total: float, unit: str, details: str) -> None:
        """Of the present stage: a bar in the spinner's place, or a line for every tenth in a log."""
        name = self._current[0] if self._current else ""
        if self._status is not None:
            if self._bar is None:
                self._status.stop()  # a terminal shows one moving thing at a time
                self._bar = self._stack.enter_context(self.terminal.progress_bar())
                self._bar.add_task(f"{name}, {unit}", total=round(total), details="")
            self._bar.update(self._bar.task_ids[0], completed=int(done), details=details)
        elif 10 * done // total > self._tenth:
            self._tenth = int(10 * done // total)
            self.terminal.note(f"{name}: {self._tenth * 10} %, {details}")

    def finish(self) -> None:
        """What began is done."""
        if self._bar is not None and self._status is not None:
            self._bar.stop()
            self._bar = None
            self._status.start()
        if self._current and self._status is not None:
            name, began = self._current
            took = f"{time.monotonic() - began:.1f} s"
            self.terminal.err.print(Text.assemble(("✓ ", "green"), f"{name} ", (took, "dim")))
        self._current = None


def terminal_of(context: typer.Context) -> Terminal:
    """The terminal that the top of the command line made."""
    found = context.find_object(Terminal)
    return found if found is not None else Terminal()


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")
