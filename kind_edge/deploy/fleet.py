"""Many bundles at once: one for every device and set of classes, what they share made once. Goes on if interrupted.

Each bundle is what `export` writes for it alone. No torch here: the workers have it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge._version import __version__
from kind_edge.budget.profile import HOST, load_profile
from kind_edge.deploy import assemble
from kind_edge.deploy.bundle import check_replaceable
from kind_edge.deploy.class_sets import check_set_name
from kind_edge.deploy.fleet_crew import Crew
from kind_edge.deploy.fleet_progress import FleetProgress, Now
from kind_edge.deploy.fleet_record import RECORD, Record, digest
from kind_edge.deploy.fleet_schedule import Group, Schedule
from kind_edge.deploy.fleet_tasks import Failure, Finish, Job, MeasureSensitivity, Open, Opened, Order, Task
from kind_edge.deploy.made import Measured, measure
from kind_edge.deploy.manifest import MANIFEST_NAME, Manifest, read_manifest
from kind_edge.errors import KindEdgeError, UsageError, unknown
from kind_edge.model.shipped import DEFAULT_MODEL, find_model

if TYPE_CHECKING:
    from typing import Unpack

    from kind_edge.deploy.request import Choices
    from kind_edge.deploy.signing import SigningKey

WORK = ".fleet"
"""Folder in the output, for what several bundles share while they are made."""

_HEALING = f".{'[0-9a-f]' * 16}.heal"
"""Beside WORK, what is healed so far, by `artefact_key`; not that of a bundle exported by itself (".NAME.heal")."""

_CODES = (70, 4, 2, 1, 3, 0)
"""Exit codes, worst first."""

OnCount = Callable[[int, int], None]


@dataclass(frozen=True)
class FleetBundle:
    """One of the bundles: its manifest, or why there is none. `kept`: it was complete before."""

    job: Job
    kept: bool = False
    failure: Failure | None = None
    manifest: Manifest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Where it is there, with what `export --json` says of a bundle."""
        job = self.job
        values: dict[str, Any] = {"name": job.name, "profile": job.profile, "set": job.set_name}
        if self.failure is not None or self.manifest is None:
            told = self.failure or Failure("KindEdgeError", "not made", KindEdgeError.exit_code)
            return {**values, "status": "failed", "error": told.message, "exit_code": told.exit_code}
        raw, latency = self.manifest.raw, self.manifest.raw["latency"]
        files = {name: entry.size_bytes for name, entry in self.manifest.files.items()}
        files |= {MANIFEST_NAME: (job.destination / MANIFEST_NAME).stat().st_size}
        return {
            **values,
            "status": "kept" if self.kept else "made",
            "bundle": str(job.destination),
            "files": dict(sorted(files.items())),
            "parity": raw["verification"]["parity"],
            "merge_parity": raw["verification"]["merge_db"],
            "latency_ms": {name: _percentiles(report) for name, report in latency["models"].items()},
            "image_latency_ms": _percentiles(latency["image"]),
            "predicted_here_ms": latency["predicted_here_ms"],
            "quality": raw["quality"],
            **({"healing": _without_words(raw["healing"])} if "healing" in raw else {}),
            "plan": raw["plan"],
        }


@dataclass(frozen=True)
class Fleet:
    """All that was asked for, in its order."""

    output: Path
    bundles: tuple[FleetBundle, ...]

    @property
    def exit_code(self) -> int:
        """The worst of all bundles."""
        codes = {each.failure.exit_code if each.failure else 0 for each in self.bundles}
        return next((code for code in _CODES if code in codes), KindEdgeError.exit_code)

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.output), "bundles": [each.to_dict() for each in self.bundles]}


