"""What `plan` and `export` are asked, parsed once: the model with what lies beside it, and a checked request."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack, get_args

from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.image_time import teacher_of
from kind_edge.budget.influence import Sensitivity
from kind_edge.budget.loss import LossModel
from kind_edge.budget.plan import Modulation, Plan
from kind_edge.budget.planner import figures_of
from kind_edge.budget.precision import PRECISIONS, check_unit
from kind_edge.budget.problem import LIMIT_NAMES, Candidate, Objective, Request, Sampling, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.budget.sensitivity import loss_model
from kind_edge.budget.solver import LOSS
from kind_edge.budget.ways import Way
from kind_edge.budget.whole_model import model_cost
from kind_edge.deploy.decoder import decoder_costs, planned_decoder
from kind_edge.deploy.merge import class_indices
from kind_edge.deploy.probe import OnProgress, measure_sensitivity
from kind_edge.deploy.reference import Heldout, load_heldout
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.sensitivity_file import find_sensitivity, keep_sensitivity
from kind_edge.errors import InputError, UsageError, unknown
from kind_edge.model.autoencoder import Autoencoder, open_autoencoder
from kind_edge.model.calibration import Calibration, calibrate_on_samples, keep_calibration, load_calibration
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, checkpoint_hash, load_checkpoint
from kind_edge.model.one_thread import one_thread
from kind_edge.model.shipped import find_model
from kind_edge.model.spec import FORMS, SAMPLERS, Form, ModelSpec, check_sampling, recommended
from kind_edge.units import Kind, parse_quantity, parse_share

_LIMIT_KINDS: Mapping[str, Kind] = {
    "max_latency": "seconds",
    "max_memory": "bytes",
    "max_flops": "flops",
    "max_size": "bytes",
}
MINIMISED: Mapping[str, Objective] = {name.removeprefix("max_"): cost for name, cost in LIMIT_NAMES.items()}  # type: ignore[misc]
"""What may be asked for as the smallest, and what that is in the solver."""

_MOST_FEWER = 64
"""So many smaller step counts are tried at most where nothing fits."""

WALKS_FLOPS, LEAST_WALKS = 3e12, 8
"""Of a calibration, about two minutes of one core; and so many images are drawn for it even where that takes longer."""
EVALUATIONS_OF_WALK = 60
"""About: ten steps, each drawn, seen with and without its class, and once backwards."""


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint with what lies beside it, and the autoencoder of its latents where one was given."""

    name: str
    sha256: str
    checkpoint: Checkpoint
    stored_calibration: Calibration | None
    heldout: Heldout | None
    stored_sensitivity: Sensitivity | None = None
    on_measure: OnProgress | None = None
    autoencoder: Autoencoder | None = None

    @functools.cached_property
    def decoders(self) -> tuple[DecoderCost, ...]:
        """What the given autoencoder's decoder costs, whole and in tiles."""
        return () if self.autoencoder is None else decoder_costs(self.autoencoder)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What is stored; else it is measured when first asked for, as a refusal need not wait for that, and kept."""
        if self.stored_calibration is not None:
            return self.stored_calibration
        with one_thread():  # the factors follow from it
            measured = calibrate_on_samples(self.checkpoint.model(), images=_walks(self.checkpoint.spec))
        return keep_calibration(measured, self.checkpoint)

    @functools.cached_property
    def sensitivity(self) -> Sensitivity:
        """What is stored; else it is measured, which takes a minute of a small model, and kept for the next time."""
        if self.stored_sensitivity is not None:
            return self.stored_sensitivity
        measured = measure_sensitivity(self.checkpoint, self.sha256, self.calibration, on_progress=self.on_measure)
        keep_sensitivity(measured, self.checkpoint.path)
        return measured

    def heldout_of(self, classes: tuple[str, ...]) -> Heldout | None:
        """The held-out images of these classes; None where the checkpoint came without any."""
        return self.heldout.of_classes(class_indices(self.checkpoint, classes)) if self.heldout else None


def _walks(spec: ModelSpec) -> int:
    """How many images are drawn to calibrate on."""
    return max(LEAST_WALKS, int(WALKS_FLOPS / (EVALUATIONS_OF_WALK * model_cost(spec, "exact").flops)))


def open_model(
    model: str | Path | OpenedModel, on_measure: OnProgress | None = None, autoencoder: str | Path | None = None
) -> OpenedModel:
    """`on_measure` is told (done, total) where the model's sensitivity has to be measured first."""
    if isinstance(model, OpenedModel):
        return model if autoencoder is None else _with_autoencoder(model, Path(autoencoder))
    folder = find_model(model)
    checkpoint = load_checkpoint(folder)
    if not checkpoint.spec.factored:
        raise UsageError(f"{folder}: a dense model has no learngene and no tailors to cut; give a KIND checkpoint")
    path, heldout = folder / CALIBRATION, load_heldout(folder, checkpoint.spec)
    stored = load_calibration(path, checkpoint.spec) if path.exists() else None
    name, sha256 = folder.resolve().name, checkpoint_hash(folder)
    table = find_sensitivity(folder, sha256, checkpoint.spec)
    opened = OpenedModel(name, sha256, checkpoint, stored, heldout, table, on_measure)
    return opened if autoencoder is None else _with_autoencoder(opened, Path(autoencoder))


