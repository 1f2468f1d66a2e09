"""From a request to a plan: what is allowed, what limits mean, and that the figures add up to the deployed model."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kind_edge.budget.deployed import deployed_fixed_cost
from kind_edge.budget.graph_bytes import GRAPH_BYTES_PER_OPERATOR
from kind_edge.budget.loss import LossModel
from kind_edge.budget.menu import rank_levels
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import make_plan
from kind_edge.budget.precision import PRECISIONS, Precision, check_unit
from kind_edge.budget.problem import (
    Candidate,
    Deployment,
    Request,
    Sampling,
    Source,
)
from kind_edge.budget.profile import HOST, DeviceProfile, load_profile, profile_names
from kind_edge.budget.response import Judged, Response
from kind_edge.budget.sensitivity import loss_model
from kind_edge.budget.ways import candidate_forms, candidates, ways
from kind_edge.budget.whole_model import model_cost
from kind_edge.deploy.merge import class_indices, fold, truncate
from kind_edge.deploy.probe import measure_sensitivity
from kind_edge.errors import NoPlanError, UsageError
from kind_edge.model.calibration import Calibration, load_calibration
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, load_checkpoint
from kind_edge.model.spec import Form, ModelSpec
from kind_edge.units import Quantity, parse_quantity

PHONE = load_profile("snapdragon8g3")
DEVICES = [name for name in profile_names() if name != HOST]  # the host is measured, and tested with the pipeline
GUIDED, UNGUIDED = Sampling("euler", 4, 1.5, 4), Sampling("euler", 4, 1.0, 4)
TWO, ONE = ("sneaker", "bag"), ("coat",)
MakePlan = Callable[..., Plan]
MakeSource = Callable[..., Source]
ROUNDING = 1 + 1e-5
"""The solver counts whole nanoseconds, matrix by matrix."""


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> tuple[Checkpoint, Calibration]:
    checkpoint = load_checkpoint(tiny_folder)
    return checkpoint, load_calibration(tiny_folder / CALIBRATION, checkpoint.spec)


@pytest.fixture(scope="module")
def source(opened: tuple[Checkpoint, Calibration]) -> MakeSource:
    """What is planned for: the tiny model, with its losses as they are measured, and a response where one is given."""
    checkpoint, calibration = opened
    sensitivity = measure_sensitivity(checkpoint, "ab" * 32, calibration, images=4)

    @functools.cache
    def losses(form: Form, classes: tuple[str, ...]) -> LossModel:
        return loss_model(checkpoint, class_indices(checkpoint, classes), form, calibration, sensitivity)

    return lambda response=None: Source(
        "tiny", "ab" * 32, checkpoint.spec, losses, "whitened", calibration.source, response=response
    )


@pytest.fixture(scope="module")
def plan(source: MakeSource) -> MakePlan:
    """`plan(max_size="40%", classes=..., form=...)` of the tiny model on a phone."""

    def make(**asked: Any) -> Plan:
        kinds = {"max_flops": "flops", "max_size": "bytes", "max_memory": "bytes", "max_latency": "seconds"}
        limits = {name: parse_quantity(asked.pop(name), kind) for name, kind in kinds.items() if name in asked}
        response = asked.pop("response", None)
        request = Request(**{"profile": PHONE, "classes": TWO, "sampling": GUIDED, "limits": limits, **asked})
        return make_plan(source(response), request)

    return make


def can_run(device: DeviceProfile, precision: Precision, unit: str) -> bool:
    """Whether a unit runs the precision's files, and the device has it, reached by a provider, with a figure."""
    able = {
        "fp32": ("cpu", "gpu"), "fp16": ("cpu", "gpu"), "int8-qdq": ("npu", "cpu"), "a16w8": ("npu", "cpu"),
        "int8": ("cpu",), "int8-weights": ("cpu",), "int4": ("cpu",),
    }  # fmt: skip
    if unit == "npu" and not any(each.startswith(("qnn-", "coreml-ane")) for each in device.execution_providers):
        return False
    return unit in able[precision] and unit in device.units


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("precision", ["auto", *PRECISIONS])
def test_every_device_gets_a_plan_or_a_reason(name: str, precision: str, plan: MakePlan) -> None:
    device = load_profile(name)
    own = {"cpu": ("fp32", "int8"), "gpu": ("fp16",), "npu": ("int8-qdq", "a16w8")}
    for unit in ("auto", *own):
        units = own if unit == "auto" else (unit,)
        if not any(can_run(device, p, u) for u in units for p in (own[u] if precision == "auto" else (precision,))):
            with pytest.raises(UsageError, match=f"--unit {unit}|--precision {precision}: runs on"):
                plan(profile=device, precision=precision, unit=unit)
            continue
        made = plan(profile=device, precision=precision, unit=unit)
        assert made.profile == name
        assert precision in ("auto", made.precision)
        assert made.unit in device.units_for(made.precision)
        assert unit in ("auto", made.unit)
        assert unit == "auto" or precision != "auto" or made.precision in own[made.unit]
        assert made.precisions == (("fp32", "int8") if made.precision in ("fp32", "int8") else (made.precision,)) or (
            precision == "fp32" and made.precisions == ("fp32",)
        )
        quantized = PRECISIONS[made.precision].int8_losses > 0
        assert made.predicted_loss_increase == 0 or quantized
        assert set(made.binding) <= {"max_memory"}
        assert 0 < made.image_latency_s <= made.sustained_image_latency_s * ROUNDING
        assert json.loads(json.dumps(made.to_dict())) == made.to_dict()


