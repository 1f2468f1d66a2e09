"""The solver against brute force, and what it says when nothing fits."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kind_edge.budget import knapsack
from kind_edge.budget.highs import _silent_stdout
from kind_edge.budget.solver import Option, Problem, diagnose, lower_bound, recheck, solve
from kind_edge.errors import KindEdgeError, NoPlanError
from kind_edge.units import Kind, parse_quantity

NAMES = ("weight_bytes", "latency_ns", "flops")
GAP = 1e-4
KINDS: dict[str, tuple[Kind, int]] = {
    "weight_bytes": ("bytes", 1),
    "latency_ns": ("seconds", 10**9),
    "flops": ("flops", 1),
}


def option(loss: float, opens: tuple[str, ...] = (), **costs: int) -> Option:
    return Option("factored", 1, loss, costs, opens)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """1-3 groups of 1-4 options, some of which open 1-2 groups more (a branch its matrices, a matrix its precisions);
    costs small, or 1e12 with differences in the last digit."""
    names = NAMES[: draw(st.integers(1, 3))]
    scale = draw(st.sampled_from([0, 1000, 10**12]))
    cost = st.builds(lambda large, small: large * scale + small, st.integers(0, 3), st.integers(0, 9))
    loss = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1, width=32))
    options: dict[str, tuple[Option, ...]] = {}
    pending = [(f"blocks.{i}", 2) for i in range(draw(st.integers(1, 3)))]
    while pending:
        group, depth = pending.pop(0)
        made = []
        for number in range(draw(st.integers(1, 4 if depth == 2 else 3))):
            opens: tuple[str, ...] = ()
            if depth and len(options) + len(pending) < 7 and draw(st.booleans()):
                opens = tuple(f"{group}.{number}{part}" for part in "ab"[: draw(st.integers(1, 2))])
                pending += [(opened, depth - 1) for opened in opens]
            costs = dict(zip(names, draw(st.tuples(*[cost] * len(names))), strict=True))
            made.append(option(draw(loss), opens, **costs))
        options[group] = tuple(made)
    fixed = {name: draw(st.integers(0, 9)) for name in names}
    bare = Problem(options, fixed, {})
    some = draw(st.sampled_from(fitting(bare, {})))
    limits = {}
    for name in draw(st.sets(st.sampled_from(names), min_size=1)):
        limits[name] = totals(bare, some)[name] - draw(st.integers(0, 2))  # where rounding would show
    return dataclasses.replace(bare, limits=limits)


def choices_of(problem: Problem, group: str) -> list[list[Option]]:
    """Every choice from a group on, by recursion."""
    found = []
    for one in problem.options[group]:
        opened = [choices_of(problem, name) for name in one.opens]
        found += [[one, *itertools.chain.from_iterable(parts)] for parts in itertools.product(*opened)]
    return found


def totals(problem: Problem, chosen: list[Option]) -> dict[str, int]:
    return {n: problem.fixed.get(n, 0) + sum(o.costs[n] for o in chosen) for n in problem.cost_names()}


def fitting(problem: Problem, limits: dict[str, int]) -> list[list[Option]]:
    opened = {name for group in problem.options.values() for one in group for name in one.opens}
    roots = [choices_of(problem, group) for group in problem.options if group not in opened]
    choices = [list(itertools.chain.from_iterable(parts)) for parts in itertools.product(*roots)]
    return [c for c in choices if all(totals(problem, c)[name] <= limit for name, limit in limits.items())]


def loss_of(chosen: list[Option]) -> float:
    return math.fsum(one.loss for one in chosen)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_solver_equals_brute_force(problem: Problem) -> None:
    choices = fitting(problem, dict(problem.limits))
    if not choices:
        with pytest.raises(NoPlanError, match="no plan fits"):
            solve(problem)
        return
    best = min(map(loss_of, choices))
    solution = solve(problem, gap=GAP)
    assert solution.totals == recheck(problem, solution.choice)
    assert best - 1e-12 <= solution.loss <= best * (1 + 2 * GAP) + 1e-9
    assert solution.lower_bound <= best + 1e-9
    assert lower_bound(problem) <= best + 1e-9
    assert 0 <= solution.optimality_gap <= 2 * GAP
    assert set(solution.binding) <= set(problem.limits)
    if not solution.binding:  # no limit costs any loss
        assert solution.loss == pytest.approx(min(map(loss_of, fitting(problem, {}))))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(NAMES), st.floats(0, 4, width=32))
def test_the_other_question_equals_brute_force(problem: Problem, cost: str, max_loss: float) -> None:
    """The smallest, at a loss of at most so much."""
    if cost not in problem.cost_names():
        return
    asked = dataclasses.replace(problem, minimise=cost, max_loss=max_loss)
    within = fitting(problem, dict(problem.limits))
    if any(abs(loss_of(choice) - max_loss) < 1e-7 for choice in within):
        return  # losses are counted in billionths
    choices = [choice for choice in within if loss_of(choice) <= max_loss]
    if not choices:
        with pytest.raises(NoPlanError):
            solve(asked)
        return
    best = min(totals(problem, choice)[cost] for choice in choices)
    solution = solve(asked, gap=GAP)
    assert solution.loss <= max_loss + 1e-8
    assert best <= solution.totals[cost] <= best * (1 + 2 * GAP) + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2000), st.data())
def test_more_budget_never_costs_more_loss(problem: Problem, more: int, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(problem.limits)))
    if not fitting(problem, dict(problem.limits)):
        return
    raised = dataclasses.replace(problem, limits={**problem.limits, name: problem.limits[name] + more})
    before, after = solve(problem, gap=GAP), solve(raised, gap=GAP)
    assert after.loss <= before.loss * (1 + 2 * GAP) + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems())
def test_diagnosis_equals_brute_force(problem: Problem) -> None:
    limits = dict(problem.limits)
    diagnosis = diagnose(problem)
    assert bool(diagnosis) != bool(fitting(problem, limits))
    alone = {name: min(totals(problem, c)[name] for c in fitting(problem, {})) for name in limits}
    failing = {name for name in limits if alone[name] > limits[name]}
    for entry in diagnosis:
        assert (entry.limit_value, entry.fixed) == (limits[entry.limit], problem.fixed[entry.limit])
        assert bool(entry.conflicts) != bool(failing)
        others = {name: limit for name, limit in limits.items() if name != entry.limit}
        if not entry.conflicts:
            assert entry.smallest == alone[entry.limit]
            continue
        conflict = {name: limits[name] for name in (entry.limit, *entry.conflicts)}
        assert not fitting(problem, conflict)
        assert all(fitting(problem, {n: conflict[n] for n in conflict if n != spared}) for spared in conflict)
        held = fitting(problem, others) or fitting(problem, {name: limits[name] for name in entry.conflicts})
        assert entry.smallest == min(totals(problem, choice)[entry.limit] for choice in held)
    if failing:
        assert {entry.limit for entry in diagnosis} == failing


@settings(max_examples=25, deadline=None)
@given(problems(), st.data())
def test_a_worse_option_changes_nothing(problem: Problem, data: st.DataObject) -> None:
    matrix = data.draw(st.sampled_from(sorted(problem.options)))
    better = data.draw(st.sampled_from(problem.options[matrix]))
    if better.opens:
        return
    worse = dataclasses.replace(better, costs={name: cost + 1 for name, cost in better.costs.items()})
    longer = dataclasses.replace(problem, options={**problem.options, matrix: (worse, *problem.options[matrix])})
    if fitting(problem, dict(problem.limits)):
        before, after = solve(problem), solve(longer)
        assert (before.choice, before.binding) == (after.choice, after.binding)
    else:
        assert diagnose(problem) == diagnose(longer)


@pytest.mark.parametrize("seed", range(8))
def test_tight_problems_equal_brute_force_and_stay_honest_without_time(seed: int) -> None:
    """Every limit at half of the range, costs unrelated: what rounding the relaxation does not solve."""
    generator = np.random.default_rng(seed)
    costs = generator.integers(1, 10**9, size=(5, 6, 3))
    losses = generator.random((5, 6))
    options = {
        f"m{i}": tuple(
            option(float(losses[i, j]), **dict(zip(NAMES, costs[i, j].tolist(), strict=True))) for j in range(6)
        )
        for i in range(5)
    }
    problem = Problem(options, {}, dict.fromkeys(NAMES, 2 * 10**9))
    choices = fitting(problem, dict(problem.limits))
    if not choices:
        assert diagnose(problem)
        return
    best = min(map(loss_of, choices))
    assert best - 1e-12 <= solve(problem, gap=GAP).loss <= best * (1 + 2 * GAP)
    with contextlib.suppress(NoPlanError):  # nothing found in no time: allowed, as long as nothing false is returned
        hurried = solve(problem, time_limit_s=0.0)
        assert hurried.totals == recheck(problem, hurried.choice)
        assert hurried.loss >= best - 1e-12 >= hurried.lower_bound - 1e-9


@pytest.mark.parametrize("exact_attempts", [24, 0])
def test_a_limit_missed_by_one_in_a_trillion_is_not_held(monkeypatch: pytest.MonkeyPatch, exact_attempts: int) -> None:
    """With cuts, and with the limit lowered by a hair instead (which here costs value, but never the limit)."""
    monkeypatch.setattr(knapsack, "_EXACT_ATTEMPTS", exact_attempts)
    monkeypatch.setattr(knapsack, "_roundings", lambda *_: [])
    trillion = 10**12
    group = (option(1, flops=0), option(0.1, flops=trillion), option(0, flops=trillion + 1))
    solution = solve(Problem({"a": group, "b": group, "c": group}, {}, {"flops": 2 * trillion + 1}))
    assert solution.totals["flops"] <= 2 * trillion + 1
    assert solution.lower_bound <= 1.1 + 1e-9
    if exact_attempts:
        assert solution.loss == pytest.approx(1.1)


def test_equal_values_take_the_lower_latency_then_the_fewer_bytes() -> None:
    group = (
        option(0, latency_ns=5, weight_bytes=1),
        option(0, latency_ns=4, weight_bytes=9),
        option(0, latency_ns=4, weight_bytes=8),
        option(0.5, latency_ns=1, weight_bytes=1),
    )
    assert solve(Problem({"a": group, "b": group}, {}, {})).totals == {"latency_ns": 8, "weight_bytes": 16}
    # With room for 10 bytes, one of the two has to take the slower option.
    assert solve(Problem({"a": group, "b": group}, {}, {"weight_bytes": 10})).totals["latency_ns"] == 9


def test_a_tie_between_two_matrices_takes_the_lower_latency() -> None:
    def group(latency_ns: int) -> tuple[Option, ...]:
        return option(1, latency_ns=0, weight_bytes=0), option(0, latency_ns=latency_ns, weight_bytes=10)

    problem = Problem({"a": group(300), "b": group(100), "c": group(200)}, {}, {"weight_bytes": 19})
    assert solve(problem).totals == {"latency_ns": 100, "weight_bytes": 10}


@pytest.mark.parametrize(
    ("limits", "binding"),
    [
        ({}, ()),
        ({"flops": 100, "weight_bytes": 100}, ()),
        ({"flops": 100, "weight_bytes": 5}, ("weight_bytes",)),
        ({"flops": 5, "weight_bytes": 5}, ("flops", "weight_bytes")),  # the only better option breaks both
    ],
)
def test_binding_names_the_limits_in_the_way(limits: dict[str, int], binding: tuple[str, ...]) -> None:
    group = (option(1, flops=3, weight_bytes=3), option(0, flops=6, weight_bytes=6))
    assert solve(Problem({"a": group}, {"flops": 1}, limits)).binding == binding


def test_many_options_are_solved_to_the_gap() -> None:
    generator = np.random.default_rng(0)
    options = {}
    for index in range(36):
        work = generator.integers(1, 10**9, size=100)
        loss = np.exp(-work / 3e8)
        size = 2 * work + generator.integers(0, 10**8, size=100)
        options[f"m{index}"] = tuple(
            option(float(v), latency_ns=int(t), weight_bytes=int(b)) for v, t, b in zip(loss, work, size, strict=True)
        )
    solution = solve(Problem(options, {}, {"latency_ns": 10**10, "weight_bytes": 2 * 10**10}), gap=GAP)
    assert solution.optimality_gap <= GAP
    assert solution.binding


def test_the_refusal_names_limit_smallest_and_a_way_out() -> None:
    mib = 2**20
    problem = Problem(
        {"a": (option(1, weight_bytes=mib // 5, latency_ns=10**9), option(0, weight_bytes=mib, latency_ns=10**6))},
        {"weight_bytes": int(1.1 * mib)},
        {"weight_bytes": mib},
    )
    with pytest.raises(NoPlanError) as caught:
        solve(problem)
    message = str(caught.value)
    start = "no plan fits: --max-size 1 MiB is below the smallest possible 1.3 MiB (fixed parts 1.1 MiB);"
    assert message.startswith(start)
    assert message.endswith(
        "raise --max-size to at least 1.3 MiB, keep fewer classes, take fewer --steps, or lower --precision"
    )
    assert caught.value.diagnosis == diagnose(problem)  # type: ignore[attr-defined]


def test_the_refusal_of_limits_that_conflict_names_both() -> None:
    group = (option(1, weight_bytes=100, latency_ns=10**9), option(0, weight_bytes=1000, latency_ns=10**6))
    with pytest.raises(NoPlanError) as caught:
        solve(Problem({"a": group, "b": group}, {}, {"weight_bytes": 1099, "latency_ns": 500 * 10**6}))
    assert "--max-size 1.07 KiB and --max-latency 500 ms cannot hold together" in str(caught.value)
    assert "raise --max-size to at least 1.96 KiB or --max-latency to at least 2 s" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2**53), st.sampled_from(["weight_bytes", "latency_ns", "flops"]))
def test_raising_the_limit_to_the_text_of_the_refusal_is_enough(smallest: int, name: str) -> None:
    kind, per_unit = KINDS[name]
    options = {"a": (option(1, **{name: smallest}),)}
    with pytest.raises(NoPlanError) as caught:
        solve(Problem(options, {}, {name: smallest - 1}))
    match = re.search(r"at least ([^,]+?)(?:, |$)", str(caught.value))
    assert match is not None
    limit = int(parse_quantity(match[1], kind).value * per_unit)
    solve(Problem(options, {}, {name: limit}))
    below = re.search(r"--max-\w+ (.+?) is below the smallest possible (.+?);", str(caught.value))
    assert below is not None
    assert below[1] != below[2]


def test_recheck_trusts_nobody() -> None:
    cheap, dear = option(1, flops=1), option(0, flops=5)
    problem = Problem({"a": (cheap, dear), "b": (cheap,)}, {"flops": 1}, {"flops": 4})
    assert recheck(problem, {"a": cheap, "b": cheap}) == {"flops": 3}
    for choice, reason in (
        ({"a": cheap}, "exactly one option per open group"),
        ({"a": cheap, "b": dear}, "not one of its own"),
        ({"a": dear, "b": cheap}, "over its limit 4"),
    ):
        with pytest.raises(KindEdgeError, match=reason) as caught:
            recheck(problem, choice)
        assert caught.value.exit_code == 70


def test_a_malformed_problem_is_our_bug() -> None:
    good = option(1, flops=1)
    for options, limits in (
        ({}, {}),
        ({"a": ()}, {}),
        ({"a": (good, option(1, weight_bytes=1))}, {}),
        ({"a": (option(math.nan, flops=1),)}, {}),
        ({"a": (option(1, flops=-1),)}, {}),
        ({"a": (good,)}, {"weight_bytes": 1}),
    ):
        with pytest.raises(KindEdgeError):
            Problem(options, {}, limits)


def test_nothing_that_highs_prints_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    with _silent_stdout():
        libc.puts(b"stray")
    print("kept")
    assert capfd.readouterr().out == "kept\n"
