"""A model that is distilled for few steps, with guidance inside, from its checkpoint to the pixels of its bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kind_edge.deploy.request as request_module
from kind_edge.budget.cost import deployed_fixed_cost, model_cost
from kind_edge.budget.image_time import Teacher, teacher_of
from kind_edge.budget.plan import MatrixPlan, Plan, check_replayable
from kind_edge.deploy import pipeline
from kind_edge.deploy.evaluation import evaluate
from kind_edge.deploy.manifest import Manifest, read_manifest
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.merge_check import check_merge
from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import ModulationNetwork, ModulationTable, PlainDiT
from kind_edge.deploy.quality import heldout_deviations
from kind_edge.deploy.reference import load_heldout, make_reference
from kind_edge.deploy.request import open_model
from kind_edge.deploy.runtime import load_bundle, to_pixels
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import REFERENCE_ARRAYS, load_reference, verify_models
from kind_edge.errors import GateError, InputError, UsageError
from kind_edge.model.calibration import calibrate_on_images, calibrate_on_samples, load_calibration
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, load_checkpoint, save_checkpoint
from kind_edge.model.sampling import denoiser, sample
from kind_edge.registry import exporter

MakeCheckpoint = Callable[..., Checkpoint]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
FEW: dict[str, Any] = {"step_counts": (1, 2, 4), "inside_guidance": 1.75}
DEVICE, FP32, INT8 = "raspberry-pi-5", "onnx/denoiser.onnx", "onnx/denoiser.int8.onnx"
SAMPLER = "onnx/sampler.onnx"
FORMS = [("switch", ("shirt", "bag")), ("single", ("coat",)), ("union", ("shirt", "bag"))]


def timesteps_of(steps: int) -> Tensor:
    return torch.from_numpy(sampler_table("euler", "flow", steps).timestep)


def plan_of(checkpoint: Checkpoint, form: str, classes: tuple[str, ...], steps: int) -> Plan:
    """Two thirds of every rank; truncate, fold and check_merge look at nothing else of a plan."""
    matrices = {}
    for i, shape in enumerate(checkpoint.spec.matrices()):
        storage = "dense" if i % 2 else "factored"
        matrices[shape.name] = MatrixPlan(storage, "fp32", 4, 1 + i % 2)
        if form != "switch":
            matrices[shape.name] = MatrixPlan(storage, "fp32", rank=5)
    unknown = {field.name: None for field in dataclasses.fields(Plan)}
    return Plan(**{
        **unknown, "checkpoint_sha256": "", "form": form, "classes": classes, "matrices": matrices, "steps": steps,
        "guidance": 1.0, "inside_guidance": 1.75, "sampler": "euler", "precision": "fp32", "precisions": ("fp32",),
        "evaluations_per_step": 1, "modulation": "network" if checkpoint.spec.label_embedding else "baked",
    })  # fmt: skip


def output_of(plain: PlainDiT, reference: dict[str, Any]) -> np.ndarray:
    step = "step_index" if isinstance(plain.modulation, ModulationTable) else "timestep"
    names = ("sample", step, "class_index") if plain.switches else ("sample", step)
    return np.asarray(plain(*(torch.from_numpy(reference[name]) for name in names)))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("form", "classes"), FORMS)
def test_merged_is_gated_at_every_class_and_step(
    form: str, classes: tuple[str, ...], labels: bool, steps: int, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint(**FEW, label_embedding=labels)
    plan, timesteps = plan_of(checkpoint, form, classes, steps), timesteps_of(steps)
    assert check_merge(checkpoint, plan, timesteps) >= 100
    truncated = truncate(checkpoint, plan, None)
    plain = fold(truncated, plan, timesteps)
    reference = make_reference(truncated, plan.form, timesteps, None)
    assert set(reference["class_index"].tolist()) == set(range(len(classes) if form == "switch" else 1))  # no null
    assert set(reference["step_index"].tolist()) == set(range(steps))
    assert sqnr_db(reference["prediction"], output_of(plain, reference)) >= 100
    # The span is in there: as a model of other steps it is another function.
    other = fold(truncated, dataclasses.replace(plan, steps=2), timesteps)
    assert sqnr_db(reference["prediction"], output_of(other, reference)) < 60
    with pytest.raises(GateError, match="merge"):
        check_merge(dataclasses.replace(checkpoint, tensors=_broken(checkpoint)), plan, timesteps)


def _broken(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: t + float("nan") if "span_embed" in name else t for name, t in checkpoint.tensors.items()}


def test_nothing_of_the_null_branch_or_the_span_network_is_deployed(make_checkpoint: MakeCheckpoint) -> None:
    ordinary, labelled = make_checkpoint(), make_checkpoint(**FEW, label_embedding=True)
    plan = plan_of(labelled, "switch", ("shirt", "bag"), 4)
    plain = fold(truncate(labelled, plan, None), plan, timesteps_of(4))
    assert isinstance(plain.modulation, ModulationNetwork)
    assert plain.modulation.y_embed is not None
    assert plain.modulation.y_embed.weight.shape[0] == 2
    assert not [name for name, _ in plain.named_parameters() if "span" in name]
    span = sum(t.numel() for name, t in labelled.tensors.items() if name.startswith("span_embed."))
    few, many = labelled.spec, dataclasses.replace(ordinary.spec, label_embedding=True)
    assert model_cost(few, "exact").part("span").params == span
    assert model_cost(few, "exact").params - model_cost(many, "exact").params == span
    assert few.dense() == many.dense()
    deployed = [deployed_fixed_cost(spec, 2, 4, False, "fp32") for spec in (many, few)]
    assert deployed[0].flops == deployed[1].flops
    assert deployed[0].params - deployed[1].params == few.width  # a row of the label embedding
    assert deployed[1].params == sum(
        p.numel() for name, p in plain.named_parameters() if ".attn." not in name and ".mlp." not in name
    ) + sum(shape.outputs for shape in few.matrices())


def test_a_plan_takes_what_the_model_recommends_and_says_where_the_time_goes(distilled_folder: Path) -> None:
    plan = pipeline.plan(distilled_folder, profile=DEVICE, classes=["bag", "coat"])
    assert (plan.form, plan.sampler, plan.steps, plan.evaluations_per_step) == ("switch", "euler", 4, 1)
    assert (plan.guidance, plan.inside_guidance, plan.null_branch, plan.modulation) == (1.0, 1.75, False, "baked")
    assert plan.time["image_s"] == pytest.approx(plan.sustained_image_latency_s, rel=1e-5)
    assert plan.time["image_s"] == pytest.approx(4 * 1 * plan.evaluation_latency_s)
    assert (plan.teacher_time["steps"], plan.teacher_time["evaluations_per_step"]) == (20, 2)
    assert 5 < plan.teacher_time["image_s"] / plan.time["image_s"] < 10.1  # a guided step is one call of two rows
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict())), "here") == plan
    two = pipeline.plan(distilled_folder, profile=DEVICE, classes=["bag"], steps=2, guidance=1.75, form="single")
    assert (two.steps, two.form, two.inside_guidance) == (2, "single", 1.75)
    spec = load_checkpoint(distilled_folder).spec
    check_replayable(plan, spec)
    for wrong in ({"steps": 3}, {"sampler": "heun"}, {"inside_guidance": 2.0}, {"guidance": 1.5}):
        with pytest.raises(InputError, match="solve again"):
            check_replayable(dataclasses.replace(plan, **wrong), spec)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"steps": 3}, "--steps 3: this model is distilled for 1, 2, 4 steps"),
        ({"guidance": 1.5}, "--guidance 1.5: this model has guidance 1.75 inside"),
        ({"guidance": 1.0}, "--guidance 1: this model has guidance 1.75 inside"),
        ({"sampler": "heun"}, "--sampler heun: this model is distilled for the steps of euler"),
    ],
)
def test_what_it_was_not_distilled_for_is_refused_before_any_work(
    asked: dict[str, Any],
    words: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_checkpoint(tmp_path / "few", make_checkpoint(**FEW))  # without calibration, which would have to be measured
    monkeypatch.setattr(request_module, "calibrate_on_samples", lambda *_, **__: pytest.fail("work was done"))
    for verb in (pipeline.plan, pipeline.export):
        with pytest.raises(UsageError) as caught:
            verb(tmp_path / "few", profile=DEVICE, **asked)
        assert words in str(caught.value)


def test_what_is_said_of_the_teacher_must_make_sense() -> None:
    assert teacher_of({}) is None
    assert teacher_of({"distilled": {"teacher_steps": 20, "teacher_guidance": 1}}) == Teacher(20, 1.0)
    assert Teacher(20, 1.0).evaluations_per_step == 1
    for odd in ({}, 3, {"teacher_steps": 0, "teacher_guidance": 1.5}, {"teacher_steps": True, "teacher_guidance": 2.0}):
        with pytest.raises(InputError, match="provenance: distilled"):
            teacher_of({"distilled": odd})


def test_calibration_is_of_its_own_steps_and_has_no_null_branch(distilled_folder: Path) -> None:
    checkpoint = load_checkpoint(distilled_folder)
    model, spec = checkpoint.model(), checkpoint.spec
    heldout = load_heldout(distilled_folder, spec)
    assert heldout is not None
    seen: list[tuple[float, float]] = []
    hook = model.register_forward_pre_hook(lambda _, x: seen.extend(zip(x[1].tolist(), x[3].tolist(), strict=True)))
    calibrations = [calibrate_on_images(model, heldout.images, heldout.labels), calibrate_on_samples(model, 1)]
    hook.remove()
    grid = {(1000 * (1 - i / n), 1000 / n) for n in spec.step_counts for i in range(n)}
    assert set(seen) == grid
    stored = load_calibration(distilled_folder / CALIBRATION, spec)
    for calibration in (*calibrations, stored):
        assert calibration.null == {}
        assert set(calibration.pooled) == {shape.name for shape in spec.matrices()}


def test_cutting_is_judged_by_what_changes_in_the_prediction(distilled_folder: Path) -> None:
    full = load_checkpoint(distilled_folder)
    heldout = load_heldout(distilled_folder, full.spec)
    assert heldout is not None
    kept = [0, 1, 2, 3]
    same = heldout_deviations(full, full, "switch", kept, heldout, timesteps_of(4))
    assert [each.name for each in same] == list(full.class_names)  # no row of a null branch
    assert all(each.change == 0 and each.full > 0 for each in same)
    tensors = {name: tensor.clone() for name, tensor in full.tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith("tailors.s"):
            tensor[2] = 0
    cut = dataclasses.replace(full, tensors=tensors)
    shares = {
        each.name: each.change for each in heldout_deviations(full, cut, "switch", kept, heldout, timesteps_of(4))
    }
    assert shares.pop("coat") > 1e-4
    assert set(shares.values()) == {0.0}


def test_diffusers_has_no_place_for_a_span(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**FEW)
    plan = plan_of(checkpoint, "single", ("coat",), 4)
    plain = fold(truncate(checkpoint, plan, None), plan, timesteps_of(4))
    with pytest.raises(UsageError, match="--formats diffusers: the model is distilled"):
        exporter("diffusers").export(plain, tmp_path, ("fp32",))
    assert list(tmp_path.iterdir()) == []


def test_diffusers_is_refused_before_any_work(distilled_folder: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    asked: dict[str, Any] = {"profile": "snapdragon8g3", "formats": ["diffusers"], "on_stage": stages.append}
    with pytest.raises(UsageError, match="--formats diffusers: the model is distilled"):
        pipeline.export(distilled_folder, **asked, output=tmp_path / "b")
    assert stages == ["reading the model"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bundle(distilled_folder: Path, made_once: MadeOnce) -> Path:
    """Two classes, cut to 60 % of the dense model's work."""

    def make(folder: Path) -> None:
        asked: dict[str, Any] = {"profile": DEVICE, "classes": ["shirt", "bag"], "max_flops": "60%"}
        pipeline.export(distilled_folder, **asked, output=folder / "b")

    return made_once("distilled-bundle", make) / "b"


