"""The search for the cheapest choice within limits: HiGHS searches in floats, integers here have the last word.

A choice takes one column of every open group of a tree; for every limit the sum of what the chosen columns cost is at
most that. HiGHS accepts a row that is violated by about 1e-6 of its right-hand side, so every answer is added up again
in integers; one that breaks a limit is cut off by a cover inequality, which no true solution violates, and the search
goes on. Needs numpy and scipy alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kind_edge.budget.exchange import Exchanges, total
from kind_edge.budget.highs import Relaxed
from kind_edge.budget.table import Table, cover_cut, narrow, program
from kind_edge.budget.tree import Floats, Integers, Mask, Tree

LARGEST_COST = 2**53
"""Costs up to here are exact as floats, and a thousand of them add up within 64 bits."""

NEGLIGIBLE = 1e-6
"""Differences of the objective below this times the gap are none."""

_EXACT_ATTEMPTS = 24
_LAST_ATTEMPT = 28
_SPLIT = 1e-6  # a column's share in the relaxation from which on it counts
_MOST_ROUNDINGS, _MOST_IMPROVED = 256, 4
_HAIR = 1e-5  # of a limit's slack: ten times what HiGHS forgives
_TILT = 0.01  # of the gap: what the tie-breakers may weigh in the objective
_MOST_RELAXATIONS = 3
_WORTHWHILE = 0.8  # a relaxation of so many of the columns teaches little new
_KERNELS = ((400, 0.5), (900, 1.0))
"""Of a large problem, so many columns are searched alone first, for so many seconds."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    `picks` [G] is the choice: a column for every group, those of closed groups of no meaning; it keeps every limit in
    integers. Or it is None. `bound`: no choice has a smaller objective. `finished`: the search ended by proof (optimal
    within the gap, or infeasible), not by the clock.
    """

    picks: Integers | None
    bound: float
    finished: bool

    @property
    def infeasible(self) -> bool:
        """Proven: no choice keeps every limit."""
        return self.picks is None and self.finished


_NOTHING = Found(None, np.inf, True)


def search(table: Table, limits: Mapping[str, int], gap: float, deadline: float, ties: Floats | None = None) -> Found:
    """Minimise the sum of the goal over a choice, to a relative `gap`, until `deadline` (`time.monotonic` seconds).

    The linear relaxation comes first: it bounds the goal, its rounding is often good enough already, and its reduced
    costs tell which columns can be part of nothing better. The integer program decides among the rest; where that is
    much, first among the columns that the relaxation likes best, whose optimum is nearly always that of all.
    Among choices whose goals differ by far less than the gap, the integer program prefers the smallest sum of `ties`
    [n], which is between 0 and 1 for every choice. Raises `KindEdgeError` when HiGHS itself fails.
    """
    return _Search(table, limits, gap, deadline, ties).run()


class _Search:
    """`best` and `reached`: the best choice so far and its goal; `bound`: none is below that.

    `core`: the columns that a better choice can be made of, and which of the table's they are; `forced`: what taking
    one costs at least above `base`, by the last relaxation.
    """

    def __init__(
        self, table: Table, limits: Mapping[str, int], gap: float, deadline: float, ties: Floats | None
    ) -> None:
        self.table, self.limits, self.gap, self.deadline, self.ties = table, limits, gap, deadline, ties
        self.exchanges = Exchanges(table.tree, table.goal, table.costs, limits)
        self.best: Integers | None = None
        self.reached, self.bound, self.base, self.tie = np.inf, -np.inf, -np.inf, np.inf
        self.columns, self.core = np.arange(len(table.goal)), table
        self.forced = np.zeros(len(table.goal))

    def run(self) -> Found:
        if not self._keep(None):
            return _NOTHING
        for _ in range(_MOST_RELAXATIONS):
            before = len(self.columns)
            if not self._relax() or self._closed() or not self._keep(self._useful()):
                return self._found(True)
            if len(self.columns) > _WORTHWHILE * before:
                break
        for most, seconds in _KERNELS:
            if len(self.columns) > 2 * most:
                self._kernel(most, min(self.deadline, time.monotonic() + seconds))
                if self._closed() or not self._keep(self._useful()):
                    return self._found(True)
        last = self._branch(np.ones(len(self.columns), dtype=bool), self.deadline)
        self.bound = max(self.bound, min(last.bound, self.reached))
        return self._found(last.finished)

    def _found(self, finished: bool) -> Found:
        """`finished` without a choice: there is none. With one, nothing is left that could be better than the bound."""
        if self.best is None:
            return _NOTHING if finished else Found(None, self.bound, False)
        bound = self.bound if self._closed() or len(self.columns) else self.reached
        return Found(self.best, bound, finished)

    def _closed(self) -> bool:
        return self.best is not None and self.reached - self.bound <= self.gap * max(self.reached, NEGLIGIBLE)

    def _useful(self) -> Mask:
        """Columns of which a choice better than the best can be made: whoever takes one loses at least what it
        forces."""
        return self.base + self.forced <= self.reached

    def _keep(self, useful: Mask | None) -> bool:
        """Leave only the useful columns of the core, and of these what is affordable; False if no choice is left."""
        kept = narrow(self.core, self.limits, useful)
        if kept is None:
            self.columns = self.columns[:0]
            return False
        self.columns, self.core, self.forced = self.columns[kept], self.core.only(kept), self.forced[kept]
        return True

    def _relax(self) -> bool:
        """Relax the core; False if it has no choice within the limits."""
        made, least = program(self.core, self.core.goal, self.limits, self.reached)
        relaxed = made.relax()
        if relaxed is None:
            self.columns = self.columns[:0]
            return False
        self.base, self.forced = relaxed.bound + least - relaxed.tolerance, relaxed.forced
        self.bound = max(self.bound, min(relaxed.bound + least, self.reached))
        for rounded in _roundings(self.core, self.limits, relaxed):
            self._take(self.columns[self.core.tree.chosen(rounded)])
        return True

    def _take(self, chosen: Integers) -> None:
        """Improve a choice of the table's columns by exchanges, and keep it if it is the best."""
        picks = self.exchanges.improve(_widened(self.table.tree, chosen, self.exchanges.richest))
        value = total(self.table.tree, picks, self.table.goal)
        tie = 0.0 if self.ties is None else total(self.table.tree, picks, self.ties)
        if (value, tie) < (self.reached, self.tie):
            self.best, self.reached, self.tie = picks, value, tie

    def _kernel(self, most: int, deadline: float) -> None:
        kernel = self.core.tree.closure(self.forced <= np.partition(self.forced, most)[most])
        if kernel is not None:
            self._branch(kernel, deadline)

    def _branch(self, among: Mask, deadline: float) -> Found:
        """Search some columns of the core with the integer program, and take what it finds."""
        columns, core = self.columns[among], self.core.only(among)
        ties = None if self.ties is None else self.ties[columns]
        found = _branch(core, self.limits, self.gap, deadline, self.reached, self.bound, ties)
        if found.picks is not None:
            self._take(columns[core.tree.chosen(found.picks)])
        return found


