"""How far a fleet export is, and what each of its workers does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kind_edge.deploy.fleet_tasks import Finish, MakeFiles, Task


@dataclass(frozen=True)
class FleetProgress:
    """`now`: what each worker does, by the name of the bundle."""

    done: int
    total: int
    now: tuple[str, ...]


class Now:
    """Tells how far everything is."""

    def __init__(self, total: int, tell: Callable[[FleetProgress], None]) -> None:
        self._total, self._tell = total, tell
        self._done = self._kept = 0
        self._names: dict[int, str] = {}
        self._stages: dict[int, str] = {}

    def begins(self, number: int, task: Task) -> None:
        name = task.job.name if isinstance(task, Finish) else task.name if isinstance(task, MakeFiles) else ""
        self._names[number] = name
        self.stage(number, "")

    def alone(self, what: str) -> None:
        self._names.clear()
        self._stages = {0: what}
        self._say()

    def stage(self, number: int, what: str) -> None:
        name = self._names.get(number, "")
        self._stages[number] = f"{name}: {what}" if name and what else what
        self._say()

    def rest(self, numbers: set[int]) -> None:
        self._stages = {number: stage for number, stage in self._stages.items() if number not in numbers}

    def kept(self, count: int) -> None:
        self._kept = count
        self._say()

    def count(self, done: int) -> None:
        self._done = done
        self._say()

    def _say(self) -> None:
        told = dict.fromkeys(stage for _, stage in sorted(self._stages.items()) if stage)
        self._tell(FleetProgress(self._kept + self._done, self._total, tuple(told)))