@pytest.mark.slow
def test_a_bundle_draws_what_the_gated_model_draws(bundle: Path, distilled_folder: Path) -> None:
    """ONNX Runtime with one evaluation per step against PyTorch with the span as its input."""
    opened, manifest = open_model(distilled_folder), read_manifest(bundle)
    model = truncate(opened.checkpoint, Plan.from_dict(manifest.raw["plan"], "here"), opened.calibration).model()
    noise = torch.from_numpy(gaussian_noise(7, 0, 3, (1, 8, 8)))
    loaded = load_bundle(bundle, model="fp32")
    for index, name in enumerate(("shirt", "bag")):
        images = sample(denoiser(model, 4, 1.75), noise, torch.full((3,), index), "flow", 4).numpy()
        got = loaded.generate(name, n=3, seed=7)
        assert np.abs(got.astype(int) - to_pixels(images.astype(np.float32)).astype(int)).max() <= 1
    assert not np.array_equal(loaded.generate("bag"), loaded.generate("shirt"))


@pytest.mark.slow
def test_a_bundle_says_that_guidance_is_inside(bundle: Path, distilled_folder: Path) -> None:
    manifest = read_manifest(bundle)
    sampler = manifest.sampler
    assert (sampler.steps, sampler.guidance, sampler.inside_guidance, sampler.null_index) == (4, 1.0, 1.75, None)
    assert not sampler.guided
    assert manifest.models[FP32].input_names() == ("sample", "step_index", "class_index")
    assert set(manifest.raw["quality"]) == {"shirt", "bag"}
    assert set(manifest.raw["quality"]["bag"]) == {"images", "full", "difference", "share"}
    assert "guidance 1.75 inside the model" in (bundle / "README.md").read_text()
    report = pipeline.verify(bundle)
    assert report.parity.keys() == {FP32, INT8, SAMPLER}
    assert manifest.models[SAMPLER].input_names() == ("noise", "class_index")
    assert {(p["class"], p["step_index"]) for p in report.files[0].points} == {
        (name, step) for name in ("shirt", "bag") for step in range(4)
    }
    assert pipeline.verify(bundle, checkpoint=distilled_folder).passed
    with pytest.raises(UsageError, match="fixed in a bundle"):
        evaluate(bundle, steps=2)
    values = json.loads((bundle / "manifest.json").read_text())
    values["sampler"] |= {"null_index": 2, "guidance": 1.75}
    with pytest.raises(InputError, match="guidance is inside the model"):
        Manifest.from_dict(values)


@pytest.mark.slow
def test_a_reference_without_a_class_is_no_proof(bundle: Path) -> None:
    """Without a null class the number of classes still counts."""
    reference = load_reference(bundle)
    own = reference["class_index"] == 0
    fewer = {name: array[own] if name in REFERENCE_ARRAYS else array for name, array in reference.items()}
    with pytest.raises(InputError, match="want 2 classes at 4 timesteps"):
        verify_models(bundle, read_manifest(bundle), fewer)