def relaxed_bound(table: Table, limits: Mapping[str, int]) -> float:
    """No choice within the limits has a smaller goal; infinite where that is proof that there is none."""
    kept = narrow(table, limits)
    if kept is None:
        return np.inf
    core = table.only(kept)
    made, least = program(core, core.goal, limits, np.inf)
    relaxed = made.relax()
    return np.inf if relaxed is None else relaxed.bound + least - relaxed.tolerance


def smallest_total(table: Table, name: str, limits: Mapping[str, int], deadline: float) -> int | None:
    """The smallest sum of one cost while `limits` (of other costs) hold, exact; None if none was found.

    Descends: every solution becomes a limit that the next one must undercut, until none does. Where the clock ends
    that, the result can be reached but may not be the smallest.
    """
    costs = Table(table.tree, table.costs[name].astype(np.float64), table.costs)
    best: int | None = None
    while True:
        bounds = dict(limits) if best is None else {**limits, name: best - 1}
        found = search(costs, bounds, gap=0.0, deadline=deadline)
        if found.picks is None:
            return best
        best = int(total(table.tree, found.picks, table.costs[name]))


def _branch(
    table: Table,
    limits: Mapping[str, int],
    gap: float,
    deadline: float,
    reached: float,
    bound: float,
    ties: Floats | None,
) -> Found:
    """The integer program, solved again with one more cut for every answer that breaks a limit in integers."""
    kept = narrow(table, limits)
    if kept is None:
        return _NOTHING
    columns, rest = np.flatnonzero(kept), table.only(kept)
    tilt = 0.0 if ties is None else _TILT * gap * max(bound, NEGLIGIBLE)
    goal = rest.goal if ties is None else rest.goal + tilt * ties[columns]
    made, least = program(rest, goal, limits, reached)
    relative = gap
    if math.isfinite(reached) and reached > least:  # of what lies above the least, which is all that HiGHS sees
        relative = min(1.0, gap * max(reached, NEGLIGIBLE) / (reached - least))
    lowest = -np.inf
    for attempt in range(_LAST_ATTEMPT):
        exact = attempt < _EXACT_ATTEMPTS  # after many cuts the limits shrink by a hair, which proves nothing any more
        answer = made.run((1 - _TILT) * relative, deadline, hair=0.0 if exact else _HAIR)
        if exact:
            lowest = max(lowest, answer.bound + least - tilt)
        if answer.picks is None:
            return Found(None, lowest, answer.finished and exact)
        cut = cover_cut(rest, rest.tree.chosen(answer.picks), limits)
        if cut is None:
            chosen = columns[rest.tree.chosen(answer.picks)]
            return Found(_widened(table.tree, chosen, table.tree.starts), lowest, answer.finished)
        made = made.with_cut(*cut)
    return Found(None, lowest, False)


def _roundings(table: Table, limits: Mapping[str, int], relaxed: Relaxed) -> list[Integers]:
    """The best choices, as picks, among the relaxation's few split groups that keep every limit.

    A basic solution splits at most as many groups as there are limits, so there are few combinations.
    """
    tree, shares = table.tree, relaxed.shares
    picks = np.lexsort((-shares, tree.group))[tree.starts].astype(np.int64)
    supported = shares > _SPLIT
    split = np.flatnonzero(np.add.reduceat(supported.astype(np.int64), tree.starts) > 1)
    support = [np.flatnonzero(supported & (tree.group == group)) for group in split]
    fitting: list[tuple[float, int, Integers]] = []
    for number, combination in enumerate(itertools.islice(itertools.product(*support), _MOST_ROUNDINGS)):
        rounded = picks.copy()
        rounded[split] = combination
        chosen = tree.chosen(rounded)
        if all(sum(table.costs[name][chosen].tolist()) <= limit for name, limit in limits.items()):
            fitting.append((math.fsum(table.goal[chosen].tolist()), number, rounded))
    return [rounded for _, _, rounded in sorted(fitting, key=lambda each: each[:2])[:_MOST_IMPROVED]]


def _widened(tree: Tree, chosen: Integers, others: Integers) -> Integers:
    """The chosen columns as picks of every group [G]; of closed groups those in `others`."""
    picks = others.copy()
    picks[tree.group[chosen]] = chosen
    return picks