def test_a_unit_that_cannot_run_a_precision_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match=r"int8: runs on cpu, not on npu; .* for --unit npu one of int8-qdq, a16w8"):
        check_unit("int8", "npu")
    with pytest.raises(UsageError, match=r"a16w8: runs on npu or cpu, not on gpu; .* --unit gpu one of fp32, fp16"):
        check_unit("a16w8", "gpu")
    check_unit("auto", "npu")
    check_unit("int4", "auto")


@pytest.mark.parametrize(
    ("form", "classes", "sampling", "forms"),
    [
        ("auto", TWO, GUIDED, ("switch",)),
        ("auto", TWO, UNGUIDED, ("switch",)),
        ("auto", ONE, GUIDED, ("switch",)),
        ("auto", ONE, UNGUIDED, ("switch", "single")),
        ("switch", ONE, GUIDED, ("switch",)),
        ("single", ONE, UNGUIDED, ("single",)),
        ("union", TWO, UNGUIDED, ("union",)),
        ("single", TWO, UNGUIDED, "--form single holds one class, got 2"),
        ("single", ONE, GUIDED, "--form single has no null branch"),
        ("union", TWO, GUIDED, "--form union has no null branch"),
    ],
)
def test_forms(form: Any, classes: tuple[str, ...], sampling: Sampling, forms: tuple[str, ...] | str) -> None:
    request = Request(PHONE, classes, sampling, form=form)
    if isinstance(forms, str):
        with pytest.raises(UsageError, match=forms):
            candidate_forms(request)
        return
    assert candidate_forms(request) == forms
    assert {candidate.form for candidate in candidates(request)} == set(forms)


def test_evaluations_follow_guidance_and_form(plan: MakePlan) -> None:
    guided, unguided = plan(precision="fp32"), plan(precision="fp32", sampling=UNGUIDED)
    assert (guided.evaluations_per_step, unguided.evaluations_per_step) == (2, 1)
    # A guided step is one call at batch 2: twice the work, but weights are read and operators started once.
    assert 1 < guided.sustained_image_latency_s / unguided.sustained_image_latency_s <= 2
    assert unguided.evaluation_latency_s == pytest.approx(unguided.sustained_image_latency_s / 4, rel=1e-5)
    assert guided.time["evaluation_s"] == pytest.approx(guided.sustained_image_latency_s / 8, rel=1e-5)
    heun = plan(precision="fp32", sampling=Sampling("heun", 4, 1.0, 7))  # the table grows a little
    assert heun.sustained_image_latency_s == pytest.approx(7 / 4 * unguided.sustained_image_latency_s, rel=1e-2)


