"""What the planner chooses where losses are given: precision by matrix, branches, and guidance with the steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kind_edge.budget.loss import LossModel, MatrixLoss
from kind_edge.budget.plan import Plan, check_replayable
from kind_edge.budget.planner import make_plan
from kind_edge.budget.problem import Deployment, Request, Sampling, Source
from kind_edge.budget.profile import load_profile
from kind_edge.budget.response import Judged, Response
from kind_edge.budget.ways import ways
from kind_edge.model.spec import ModelSpec
from kind_edge.units import Quantity

PHONE = load_profile("snapdragon8g3")
GUIDED, UNGUIDED = Sampling("euler", 4, 1.5, 4), Sampling("euler", 4, 1.0, 4)
TWO, ONE = ("sneaker", "bag"), ("coat",)


def synthetic(branch_loss: float) -> Source:
    """A model of two blocks whose MLPs bear int8, while its attention does not."""
    spec = ModelSpec(28, 1, 4, 128, 2, 4, 10, learngene_rank=48, tailor_rank=8, label_embedding=False)
    matrices = {
        shape.name: MatrixLoss(
            np.linspace(1, 0, 49) ** 2, np.linspace(1, 0, 9) ** 2, 1.0 if "attn" in shape.name else 1e-5
        )
        for shape in spec.matrices()
    }
    losses = LossModel(matrices, dict.fromkeys(spec.branches(), branch_loss))
    return Source("synthetic", "ab" * 32, spec, lambda *_: losses, "whitened", "")


def test_the_solver_chooses_precision_matrix_by_matrix_and_drops_branches() -> None:
    def made(branch_loss: float, share: float, **asked: Any) -> Plan:
        limits = {"max_size": Quantity(share, "share")}
        return make_plan(synthetic(branch_loss), Request(PHONE, TWO, GUIDED, unit="cpu", limits=limits, **asked))

    mixed = made(1.0, 0.3)
    assert {name.split(".")[2] for name, own in mixed.matrices.items() if own.precision == "int8"} == {"mlp"}
    assert {name.split(".")[2] for name, own in mixed.matrices.items() if own.precision == "fp32"} == {"attn"}
    assert (mixed.precision, mixed.dropped_branches) == ("int8", ())
    assert mixed.predicted_loss_increase < 1e-3
    quantized = made(1.0, 0.3, precision="int8").matrices.values()
    assert {own.precision for own in quantized if own.storage != "dropped"} == {"int8"}
    cut = made(1e-3, 0.1)
    assert len(cut.dropped_branches) == 2  # half of them, no more
    assert cut.predicted_loss_increase == pytest.approx(
        synthetic(1e-3).losses("switch", TWO).increase(cut.matrices), rel=1e-6
    )
    check_replayable(cut, synthetic(1e-3).spec)


def test_guidance_is_chosen_with_the_steps_within_one_and_the_same_limit() -> None:
    distances = {(4, 1.5): 5.0, (4, 1.0): 6.0, (2, 1.5): 7.0, (2, 1.0): 9.0}
    response = Response(tuple(Judged(*key, frechet) for key, frechet in distances.items()), 20, 1, {})
    others = tuple(Sampling("euler", steps, guidance, steps) for steps, guidance in distances)[1:]

    def made(**asked: Any) -> Plan:
        whole: dict[str, Any] = {"classes": TWO, "sampling": GUIDED, "precision": "fp32", "unit": "cpu", **asked}
        return make_plan(dataclasses.replace(synthetic(1.0), response=response), Request(PHONE, **whole))

    free, unguided = made(others=others), made(sampling=UNGUIDED)
    assert (free.steps, free.guidance, free.evaluations_per_step) == (4, 1.5, 2)
    limits = {"max_latency": Quantity(unguided.sustained_image_latency_s * 1.001, "seconds")}
    tight = made(others=others, limits=limits)
    assert (tight.steps, tight.guidance, tight.evaluations_per_step) == (4, 1.0, 1)
    assert tight.predicted_frechet is not None
    assert tight.predicted_frechet < (made(limits=limits).predicted_frechet or 0.0)
    alone = made(others=others, limits=limits, classes=ONE)
    assert (alone.guidance, alone.form) == (1.0, "single")  # without guidance alone there is such a form
    # A share is one of the request's own sampling: what takes half the time has no smaller limit.
    request = Request(PHONE, ONE, GUIDED, unit="cpu", others=others, limits={"max_latency": Quantity(0.5, "share")})
    uncut = synthetic(1.0)
    found = [(way.request.sampling, Deployment(uncut.spec, way.request, way.candidate)) for way in ways(uncut, request)]
    assert {sampling for sampling, _ in found} == {GUIDED, *others}
    assert {deployment.candidate.form for _, deployment in found} == {"switch", "single"}
    assert len({deployment.limits()["latency_ns"] for _, deployment in found}) == 1
