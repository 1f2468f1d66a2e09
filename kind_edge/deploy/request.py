"""What `plan` and `export` are asked, parsed once: the model with what lies beside it, and a checked request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from kind_edge.budget.planner import candidate_forms
from kind_edge.budget.problem import Request, Sampling, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.budget.sensitivity import spectra
from kind_edge.deploy.merge import class_indices
from kind_edge.deploy.reference import Heldout, load_heldout
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import UsageError, unknown
from kind_edge.model.calibration import Calibration, calibration_of
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, checkpoint_hash, load_checkpoint
from kind_edge.model.shipped import find_model
from kind_edge.model.spec import DEFAULT_GUIDANCE, DEFAULT_STEPS, FORMS, SAMPLERS, default_sampler
from kind_edge.units import Kind, parse_quantity

_LIMIT_KINDS: Mapping[str, Kind] = {
    "max_latency": "seconds",
    "max_memory": "bytes",
    "max_flops": "flops",
    "max_size": "bytes",
}


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint with what lies beside it."""

    name: str
    sha256: str
    checkpoint: Checkpoint
    calibration: Calibration
    heldout: Heldout | None


def open_model(model: str | Path) -> OpenedModel:
    folder = find_model(model)
    checkpoint = load_checkpoint(folder)
    if not checkpoint.spec.factored:
        raise UsageError(f"{folder}: a dense model has no learngene and no tailors to cut; give a KIND checkpoint")
    calibration = calibration_of(checkpoint, folder / CALIBRATION)
    return OpenedModel(
        folder.resolve().name, checkpoint_hash(folder), checkpoint, calibration, load_heldout(folder, checkpoint.spec)
    )


class Choices(TypedDict, total=False):
    """What may be asked of a plan, beside model and device; limits are texts with a unit, as on the command line."""

    classes: Sequence[str] | None
    form: str
    precision: str
    unit: str
    steps: int | None
    guidance: float | None
    sampler: str | None
    max_latency: str | None
    max_memory: str | None
    max_flops: str | None
    max_size: str | None


def make_request(
    checkpoint: Checkpoint,
    device: DeviceProfile,
    *,
    classes: Sequence[str] | None = None,
    form: str = "auto",
    precision: str = "auto",
    unit: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    **limits: str | None,
) -> Request:
    """Check every choice; what is left open comes from the checkpoint's own recommendation."""
    if unknown_names := set(limits) - set(_LIMIT_KINDS):
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown_names))}")
    _known("--form", form, ("auto", *FORMS))
    _known("--precision", precision, ("auto", "fp32", "int8"))
    _known("--unit", unit, ("auto", "cpu", "gpu", "npu"))
    if isinstance(classes, str):
        raise UsageError(f"classes: got the text {classes!r}, want a list of names such as [{classes!r}]")
    wanted = tuple(checkpoint.class_names if classes is None else classes)
    class_indices(checkpoint, wanted)
    if not wanted or len(set(wanted)) != len(wanted):
        raise UsageError(f"--classes: got {', '.join(wanted) or 'none'}; want at least one class, each once")
    objective = checkpoint.spec.objective
    advice = checkpoint.provenance.get("recommended", {})
    kind = sampler or advice.get("sampler") or default_sampler(objective)
    _known("--sampler", kind, SAMPLERS[objective])
    count = steps if steps is not None else int(advice.get("steps", DEFAULT_STEPS))
    if guidance is None:  # forms without a null branch cannot be guided, and nobody asked for it
        guidance = 1.0 if form in ("single", "union") else float(advice.get("guidance", DEFAULT_GUIDANCE))
    if not 0 < guidance < 100:
        raise UsageError(f"--guidance: got {guidance}, want a number above 0; 1 means no guidance")
    rows = len(sampler_table(kind, objective, count).timestep)
    parsed = {
        name: parse_quantity(text, _LIMIT_KINDS[name], flag="--" + name.replace("_", "-"))
        for name, text in limits.items()
        if text is not None
    }
    sampling = Sampling(kind, count, guidance, rows)
    return Request(device, wanted, sampling, form, precision, unit, parsed)  # type: ignore[arg-type]


def _known(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise unknown(f"value for {flag}", value, choices)


def make_source(model: OpenedModel, request: Request) -> Source:
    kept = class_indices(model.checkpoint, request.classes)
    spectrum = {form: spectra(model.checkpoint, kept, form, model.calibration) for form in candidate_forms(request)}
    spec = model.checkpoint.spec
    return Source(model.name, model.sha256, spec, spectrum, "whitened", model.calibration.source)
