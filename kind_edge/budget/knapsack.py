"""The multiple-choice knapsack as an integer program: HiGHS searches in floats, integers here have the last word.

One column per option, exactly one column chosen per group (a group is one matrix), and for every limit
sum(cost of chosen) <= limit. HiGHS accepts a row that is violated by about 1e-6 of its right-hand side, so every
answer is added up again in integers; one that breaks a limit is cut off by a cover inequality, which no true
solution violates, and the search goes on. Needs numpy and scipy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.highs import Program, Relaxed

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

LARGEST_COST = 2**53
"""Costs up to here are exact as floats, and a thousand of them add up within 64 bits."""

_EXACT_ATTEMPTS = 24
_LAST_ATTEMPT = 28
_SPLIT = 1e-6  # a column's share in the relaxation from which on it counts
_MOST_ROUNDINGS = 256
_HAIR = 1e-5  # of a limit's slack: ten times what HiGHS forgives


@dataclass(frozen=True)
class Table:
    """Columns sorted by group: `group` [n] counts from 0 without holes, `value` [n], `costs` name -> [n]."""

    group: Integers
    value: Floats
    costs: Mapping[str, Integers]

    @property
    def groups(self) -> int:
        return int(self.group[-1]) + 1

    def starts(self) -> Integers:
        return np.searchsorted(self.group, np.arange(self.groups)).astype(np.int64)

    def only(self, kept: Mask) -> Table:
        return Table(self.group[kept], self.value[kept], {name: cost[kept] for name, cost in self.costs.items()})

    def above_minimum(self, name: str) -> Integers:
        """What each column costs beyond the cheapest of its group, [n]."""
        cost = self.costs[name]
        lowest: Integers = np.minimum.reduceat(cost, self.starts())
        above: Integers = cost - lowest[self.group]
        return above

    def slack(self, name: str, limit: int) -> int:
        """What is left of a limit when every group takes its cheapest column; negative: the limit cannot be met."""
        cheapest: list[int] = np.minimum.reduceat(self.costs[name], self.starts()).tolist()
        return limit - sum(cheapest)


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    `chosen` holds one column per group and keeps every limit in integers, or is None. `bound`: no choice has a larger
    objective. `finished`: the search ended by proof (optimal within the gap, or infeasible), not by the clock.
    """

    chosen: Integers | None
    bound: float
    finished: bool

    @property
    def infeasible(self) -> bool:
        """Proven: no choice keeps every limit."""
        return self.chosen is None and self.finished


def undominated(table: Table) -> Mask:
    """The columns that no other of their group beats or equals in value and all costs (of twins the first stays)."""
    kept = np.ones(len(table.group), dtype=bool)
    for columns in np.split(np.arange(len(table.group)), table.starts()[1:]):
        value = table.value[columns]
        beaten = value[None, :] >= value[:, None]  # [column, rival]
        equal = value[None, :] == value[:, None]
        for cost in table.costs.values():
            own = cost[columns]
            beaten &= own[None, :] <= own[:, None]
            equal &= own[None, :] == own[:, None]
        earlier = np.tri(len(columns), k=-1, dtype=bool)
        kept[columns] = ~(beaten & (~equal | earlier)).any(axis=1)
    return kept


def search(table: Table, objective: Floats, limits: Mapping[str, int], gap: float, deadline: float) -> Found:
    """Maximise the sum of `objective` [n] over the chosen columns, to a relative `gap`, until `deadline`.

    The linear relaxation comes first: it bounds the objective, its rounding is often good enough already, and its
    reduced costs tell which columns can be part of nothing better; the integer program decides among the rest.
    `deadline` is in seconds of `time.monotonic`. Raises `KindEdgeError` when HiGHS itself fails.
    """
    kept = _narrow(table, limits)
    if kept is None:
        return Found(None, -np.inf, True)
    columns = np.flatnonzero(kept)
    narrowed, goal = table.only(kept), objective[kept]
    relaxed = _program(narrowed, goal, limits).relax()
    if relaxed is None:
        return Found(None, -np.inf, True)
    rounded = _round(narrowed, goal, limits, relaxed)
    if rounded is None:
        found = _branch(narrowed, goal, limits, gap, deadline)
        return Found(None if found.chosen is None else columns[found.chosen], found.bound, found.finished)
    reached = float(goal[rounded].sum())
    if relaxed.bound - reached <= gap * abs(reached):
        return Found(columns[rounded], relaxed.bound, True)
    # Whoever takes a column loses at least its reduced cost against the bound.
    useful = relaxed.bound + relaxed.reduced_costs >= reached - relaxed.tolerance
    core = np.flatnonzero(useful)
    found = _branch(narrowed.only(useful), goal[core], limits, gap, deadline)
    bound = max(reached, min(relaxed.bound, found.bound))
    if found.chosen is None or float(goal[core][found.chosen].sum()) < reached:
        return Found(columns[rounded], bound, found.finished)
    return Found(columns[core[found.chosen]], bound, found.finished)


def smallest_total(table: Table, name: str, limits: Mapping[str, int], deadline: float) -> int | None:
    """The smallest sum of one cost while `limits` (of other costs) hold, exact; None if none was found.

    Descends: every solution becomes a limit that the next one must undercut, until none does. Where the clock ends
    that, the result can be reached but may not be the smallest.
    """
    cost = table.costs[name]
    best: int | None = None
    while True:
        bounds = dict(limits) if best is None else {**limits, name: best - 1}
        found = search(table, -table.above_minimum(name).astype(np.float64), bounds, gap=0.0, deadline=deadline)
        if found.chosen is None:
            return best
        best = sum(cost[found.chosen].tolist())