def export_many(
    model: str | Path = DEFAULT_MODEL,
    *,
    profiles: Sequence[str],
    class_sets: Mapping[str, Sequence[str]] | None = None,
    output: str | Path,
    formats: Sequence[str] = ("onnx",),
    autoencoder: str | Path | None = None,
    heal: str | None = None,
    format_choices: Mapping[str, Mapping[str, Any]] | None = None,
    sign: SigningKey | None = None,
    keep_failed: bool = False,
    workers: int | None = None,
    on_progress: Callable[[FleetProgress], None] | None = None,
    on_measure: OnCount | None = None,
    on_note: Callable[[str], None] | None = None,
    **choices: Unpack[Choices],
) -> Fleet:
    """A bundle for every profile and set of classes, in output/PROFILE/SET; without sets in output/PROFILE.

    Everything else is as in `export`, and is asked for every bundle. What plans have in common is made once, by as many
    processes as there are cores (`workers`); nothing else runs while latency is measured. A bundle that cannot be made
    does not stop the others. Stopped, the same call goes on: bundles that are complete and asked for in the same way
    are kept. `on_note` is told what of an earlier call is made anew or left alone.

    Where processes are started, the calling script's own work must stand below `if __name__ == "__main__":`, as always
    with multiprocessing.
    Raises `UsageError` for names that are not known and for an output that is in use or holds something else.
    """
    order = Order(
        str(model), tuple(formats), {name: value for name, value in choices.items() if name != "classes"},
        format_choices or {}, None if autoencoder is None else str(autoencoder), heal, keep_failed, sign,
    )  # fmt: skip
    place = Path(output)
    sets: Mapping[str | None, Any] = {None: choices.get("classes")}
    if class_sets is not None:
        if choices.get("classes") is not None:
            raise UsageError("classes: class_sets has them already; leave one of the two out")
        sets = {check_set_name(name, "class_sets"): tuple(listed) for name, listed in class_sets.items()}
    jobs = _jobs(place, profiles, sets)
    find_model(model)
    if (place / MANIFEST_NAME).exists():
        raise UsageError(f"{place} is a bundle itself; choose another -o")
    with _locked(place):
        record = Record.read(place / RECORD)
        return _exported(order, jobs, place, record, workers, on_progress, on_measure, on_note or (lambda _: None))


def _exported(
    order: Order,
    jobs: tuple[Job, ...],
    place: Path,
    record: Record,
    workers: int | None,
    on_progress: Callable[[FleetProgress], None] | None,
    on_measure: OnCount | None,
    on_note: Callable[[str], None],
) -> Fleet:
    load_profile(HOST)  # what is predicted for this machine: measured on first use, while nothing else runs
    cores = _cores()
    most = workers or cores
    now = Now(len(jobs), on_progress or (lambda _: None))
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_leftovers, place, jobs)
        crew = stack.enter_context(Crew(order, min(most, len(jobs)), cores, now.stage, on_measure or (lambda *_: None)))
        crew.grow(min(most, max(1, sum(job.name not in record.entries for job in jobs))))
        opened = _opened(crew)
        _check_classes(jobs, opened)
        asked = {job: _asked(order, job, opened) for job in jobs}
        changes = {job: record.changes(job, asked[job]) for job in jobs}
        kept = {job for job in jobs if changes[job] == [] and record.is_whole(job)}
        todo = [job for job in jobs if job not in kept]
        _tell_of_others(todo, changes, record, on_note)
        for job in todo:
            check_replaceable(job.destination)
        _remove_leftovers(place, jobs)
        now.kept(len(kept))
        crew.grow(min(most, max(1, len(todo))))
        schedule = Schedule(todo, place / WORK, most)
        _work(crew, schedule, now, lambda job: record.add(job, asked[job]))
    for folder in place.glob(_HEALING):
        shutil.rmtree(folder, ignore_errors=True)
    return Fleet(place, tuple(_bundle(job, job in kept, schedule.outcome.get(job)) for job in jobs))


def _work(crew: Crew, schedule: Schedule, now: Now, complete: Callable[[Job], None]) -> None:
    """Until nothing is left to be done."""
    while True:
        for number in crew.idle():
            task = schedule.next()
            if task is None:
                break
            now.begins(number, task)
            crew.start(number, task)
        if not crew.busy:
            if not schedule.measuring:
                return
            while schedule.measuring:
                group = schedule.measuring[0]
                now.alone("measuring")
                schedule.measured(group, _measured(group))
            continue
        for task, answer in crew.answers():
            schedule.done(task, answer)
            if isinstance(task, Finish) and answer is None:
                complete(task.job)
            now.rest(set(crew.idle()))
            now.count(len(schedule.outcome))


def _measured(group: Group) -> Measured | Failure:
    """In this process, with all workers at rest."""
    assert group.made is not None
    try:
        return measure(group.folder, group.made)
    except KindEdgeError as error:
        return Failure(type(error).__name__, str(error), error.exit_code)


