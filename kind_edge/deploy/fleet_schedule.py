"""Which task comes next in a fleet export. Plans that make the same of a model share its files; measuring waits until
nothing else runs, so that times are those of a quiet machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.deploy.assemble import SIZE_ATTEMPTS, missing_bytes
from kind_edge.deploy.fleet_tasks import Failure, Finish, Job, MakeFiles, MakePlans, Task, artefact_key
from kind_edge.errors import GateError

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan
    from kind_edge.deploy.made import Made, Measured


@dataclass(eq=False)
class Group:
    """Jobs with the same model files."""

    folder: Path
    waiting: list[Job] = field(default_factory=list)
    made: Made | None = None
    measured: Measured | None = None
    failure: Failure | None = None


class Schedule:
    """Gives out tasks and takes their answers. `outcome` has None for every bundle that is complete, or its failure.

    A round of groups is made, then measured with everything else at rest, then finished while the next one is made.
    """

    def __init__(self, jobs: Sequence[Job], work: Path, workers: int) -> None:
        self.outcome: dict[Job, Failure | None] = {}
        self.measuring: deque[Group] = deque()
        self._work = work
        self._plans: dict[Job, Plan] = {}
        self._spare_bytes = dict.fromkeys(jobs, 0)
        self._solved = dict.fromkeys(jobs, 0)
        self._groups: dict[str, Group] = {}
        self._planning = deque(_of_same_classes(jobs, workers))
        self._to_make: list[str] = []
        self._making: set[str] = set()
        self._finishing: deque[tuple[Group, Job]] = deque()

    def next(self) -> Task | None:
        """What a free worker does now; None: nothing before others are done."""
        if self._planning:
            jobs = self._planning.popleft()
            return MakePlans(jobs, tuple(self._spare_bytes[job] for job in jobs))
        if self.measuring and not self._making:
            return None
        if self._to_make and not self.measuring:
            key = max(self._to_make, key=lambda key: len(self._plans[self._groups[key].waiting[0]].classes))
            self._to_make.remove(key)
            self._making.add(key)
            first = self._groups[key].waiting[0]
            return MakeFiles(self._plans[first], self._groups[key].folder, first.name, first.destination)
        if self._finishing:
            group, job = self._finishing.popleft()
            assert group.made is not None
            assert group.measured is not None
            return Finish(job, self._plans[job], group.folder, group.made, group.measured)
        return None

    def done(self, task: Task, answer: Any) -> None:
        """Take the answer of a task that `next` gave out; a Failure is that of all jobs that it was for."""
        if isinstance(task, MakePlans):
            answers = [answer] * len(task.jobs) if isinstance(answer, Failure) else answer
            for job, plan in zip(task.jobs, answers, strict=True):
                self._planned(job, plan)
        elif isinstance(task, MakeFiles):
            self._made(artefact_key(task.plan), answer)
        elif isinstance(task, Finish):
            self.outcome[task.job] = answer

    def measured(self, group: Group, answer: Measured | Failure) -> None:
        """The first group that was to be measured has been."""
        assert group is self.measuring.popleft()
        if isinstance(answer, Failure):
            group.failure = answer
        else:
            group.measured = answer
        self._release(group)

    def _planned(self, job: Job, plan: Plan | Failure) -> None:
        if isinstance(plan, Failure):
            self.outcome[job] = plan
            return
        self._plans[job] = plan
        key = artefact_key(plan)
        if key not in self._groups:
            self._groups[key] = Group(self._work / key)
            self._to_make.append(key)
        group = self._groups[key]
        group.waiting.append(job)
        self._settle(group, [job])

    def _made(self, key: str, answer: Made | Failure) -> None:
        self._making.discard(key)
        group = self._groups[key]
        if isinstance(answer, Failure):
            group.failure = answer
        else:
            group.made = answer
        self._settle(group, list(group.waiting))

    def _settle(self, group: Group, newcomers: list[Job]) -> None:
        """What can be done now for jobs that wait for a group's files, made or not."""
        if group.made is not None:
            for job in newcomers:
                self._fit(group, job)
        if group.failure is not None or group.measured is not None:
            self._release(group)
        elif group.made is not None and group.waiting and group not in self.measuring:
            self.measuring.append(group)

    def _fit(self, group: Group, job: Job) -> None:
        """Where the file misses the job's limit it is solved again, with room for what files hold beyond prediction."""
        assert group.made is not None
        self._solved[job] += 1
        try:
            last = self._solved[job] >= SIZE_ATTEMPTS
            spare_bytes = missing_bytes(self._plans[job], group.made.model_bytes, group.made.package_bytes, last)
        except GateError as error:
            group.waiting.remove(job)
            self.outcome[job] = Failure("GateError", str(error), error.exit_code)
            return
        if spare_bytes:
            group.waiting.remove(job)
            self._spare_bytes[job] += spare_bytes
            self._planning.append((job,))

    def _release(self, group: Group) -> None:
        """The jobs of a group can be finished, or have all failed with it."""
        for job in group.waiting:
            if group.failure is not None:
                self.outcome[job] = group.failure
            else:
                self._finishing.append((group, job))
        group.waiting.clear()


def _of_same_classes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, ...]]:
    """What is known of a set of classes is found once by the worker that plans them; enough parts for all workers."""
    sets: dict[tuple[str, ...] | None, list[Job]] = {}
    for job in jobs:
        sets.setdefault(job.classes, []).append(job)
    parts = -(-workers // len(sets)) if sets else 1
    for same in sets.values():
        size = -(-len(same) // parts)
        yield from (tuple(same[start : start + size]) for start in range(0, len(same), size))
