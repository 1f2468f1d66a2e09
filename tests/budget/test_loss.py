"""Predicted loss: curves that rise, sums over matrices, a response that never falls, files that say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.budget.influence import Curve, MatrixInfluence, Sensitivity, read_sensitivity
from kind_edge.budget.loss import LossModel, MatrixLoss
from kind_edge.budget.plan import MatrixPlan
from kind_edge.budget.response import Judged, Response
from kind_edge.errors import InputError

positive = st.floats(1e-6, 1e6)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6), st.lists(positive, min_size=1, max_size=20))
def test_what_loses_more_never_costs_less(points: list[tuple[float, float]], wanted: list[float]) -> None:
    curve = Curve.through([lost for lost, _ in points], [increase for _, increase in points])
    found = curve.at(np.array([0.0, *sorted(wanted)]))
    assert found[0] == 0
    assert (np.diff(found) >= -1e-9 * found[1:]).all()
    assert curve.at(curve.lost[-1:]) == pytest.approx(curve.increase[-1:])


def test_a_curve_is_proportional_outside_its_points_and_keeps_to_them() -> None:
    curve = Curve.through([4.0, 1.0], [0.08, 0.01])
    assert curve.at(np.array([0.5, 1.0, 2.0, 4.0, 8.0])) == pytest.approx([0.005, 0.01, 0.08**0.5 / 10, 0.08, 0.16])
    assert Curve.through([], []).at(np.array([0.0, 3.0])).tolist() == [0, 0]


def test_a_plan_costs_the_sum_of_its_matrices_unless_a_branch_is_dropped() -> None:
    own = MatrixLoss(np.array([0.5, 0.25, 0.0]), np.array([0.125, 0.0]), 0.0625)
    names = ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.attn.q")
    model = LossModel(dict.fromkeys(names, own), {"blocks.0.mlp": 3.0, "blocks.0.attn": 5.0})

    def increase(*plans: MatrixPlan) -> float:
        return model.increase(dict(zip(names, plans, strict=True)))

    whole, cut = MatrixPlan("dense", "fp32", 2, 1), MatrixPlan("factored", "int8", 1, 0)
    gone = MatrixPlan("dropped", "fp32", 0, 0)
    assert increase(whole, whole, whole) == 0
    assert increase(whole, cut, whole) == 0.25 + 0.125 + 0.0625
    assert increase(gone, whole, whole) == 0.5 + 0.125  # one matrix alone is no branch
    assert increase(gone, gone, whole) == 3
    single = LossModel({"blocks.0.attn.q": MatrixLoss(np.array([0.5, 0.0]), np.zeros(1), 0.0)}, {})
    assert single.increase({"blocks.0.attn.q": MatrixPlan("factored", "fp32", rank=0)}) == 0.5


RESPONSE = Response((Judged(4, 1.75, 8.0), Judged(2, 1.75, 10.0)), 100.0, 1.5, {"images": 500})


@given(st.floats(0, 10), st.floats(0, 10))
def test_a_response_rises_from_one(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 1 == RESPONSE.factor(0) <= RESPONSE.factor(low) <= RESPONSE.factor(high)
    assert RESPONSE.frechet(high, 4, 1.75) == pytest.approx(0.8 * RESPONSE.frechet(high, 2, 1.75))


def test_a_response_does_not_guess_where_nothing_was_judged() -> None:
    assert not RESPONSE.measured(8, 1.75)
    with pytest.raises(InputError, match=r"was measured at 8 steps, guidance 1\.75; known: 4 steps"):
        RESPONSE.frechet(0.1, 8, 1.75)


def table(response: Response | None = None) -> Sensitivity:
    own = MatrixInfluence(Curve.through([1.0, 2.0], [0.1, 0.2]), Curve.through([], []), 0.001)
    return Sensitivity("ab" * 32, {"images": 120}, {"blocks.0.attn.q": own}, {"blocks.0.attn": 0.5}, response)


@pytest.mark.parametrize("response", [None, RESPONSE])
def test_a_table_comes_back_as_it_was_written(response: Response | None, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(table(response).to_json())
    assert read_sensitivity(path).to_dict() == table(response).to_dict()


@pytest.mark.parametrize(
    "spoil",
    [
        {"schema_version": 9},
        {"matrices": {"blocks.0.attn.q": {"shared": [[2, 0.1], [1, 0.2]], "tailor": [], "int8": 0}}},
        {"matrices": {"blocks.0.attn.q": {"shared": [[1, float("nan")]], "tailor": [], "int8": 0}}},
        {"matrices": {"blocks.0.attn.q": {"shared": [], "tailor": []}}},
        {"branches": {"blocks.0.attn": -1}},
        {"response": {"table": [], "scale": 1, "power": 1, "conditions": {}}},
        {"checkpoint_sha256": None, "branches": []},
    ],
)
def test_a_damaged_table_is_refused_with_what_to_do(spoil: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(table().to_dict() | spoil))
    with pytest.raises(InputError, match="remove it, and it is measured"):
        read_sensitivity(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_sensitivity(path)
