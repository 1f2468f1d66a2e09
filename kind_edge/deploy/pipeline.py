"""The whole way as two functions: `plan` decides, `export` makes, proves, measures and bundles."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from kind_edge.budget.front import Curve, front
from kind_edge.budget.plan import Plan, check_replayable
from kind_edge.budget.planner import make_plan
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile, load_profile, profile_names
from kind_edge.deploy import assemble
from kind_edge.deploy.bench import LatencyReport
from kind_edge.deploy.bundle import check_replaceable, open_bundle, verified_manifest, write_manifest, writing_bundle
from kind_edge.deploy.cut import Cut, healing_key, healing_state, judged, make_cut
from kind_edge.deploy.merge import class_indices, fold, truncate
from kind_edge.deploy.model_files import recorded
from kind_edge.deploy.parity import VerifyReport
from kind_edge.deploy.probe import OnProgress
from kind_edge.deploy.quality import Healing, Quality
from kind_edge.deploy.reference import make_images, make_reference
from kind_edge.deploy.request import (
    MINIMISED,
    Choices,
    OpenedModel,
    as_replayed,
    make_request,
    make_source,
    open_model,
)
from kind_edge.deploy.sampler_table import SamplerTable, sampler_table
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import GateError, InputError, UsageError
from kind_edge.model.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    stored_dtype,
)
from kind_edge.model.shipped import DEFAULT_MODEL
from kind_edge.registry import Exporter, exporter
from kind_edge.units import format_bytes, parse_duration

if TYPE_CHECKING:
    from kind_edge.training.healing import HealingProgress

    OnHealing = Callable[[HealingProgress], None]

OnStage = Callable[[str], None]

HEALED = "healed"
"""Folder of a bundle: the checkpoint that a healed bundle's files were folded from."""

_SIZE_ATTEMPTS = 3


@dataclass(frozen=True)
class Bundle:
    """What an export wrote: `files` bytes by name, `parity` worst SQNR in dB by model file."""

    path: Path
    files: Mapping[str, int]
    parity: Mapping[str, float | None]
    latency: Mapping[str, LatencyReport]
    image_latency: LatencyReport
    predicted_here_ms: Mapping[str, float]
    plan: Plan
    quality: tuple[Quality, ...]
    merge_db: float
    healing: Healing | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "files": dict(self.files),
            "parity": dict(self.parity),
            "merge_parity": self.merge_db,
            "latency_ms": {name: assemble.percentiles(report) for name, report in self.latency.items()},
            "image_latency_ms": assemble.percentiles(self.image_latency),
            "predicted_here_ms": dict(self.predicted_here_ms),
            "quality": {each.name: each.to_dict() for each in self.quality},
            **({"healing": self.healing.to_dict()} if self.healing else {}),
            "plan": self.plan.to_dict(),
        }


def plan(
    model: str | Path | OpenedModel = DEFAULT_MODEL,
    *,
    profile: str,
    on_measure: OnProgress | None = None,
    **choices: Unpack[Choices],
) -> Plan:
    """The best plan for a device and classes under limits such as max_size="2MiB", max_latency="4s", max_flops="40%".

    `on_measure` is told (done, total) where the model has no sensitivity table yet: that takes a minute, once.
    Raises `UsageError` for what cannot be understood, `NoPlanError` when nothing fits.
    """
    device = load_profile(profile)
    opened = open_model(model, on_measure)
    request = make_request(opened.checkpoint, device, **choices)
    return make_plan(make_source(opened), request)


def pareto(
    model: str | Path | OpenedModel = DEFAULT_MODEL,
    *,
    profile: str,
    on_measure: OnProgress | None = None,
    **choices: Unpack[Choices],
) -> tuple[Curve, ...]:
    """The front for 1, 2, 5 and all of the classes: the least predicted loss at every size of the model file, or at
    every latency, amount of FLOPs or memory with minimize="latency" and so on; within the limits that are asked for.

    Raises `NoPlanError` when not one point fits.
    """
    opened = open_model(model, on_measure)
    axis = MINIMISED[choices.pop("minimize", None) or "size"]
    request = make_request(opened.checkpoint, load_profile(profile), **choices)
    return front(make_source(opened), request, axis)