def _with_autoencoder(model: OpenedModel, folder: Path) -> OpenedModel:
    checkpoint = model.checkpoint
    return dataclasses.replace(model, autoencoder=open_autoencoder(folder, checkpoint.spec, checkpoint.provenance))


class Choices(TypedDict, total=False):
    """What may be asked of a plan, beside model and device; limits are texts with a unit, as on the command line."""

    classes: Sequence[str] | None
    form: str
    precision: str
    unit: str
    modulation: str
    steps: int | None
    guidance: float | None
    sampler: str | None
    max_latency: str | None
    max_memory: str | None
    max_flops: str | None
    max_size: str | None
    max_quality_loss: str | None
    minimize: str | None
    burst: bool


def make_request(
    checkpoint: Checkpoint,
    device: DeviceProfile,
    *,
    classes: Sequence[str] | None = None,
    form: str = "auto",
    precision: str = "auto",
    unit: str = "auto",
    modulation: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    max_quality_loss: str | None = None,
    minimize: str | None = None,
    burst: bool = False,
    **limits: str | None,
) -> Request:
    """Check every choice; what is left open comes from the checkpoint's own recommendation."""
    if unknown_names := set(limits) - set(_LIMIT_KINDS):
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown_names))}")
    _known("--form", form, ("auto", *FORMS))
    _known("--precision", precision, ("auto", *PRECISIONS))
    _known("--unit", unit, ("auto", "cpu", "gpu", "npu"))
    _known("--modulation", modulation, ("auto", *get_args(Modulation)))
    check_unit(precision, unit)
    if isinstance(classes, str):
        raise UsageError(f"classes: got the text {classes!r}, want a list of names such as [{classes!r}]")
    wanted = tuple(checkpoint.class_names if classes is None else classes)
    class_indices(checkpoint, wanted)
    if not wanted or len(set(wanted)) != len(wanted):
        raise UsageError(f"--classes: got {', '.join(wanted) or 'none'}; want at least one class, each once")
    parsed = {
        name: parse_quantity(text, _LIMIT_KINDS[name], flag="--" + name.replace("_", "-"))
        for name, text in limits.items()
        if text is not None
    }
    sampling = _sampling(checkpoint, form, steps, guidance, sampler)
    if max_quality_loss is None and minimize is not None:
        raise UsageError(f"--minimize {minimize}: at what loss? add --max-quality-loss 2%")
    minimised = MINIMISED[_known("--minimize", minimize or "size", tuple(MINIMISED))] if max_quality_loss else LOSS
    return Request(
        device, wanted, sampling, form, precision, unit, parsed,  # type: ignore[arg-type]
        others=_other_counts(checkpoint, sampling) if steps is None else (),
        fewer=_fewer(checkpoint, sampling),
        minimise=minimised,  # type: ignore[arg-type]
        max_loss=None if max_quality_loss is None else parse_share(max_quality_loss, "--max-quality-loss"),
        burst=burst,
        modulation=modulation,  # type: ignore[arg-type]
    )  # fmt: skip


def _sampling(
    checkpoint: Checkpoint, form: str, steps: int | None, guidance: float | None, sampler: str | None
) -> Sampling:
    spec, advice = checkpoint.spec, recommended(checkpoint.spec, checkpoint.provenance)
    kind, count = sampler or advice.sampler, advice.steps if steps is None else steps
    _known("--sampler", kind, SAMPLERS[spec.objective])
    inside = spec.inside_guidance
    if inside is not None:  # nothing is left to be done outside
        check_sampling(spec, count, inside if guidance is None else guidance, kind)
        guidance = 1.0
    if guidance is None:  # forms without a null branch cannot be guided, and nobody asked for it
        guidance = 1.0 if form in ("single", "union") else advice.guidance
    if not 0 < guidance < 100:
        raise UsageError(f"--guidance: got {guidance}, want a number above 0; 1 means no guidance")
    return Sampling(kind, count, guidance, len(sampler_table(kind, spec.objective, count).timestep), inside)


def _at(checkpoint: Checkpoint, sampling: Sampling, steps: int) -> Sampling:
    rows = len(sampler_table(sampling.sampler, checkpoint.spec.objective, steps).timestep)
    return dataclasses.replace(sampling, steps=steps, evaluations=rows)


