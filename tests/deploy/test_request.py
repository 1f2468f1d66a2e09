"""What `plan` and `export` are asked, before anything is planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kind_edge.budget.influence import Sensitivity
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import make_plan
from kind_edge.budget.problem import Request
from kind_edge.budget.profile import load_profile
from kind_edge.budget.response import Judged, Response
from kind_edge.deploy.request import as_replayed, ask, make_request, make_source, open_model
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import (
    CALIBRATION,
    HELDOUT,
    Checkpoint,
    checkpoint_hash,
    load_checkpoint,
    save_checkpoint,
)
from kind_edge.units import Quantity

PHONE = load_profile("snapdragon8g3")


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return load_checkpoint(tiny_folder)


def request_with(checkpoint: Checkpoint, **asked: Any) -> Request:
    return make_request(checkpoint, PHONE, **asked)


def test_defaults_are_all_classes_and_what_the_checkpoint_recommends(checkpoint: Checkpoint) -> None:
    request = request_with(checkpoint)
    assert request.classes == checkpoint.class_names
    assert dataclasses.astuple(request.sampling) == ("euler", 4, 1.5, 4, None)
    silent = dataclasses.replace(checkpoint, provenance={})
    assert dataclasses.astuple(request_with(silent).sampling) == ("euler", 20, 1.5, 20, None)
    advised = dataclasses.replace(checkpoint, provenance={"recommended": {"sampler": "heun", "steps": 3}})
    assert dataclasses.astuple(request_with(advised).sampling) == ("heun", 3, 1.5, 5, None)


@pytest.mark.parametrize(("form", "guidance"), [("auto", 1.5), ("switch", 1.5), ("single", 1.0), ("union", 1.0)])
def test_folded_forms_are_unguided_unless_asked(form: str, guidance: float, checkpoint: Checkpoint) -> None:
    assert request_with(checkpoint, form=form).sampling.guidance == guidance
    assert request_with(checkpoint, form=form, guidance=3.0).sampling.guidance == 3.0


def test_steps_and_guidance_that_are_left_open_are_those_that_were_judged(tiny_folder: Path) -> None:
    response = Response(tuple(Judged(s, g, 5.0) for s in (2, 4) for g in (1.0, 1.5, 2.0)), 1.0, 1.0, {})
    opened = open_model(tiny_folder)
    opened = dataclasses.replace(opened, stored_sensitivity=Sensitivity(opened.sha256, {}, {}, {}, response))

    def others(**choices: Any) -> set[tuple[int, float]]:
        _, request = ask(opened, PHONE, **choices)
        assert request.sampling not in request.others
        return {(each.steps, each.guidance) for each in request.others}

    assert others() == {(2, 1.0), (2, 1.5), (2, 2.0), (4, 1.0), (4, 2.0)}
    assert others(steps=2) == {(2, 1.0), (2, 2.0)}
    assert others(guidance=1.5) == {(2, 1.5)}
    assert others(form="single", classes=["bag"]) == {(2, 1.0)}
    assert others(steps=2, guidance=1.5) == others(sampler="heun") == others(steps=3) == set()


def test_limits_are_parsed_with_their_units(checkpoint: Checkpoint) -> None:
    limits = {"max_size": "2MiB", "max_latency": "250ms", "max_flops": "40%", "max_memory": None}
    assert request_with(checkpoint, **limits).limits == {
        "max_size": Quantity(2 * 2**20, "bytes"),
        "max_latency": Quantity(0.25, "seconds"),
        "max_flops": Quantity(0.4, "share"),
    }


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"classes": ["beg"]}, "unknown class 'beg'; did you mean: bag"),
        ({"classes": []}, "--classes: got none"),
        ({"classes": ["bag", "bag"]}, "--classes: got bag, bag; want at least one class, each once"),
        ({"form": "swich"}, "--form 'swich'; did you mean: switch"),
        ({"precision": "fp8"}, "--precision 'fp8'"),
        ({"unit": "tpu"}, "--unit 'tpu'"),
        ({"sampler": "ddim"}, "--sampler 'ddim'"),
        ({"steps": 0}, "--steps: got 0"),
        ({"steps": 1001}, "--steps: got 1001"),
        ({"guidance": 0.0}, "--guidance: got 0.0"),
        ({"guidance": float("nan")}, "--guidance: got nan"),
        ({"max_size": "300"}, "--max-size '300': a bare number says no unit"),
        ({"max_latency": "3MB"}, "--max-latency '3MB'"),
    ],
)
def test_mistakes_are_refused_in_the_words_of_the_command_line(
    asked: dict[str, Any], words: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(UsageError) as caught:
        request_with(checkpoint, **asked)
    assert words in str(caught.value)


def test_opening_a_model_reads_what_lies_beside_it(tiny_folder: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    opened = open_model(tiny_folder)
    assert (opened.name, opened.sha256) == (tiny_folder.name, checkpoint_hash(tiny_folder))
    assert opened.heldout is not None
    assert opened.calibration.source == "stored with the checkpoint"
    save_checkpoint(tmp_path / "bare", checkpoint)
    bare = open_model(tmp_path / "bare")
    assert bare.heldout is None
    measured = bare.calibration
    again = open_model(tmp_path / "bare").stored_calibration  # kept for the next time
    assert again is not None
    assert all(torch.equal(again.pooled[name], covariance) for name, covariance in measured.pooled.items())
    for name in (CALIBRATION, HELDOUT):
        (tmp_path / "bare" / name).write_bytes(b"not safetensors")
        with pytest.raises(InputError, match=f"{name}: truncated or corrupt"):
            open_model(tmp_path / "bare")
        (tmp_path / "bare" / name).unlink()


def test_a_dense_model_cannot_be_cut(tmp_path: Path, checkpoint: Checkpoint) -> None:
    from kind_edge.model.dit import DiT

    spec = checkpoint.spec.dense()
    save_checkpoint(tmp_path, Checkpoint(spec, checkpoint.class_names, DiT(spec).state_dict()), torch.float16)
    with pytest.raises(UsageError, match="a dense model has no learngene"):
        open_model(tmp_path)


def test_the_source_knows_losses_for_every_form_and_the_order_of_classes_does_not_matter(tiny_folder: Path) -> None:
    source = make_source(open_model(tiny_folder))
    assert (source.name, source.truncation) == (tiny_folder.name, "whitened")
    for form in ("switch", "single"):
        losses = source.losses(form, ("bag", "coat"))
        assert set(losses.matrices) == {shape.name for shape in source.spec.matrices()}
        assert losses is source.losses(form, ("coat", "bag"))


def test_what_is_the_smallest_is_asked_with_a_loss(checkpoint: Checkpoint) -> None:
    asked = request_with(checkpoint, max_quality_loss="2%")
    assert (asked.minimise, asked.max_loss, asked.others) == ("weight_bytes", 0.02, ())
    assert request_with(checkpoint, max_quality_loss="2%", minimize="latency").minimise == "latency_ns"
    for wrong in ({"minimize": "latency"}, {"max_quality_loss": "2MiB"}, {"max_quality_loss": "0%"}):
        with pytest.raises(UsageError, match="--max-quality-loss"):
            request_with(checkpoint, **wrong)


def edited(plan: Plan, matrix: str, **changes: Any) -> Plan:
    return dataclasses.replace(
        plan, matrices={**plan.matrices, matrix: dataclasses.replace(plan.matrices[matrix], **changes)}
    )


def test_a_plan_that_was_changed_by_hand_loses_its_old_figures(tiny_folder: Path) -> None:
    opened, device = open_model(tiny_folder), load_profile("apple-a18")
    source = make_source(opened)
    made = make_plan(source, make_request(opened.checkpoint, device, classes=["bag", "coat"], max_flops="70%"))
    assert as_replayed(made, source, device) == made
    name = next(name for name, matrix in made.matrices.items() if matrix.storage == "factored")
    cut = as_replayed(edited(made, name, learngene_rank=1), source, device)
    assert cut.matrices[name].learngene_rank == 1
    assert cut.flops < made.flops
    assert cut.params < made.params
    assert cut.predicted_loss_increase > made.predicted_loss_increase
    assert (cut.binding, dict(cut.prices), cut.optimality_gap) == ((), {}, None)
    older = dataclasses.replace(made, predicted_loss_increase=None)
    assert as_replayed(older, source, device).predicted_loss_increase == pytest.approx(made.predicted_loss_increase)
