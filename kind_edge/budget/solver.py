"""Choose, for every matrix, how it is stored: the most retained energy that the budget affords.

A multiple-choice knapsack: one option per matrix, the sum of values largest, the sum of every limited cost within its
limit. Costs are integers from start to end; the search is `kind_edge.budget.knapsack`, and `recheck` adds its answer
up again without trusting it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kind_edge.budget.infeasible import Infeasible, no_plan_error
from kind_edge.budget.knapsack import (
    LARGEST_COST,
    Floats,
    Found,
    Integers,
    Mask,
    Table,
    broken_limits,
    improve,
    search,
    smallest_total,
    undominated,
)
from kind_edge.errors import KindEdgeError, NoPlanError
from kind_edge.units import format_seconds

Storage = Literal["dense", "factored", "dropped"]

TIE_BREAKERS = ("latency_ns", "weight_bytes")
"""Among equal values the lower of these wins, the first one first."""

# The tie-breakers' share of the objective, as a share of the gap: what they can cost stays far below the gap itself.
_TILT = 0.01
_SEARCH_SHARE = 0.9


@dataclass(frozen=True)
class Option:
    """One way to store one matrix.

    `learngene_rank` is the rank of the folded product in the forms single and union, where `tailor_rank` is 0.
    `value` is retained energy: finite, at least 0, larger is better. `costs`: name -> integer of at least 0
    ("flops", "weight_bytes", "peak_memory_bytes", "latency_ns"; the same names in all options).
    """

    storage: Storage
    learngene_rank: int
    tailor_rank: int
    value: float
    costs: Mapping[str, int]


@dataclass(frozen=True)
class Problem:
    """What may be chosen and what it may cost.

    `options`: matrix name -> its options. `fixed`: the cost of everything that is not chosen; missing = 0.
    `limits`: upper bound on fixed + chosen; missing = unbounded.
    Raises `KindEdgeError` for a malformed problem: the caller builds problems from checked plans, so it is our bug.
    """

    options: Mapping[str, tuple[Option, ...]]
    fixed: Mapping[str, int]
    limits: Mapping[str, int]

    def __post_init__(self) -> None:
        if not self.options or not all(self.options.values()):
            raise KindEdgeError("Problem.options: want at least one matrix, and at least one option for each")
        names = set(self.cost_names())
        for matrix, options in self.options.items():
            for option in options:
                _check_option(matrix, option, names)
        for kind, amounts in (("fixed", self.fixed), ("limits", self.limits)):
            for name, amount in amounts.items():
                if name not in names or not _is_integer(amount):
                    raise KindEdgeError(f"Problem.{kind}[{name!r}] = {amount!r}: want an integer for one of {names}")

    def cost_names(self) -> tuple[str, ...]:
        return tuple(next(iter(self.options.values()))[0].costs)

    def free(self) -> dict[str, int]:
        """What each limit leaves to the chosen options, once the fixed parts are paid."""
        return {name: limit - self.fixed.get(name, 0) for name, limit in self.limits.items()}


@dataclass(frozen=True)
class Solution:
    """A choice that keeps every limit (rechecked in integers).

    `totals`: fixed + chosen, for every cost name. `upper_bound`: no choice has a larger value; `optimality_gap` =
    (upper_bound - value) / upper_bound, at most the gap asked for unless time ran out.
    `binding`: the limits that stand in the way of a better plan. Every exchange of one matrix's option for one of
    higher value breaks at least one limit; a limit binds when some exchange breaks it and no other. Where every such
    exchange breaks several at once, the smallest sets of limits broken together bind. Empty: no limit costs any value.
    """

    choice: Mapping[str, Option]
    value: float
    totals: Mapping[str, int]
    binding: tuple[str, ...]
    optimality_gap: float
    upper_bound: float


def solve(problem: Problem, time_limit_s: float = 10.0, gap: float = 1e-4) -> Solution:
    """The choice of largest value, proven to the relative `gap` unless `time_limit_s` ends the proof first.

    Ties: no exchange of a single matrix's option keeps the value and lowers latency, or keeps both and lowers bytes.
    Across matrices a small term in the objective, far below the gap, prefers the same.
    Raises `NoPlanError` when no choice fits (its `diagnosis` holds `Infeasible` entries), or when time ran out before
    one was found; `KindEdgeError` when the answer fails `recheck`.
    """
    deadline = time.monotonic() + time_limit_s
    table, options = _table(problem)
    limits = problem.free()
    tie_breakers = [name for name in TIE_BREAKERS if name in table.costs]
    tie_shares = _tie_shares(table, tie_breakers)
    most = float(np.maximum.reduceat(table.value, table.starts()).sum())
    tilt = gap * _TILT * most
    found = search(table, table.value - tilt * tie_shares, limits, gap * _SEARCH_SHARE, deadline)
    if found.chosen is None:
        raise _refusal(problem, table, found, time_limit_s)
    start, upper_bound = found.chosen, min(most, found.bound + tilt)
    if found.finished and tilt > gap * (1 - _SEARCH_SHARE) * upper_bound:
        # The limits leave only a trifle of `most`, and the tie-breaking term blurs the proof: once more without it.
        again = search(table, table.value, limits, gap * _SEARCH_SHARE, deadline)
        upper_bound = min(upper_bound, again.bound)
        start = start if again.chosen is None else again.chosen
    chosen = improve(table, start, limits, tie_breakers)
    value = math.fsum(table.value[chosen])
    upper_bound = max(value, upper_bound)
    choice = {matrix: options[column] for matrix, column in zip(problem.options, chosen, strict=True)}
    return Solution(
        choice=choice,
        value=value,
        totals=recheck(problem, choice),
        binding=_binding(table, chosen, limits),
        optimality_gap=(upper_bound - value) / upper_bound if upper_bound > 0 else 0.0,
        upper_bound=upper_bound,
    )


def recheck(problem: Problem, choice: Mapping[str, Option]) -> dict[str, int]:
    """The totals of a choice, added up anew; trusts nothing but the problem.

    Raises `KindEdgeError` (our bug) unless every matrix has exactly one of its own options and every limit holds.
    """
    if set(choice) != set(problem.options):
        raise KindEdgeError(f"recheck: not exactly one option per matrix: {sorted(set(choice) ^ set(problem.options))}")
    for matrix, option in choice.items():
        if option not in problem.options[matrix]:
            raise KindEdgeError(f"recheck: {matrix} was given an option that is not one of its own: {option}")
    totals = {name: problem.fixed.get(name, 0) for name in problem.cost_names()}
    for option in choice.values():
        for name in totals:
            totals[name] += option.costs[name]
    for name, limit in problem.limits.items():
        if totals[name] > limit:
            raise KindEdgeError(f"recheck: {name} adds up to {totals[name]}, over its limit {limit}")
    return totals


def diagnose(problem: Problem, time_limit_s: float = 10.0) -> tuple[Infeasible, ...]:
    """Why no choice fits: every limit that fails alone; else the members of one smallest conflict; () if one fits.

    Where time runs out, a conflict may not be the smallest, nor `smallest` the least that would do (it does, though).
    """
    return _diagnose(problem, _table(problem)[0], time_limit_s)


def _refusal(problem: Problem, table: Table, found: Found, time_limit_s: float) -> NoPlanError:
    if found.infeasible:
        return no_plan_error(_diagnose(problem, table, time_limit_s))
    seconds = format_seconds(time_limit_s)
    return NoPlanError(f"no plan was found within {seconds}, nor proven impossible; relax a limit")


def _table(problem: Problem) -> tuple[Table, list[Option]]:
    """The options worth considering as columns, and the option of each column.

    Dominance looks at the value, the limited costs and the tie-breakers: what it drops changes no answer.
    """
    options = [option for group in problem.options.values() for option in group]
    names = [name for name in problem.cost_names() if name in problem.limits or name in TIE_BREAKERS]
    table = Table(
        group=np.repeat(np.arange(len(problem.options)), [len(group) for group in problem.options.values()]),
        value=np.array([option.value for option in options], dtype=np.float64),
        costs={name: np.array([option.costs[name] for option in options], dtype=np.int64) for name in names},
    )
    kept = undominated(table)
    return table.only(kept), [options[column] for column in np.flatnonzero(kept)]


def _tie_shares(table: Table, tie_breakers: list[str]) -> Floats:
    """Per column the tie-breaking costs as shares of their range, a thousandth each of the one before; the sum over
    any choice is between 0 and 1."""
    shares = np.zeros(len(table.group))
    for weight, name in zip((0.999, 0.001), tie_breakers, strict=False):
        above = table.above_minimum(name)
        widest = float(np.maximum.reduceat(above, table.starts()).sum())
        if widest > 0:
            shares += weight * above / widest
    return shares


def _binding(table: Table, chosen: Integers, limits: Mapping[str, int]) -> tuple[str, ...]:
    """The union of the smallest (by inclusion) sets of limits that an exchange for more value breaks."""
    gains: Mask = table.value > table.value[chosen][table.group]
    broken = broken_limits(table, chosen, limits)
    patterns = {frozenset(name for name in broken if broken[name][column]) for column in np.flatnonzero(gains)}
    smallest = [pattern for pattern in patterns if not any(other < pattern for other in patterns)]
    return tuple(name for name in limits if any(name in pattern for pattern in smallest))


def _diagnose(problem: Problem, table: Table, time_limit_s: float) -> tuple[Infeasible, ...]:
    limits, fixed = problem.free(), {name: problem.fixed.get(name, 0) for name in problem.limits}
    alone = [name for name, limit in limits.items() if table.slack(name, limit) < 0]
    if alone:
        return tuple(
            Infeasible(name, problem.limits[name], problem.limits[name] - table.slack(name, limits[name]), fixed[name])
            for name in alone
        )
    slice_s = time_limit_s / (1 + 2 * len(limits))  # one member's search must not eat up another's
    if not _impossible(table, limits, slice_s):
        return ()
    conflict = dict(limits)
    for name in limits:
        fewer = {other: limit for other, limit in conflict.items() if other != name}
        if _impossible(table, fewer, slice_s):
            conflict = fewer
    entries = []
    for name in conflict:
        smallest = None
        for held in (limits, conflict):
            others = {other: limit for other, limit in held.items() if other != name}
            if smallest is None:
                smallest = smallest_total(table, name, others, time.monotonic() + slice_s)
        if smallest is not None:
            rest = tuple(other for other in conflict if other != name)
            entries.append(Infeasible(name, problem.limits[name], smallest + fixed[name], fixed[name], rest))
    return tuple(entries)


def _impossible(table: Table, limits: Mapping[str, int], seconds: float) -> bool:
    anything = np.zeros(len(table.group))
    return search(table, anything, limits, gap=1.0, deadline=time.monotonic() + seconds).infeasible


def _check_option(matrix: str, option: Option, names: set[str]) -> None:
    where = f"Problem.options[{matrix!r}]"
    if not (math.isfinite(option.value) and option.value >= 0):
        raise KindEdgeError(f"{where}: value {option.value!r}, want a finite number of at least 0")
    if set(option.costs) != names:
        raise KindEdgeError(f"{where}: costs {sorted(option.costs)}, want {sorted(names)} as in the first option")
    for name, cost in option.costs.items():
        if not _is_integer(cost) or not 0 <= cost <= LARGEST_COST:
            raise KindEdgeError(f"{where}: {name} = {cost!r}, want an integer from 0 to 2^53")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
