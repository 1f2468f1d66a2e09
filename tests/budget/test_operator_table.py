"""Measured tables: interpolation, what latency takes from them, dense int8 where it is faster, and their TOML."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.budget.cost import (
    branch_fixed_cost,
    deployed_fixed_cost,
    fixed_latency_s,
    matrix_cost,
    matrix_latency_s,
    runs_on_one_thread,
)
from kind_edge.budget.latency import latency_source
from kind_edge.budget.loss import LossModel, MatrixLoss
from kind_edge.budget.operator_table import KINDS, Grid, Key, OperatorTable
from kind_edge.budget.plan import MatrixPlan
from kind_edge.budget.planner import make_plan
from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling, Source
from kind_edge.budget.profile import DeviceProfile, Figure, load_profile
from kind_edge.budget.profile_file import parse_profile
from kind_edge.budget.profile_text import profile_text
from kind_edge.errors import InputError
from kind_edge.model.spec import MatrixShape, ModelSpec
from kind_edge.units import Quantity

SPEC = ModelSpec(28, 1, 4, 128, 2, 4, 10, learngene_rank=48, tailor_rank=8)
SIZES, ROWS = (8, 32, 128, 512), (49, 98)


def us(precision: str, rows: int, m: int, n: int) -> float:
    """As on a CPU with int8 units: an operator's start, and quicker products that first quantize their inputs."""
    rate, start = (2e4, 1.0) if precision == "fp32" else (1e5, 4.0)
    return start + rows * m * n / rate + (rows * m / 4e3 if precision == "int8" else 0)


def make_table(slower: float = 1.0) -> OperatorTable:
    precisions = ("fp32", "int8")
    places = list(itertools.product((1, 2), (49, 256), (64, 128)))
    layers: dict[str, dict[Key, float]] = {}
    for role, times in (("square", 1), ("wide", 4)):
        for precision, (batch, tokens, width), rank in itertools.product(precisions, places, (2, 8, 32, 64)):
            key, rows, outputs = (precision, batch, tokens, width), batch * tokens, times * width
            thin = us(precision, rows, width, rank) + us(precision, rows, rank, outputs)
            layers.setdefault(f"{role}_dense", {})[key] = us(precision, rows, width, outputs) * slower
            layers.setdefault(f"{role}_factored", {})[(*key, rank)] = thin * slower
            layers.setdefault(f"{role}_tailor", {})[(*key, rank)] = (5.0 + batch * rank) * slower
    return OperatorTable(
        **layers,
        attention={place: 40.0 * slower * place[0] for place in places},
        mlp={place: 20.0 * slower * place[0] for place in places},
        ends={place: 30.0 * slower * place[0] for place in places},
        source="measured: a test",
    )


@pytest.fixture(scope="module")
def device() -> DeviceProfile:
    """A phone whose CPU was measured."""
    phone = load_profile("snapdragon8g3")
    cpu = dataclasses.replace(phone.unit("cpu"), table=make_table())
    return dataclasses.replace(phone, units={**phone.units, "cpu": cpu})


sizes = st.integers(1, 5000)


@given(rows=sizes, m=sizes, n=sizes)
def test_a_power_law_is_met_everywhere(rows: int, m: int, n: int) -> None:
    def law(rows: int, m: int, n: int) -> float:
        return 0.2 * rows**0.9 * m**0.5 * n

    grid = Grid({key: law(*key) for key in itertools.product(ROWS, SIZES, SIZES)})
    assert grid.at(rows, m, n) == pytest.approx(law(rows, m, n), rel=1e-6)


@given(m=sizes, more=st.integers(0, 5000))
def test_more_work_takes_no_less(m: int, more: int) -> None:
    table = make_table()

    def dense_us(size: int) -> float:
        return table.layer_us("dense", "int8", 1, 70, size, size)

    assert dense_us(m + more) >= dense_us(m) * (1 - 1e-9)
    thin = [table.layer_us("factored", "fp32", 2, 49, 128, 512, rank) for rank in (m, m + more)]
    assert thin[1] >= thin[0] * (1 - 1e-9)


