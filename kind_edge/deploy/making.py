"""The two stages of an export: model files made and proven; then measured, drawn, packaged and told about."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kind_edge.budget.plan import Plan
from kind_edge.budget.precision import decoder_path
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.deploy import assemble
from kind_edge.deploy.bench import LatencyReport
from kind_edge.deploy.bundle import write_manifest
from kind_edge.deploy.cut import Cut
from kind_edge.deploy.decoder import decoder_facts, planned_decoder
from kind_edge.deploy.merge import class_indices, fold
from kind_edge.deploy.model_files import recorded
from kind_edge.deploy.packs_bundle import write_core
from kind_edge.deploy.parity import VerifyReport
from kind_edge.deploy.quality import Healing, Quality
from kind_edge.deploy.reference import make_images, make_reference
from kind_edge.deploy.report import REPORT, write_report
from kind_edge.deploy.report_facts import draw_whole_model, report_facts
from kind_edge.deploy.request import OpenedModel
from kind_edge.deploy.resizing import size_spec
from kind_edge.deploy.sampler_table import SamplerTable, sampler_table
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
    """What is written: model files by exporters, and what packagers make of them."""

    exporters: tuple[Exporter, ...]
    packagers: tuple[Packager, ...]
    packs: bool

    @classmethod
    def of(cls, names: Sequence[str], choices: Mapping[str, Mapping[str, Any]] | None = None) -> Formats:
        """ONNX is always among them: what an app loads, what is measured and what draws the preview."""
        return cls(exporters(("onnx", *names), choices), packagers(names), PACKS in names)

    def check(self, spec: ModelSpec) -> None:
        """`UsageError` before any work for a model that one of them has no place for."""
        checked: list[Exporter | Packager] = [*self.exporters, *self.packagers]
        for each in checked:
            each.check(spec)


@dataclass(frozen=True)
class Made:
    """The model files in the temporary folder, proven, before they are measured. `values` are those of the manifest,
    `model_bytes` what an app loads, `core` the manifest's section of class packs, where classes can be changed."""

    cut: Cut
    values: Mapping[str, Any]
    model_bytes: int
    table: SamplerTable
    verification: VerifyReport
    core: Mapping[str, Any] | None


def make_models(model: OpenedModel, plan: Plan, folder: Path, formats: Formats, stage: OnStage, cut: Cut) -> Made:
    """Export and verify into `folder`; healed weights are in no other checkpoint, so they are kept there."""
    table = sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps)
    timesteps = torch.from_numpy(table.timestep)
    truncated = cut.truncated
    if cut.healed:
        save_checkpoint(folder / HEALED, truncated, stored_dtype(model.checkpoint))
    own = model.heldout.of_classes(class_indices(model.checkpoint, plan.classes)) if model.heldout else None
    plain = fold(truncated, plan, timesteps)
    plain.origin = dataclasses.replace(plain.origin, autoencoder=model.autoencoder)
    stage("exporting")
    entries = {
        file.path: file.entry
        for each in formats.exporters
        for file in each.export(plain, folder, tuple(p for p in plan.precisions if p in each.precisions))
    }
    entries = recorded(folder, entries)
    core = write_core(folder, entries, plan)
    stage("verifying")
    with one_thread() if formats.packs else contextlib.nullcontext():  # it goes into the packs
        images = make_images(truncated, plan, model.autoencoder, every_class=formats.packs)
        reference = make_reference(truncated, plan.form, timesteps, own) | images
    assemble.save_reference(folder, reference)
    wanted = {"role": "denoiser", "precision": plan.precision}
    default_model = next(path for path, entry in _runnable(entries).items() if wanted.items() <= entry.items())
    decoder = decoder_facts(model.autoencoder, plan, reference["latent"]) if model.autoencoder else None
    spec = size_spec(model.checkpoint.spec, plan.resize)
    values = assemble.describe(plan, spec, entries, default_model, table, plain.origin.lineage(), decoder)
    verification = verify_models(folder, assemble.manifest_of(values, folder), reference).require()
    loaded = [default_model, *([decoder_path(str(plan.decoder["precision"]))] if plan.decoder else [])]
    size = sum((folder / file).stat().st_size for file in loaded)
    return Made(cut, values, size, table, verification, core)


def _runnable(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The files that ONNX Runtime opens: what an app loads, and what can be measured here."""
    return {path: entry for path, entry in entries.items() if path.endswith((".onnx", ".ort"))}


def finish(
    model: OpenedModel,
    plan: Plan,
    device: DeviceProfile,
    folder: Path,
    destination: Path,
    made: Made,
    formats: Formats,
    asked: tuple[Source, Request | None],
    stage: OnStage,
) -> Bundle:
    """Measure, draw the preview and write what the bundle says about itself."""
    spec = size_spec(model.checkpoint.spec, plan.resize)
    values, cut = dict(made.values), made.cut
    values["verification"] = {**made.verification.to_dict(), "merge_db": cut.merge_db}
    values["quality"] = {each.name: each.to_dict() for each in cut.quality}
    if made.core:
        values["packs"] = dict(made.core)
    if cut.healing:
        values["healing"] = {**cut.healing.to_dict(), "told": cut.healing.told()}
    stage("measuring")
    measured = _runnable(values["models"])
    latency, image = assemble.measure(folder, values, measured)
    rows, decoder = len(made.table.timestep), planned_decoder(model.decoders, plan)
    predicted = assemble.predict_here_ms(plan, spec, measured, rows, decoder)
    assemble.latency_gate(plan, device, image)
    values["latency"] = {
        "models": {name: report.to_dict() for name, report in latency.items()},
        "image": image.to_dict(),
        "predicted_here_ms": predicted,
    }
    stage("drawing the preview")
    assemble.draw_preview(folder, assemble.manifest_of(values, folder))
    draw_whole_model(folder, model.checkpoint, plan)
    assemble.write_texts(folder, plan, values)
    for each in formats.packagers:
        stage("packaging for apps")
        each.write(folder, values)
    stage("writing the report")
    values["report"] = report_facts(plan, *asked, device, folder / values["default_model"], rows)
    write_report(folder, values, folder / REPORT)
    write_manifest(folder, values)
    sizes, parity = sizes_below(folder), made.verification.parity
    known = (cut.quality, cut.merge_db, cut.healing)
    return Bundle(destination, sizes, parity, latency, image, predicted, plan, *known)


def sizes_below(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
