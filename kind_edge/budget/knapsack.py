"""The multiple-choice knapsack as an integer program: HiGHS searches in floats, integers here have the last word.

One column per option, exactly one column chosen per group (a group is one matrix), and for every limit
sum(cost of chosen) <= limit. HiGHS accepts a row that is violated by about 1e-6 of its right-hand side, so every
answer is added up again in integers; one that breaks a limit is cut off by a cover inequality, which no true
solution violates, and the search goes on. Needs numpy and scipy alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack

from kind_edge.errors import KindEdgeError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

LARGEST_COST = 2**53
"""Costs up to here are exact as floats, and a thousand of them add up within 64 bits."""

# The objective is scaled to this size, far above the absolute gap (1e-6) at which HiGHS stops in any case.
_OBJECTIVE_SIZE = 1000.0
_EXACT_ATTEMPTS = 24
_LAST_ATTEMPT = 28
_HAIR = 1e-5  # of a limit's slack: ten times what HiGHS forgives

_MILP_OPTIMAL, _MILP_STOPPED, _MILP_INFEASIBLE = 0, 1, 2


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

    `deadline` is in seconds of `time.monotonic`. Raises `KindEdgeError` when HiGHS itself fails.
    """
    kept = _narrow(table, limits)
    if kept is None:
        return Found(None, -np.inf, True)
    columns = np.flatnonzero(kept)
    narrowed, goal = table.only(kept), objective[kept]
    program = _Program.of(narrowed, goal, limits)
    bound = float(np.maximum.reduceat(goal, narrowed.starts()).sum())
    for attempt in range(_LAST_ATTEMPT):
        exact = attempt < _EXACT_ATTEMPTS
        chosen, program_bound, finished = program.run(gap, deadline, hair=0.0 if exact else _HAIR)
        if exact:
            bound = min(bound, program_bound)
        if chosen is None:
            return Found(None, bound, finished and exact)
        cut = _cover_cut(narrowed, chosen, limits)
        if cut is None:
            return Found(columns[chosen], bound, finished)
        program = program.with_cut(*cut)
    return Found(None, bound, False)


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


def _narrow(table: Table, limits: Mapping[str, int]) -> Mask | None:
    """Drop, until nothing changes, columns that no choice can afford; None if a limit cannot be met at all."""
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


@dataclass(frozen=True)
class _Program:
    """The scaled program: rows of limits end at 1 and hold shares of the slack, so that HiGHS sees numbers near 1."""

    group: Integers
    objective: Floats
    scale: float
    one_per_group: csr_matrix
    limit_rows: Floats  # [limits, n]
    cuts: csr_matrix  # [cuts, n]
    cut_counts: tuple[int, ...]

    @classmethod
    def of(cls, table: Table, objective: Floats, limits: Mapping[str, int]) -> _Program:
        count = len(table.group)
        rows = []
        for name, limit in limits.items():
            above, slack = table.above_minimum(name), table.slack(name, limit)
            # A row that every choice keeps is left out; where the slack is 0, narrowing left only such columns.
            if sum(np.maximum.reduceat(above, table.starts()).tolist()) > slack:
                rows.append(above / slack)
        size = float(np.maximum.reduceat(np.abs(objective), table.starts()).sum())
        one_per_group = csr_matrix((np.ones(count), (table.group, np.arange(count))), shape=(table.groups, count))
        return cls(
            group=table.group,
            objective=objective,
            scale=_OBJECTIVE_SIZE / size if size > 0 else 1.0,
            one_per_group=one_per_group,
            limit_rows=np.array(rows).reshape(len(rows), count),
            cuts=csr_matrix((0, count)),
            cut_counts=(),
        )

    def with_cut(self, columns: Mask, count: int) -> _Program:
        row = csr_matrix(columns.astype(np.float64)[None, :])
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {"cuts": vstack([self.cuts, row], format="csr"), "cut_counts": (*self.cut_counts, count)}
        return _Program(**fields)

    def run(self, gap: float, deadline: float, hair: float) -> tuple[Integers | None, float, bool]:
        """The best columns, an upper bound of the objective, and whether HiGHS finished."""
        constraints = [LinearConstraint(self.one_per_group, 1, 1)]
        if len(self.limit_rows):
            constraints.append(LinearConstraint(self.limit_rows, -np.inf, 1.0 - hair))
        if self.cut_counts:
            constraints.append(LinearConstraint(self.cuts, -np.inf, np.array(self.cut_counts, dtype=np.float64)))
        seconds_left = max(deadline - time.monotonic(), 0.01)
        with _silent_stdout():
            result = milp(
                -self.objective * self.scale,
                integrality=np.ones(len(self.objective)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": gap, "time_limit": seconds_left},
            )
        if result.status not in (_MILP_OPTIMAL, _MILP_STOPPED, _MILP_INFEASIBLE):
            raise KindEdgeError(f"the integer program could not be solved: {result.message}")
        finished = result.status != _MILP_STOPPED
        if result.x is None:
            return None, -np.inf if finished else np.inf, finished
        bound = np.inf if result.mip_dual_bound is None else -float(result.mip_dual_bound) / self.scale
        # The largest variable of each group: sorted by group, then by x, it is the last of its group.
        order = np.lexsort((result.x, self.group))
        last = np.append(np.flatnonzero(np.diff(self.group)), len(self.group) - 1)
        return order[last].astype(np.int64), bound, finished


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS prints a stray line to the C library's stdout now and then, which `--json` must keep clean."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # no stdout at all: nothing to keep clean
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(sink)
        os.close(saved)
