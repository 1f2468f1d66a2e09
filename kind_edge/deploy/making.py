"""The stages of an export: model files made and proven; measured; drawn; then told about and packaged.

All but the last depend on the model and on what a plan makes of it, not on the device that it is for.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kind_edge.budget.coreml import APP_ROLES
from kind_edge.budget.plan import Plan
from kind_edge.budget.precision import decoder_path
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.deploy import assemble
from kind_edge.deploy.bench import LatencyReport
from kind_edge.deploy.bundle import write_manifest
from kind_edge.deploy.cut import Cut
from kind_edge.deploy.decoder import decoder_facts, planned_decoder
from kind_edge.deploy.made import Made, Measured, runnable
from kind_edge.deploy.merge import fold
from kind_edge.deploy.model_files import recorded
from kind_edge.deploy.packs_bundle import write_core
from kind_edge.deploy.packs_make import shared_weights
from kind_edge.deploy.quality import Healing, Quality
from kind_edge.deploy.reference import make_images, make_reference
from kind_edge.deploy.report import REPORT, write_report
from kind_edge.deploy.report_facts import draw_whole_model, report_facts
from kind_edge.deploy.request import OpenedModel
from kind_edge.deploy.resizing import size_spec
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import verify_models
from kind_edge.model.checkpoint import save_checkpoint, stored_dtype
from kind_edge.model.one_thread import one_thread
from kind_edge.model.spec import ModelSpec
from kind_edge.registry import PACKS, Exporter, Packager, exporters, packagers

OnStage = Callable[[str], None]

HEALED = "healed"
"""Folder of a bundle: the checkpoint that a healed bundle's files were folded from."""


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


@dataclass(frozen=True)
class Formats:
    """What is written: model files by exporters, and what packagers make of them. `coreml` are the choices for Core
    ML's packages, None where none are written."""

    exporters: tuple[Exporter, ...]
    packagers: tuple[Packager, ...]
    packs: bool
    coreml: Mapping[str, Any] | None

    @classmethod
    def of(cls, names: Sequence[str], choices: Mapping[str, Mapping[str, Any]] | None = None) -> Formats:
        """ONNX is always among them: what an app loads, what is measured and what draws the preview."""
        coreml = (choices or {}).get("coreml", {}) if "coreml" in names else None
        return cls(exporters(("onnx", *names), choices), packagers(names), PACKS in names, coreml)

    def check(self, spec: ModelSpec) -> None:
        """`UsageError` before any work for a model that one of them has no place for."""
        checked: list[Exporter | Packager] = [*self.exporters, *self.packagers]
        for each in checked:
            each.check(spec)


def make_models(model: OpenedModel, plan: Plan, folder: Path, formats: Formats, stage: OnStage, cut: Cut) -> Made:
    """Export and verify into `folder`; healed weights are in no other checkpoint, so they are kept there."""
    table = sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps)
    timesteps = torch.from_numpy(table.timestep)
    truncated = cut.truncated
    if cut.healed:
        save_checkpoint(folder / HEALED, truncated, stored_dtype(model.checkpoint))
    own = model.heldout_of(plan.classes)
    plain = fold(truncated, plan, timesteps)
    plain.origin = dataclasses.replace(plain.origin, autoencoder=model.autoencoder)
    stage("exporting")
    entries = {
        file.path: file.entry
        for each in formats.exporters
        for file in each.export(plain, folder, tuple(p for p in plan.precisions if p in each.precisions))
    }
    entries = recorded(folder, entries)
    core = write_core(folder, entries, plan, shared_weights(truncated))
    stage("verifying")
    with one_thread() if formats.packs else contextlib.nullcontext():  # it goes into the packs
        images = make_images(truncated, plan, model.autoencoder, every_class=formats.packs)
        reference = make_reference(truncated, plan.form, timesteps, own) | images
    assemble.save_reference(folder, reference)
    wanted = {"role": "denoiser", "precision": plan.precision}
    default_model = next(path for path, entry in runnable(entries).items() if wanted.items() <= entry.items())
    decoder = decoder_facts(model.autoencoder, plan, reference["latent"]) if model.autoencoder else None
    spec = size_spec(model.checkpoint.spec, plan.resize)
    values = assemble.describe(plan, spec, entries, default_model, table, plain.origin.lineage(), decoder)
    verification = verify_models(folder, assemble.manifest_of(values, folder), reference).require()
    loaded = [default_model, *([decoder_path(str(plan.decoder["precision"]))] if plan.decoder else [])]
    size = sum((folder / file).stat().st_size for file in loaded)
    values |= {
        "verification": {**verification.to_dict(), "merge_db": cut.merge_db},
        "quality": {each.name: each.to_dict() for each in cut.quality},
        **({"packs": dict(core)} if core else {}),
        **({"healing": {**cut.healing.to_dict(), "told": cut.healing.told()}} if cut.healing else {}),
    }
    packages = sum(entry.get("package_bytes", 0) for entry in entries.values() if entry["role"] in APP_ROLES)
    return Made(values, size, len(table.timestep), verification.parity, packages)


def draw(model: OpenedModel, plan: Plan, folder: Path, made: Made) -> None:
    """What the model files draw, and the whole model from the same noise."""
    assemble.draw_preview(folder, assemble.manifest_of(made.values, folder))
    draw_whole_model(folder, model.checkpoint, plan)


def tell(
    model: OpenedModel,
    plan: Plan,
    device: DeviceProfile,
    folder: Path,
    made: Made,
    measured: Measured,
    formats: Formats,
    asked: tuple[Source, Request | None],
    stage: OnStage,
) -> dict[str, float]:
    """Write what a bundle of proven, measured files says about itself. The files may be those of another device's plan
    that makes the same of the model: whatever names the device is written here.
    Returns what is predicted for this machine, in milliseconds by file.
    """
    values = {**made.values, "name": assemble.bundle_name(plan), "plan": plan.to_dict()}
    decoder = planned_decoder(model.decoders, plan)
    spec, entries = size_spec(model.checkpoint.spec, plan.resize), runnable(made.values["models"])
    predicted = assemble.predict_here_ms(plan, spec, entries, made.rows, decoder)
    values["latency"] = {
        "models": {name: report.to_dict() for name, report in measured.models.items()},
        "image": measured.image.to_dict(),
        "predicted_here_ms": predicted,
    }
    assemble.write_texts(folder, plan, values)
    if formats.packagers:
        stage("packaging for apps")
    for each in formats.packagers:
        each.write(folder, values)
    stage("writing the report")
    values["report"] = report_facts(plan, *asked, device, folder / values["default_model"], made.rows)
    write_report(folder, values, folder / REPORT)
    write_manifest(folder, values)
    return predicted


def sizes_below(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