def test_measured_points_are_kept_and_missing_corners_follow() -> None:
    points = {(49, m, n): us("fp32", 49, m, n) for m, n in itertools.product(SIZES, SIZES) if m * n < 512 * 512}
    grid = Grid(points)
    assert all(grid.at(*key) == pytest.approx(time) for key, time in points.items())
    assert grid.at(49, 512, 512) == pytest.approx(4 * points[49, 128, 512])
    assert Grid({(49, 8): -3.0}).at(49, 8) > 0  # a difference of two measured times


def test_latency_adds_the_table_up(device: DeviceProfile) -> None:
    fixed = deployed_fixed_cost(SPEC, 2, 4, True, "int8")
    for batch in (1, 2):
        whole = fixed_latency_s(fixed, device, "cpu", sustained=False, batch=batch)
        assert whole == pytest.approx(batch * (30 + 2 * (40 + 20)) * 1e-6)
    shape = MatrixShape("blocks.0.mlp.fc1", 512, 128)
    cost = matrix_cost(SPEC, shape, "factored", 32, 0, 0, "int8")
    found = matrix_latency_s(cost, device, "cpu", "int8", sustained=False)
    assert found == pytest.approx(1e-6 * (us("int8", 49, 128, 32) + us("int8", 49, 32, 512)))
    tailors = matrix_cost(SPEC, shape, "dropped", 0, 8, 2, "fp32")
    assert matrix_latency_s(tailors, device, "cpu", "fp32", sustained=False, batch=2) == pytest.approx(21e-6)
    branch = branch_fixed_cost(SPEC, "attn", "int8", 2, 4)
    assert fixed_latency_s(branch, device, "cpu", sustained=False) == pytest.approx(40e-6)


def test_a_small_model_runs_on_one_thread_and_a_large_one_on_all(device: DeviceProfile) -> None:
    slow = dataclasses.replace(device.unit("cpu"), one_thread=make_table(slower=3.0))
    both = dataclasses.replace(device, units={**device.units, "cpu": slow})
    large = dataclasses.replace(SPEC, image_size=64, width=768, depth=12, heads=12)
    latent = dataclasses.replace(SPEC, pixels_per_latent=8)
    for spec, factor in ((SPEC, 3.0), (large, 1.0), (latent, 1.0)):
        one = {shape.name: MatrixPlan("dense", "fp32", rank=48) for shape in spec.matrices()}
        seconds = [
            Deployment(
                spec, Request(each, ("a",), Sampling("euler", 4, 1.0, 4)), Candidate("single", "fp32", "cpu")
            ).evaluation_latency_s(one, sustained=False)
            for each in (device, both)
        ]  # fmt: skip
        assert seconds[1] == pytest.approx(factor * seconds[0])
        assert runs_on_one_thread(spec) == (factor > 1)
        assert runs_on_one_thread(spec.without_branches(["blocks.0.attn"])) == runs_on_one_thread(spec)


def test_what_lasts_is_slower_and_other_units_are_estimated(device: DeviceProfile) -> None:
    fixed = deployed_fixed_cost(SPEC, 2, 4, True, "fp32")
    at_first = fixed_latency_s(fixed, device, "cpu", sustained=False)
    share = device.unit("cpu").sustained_share.value
    assert share < 1
    assert fixed_latency_s(fixed, device, "cpu") == pytest.approx(at_first / share)
    assert latency_source(device, "cpu", "int8") == "measured table"
    assert latency_source(device, "gpu", "fp32") == latency_source(device, "cpu", "fp16") == "roofline estimate"


def test_burst_limits_the_time_at_first(device: DeviceProfile) -> None:
    sampling, limits = Sampling("euler", 4, 1.0, 4), {"max_latency": Quantity(1.0, "seconds")}
    request = Request(device, ("a", "b"), sampling, limits=limits)
    costs = [
        Deployment(SPEC, dataclasses.replace(request, burst=burst), Candidate("switch", "int8", "cpu")).fixed_costs()
        for burst in (False, True)
    ]
    share = device.unit("cpu").sustained_share.value
    assert costs[1]["latency_ns"] == pytest.approx(costs[0]["latency_ns"] * share, rel=1e-6)