def improve(table: Table, chosen: Integers, limits: Mapping[str, int], tie_breakers: Sequence[str]) -> Integers:
    """Exchange single columns while that gains value, or keeps it and lowers the tie-breaking costs, first one first.

    Limits hold before and after. Afterwards every exchange that would gain value breaks a limit.
    """
    chosen = chosen.copy()
    while True:
        current = chosen[table.group]
        fits = ~np.array([*broken_limits(table, chosen, limits).values(), np.zeros(len(current), bool)]).any(axis=0)
        keys = [table.value - table.value[current]]
        keys += [(table.costs[name][current] - table.costs[name]).astype(np.float64) for name in tie_breakers]
        better, tied = np.zeros(len(current), bool), np.ones(len(current), bool)
        for key in keys:
            better |= tied & (key > 0)
            tied &= key == 0
        candidates = np.flatnonzero(fits & better)
        if not len(candidates):
            return chosen
        best = candidates[np.lexsort([key[candidates] for key in reversed(keys)])[-1]]
        chosen[table.group[best]] = best


def broken_limits(table: Table, chosen: Integers, limits: Mapping[str, int]) -> dict[str, Mask]:
    """Limit -> [n]: would that limit break if the column alone replaced its group's chosen one?"""
    broken = {}
    for name, limit in limits.items():
        cost = table.costs[name]
        left = limit - sum(cost[chosen].tolist())
        broken[name] = cost - cost[chosen][table.group] > left
    return broken


def _branch(table: Table, goal: Floats, limits: Mapping[str, int], gap: float, deadline: float) -> Found:
    """The integer program, solved again with one more cut for every answer that breaks a limit in integers."""
    kept = _narrow(table, limits)
    if kept is None:
        return Found(None, -np.inf, True)
    columns, rest = np.flatnonzero(kept), table.only(kept)
    program = _program(rest, goal[kept], limits)
    bound = float(np.maximum.reduceat(goal[kept], rest.starts()).sum())
    for attempt in range(_LAST_ATTEMPT):
        exact = attempt < _EXACT_ATTEMPTS  # after many cuts the limits shrink by a hair, which proves nothing any more
        answer = program.run(gap, deadline, hair=0.0 if exact else _HAIR)
        if exact:
            bound = min(bound, answer.bound)
        if answer.chosen is None:
            return Found(None, bound, answer.finished and exact)
        cut = _cover_cut(rest, answer.chosen, limits)
        if cut is None:
            return Found(columns[answer.chosen], bound, answer.finished)
        program = program.with_cut(*cut)
    return Found(None, bound, False)


def _program(table: Table, goal: Floats, limits: Mapping[str, int]) -> Program:
    """The program of a narrowed table: limits as shares of their slack; a row that every choice keeps is left out.

    Where the slack is 0, narrowing left only columns at the minimum, and the row is one of those.
    """
    rows = []
    for name, limit in limits.items():
        above, slack = table.above_minimum(name), table.slack(name, limit)
        if sum(np.maximum.reduceat(above, table.starts()).tolist()) > slack:
            rows.append(above / slack)
    return Program(table.group, goal, np.array(rows).reshape(len(rows), len(goal)))


def _round(table: Table, goal: Floats, limits: Mapping[str, int], relaxed: Relaxed) -> Integers | None:
    """The best choice among the relaxation's few split groups, improved by single exchanges; None if none fits.

    A basic solution splits at most as many groups as there are limits, so there are few combinations.
    """
    support = [part[relaxed.shares[part] > _SPLIT] for part in np.split(np.arange(len(goal)), table.starts()[1:])]
    best: Integers | None = None
    for combination in itertools.islice(itertools.product(*support), _MOST_ROUNDINGS):
        chosen = np.array(combination, dtype=np.int64)
        if any(sum(table.costs[name][chosen].tolist()) > limit for name, limit in limits.items()):
            continue
        chosen = improve(Table(table.group, goal, table.costs), chosen, limits, ())
        if best is None or goal[chosen].sum() > goal[best].sum():
            best = chosen
    return best


def _narrow(table: Table, limits: Mapping[str, int]) -> Mask | None:
    """Drop, until nothing changes, columns that no choice can afford; None if nothing is left to choose."""
    kept = np.ones(len(table.group), dtype=bool)
    while True:
        rest = table.only(kept)
        affordable = np.ones(len(rest.group), dtype=bool)
        for name, limit in limits.items():
            slack = rest.slack(name, limit)
            if slack < 0:
                return None
            affordable &= rest.above_minimum(name) <= slack
        if affordable.all():
            return kept
        if not np.logical_or.reduceat(affordable, rest.starts()).all():
            return None  # what one limit leaves of a group, another excludes
        kept[np.flatnonzero(kept)] = affordable


def _cover_cut(table: Table, chosen: Integers, limits: Mapping[str, int]) -> tuple[Mask, int] | None:
    """For a choice that breaks a limit in integers: columns of which at most `count` can be chosen together.

    The chosen columns of a few groups already break the limit with everybody else at the cheapest; so does any choice
    that takes columns at least as costly in all of those groups.
    """
    for name, limit in limits.items():
        slack = table.slack(name, limit)
        above = table.above_minimum(name)
        spent = above[chosen]
        order = np.argsort(-spent, kind="stable")
        over = np.cumsum(spent[order]) > slack
        if not over[-1]:
            continue
        in_cover = np.zeros(table.groups, dtype=bool)
        size = int(np.argmax(over)) + 1
        in_cover[order[:size]] = True
        return in_cover[table.group] & (above >= spent[table.group]), size - 1
    return None