def _other_counts(checkpoint: Checkpoint, sampling: Sampling) -> tuple[Sampling, ...]:
    """The other step counts of a distilled model, most first: all that it can do."""
    counts = [count for count in reversed(checkpoint.spec.step_counts) if count != sampling.steps]
    return tuple(_at(checkpoint, sampling, count) for count in counts)


def ask(
    model: OpenedModel, device: DeviceProfile, source: Source | None = None, **choices: Unpack[Choices]
) -> tuple[Source, Request]:
    """What is planned for, and the checked request; a mistake in it is told before anything is measured.

    Of a model that is not distilled, the steps and the guidance that the user left open are those at which it was
    judged, as many as there are: 1 is without a guidance branch. `source`: the model's, where it is there already.
    """
    request = make_request(model.checkpoint, device, **choices)
    source, sampling = source or make_source(model), request.sampling
    spec, advice = model.checkpoint.spec, recommended(model.checkpoint.spec, model.checkpoint.provenance)
    if spec.distilled or source.response is None or sampling.sampler != advice.sampler:
        return source, request
    steps_open, guidance_open = (choices.get(name) is None for name in ("steps", "guidance"))
    folded = request.form in ("single", "union")  # no null branch to guide with
    others = [
        dataclasses.replace(_at(model.checkpoint, sampling, row.steps), guidance=row.guidance)
        for row in source.response.table
        if (steps_open or row.steps == sampling.steps)
        and (row.guidance == sampling.guidance or (guidance_open and not folded))
    ]
    return source, dataclasses.replace(request, others=tuple(other for other in others if other != sampling))


def _fewer(checkpoint: Checkpoint, sampling: Sampling) -> tuple[Sampling, ...]:
    supported = checkpoint.spec.step_counts or range(1, sampling.steps)
    counts = [count for count in supported if count < sampling.steps]
    spread = sorted({counts[i * len(counts) // _MOST_FEWER] for i in range(_MOST_FEWER)}) if counts else []
    return tuple(_at(checkpoint, sampling, count) for count in reversed(spread))


def _known(flag: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise unknown(f"value for {flag}", value, choices)
    return value


def make_source(model: OpenedModel) -> Source:
    """What is planned for; the losses are found when they are asked for, once for each form and set of classes."""

    table = model.sensitivity

    @functools.cache
    def losses(form: Form, classes: frozenset[str]) -> LossModel:
        kept = sorted(class_indices(model.checkpoint, tuple(classes)))
        return loss_model(model.checkpoint, kept, form, model.calibration, table)

    spec = model.checkpoint.spec
    teacher = teacher_of(model.checkpoint.provenance) if spec.distilled else None
    return Source(
        model.name, model.sha256, spec, lambda form, classes: losses(form, frozenset(classes)), "whitened",
        model.calibration.source, teacher, table.response,
        model.decoders,
    )  # fmt: skip


def as_replayed(plan: Plan, source: Source, device: DeviceProfile, whole: ModelSpec | None = None) -> Plan:
    """A stored plan with figures that are its own: where its matrices, steps or classes were changed by hand, costs and
    predictions are found anew, and nothing claims any more that it is the best.

    Latency and memory of an unchanged plan stay as they were predicted: a profile may have been measured again.
    `whole`: the shape of the model before the plan resizes it, where it does. Raises `InputError` for lower ranks of a
    model at another size: nobody knows what those lose.
    """
    rows = len(sampler_table(plan.sampler, source.spec.objective, plan.steps).timestep)
    sampling = Sampling(plan.sampler, plan.steps, plan.guidance, rows, plan.inside_guidance)
    written = "auto" if len(plan.precisions) > 1 else plan.precisions[0]
    decoder = planned_decoder(source.decoders, plan)
    request = Request(
        device, plan.classes, sampling, plan.form, written, plan.unit, decoder=decoder, dense_spec=whole,  # type: ignore[arg-type]
    )  # fmt: skip
    candidate = Candidate(plan.form, plan.precision, plan.unit, plan.modulation)  # type: ignore[arg-type]
    found = figures_of(source, Way(request, candidate), plan.matrices)
    if not math.isfinite(found.predicted_loss_increase or 0.0):
        raise InputError("the plan takes the model at another size, at ranks that were not measured there; solve again")
    same = all(getattr(found, name) == getattr(plan, name) for name in ("flops", "params", "evaluations_per_step"))
    known = plan.predicted_loss_increase
    if same and known is not None and math.isclose(known, found.predicted_loss_increase or 0.0, abs_tol=1e-9):
        return plan
    kept = {name: getattr(plan, name) for name in ("calibration", "limits", "precisions", "minimised")}
    return dataclasses.replace(found, **kept)