def export(
    model: str | Path | OpenedModel = DEFAULT_MODEL,
    *,
    profile: str | None = None,
    plan: Plan | None = None,
    output: str | Path | None = None,
    formats: Sequence[str] = ("onnx",),
    heal: str | None = None,
    keep_failed: bool = False,
    on_stage: OnStage | None = None,
    on_healing: OnHealing | None = None,
    on_measure: OnProgress | None = None,
    **choices: Unpack[Choices],
) -> Bundle:
    """Plan (unless `plan` is given), merge, export, verify, measure and bundle.

    `heal` is a time such as "5m": for so long the cut model learns from the full one, once it is known that it can be
    exported. What it has learned is kept beside `output` until the bundle is complete: stopped, the same call goes on.
    ONNX is always among the formats: what an app loads, what is measured and what draws the preview.
    Raises `GateError` if parity, size or latency fails: then nothing is left behind, unless `keep_failed`.
    """
    stage = on_stage or (lambda _: None)
    exporters = [exporter(name) for name in dict.fromkeys(("onnx", *formats))]
    heal_s = None if heal is None else parse_duration(heal, "--heal")
    if output is not None:
        check_replaceable(Path(output))  # before any work
    stage("reading the model")
    opened = open_model(model, on_measure)
    request = None
    for each in exporters:
        each.check(opened.checkpoint.spec)
    if plan is None:
        if profile is None:
            raise UsageError("--profile is missing: which device is it for? kind-edge profiles list shows all")
        stage("planning")
        device = load_profile(profile)
        request = make_request(opened.checkpoint, device, **choices)
        source = make_source(opened)
        plan = make_plan(source, request)
    else:
        if profile is None and plan.profile not in profile_names():
            raise UsageError(f"the plan was made for profile {plan.profile!r}, which is not ours: add --profile FILE")
        device = load_profile(profile or plan.profile)
        _check_replay(plan, opened, device.name, choices)
        source = make_source(opened)
        plan = as_replayed(plan, source, device)
    destination = Path(output) if output is not None else Path(f"{opened.name}-{device.name}")
    with writing_bundle(destination, keep_failed) as folder:
        plan, made = _fitted(opened, plan, source, request, folder, exporters, stage)
        if heal_s is not None:
            stage("healing")
            cut = heal_cut(opened, plan, made.cut, heal_s, healing_state(destination), on_healing)
            made = _make(opened, plan, folder, exporters, stage, cut)
        bundle = _finish(opened, plan, device, folder, destination, made, stage)
    shutil.rmtree(healing_state(destination).parent, ignore_errors=True)
    return dataclasses.replace(bundle, files=_sizes(destination))  # the manifest grew when the bundle was completed


def _fitted(
    model: OpenedModel,
    plan: Plan,
    source: Source,
    request: Request | None,
    folder: Path,
    exporters: Sequence[Exporter],
    stage: OnStage,
) -> tuple[Plan, _Made]:
    """Proven model files within --max-size; where prediction was short by a little, `request` is solved again."""
    for attempt in range(_SIZE_ATTEMPTS):
        stage("merging")
        made = _make(model, plan, folder, exporters, stage, make_cut(model, plan))
        excess = made.model_bytes - plan.limits.get("max_size", float("inf"))
        if excess <= 0:
            break
        if request is None or attempt == _SIZE_ATTEMPTS - 1:
            raise GateError(
                f"--max-size: the model file takes {format_bytes(made.model_bytes)}, "
                f"{format_bytes(excess)} over the limit; solve again with a smaller limit"
            )
        spare_bytes = request.spare_bytes + max(0, made.model_bytes - plan.weight_bytes)
        request = dataclasses.replace(request, spare_bytes=spare_bytes)
        plan = make_plan(source, request)
    return plan, made


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_replay(plan: Plan, model: OpenedModel, profile: str, choices: Mapping[str, Any]) -> None:
    """A stored plan is replayed as it is: nothing may be asked beside it, and it must be for this very model."""
    if asked := [name for name, value in choices.items() if value not in (None, "auto", False)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in asked)
        raise UsageError(f"--plan has its own {flags}; leave that out, or make another plan with kind-edge plan")
    if profile != plan.profile:
        raise UsageError(f"--profile {profile}: the plan was made for {plan.profile}; leave it out, or plan anew")
    check_replayable(plan, model.checkpoint.spec)
    if plan.checkpoint_sha256 != model.sha256:
        raise InputError(
            f"the plan was made for checkpoint {plan.checkpoint_sha256[:12]} ({plan.model}), "
            f"this one is {model.sha256[:12]} ({model.name}); solve again"
        )


def heal_cut(
    model: OpenedModel,
    plan: Plan,
    cut: Cut,
    seconds: float,
    state: Path,
    on_healing: OnHealing | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Cut:
    """The cut with the weights that healing leaves, or with its own where those are no better.

    `state` is a file: what is learned is kept there, and an interrupted call goes on. `clock` counts the `seconds`.
    """
    from kind_edge.training.healing import Lesson, Rows, heal, walk_deviation

    table = sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps)
    rows = Rows(*(torch.from_numpy(getattr(table, name)).float() for name in Rows._fields))
    kept = tuple(class_indices(model.checkpoint, plan.classes))
    guidance = plan.guidance if plan.evaluations_per_step > 1 else 1.0
    lesson = Lesson(model.checkpoint, cut.truncated, kept, plan.form, rows, guidance, plan.null_branch)
    done = heal(lesson, seconds, state, healing_key(plan), on_healing or (lambda _: None), clock)
    return judged(model, plan, cut, done.checkpoint, done.seconds, done.steps, partial(walk_deviation, lesson))


@dataclass(frozen=True)
class _Made:
    """The model files in the temporary folder, proven, before they are measured."""

    cut: Cut
    entries: Mapping[str, Mapping[str, Any]]
    default_model: str
    model_bytes: int
    table: SamplerTable
    verification: VerifyReport


