"""The studies of predicted loss: plans of equal FLOPs, cuts that are export's own, a fit that finds its curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kind_edge.budget.plan import MatrixPlan
from kind_edge.deploy.merge import truncate
from kind_edge.deploy.request import open_model


@pytest.mark.parametrize("changes", [{}, {"nested": True, "step_counts": (2, 4), "inside_guidance": 1.5}])
def test_a_plan_is_cut_as_export_cuts_it(
    changes: dict[str, Any], tmp_path: Path, make_checkpoint_folder: Callable[..., Path]
) -> None:
    from studies.prediction import FixedHeldout, cut_model, folded_matrices

    from kind_edge.deploy.pipeline import plan as make_plan

    folder = make_checkpoint_folder(tmp_path / "model", **changes)
    opened, base = open_model(folder), make_plan(folder, profile="snapdragon8g3", precision="fp32", form="switch")
    matrices = {
        shape.name: MatrixPlan("factored", "fp32", 6 - number % 3, 2 - number % 2)
        for number, shape in enumerate(opened.checkpoint.spec.matrices())
    }
    own = cut_model(opened.checkpoint, folded_matrices(opened.checkpoint, opened.calibration), matrices).state_dict()
    exported = truncate(opened.checkpoint, dataclasses.replace(base, matrices=matrices), opened.calibration)
    wanted = exported.model().state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    heldout = FixedHeldout.of(opened)
    whole = {name: MatrixPlan("factored", "fp32", 6, 2) for name in matrices}
    assert heldout.increase(cut_model(opened.checkpoint, {}, whole)) == pytest.approx(0, abs=1e-9)
    cut = cut_model(opened.checkpoint, folded_matrices(opened.checkpoint, opened.calibration), matrices)
    assert heldout.increase(cut) != pytest.approx(0, abs=1e-6)


def test_random_plans_have_equal_flops_and_are_not_alike(make_checkpoint: Callable[..., Any]) -> None:
    from studies.prediction import TOLERANCE, random_plans

    spec = make_checkpoint(learngene_rank=16, tailor_rank=8).spec

    def ranks(matrices: Any) -> int:
        return sum(own.shared_rank + own.tailor_rank for own in matrices.values())

    plans = random_plans(spec, ranks, 150, 5, 0)
    assert all(abs(ranks(plan) / 150 - 1) <= TOLERANCE for plan in plans)
    assert len({tuple(plan.items()) for plan in plans}) == 5
    assert plans == random_plans(spec, ranks, 150, 5, 0)


def test_the_fit_finds_the_curve_and_the_text_the_plans_held_out() -> None:
    from studies.response import errors, fitted, text

    advice = {"images": 500, "seed": 0, "steps": 4, "guidance": 1.75, "judge_sha256": "ab" * 32}
    checkpoint = {"model": "m", "sha256": "cd" * 32, "weights_sha256": "ef" * 32}

    def record(kind: str, share: float, figures: dict[str, float]) -> dict[str, Any]:
        return {"checkpoint": checkpoint, "conditions": {"kind": kind, "share": share, **advice}, "figures": figures}

    losses = np.geomspace(0.001, 0.1, 12)
    plans = [
        record("held out" if n % 3 == 1 else "fitted", 0.6 - n / 50, {"predicted": x, "frechet": 8 * (1 + 50 * x**1.5)})
        for n, x in enumerate(losses.tolist())
    ]
    records = [record("whole", 1.0, {"frechet": 8.0}), *plans]
    curve = fitted(records)
    assert (curve.scale, curve.power) == pytest.approx((50, 1.5), rel=0.01)
    assert np.abs(errors(records, "held out")).max() < 0.01
    assert text(records).count("held out") == 4 + 1