def test_a_guided_step_is_one_call(device: DeviceProfile) -> None:
    guided = Request(device, ("a", "b"), Sampling("euler", 4, 1.5, 4), burst=True)
    deployment = Deployment(SPEC, guided, Candidate("switch", "fp32", "cpu"))
    assert deployment.evaluations_per_step == 2
    assert deployment.fixed_costs()["latency_ns"] == round(4 * 2 * (30 + 2 * 60) * 1e3)


@pytest.mark.parametrize(("precision", "storage"), [("int8", "dense"), ("fp32", "factored")])
def test_the_solver_takes_dense_int8_where_rank_does_not_pay(
    precision: str, storage: str, device: DeviceProfile
) -> None:
    """At rank 48 of a 128 x 128 matrix the table has two thin int8 products slower than one, in fp32 quicker."""
    shared = np.linspace(0.1, 0, SPEC.learngene_rank + 1)
    one = MatrixLoss(shared, np.linspace(0.01, 0, SPEC.tailor_rank + 1), 1e-4)
    losses = LossModel({shape.name: one for shape in SPEC.matrices()}, {})
    source = Source("tiny", "0" * 64, SPEC, lambda form, classes: losses, "whitened", "none")
    request = Request(device, ("a", "b"), Sampling("euler", 4, 1.0, 4), precision=precision, unit="cpu")  # type: ignore[arg-type]
    plan = make_plan(source, request)
    square = [matrix for name, matrix in plan.matrices.items() if ".attn." in name]
    assert {(matrix.storage, matrix.precision, matrix.learngene_rank) for matrix in square} == {
        (storage, precision, SPEC.learngene_rank)
    }
    assert plan.latency_source == "measured table"
    assert plan.image_latency_s < plan.sustained_image_latency_s


def test_a_profile_with_a_table_is_read_as_it_was_written(device: DeviceProfile) -> None:
    two = dataclasses.replace(device.unit("cpu"), one_thread=make_table(2.0))
    odd = dataclasses.replace(device, title='the "odd" one \x7f \\ µ', units={"cpu": two})
    again = parse_profile(profile_text(odd), odd.name, "written")
    assert again.title == odd.title
    for table, wanted in ((again.unit("cpu").table, make_table()), (again.unit("cpu").one_thread, make_table(2.0))):
        assert table is not None
        assert table.source == wanted.source
        for kind in KINDS:
            assert getattr(table, kind) == pytest.approx(getattr(wanted, kind), rel=1e-5)
    assert again.ram_bytes == Figure(pytest.approx(odd.ram_bytes.value, rel=1e-5), "G", odd.ram_bytes.source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("square_dense = [", "squares_dense = [", "nearest known: square_dense"),
        ('["fp32", 1, 49, 64,', '["fp64", 1, 49, 64,', "square_dense.0.: got 'fp64'"),
        ('["fp32", 1, 49, 64,', '["fp32", 1, 49,', "want 3 sizes"),
        ('["fp32", 1, 49, 64,', '["fp32", 1, 49, 0,', "sizes of at least 1"),
        ("[1, 49, 64, 30]", "[1, 49, 64, nan]", "ends.0..us: got nan"),
        ("[1, 49, 64, 30]", '"fast"', "ends.0.: got 'fast'"),
    ],
)
def test_a_wrong_table_is_refused(old: str, new: str, message: str, device: DeviceProfile) -> None:
    text = profile_text(dataclasses.replace(device, units={"cpu": device.unit("cpu")}))
    assert old in text
    with pytest.raises(InputError, match=message):
        parse_profile(text.replace(old, new, 1), "mine", "mine.toml")


def test_extrapolation_keeps_a_sane_slope() -> None:
    noisy = Grid({(1, 49): 10.0, (1, 256): 9.0, (2, 49): 20.0, (2, 256): 1e9})
    assert noisy.at(1, 512) == pytest.approx(9.0)  # more tokens take no less
    assert math.log(noisy.at(2, 512) / noisy.at(2, 256)) <= 2 * math.log(2) + 1e-9
