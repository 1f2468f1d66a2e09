"""The whole way as two functions: `plan` decides, `export` makes, proves, measures and bundles."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from kind_edge.budget.front import Curve, front
from kind_edge.budget.plan import Plan
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile, load_profile, profile_names
from kind_edge.budget.sizes import make_plan_of_any_size
from kind_edge.deploy.assemble import SIZE_ATTEMPTS, latency_gate, missing_bytes
from kind_edge.deploy.bundle import check_replaceable, open_bundle, verified_manifest, writing_bundle
from kind_edge.deploy.cut import Cut, healing_key, healing_state, judged, make_cut, truncated_by
from kind_edge.deploy.made import Made, measure
from kind_edge.deploy.making import (
    HEALED,
    Bundle,
    Formats,
    OnStage,
    draw,
    make_models,
    sizes_below,
    tell,
)
from kind_edge.deploy.merge import class_indices
from kind_edge.deploy.parity import VerifyReport
from kind_edge.deploy.planning import check_replayed, choices_for, make_plan_for
from kind_edge.deploy.probe import OnProgress
from kind_edge.deploy.reference import make_images, make_reference
from kind_edge.deploy.replay import check_replay
from kind_edge.deploy.request import (
    MINIMISED,
    Choices,
    OpenedModel,
    as_replayed,
    ask,
    make_source,
    open_model,
)
from kind_edge.deploy.resizing import at_planned_size, check_heal, planned_source, sized_sources
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.signing import SigningKey
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.shipped import DEFAULT_MODEL
from kind_edge.units import parse_duration

if TYPE_CHECKING:
    from kind_edge.training.healing import HealingProgress

    OnHealing = Callable[[HealingProgress], None]


def plan(
    model: str | Path | OpenedModel = DEFAULT_MODEL,
    *,
    profile: str,
    formats: Sequence[str] = ("onnx",),
    autoencoder: str | Path | None = None,
    allow_resize: str | None = None,
    format_choices: Mapping[str, Mapping[str, Any]] | None = None,
    on_measure: OnProgress | None = None,
    on_healing: OnHealing | None = None,
    **choices: Unpack[Choices],
) -> Plan:
    """The best plan for a device and classes under limits such as max_size="2MiB", max_latency="4s", max_flops="40%":
    the one that `export` makes of the same.

    `formats` and `format_choices` are those of `export`: Core ML's packages have to keep --max-size, and what the
    device's store takes, and class packs need the form that keeps classes apart.
    `allow_resize`: a time such as "10m"; smaller depths and widths are choices, too, with their quality after so long a
    healing, which is measured first, once for the model.
    `autoencoder`: the folder of what turns a latent model's latents into pictures; its decoder is counted.
    `on_measure` is told (done, total) where the model has no sensitivity table yet: that takes a minute, once.
    Raises `UsageError` for what cannot be understood, `NoPlanError` when nothing fits.
    """
    device = load_profile(profile)
    wanted = Formats.of(formats, format_choices)
    opened = open_model(model, on_measure, autoencoder)
    wanted.check(opened.checkpoint.spec)
    source, request = ask(opened, device, **choices_for(choices, wanted))
    solve = partial(make_plan_for, formats=wanted)
    if allow_resize is None:
        return solve(source, request)
    heal_s = parse_duration(allow_resize, "--allow-resize")
    return make_plan_of_any_size([source, *sized_sources(opened, source, heal_s, on_healing)], request, solve)


def pareto(
    model: str | Path | OpenedModel = DEFAULT_MODEL,
    *,
    profile: str,
    autoencoder: str | Path | None = None,
    on_measure: OnProgress | None = None,
    **choices: Unpack[Choices],
) -> tuple[Curve, ...]:
    """The front for 1, 2, 5 and all of the classes: the least predicted loss at every size of the model file, or at
    every latency, amount of FLOPs or memory with minimize="latency" and so on; within the limits that are asked for.

    Raises `NoPlanError` when not one point fits.
    """
    opened = open_model(model, on_measure, autoencoder)
    axis = MINIMISED[choices.pop("minimize", None) or "size"]
    source, request = ask(opened, load_profile(profile), **choices)
    return front(source, request, axis)


def export(
    model: str | Path | OpenedModel = DEFAULT_MODEL,
    *,
    profile: str | None = None,
    plan: Plan | None = None,
    output: str | Path | None = None,
    formats: Sequence[str] = ("onnx",),
    autoencoder: str | Path | None = None,
    heal: str | None = None,
    format_choices: Mapping[str, Mapping[str, Any]] | None = None,
    sign: SigningKey | None = None,
    keep_failed: bool = False,
    on_stage: OnStage | None = None,
    on_healing: OnHealing | None = None,
    on_measure: OnProgress | None = None,
    **choices: Unpack[Choices],
) -> Bundle:
    """Plan (unless `plan` is given), merge, export, verify, measure and bundle.

    `heal` is a time such as "5m": for so long the cut model learns from the full one, once it is known that it can be
    exported. What it has learned is kept beside `output` until the bundle is complete: stopped, the same call goes on.
    `autoencoder`, a folder of diffusers', makes pictures of a latent model's latents: its decoder goes into the bundle.
    ONNX is always among the formats: what an app loads, what is measured and what draws the preview. `format_choices`
    are an exporter's own, by format: {"coreml": {"target": "iOS16"}}. With `sign` the manifest is signed:
    `kind_edge.deploy.signing.read_signing_key("KEY.pem")`.
    Raises `GateError` if parity, size or latency fails: then nothing is left behind, unless `keep_failed`.
    """
    stage = on_stage or (lambda _: None)
    wanted = Formats.of(formats, format_choices)
    heal_s = None if heal is None else parse_duration(heal, "--heal")
    if output is not None:
        check_replaceable(Path(output))  # before any work
    stage("reading the model")
    opened = open_model(model, on_measure, autoencoder)
    wanted.check(opened.checkpoint.spec)
    request = None
    if plan is None:
        if profile is None:
            raise UsageError("--profile is missing: which device is it for? kind-edge profiles list shows all")
        stage("planning")
        device = load_profile(profile)
        source, request = ask(opened, device, **choices_for(choices, wanted))
        plan = make_plan_for(source, request, wanted)
    else:
        device, source, plan = _replayed(opened, plan, profile, heal_s, choices)
        plan = check_replayed(source, device, plan, wanted)
    destination = Path(output) if output is not None else Path(f"{opened.name}-{device.name}")
    with writing_bundle(destination, keep_failed, sign) as folder:
        plan, cut, made = _fitted(opened, plan, (source, request), folder, wanted, stage)
        if heal_s is not None:
            stage("healing")
            cut = heal_cut(opened, plan, cut, heal_s, healing_state(destination), on_healing)
            made = make_models(opened, plan, folder, wanted, stage, cut)
        stage("measuring")
        measured = measure(folder, made)
        latency_gate(plan, device, measured.image)
        stage("drawing the preview")
        draw(opened, plan, folder, made)
        predicted = tell(opened, plan, device, folder, made, measured, wanted, (source, request), stage)
    shutil.rmtree(healing_state(destination).parent, ignore_errors=True)
    known = (predicted, plan, cut.quality, cut.merge_db, cut.healing)
    return Bundle(destination, sizes_below(destination), made.parity, measured.models, measured.image, *known)


def _replayed(
    model: OpenedModel, plan: Plan, profile: str | None, heal_s: float | None, choices: Choices
) -> tuple[DeviceProfile, Source, Plan]:
    """A stored plan, checked against the model and what else is asked."""
    if profile is None and plan.profile not in profile_names():
        raise UsageError(f"the plan was made for profile {plan.profile!r}, which is not ours: add --profile FILE")
    device = load_profile(profile or plan.profile)
    check_replay(plan, model, device.name, choices)
    check_heal(plan, heal_s)
    source = planned_source(model, make_source(model), plan)
    return device, source, as_replayed(plan, source, device, model.checkpoint.spec)


def _fitted(
    model: OpenedModel,
    plan: Plan,
    asked: tuple[Source, Request | None],
    folder: Path,
    formats: Formats,
    stage: OnStage,
) -> tuple[Plan, Cut, Made]:
    """Proven model files within their limits; where prediction was short by a little, they are planned again."""
    source, request = asked
    for attempt in range(SIZE_ATTEMPTS):
        stage("merging")
        cut = make_cut(model, plan)
        made = make_models(model, plan, folder, formats, stage, cut)
        last = request is None or attempt == SIZE_ATTEMPTS - 1
        spare_bytes = missing_bytes(plan, made.model_bytes, made.package_bytes, last)
        if request is None or not spare_bytes:
            break
        request = dataclasses.replace(request, spare_bytes=request.spare_bytes + spare_bytes)
        plan = make_plan_for(source, request, formats)
    return plan, cut, made


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
    from kind_edge.training.healing import Lesson, heal, sampler_rows, walk_deviation

    table = sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps)
    kept = tuple(class_indices(model.checkpoint, plan.classes))
    guidance = plan.guidance if plan.evaluations_per_step > 1 else 1.0
    lesson = Lesson(
        model.checkpoint, cut.truncated, kept, plan.form, sampler_rows(table), guidance, plan.null_branch,
        whole=bool(plan.resize),
    )  # fmt: skip
    done = heal(lesson, seconds, state, healing_key(plan), on_healing or (lambda _: None), clock)
    return judged(model, plan, cut, done.checkpoint, done.seconds, done.steps, partial(walk_deviation, lesson))


def verify(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    autoencoder: str | Path | None = None,
    key: str | Path | None = None,
) -> VerifyReport:
    """Check a bundle's hashes and the parity of its model files; `GateError` if any gate fails.

    With `key`, a PEM file with the public half of an Ed25519 key, the signature of its manifest comes first.

    The stored reference is used; with `checkpoint` it is computed anew from the gated model. Of a healed bundle that is
    the healed checkpoint in it, and `checkpoint` must be the one that it was cut from. Where there is a decoder, its
    `autoencoder` must be given as well.
    """
    with open_bundle(bundle) as folder:
        manifest = verified_manifest(folder, str(bundle), key)
        reference, told = load_reference(folder), VerifyReport.reference
        if autoencoder is not None and checkpoint is None:
            raise UsageError("--autoencoder goes with --checkpoint: alone it has nothing to decode")
        if checkpoint is not None:
            reference = _fresh_reference(manifest.raw, folder, checkpoint, autoencoder)
            told = f"the gated model of {checkpoint}"
            if _is_healed(manifest.raw):
                told = f"the healed gated model in the bundle, cut from {checkpoint}"
        return dataclasses.replace(verify_models(folder, manifest, reference), reference=told).require()


def _is_healed(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("healing", {}).get("kept"))


def _fresh_reference(
    raw: Mapping[str, Any], folder: Path, checkpoint: str | Path, autoencoder: str | Path | None
) -> Mapping[str, Any]:
    if later := raw.get("provenance", {}).get("later"):
        raise UsageError(
            f"--checkpoint: the bundle has classes of other checkpoints ({', '.join(later)}); leave it out: the stored "
            "reference has them all"
        )
    stored = Plan.from_dict(raw["plan"], "manifest.json: plan")
    model = open_model(checkpoint, autoencoder=autoencoder)
    check_replay(stored, model, stored.profile, {})
    table = sampler_table(stored.sampler, model.checkpoint.spec.objective, stored.steps)
    if _is_healed(raw):
        if not (folder / HEALED).exists():
            raise UsageError("--checkpoint: a healed bundle with other classes has its stored reference alone")
        truncated = load_checkpoint(folder / HEALED)
    else:
        truncated = truncated_by(stored, at_planned_size(model, stored))
    own = model.heldout_of(stored.classes)
    points = make_reference(truncated, stored.form, torch.from_numpy(table.timestep), own, seed=1)
    return points | make_images(truncated, stored, model.autoencoder, seed=1)