def _jobs(place: Path, profiles: Sequence[str], sets: Mapping[str | None, Any]) -> tuple[Job, ...]:
    """Every profile with every set; profiles are read here, so that a name that is not known ends it all at once."""
    if isinstance(profiles, str) or not profiles or not sets:
        raise UsageError("profiles and sets of classes: want at least one of each")
    names = [load_profile(profile).name for profile in profiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--profiles: {', '.join(twice)} is there twice, and each has a folder of its own")
    return tuple(
        Job(name if each is None else f"{name}/{each}", profile, each, listed, place / name / (each or ""))
        for name, profile in zip(names, profiles, strict=True)
        for each, listed in sets.items()
    )


def _opened(crew: Crew) -> Opened:
    """The model, read by every worker at once; where nobody has measured what cuts cost, one does it for all."""
    for number in crew.idle():
        crew.start(number, Open())
    opened: Opened = _first_answer(crew, Open)
    if opened.measured:
        return opened
    number = crew.idle()[0]
    for task in (MeasureSensitivity(), Open()):
        crew.start(number, task)
        answer = _first_answer(crew, type(task), number)
    return answer  # type: ignore[no-any-return]  # of the last task


def _first_answer(crew: Crew, kind: type[Task], number: int | None = None) -> Any:
    """Of a task of that kind (to that worker); a Failure is raised as the error that it was."""
    while True:
        before = None if number is None else crew.task(number)
        for task, answer in crew.answers():
            if isinstance(task, kind) and (number is None or task is before):
                if isinstance(answer, Failure):
                    raise answer.error()
                return answer


def _check_classes(jobs: Sequence[Job], opened: Opened) -> None:
    """`UsageError` with the nearest names for a class that the model does not have."""
    for job in jobs:
        for name in job.classes or ():
            if name not in opened.class_names:
                error = unknown("class", name, opened.class_names)
                raise UsageError(f"{job.set_name}: {error}") if job.set_name else error


def _asked(order: Order, job: Job, opened: Opened) -> dict[str, Any]:
    """All that a bundle follows from, by name."""
    return {
        "version": {"kind_edge": __version__, **assemble.tool_versions()},
        "model": {"name": opened.name, **opened.fingerprint},
        "profile": digest(load_profile(job.profile)),
        **{name: value for name, value in order.choices.items() if value is not None},
        "classes": list(job.classes or opened.class_names),
        "formats": list(order.formats),
        "format_choices": digest(sorted((name, sorted(each.items())) for name, each in order.format_choices.items())),
        "heal": order.heal,
        "sign": digest(order.sign.sign(RECORD.encode())) if order.sign else None,
    }


def _tell_of_others(
    todo: Sequence[Job],
    changes: Mapping[Job, Sequence[str] | None],
    record: Record,
    tell: Callable[[str], None],
) -> None:
    """What becomes of earlier bundles that are not simply kept; `changes`: by `Record.changes`, of every job."""
    if other := {job.name: each for job in todo if (each := changes[job])}:
        what = ", ".join(sorted({each.replace("_", " ") for found in other.values() for each in found}))
        tell(f"made anew, as something else was asked for or given before ({what}): {', '.join(other)}")
    if damaged := [job.name for job in todo if changes[job] == []]:
        tell(f"made anew, as the bundle is damaged or gone: {', '.join(damaged)}")
    if left := sorted(set(record.entries) - {job.name for job in changes}):
        tell(f"left as they are, of an earlier export and not asked for now: {', '.join(left)}")


def _bundle(job: Job, kept: bool, failure: Failure | None) -> FleetBundle:
    return FleetBundle(job, kept, failure, None if failure else read_manifest(job.destination))


def _percentiles(report: Mapping[str, Any]) -> dict[str, float]:
    return {name: report[f"{name}_ms"] for name in ("p50", "p90", "p99")}


def _without_words(healing: Mapping[str, Any]) -> dict[str, Any]:
    """As `Healing.to_dict` has it."""
    return {name: value for name, value in healing.items() if name != "told"}


def _remove_leftovers(place: Path, jobs: Sequence[Job]) -> None:
    """What processes that were killed had begun to write; no worker is left when this is called."""
    shutil.rmtree(place / WORK, ignore_errors=True)
    for job in jobs:
        for folder in job.destination.parent.glob(f".{job.destination.name}.*-*"):
            if folder.name.removeprefix(f".{job.destination.name}.").startswith(("new-", "old-")):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One export at a time writes into a folder."""
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{place}: another export is writing there; wait for it, or choose another -o") from error
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # it holds something, as it should
            place.rmdir()


def _cores() -> int:
    from kind_edge.budget.host import available_threads

    return available_threads()