@pytest.mark.parametrize("limit", ["max_flops", "max_size", "max_memory", "max_latency"])
def test_a_tighter_limit_never_keeps_more(limit: str, plan: MakePlan) -> None:
    cost = {"max_flops": "flops", "max_size": "weight_bytes", "max_memory": "peak_memory_bytes"}
    free = plan(precision="fp32", unit="cpu")
    whole = getattr(free, cost[limit]) if limit in cost else free.sustained_image_latency_s
    unit = {"max_flops": "FLOPs", "max_latency": "s"}.get(limit, "B")
    with pytest.raises(NoPlanError) as refused:
        plan(precision="fp32", unit="cpu", **{limit: f"{whole / 1000:.12f}{unit}"})
    smallest = refused.value.diagnosis[0].smallest / (1e9 if limit == "max_latency" else 1)  # type: ignore[attr-defined]
    lost, losing = free.predicted_loss_increase, 0
    assert lost == 0
    for share in (0.8, 0.5, 0.25, 0.01):
        amount = smallest + share * (whole - smallest)
        made = plan(precision="fp32", unit="cpu", **{limit: f"{amount:.9f}{unit}"})
        spent = getattr(made, cost[limit]) if limit in cost else made.sustained_image_latency_s
        assert spent <= amount
        assert made.predicted_loss_increase >= lost * (1 - 1e-3)
        assert limit in made.binding or made.predicted_loss_increase == 0
        assert set(made.prices) == set(made.binding)
        for price in made.prices.values():
            assert price["predicted_loss_increase"] <= made.predicted_loss_increase * (1 + 1e-3)
        losing += made.predicted_loss_increase > 0
        # A class without tailors is none: they are dropped with their branch alone.
        assert all(matrix.tailor_rank or matrix.storage == "dropped" for matrix in made.matrices.values())
        lost = made.predicted_loss_increase
    assert losing > 0


def test_percentages_refer_to_the_dense_fp32_model(plan: MakePlan, opened: tuple[Checkpoint, Calibration]) -> None:
    spec = opened[0].spec
    dense = model_cost(spec.dense(), "exact")
    made = plan(max_flops="90%", max_size="80%", max_memory="150%", max_latency="300%", precision="fp32", unit="cpu")
    assert made.dense["params"] == dense.params
    assert made.dense["flops"] == dense.flops
    assert made.dense["weight_bytes"] == 4 * dense.params
    assert made.limits == {
        "max_flops": int(0.9 * dense.flops),
        "max_size": int(0.8 * 4 * dense.params),
        "max_memory": int(1.5 * made.dense["peak_memory_bytes"]),
        "max_latency": int(3 * made.dense["latency_ns"]),
    }
    assert made.flops <= 0.9 * dense.flops
    assert made.weight_bytes <= 0.8 * 4 * dense.params


def test_memory_is_never_more_than_the_system_allows(plan: MakePlan) -> None:
    allowed = int(PHONE.app_memory_limit_bytes.value)
    assert plan().limits == {"max_memory": allowed}
    assert plan(max_memory="1TiB").limits == {"max_memory": allowed}
    assert plan(max_memory="100MiB").limits == {"max_memory": 100 * 2**20}
    small = dataclasses.replace(PHONE.app_memory_limit_bytes, value=2.0**20)
    with pytest.raises(NoPlanError, match="--max-memory"):
        plan(profile=dataclasses.replace(PHONE, app_memory_limit_bytes=small))


@pytest.mark.parametrize(
    "limits", [{"max_size": "1kB"}, {"max_flops": "1%"}, {"max_latency": "1ns"}, {"max_memory": "1MB"}]
)
def test_what_cannot_fit_is_said(limits: dict[str, str], plan: MakePlan) -> None:
    flag = "--" + next(iter(limits)).replace("_", "-")
    with pytest.raises(NoPlanError, match=f"no plan fits: {flag} .* is below the smallest possible"):
        plan(**limits)


