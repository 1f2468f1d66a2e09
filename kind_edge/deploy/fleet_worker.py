"""The work of a fleet export: one model, opened once, and the tasks that are done with it. Stages as in one export."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kind_edge.budget.plan import Plan
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile, load_profile
from kind_edge.deploy.assemble import latency_gate
from kind_edge.deploy.bundle import MANIFEST_NAME, hash_file, writing_bundle
from kind_edge.deploy.cut import healing_state, make_cut
from kind_edge.deploy.fleet_tasks import (
    Failure,
    Finish,
    Job,
    MakeFiles,
    MakePlans,
    MeasureSensitivity,
    Open,
    Opened,
    Order,
    Task,
)
from kind_edge.deploy.made import Made
from kind_edge.deploy.making import Formats, draw, make_models, tell
from kind_edge.deploy.pipeline import heal_cut
from kind_edge.deploy.planning import choices_for, make_plan_for
from kind_edge.deploy.request import Choices, OpenedModel, ask, make_source, open_model
from kind_edge.errors import KindEdgeError, UsageError
from kind_edge.model.checkpoint import CALIBRATION, HELDOUT, Checkpoint
from kind_edge.units import parse_duration

OnStage = Callable[[str], None]
OnCount = Callable[[int, int], None]


class Worker:
    """Does one task after the other. `stage` is told what begins, `count` how far a measurement of the model is."""

    def __init__(self, order: Order, stage: OnStage, count: OnCount) -> None:
        self.order, self.stage, self.count = order, stage, count
        self.formats = Formats.of(order.formats, order.format_choices)

    def do(self, task: Task) -> Any:
        """The task's answer, or what became of it: an error of one bundle does not stop the others."""
        try:
            return self._do(task)
        except Exception as error:  # noqa: BLE001 - it goes to the process that asked
            return failure_of(error)

    def _do(self, task: Task) -> Any:
        match task:
            case Open():
                return self._opened()
            case MeasureSensitivity():
                _ = self.model.calibration, self.model.sensitivity
                return None
            case MakePlans():
                self._look_again()
                pairs = zip(task.jobs, task.spare_bytes, strict=True)
                return tuple(self._planned(job, spare_bytes) for job, spare_bytes in pairs)
            case MakeFiles():
                return self._made(task)
            case Finish():
                return self._finish(task)

    @functools.cached_property
    def model(self) -> OpenedModel:
        return open_model(self.order.model, self.count, self.order.autoencoder)

    @functools.cached_property
    def source(self) -> Source:
        return make_source(self.model)

    def _opened(self) -> Opened:
        self.stage("reading the model")
        model = self.model
        self.formats.check(model.checkpoint.spec)
        table = model.stored_sensitivity or vars(model).get("sensitivity")
        fingerprint = {
            "checkpoint": model.sha256,
            "provenance": hashlib.sha256(json.dumps(model.checkpoint.provenance, sort_keys=True).encode()).hexdigest(),
            **{name.split(".")[0]: _hash_beside(model.checkpoint, name) for name in (CALIBRATION, HELDOUT)},
            "sensitivity": hashlib.sha256(table.to_json().encode()).hexdigest() if table else None,
            "autoencoder": model.autoencoder.sha256 if model.autoencoder else None,
        }
        return Opened(model.name, model.checkpoint.class_names, fingerprint, self._is_measured())

    def _look_again(self) -> None:
        """Another worker may have measured the model since it was opened here."""
        if not self._is_measured():
            del self.model

    def _is_measured(self) -> bool:
        model = self.model
        sensitivity, calibration = model.stored_sensitivity is not None, model.stored_calibration is not None
        return (sensitivity or "sensitivity" in vars(model)) and (calibration or "calibration" in vars(model))

    def _asked(self, job: Job) -> tuple[DeviceProfile, Request]:
        choices: Choices = {**self.order.choices, "classes": job.classes}  # type: ignore[typeddict-item]
        device = load_profile(job.profile)
        return device, ask(self.model, device, self.source, **choices_for(choices, self.formats))[1]

    def _planned(self, job: Job, spare_bytes: int) -> Plan | Failure:
        self.stage("planning")
        try:
            _, request = self._asked(job)
            return make_plan_for(self.source, dataclasses.replace(request, spare_bytes=spare_bytes), self.formats)
        except KindEdgeError as error:
            return failure_of(error)

    def _made(self, task: MakeFiles) -> Made:
        shutil.rmtree(task.folder, ignore_errors=True)
        task.folder.mkdir(parents=True)
        try:
            return self._proven(task)
        except Exception:
            if self.order.keep_failed:
                shutil.copytree(task.folder, Path(f"{task.destination}.failed"), dirs_exist_ok=True)
            raise

    def _proven(self, task: MakeFiles) -> Made:
        """As a single export makes them; healing that was interrupted goes on for the same plan."""
        self.stage("merging")
        cut = make_cut(self.model, task.plan)
        made = make_models(self.model, task.plan, task.folder, self.formats, self.stage, cut)
        if self.order.heal is not None and made.model_bytes <= task.plan.limits.get("max_size", float("inf")):
            self.stage("healing")
            state = healing_state(task.folder.parent.parent / task.folder.name)
            cut = heal_cut(self.model, task.plan, cut, parse_duration(self.order.heal, "--heal"), state)
            made = make_models(self.model, task.plan, task.folder, self.formats, self.stage, cut)
        self.stage("drawing the preview")
        draw(self.model, task.plan, task.folder, made)
        return made

    def _finish(self, task: Finish) -> None:
        job, plan = task.job, task.plan
        device, request = self._asked(job)
        facts = (task.made, task.measured, self.formats, (self.source, request))
        with writing_bundle(job.destination, self.order.keep_failed, self.order.sign) as folder:
            share_files(task.folder, folder)
            latency_gate(plan, device, task.measured.image)
            tell(self.model, plan, device, folder, *facts, self.stage)


def _hash_beside(checkpoint: Checkpoint, name: str) -> str | None:
    """Of a file of the checkpoint's folder, if it has it."""
    path = (checkpoint.path or Path()) / name
    return hash_file(path) if path.is_file() else None


def share_files(source: Path, target: Path) -> None:
    """All files but the manifest under another folder too, stored once where the disk can: nothing of ours changes a
    file of a bundle in its place."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir(exist_ok=True)
        elif place != target / MANIFEST_NAME:
            try:
                os.link(file, place)
            except OSError:  # another file system, or one without links
                shutil.copy2(file, place)


def failure_of(error: Exception) -> Failure:
    """What is told of an error; a disk that is full or refuses is the user's to mend."""
    if isinstance(error, OSError) and error.errno is not None:
        error = UsageError(f"{error.filename or 'output'}: {os.strerror(error.errno)}; choose another place")
    code = error.exit_code if isinstance(error, KindEdgeError) else KindEdgeError.exit_code
    return Failure(type(error).__name__, str(error), code, "".join(traceback.format_exception(error)))