def _make(
    model: OpenedModel, plan: Plan, folder: Path, exporters: Sequence[Exporter], stage: OnStage, cut: Cut
) -> _Made:
    """Export and verify into `folder`; healed weights are in no other checkpoint, so they are kept there."""
    table = sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps)
    timesteps = torch.from_numpy(table.timestep)
    truncated = cut.truncated
    if cut.healed:
        save_checkpoint(folder / HEALED, truncated, stored_dtype(model.checkpoint))
    own = model.heldout.of_classes(class_indices(model.checkpoint, plan.classes)) if model.heldout else None
    plain = fold(truncated, plan, timesteps)
    stage("exporting")
    entries = {
        file.path: file.entry
        for each in exporters
        for file in each.export(plain, folder, tuple(p for p in plan.precisions if p in each.precisions))
    }
    entries = recorded(folder, entries)
    stage("verifying")
    reference = make_reference(truncated, plan.form, timesteps, own) | make_images(truncated, plan)
    assemble.save_reference(folder, reference)
    wanted = {"role": "denoiser", "precision": plan.precision}
    default_model = next(path for path, entry in _runnable(entries).items() if wanted.items() <= entry.items())
    manifest = assemble.manifest_of(
        assemble.describe(plan, model.checkpoint.spec, entries, default_model, table), folder
    )
    verification = verify_models(folder, manifest, reference).require()
    size = (folder / default_model).stat().st_size
    return _Made(cut, entries, default_model, size, table, verification)


def _runnable(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The files that ONNX Runtime opens: what an app loads, and what can be measured here."""
    return {path: entry for path, entry in entries.items() if path.endswith((".onnx", ".ort"))}


def _finish(
    model: OpenedModel, plan: Plan, device: DeviceProfile, folder: Path, destination: Path, made: _Made, stage: OnStage
) -> Bundle:
    """Measure, draw the preview and write what the bundle says about itself."""
    spec = model.checkpoint.spec
    values = assemble.describe(plan, spec, made.entries, made.default_model, made.table)
    cut = made.cut
    values["verification"] = {**made.verification.to_dict(), "merge_db": cut.merge_db}
    values["quality"] = {each.name: each.to_dict() for each in cut.quality}
    if cut.healing:
        values["healing"] = {**cut.healing.to_dict(), "told": cut.healing.told()}
    stage("measuring")
    measured = _runnable(made.entries)
    latency, image = assemble.measure(folder, values, list(measured), made.default_model)
    predicted = assemble.predict_here_ms(plan, spec, measured, len(made.table.timestep))
    assemble.latency_gate(plan, device, image)
    values["latency"] = {
        "models": {name: report.to_dict() for name, report in latency.items()},
        "image": image.to_dict(),
        "predicted_here_ms": predicted,
    }
    stage("drawing the preview")
    assemble.draw_preview(folder, assemble.manifest_of(values, folder))
    assemble.write_texts(folder, plan, values)
    write_manifest(folder, values)
    sizes, parity = _sizes(folder), made.verification.parity
    known = (cut.quality, cut.merge_db, cut.healing)
    return Bundle(destination, sizes, parity, latency, image, predicted, plan, *known)


def verify(bundle: str | Path, checkpoint: str | Path | None = None) -> VerifyReport:
    """Check a bundle's hashes and the parity of its model files; `GateError` if any gate fails.

    The stored reference is used; with `checkpoint` it is computed anew from the gated model. Of a healed bundle that is
    the healed checkpoint in it, and `checkpoint` must be the one that it was cut from.
    """
    with open_bundle(bundle) as folder:
        manifest = verified_manifest(folder, str(bundle))
        reference, told = load_reference(folder), VerifyReport.reference
        if checkpoint is not None:
            reference, told = _fresh_reference(manifest.raw, folder, checkpoint), f"the gated model of {checkpoint}"
            if _is_healed(manifest.raw):
                told = f"the healed gated model in the bundle, cut from {checkpoint}"
        return dataclasses.replace(verify_models(folder, manifest, reference), reference=told).require()


def _is_healed(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("healing", {}).get("kept"))


def _fresh_reference(raw: Mapping[str, Any], folder: Path, checkpoint: str | Path) -> Mapping[str, Any]:
    stored = Plan.from_dict(raw["plan"], "manifest.json: plan")
    model = open_model(checkpoint)
    _check_replay(stored, model, stored.profile, {})
    table = sampler_table(stored.sampler, model.checkpoint.spec.objective, stored.steps)
    if _is_healed(raw):
        truncated = load_checkpoint(folder / HEALED)
    else:
        truncated = truncate(model.checkpoint, stored, model.calibration)
    own = model.heldout.of_classes(class_indices(model.checkpoint, stored.classes)) if model.heldout else None
    points = make_reference(truncated, stored.form, torch.from_numpy(table.timestep), own, seed=1)
    return points | make_images(truncated, stored, seed=1)