@pytest.mark.parametrize("form", ["switch", "single", "union"])
@pytest.mark.parametrize("max_flops", ["100%", "80%"])
def test_figures_equal_a_recount_from_the_matrices(
    form: str, max_flops: str, plan: MakePlan, opened: tuple[Checkpoint, Calibration]
) -> None:
    """FLOPs and bytes from ranks by hand, and parameters from the deployed model itself."""
    checkpoint, calibration = opened
    classes = ONE if form == "single" else TWO
    sampling = GUIDED if form == "switch" else UNGUIDED
    made = plan(form=form, classes=classes, sampling=sampling, max_flops=max_flops, precision="fp32")
    fixed = deployed_fixed_cost(checkpoint.spec, len(classes), 4, True, "fp32")
    flops, params, operators = fixed.flops, fixed.params, fixed.operators
    for shape in checkpoint.spec.matrices():
        chosen, n, m = made.matrices[shape.name], shape.outputs, shape.inputs
        shared = {"dense": n * m, "factored": (n + m) * chosen.shared_rank, "dropped": 0}[chosen.storage]
        tailor = (n + m) * (chosen.tailor_rank or 0)
        flops += 2 * checkpoint.spec.tokens * (shared + tailor)
        params += shared + len(classes) * tailor
        operators += {"dense": 1, "factored": 2 if chosen.shared_rank else 0, "dropped": 0}[chosen.storage]
        operators += 5 if tailor else 0  # a transpose, two products, one sum, and a share of the gathers
    assert made.flops == flops
    assert made.params == params
    assert made.weight_bytes == 4 * params + GRAPH_BYTES_PER_OPERATOR * operators
    plain = fold(truncate(checkpoint, made, calibration), made, torch.arange(4.0))
    assert made.params == sum(parameter.numel() for parameter in plain.parameters())


def test_modulation_is_what_is_cheaper_or_what_is_asked_for(plan: MakePlan, source: MakeSource) -> None:
    """A table of as many rows as the model is wide is as large as the networks."""
    labelled = dataclasses.replace(source(), spec=dataclasses.replace(source().spec, label_embedding=True))
    width, found = labelled.spec.width, {}
    for steps in (1, width // 8, width // 2, width, 20 * width):
        request = Request(PHONE, TWO, Sampling("euler", steps, 1.5, steps), precision="fp32", form="switch")
        found[steps] = {way.candidate.modulation for way in ways(labelled, request)}
        asked = dataclasses.replace(request, modulation="baked-fp16")
        assert {way.candidate.modulation for way in ways(labelled, asked)} == {"baked-fp16"}
    assert found[1] == found[width // 8] == {"baked"}
    assert found[20 * width] == {"baked", "network"}  # a table is still quicker
    assert plan().modulation == "baked"
    assert plan(modulation="network").modulation == "network"
    sizes = {kind: plan(modulation=kind, precision="fp32").weight_bytes for kind in ("baked", "baked-fp16", "network")}
    assert sizes["baked-fp16"] < sizes["baked"] < sizes["network"]


def test_int8_is_smaller_and_a_kept_class_more_is_larger(plan: MakePlan) -> None:
    plans = {p: plan(precision=p, unit="cpu") for p in ("fp32", "int8")}
    assert plans["int8"].weight_bytes < plans["fp32"].weight_bytes
    assert plans["int8"].params == plans["fp32"].params
    assert plans["int8"].flops == plans["fp32"].flops
    three = plan(classes=("sneaker", "bag", "coat"), precision="fp32")
    assert three.weight_bytes > plans["fp32"].weight_bytes
    assert three.flops == plans["fp32"].flops  # an image sees one tailor


def test_spare_bytes_are_kept_out_of_the_file(plan: MakePlan) -> None:
    free = plan(precision="fp32")
    with_spare = plan(precision="fp32", max_size=f"{free.weight_bytes + 500}B", spare_bytes=500)
    assert with_spare.weight_bytes == free.weight_bytes
    with_spare = plan(precision="fp32", max_size=f"{free.weight_bytes + 499}B", spare_bytes=500)
    assert with_spare.weight_bytes < free.weight_bytes


def test_limits_are_bytes_and_nanoseconds() -> None:
    request = Request(PHONE, TWO, GUIDED, limits={"max_latency": Quantity(0.25, "seconds")})
    spec = ModelSpec(8, 1, 2, 16, 2, 2, 3, learngene_rank=4, tailor_rank=2)
    assert Deployment(spec, request, Candidate("switch", "fp32", "cpu")).limits()["latency_ns"] == 250_000_000


@pytest.mark.parametrize("full", [0, 1, 2, 15, 16, 17, 48, 154])
def test_rank_levels_rise_to_the_full_rank(full: int) -> None:
    levels = rank_levels(full)
    assert levels == sorted(set(levels))
    assert (levels[-1] if levels else 0) == full
    assert all(1 <= level <= full for level in levels)
    assert len(levels) <= 32


def test_the_smallest_within_a_loss(plan: MakePlan) -> None:
    sizes = []
    for loss in (1e-6, 1e-4, 1e-2):
        made = plan(minimise="weight_bytes", max_loss=loss)
        assert made.predicted_loss_increase <= loss * (1 + 1e-6)
        assert made.limits["max_quality_loss"] == loss
        assert made.minimised == "weight_bytes"
        sizes.append(made.weight_bytes)
        # Asked the other way round, nothing of that size loses less.
        back = plan(max_size=f"{made.weight_bytes}B")
        assert back.predicted_loss_increase <= made.predicted_loss_increase * 1.002
    assert sizes == sorted(sizes, reverse=True)
    fastest = plan(minimise="latency_ns", max_loss=1e-2)
    assert fastest.sustained_image_latency_s <= plan(minimise="flops", max_loss=1e-2).sustained_image_latency_s


def test_permuting_classes_permutes_the_plan(plan: MakePlan) -> None:
    one = plan(classes=("sneaker", "bag", "coat"), max_size="60%", max_flops="60%")
    other = plan(classes=("coat", "sneaker", "bag"), max_size="60%", max_flops="60%")
    assert dataclasses.replace(other, classes=one.classes) == one


STEPS = tuple(Sampling("euler", steps, 1.5, steps) for steps in (8, 2, 1))
RESPONSE = Response(tuple(Judged(steps, 1.5, frechet) for steps, frechet in ((8, 5.0), (4, 5.05), (2, 7.0))), 20, 1, {})


def test_steps_are_chosen_by_the_predicted_distance(plan: MakePlan) -> None:
    free = plan(response=RESPONSE, others=STEPS)
    assert (free.steps, free.predicted_frechet) == (4, 5.05)  # recommended; 8 are better by 1 % only
    latency_s = free.sustained_image_latency_s
    assert plan(response=RESPONSE, others=STEPS, max_latency=f"{3 * latency_s}s").steps == 8
    tight = plan(response=RESPONSE, others=STEPS, max_latency=f"{0.55 * latency_s:.9f}s")
    assert tight.steps == 2  # of 4 steps so much would have to go that the distance is larger
    assert tight.predicted_frechet == pytest.approx(7.0 * (1 + 20 * tight.predicted_loss_increase))
    assert plan(response=RESPONSE, sampling=STEPS[1]).predicted_frechet == 7.0
    # Where distances are not known, other steps are taken only if there is no other way.
    assert plan(others=STEPS, max_latency=f"{0.9 * latency_s:.9f}s").steps == 4
    assert plan(others=STEPS, max_latency=f"{0.2 * latency_s:.9f}s").steps < 4


def test_a_refusal_shows_the_closest_plan_and_what_would_help(plan: MakePlan) -> None:
    small = plan(minimise="weight_bytes", max_loss=100.0)
    fast = plan(minimise="latency_ns", max_loss=100.0)
    sizes = {"max_size": f"{small.weight_bytes - 100}B"}
    for limits in (sizes, {**sizes, "max_latency": f"{0.9 * fast.sustained_image_latency_s:.9f}s"}):
        with pytest.raises(NoPlanError) as caught:
            plan(classes=TWO, fewer=STEPS[1:], **limits)
        refusal = caught.value.refusal  # type: ignore[attr-defined]
        assert {miss.limit for miss in refusal.misses} == set(limits)
        assert all(miss.needed > miss.asked > 0 for miss in refusal.misses)
        assert refusal.closest.weight_bytes == next(m.needed for m in refusal.misses if m.limit == "max_size")
        changes = [each.change for each in refusal.relaxations]
        assert any("--max-size to at least" in change for change in changes)
        assert [each.given_up for each in refusal.relaxations] == sorted(each.given_up for each in refusal.relaxations)
        json.dumps(refusal.to_dict(), allow_nan=False)
        assert ("max_latency" in limits) != any("keep 1 class instead of 2" in change for change in changes)
