"""The search for the cheapest choice within limits: HiGHS searches in floats, integers here have the last word.

A choice takes one column of every open group of a tree; for every limit the sum of what the chosen columns cost is at
most that. HiGHS accepts a row that is violated by about 1e-6 of its right-hand side, so every answer is added up again
in integers; one that breaks a limit is cut off by a cover inequality, which no true solution violates, and the search
goes on. Needs numpy and scipy alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kind_edge.budget.exchange import Exchanges, total
from kind_edge.budget.highs import Program, Relaxed
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


@dataclass(frozen=True)
class Table:
    """The columns of a tree: `goal` [n] is to be minimised, limits bind `costs`, name -> [n]; all at least 0."""

    tree: Tree
    goal: Floats
    costs: Mapping[str, Integers]

    def only(self, kept: Mask) -> Table:
        """The table of the kept columns, which must be a closure."""
        costs = {name: cost[kept] for name, cost in self.costs.items()}
        return Table(self.tree.only(kept), self.goal[kept], costs)

    @cached_property
    def regrets(self) -> Mapping[str, tuple[Integers, int]]:
        """What every column adds to the least cost of all, [n], and that least."""
        return {name: self.tree.regrets(cost) for name, cost in self.costs.items()}  # type: ignore[misc]

    def slack(self, name: str, limit: int) -> int:
        """What the cheapest choice leaves of a limit; negative: the limit cannot be met."""
        return limit - self.regrets[name][1]


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


def undominated(table: Table) -> Mask:
    """The columns that no other of their group beats or equals in goal and all costs (of twins the first stays).

    Columns that open groups are all kept: what they cost is not known yet.
    """
    tree = table.tree
    kept = np.ones(len(tree.group), dtype=bool)
    for columns in np.split(np.arange(len(tree.group)), tree.starts[1:]):
        columns = columns[tree.leaves[columns]]
        goal = table.goal[columns]
        beaten = goal[None, :] <= goal[:, None]  # [column, rival]
        equal = goal[None, :] == goal[:, None]
        for cost in table.costs.values():
            own = cost[columns]
            beaten &= own[None, :] <= own[:, None]
            equal &= own[None, :] == own[:, None]
        earlier = np.tri(len(columns), k=-1, dtype=bool)
        kept[columns] = ~(beaten & (~equal | earlier)).any(axis=1)
    return kept


def search(table: Table, limits: Mapping[str, int], gap: float, deadline: float, ties: Floats | None = None) -> Found:
    """Minimise the sum of the goal over a choice, to a relative `gap`, until `deadline` (`time.monotonic` seconds).

    The linear relaxation comes first: it bounds the goal, its rounding is often good enough already, and its reduced
    costs tell which columns can be part of nothing better; the integer program decides among the rest. Among choices
    whose goals differ by far less than the gap, the integer program prefers the smallest sum of `ties` [n], which is
    between 0 and 1 for every choice. Raises `KindEdgeError` when HiGHS itself fails.
    """
    best: Integers | None = None
    reached, bound = np.inf, -np.inf
    kept = _narrow(table, limits)
    if kept is None:
        return _NOTHING
    columns, core = np.flatnonzero(kept), table.only(kept)
    exchanges = Exchanges(table.tree, table.goal, table.costs, limits)
    for _ in range(_MOST_RELAXATIONS):
        program, least = _program(core, core.goal, limits, reached)
        relaxed = program.relax()
        if relaxed is None:
            if best is None:
                return _NOTHING
            return Found(best, reached, True)  # nothing better is left
        bound = max(bound, min(relaxed.bound + least, reached))
        for rounded in _roundings(core, limits, relaxed):
            picks = exchanges.improve(_widened(table.tree, columns[core.tree.chosen(rounded)], exchanges.richest))
            value = total(table.tree, picks, table.goal)
            if value < reached:
                best, reached = picks, value
        if best is not None and reached - bound <= gap * max(reached, NEGLIGIBLE):
            return Found(best, bound, True)
        # Whoever takes a column loses at least what that forces, above the bound.
        useful = relaxed.bound + least + relaxed.forced <= reached + relaxed.tolerance
        kept = _narrow(core, limits, useful)
        if kept is None:
            return Found(best, reached, True) if best is not None else _NOTHING
        shrunk = kept.mean() < _WORTHWHILE
        columns, core = columns[kept], core.only(kept)
        if not shrunk:
            break
    found = _branch(core, limits, gap, deadline, reached, bound, None if ties is None else ties[columns])
    bound = max(bound, min(found.bound, reached))
    if found.picks is None:
        return Found(best, bound if best is not None else found.bound, found.finished)
    picks = _widened(table.tree, columns[core.tree.chosen(found.picks)], exchanges.richest)
    if total(table.tree, picks, table.goal) > reached:
        return Found(best, bound, found.finished)
    return Found(picks, bound, found.finished)


def relaxed_bound(table: Table, limits: Mapping[str, int]) -> float:
    """No choice within the limits has a smaller goal; infinite where that is proof that there is none."""
    kept = _narrow(table, limits)
    if kept is None:
        return np.inf
    core = table.only(kept)
    program, least = _program(core, core.goal, limits, np.inf)
    relaxed = program.relax()
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
    kept = _narrow(table, limits)
    if kept is None:
        return _NOTHING
    columns, rest = np.flatnonzero(kept), table.only(kept)
    tilt = 0.0 if ties is None else _TILT * gap * max(bound, NEGLIGIBLE)
    goal = rest.goal if ties is None else rest.goal + tilt * ties[columns]
    program, least = _program(rest, goal, limits, reached)
    relative = gap
    if math.isfinite(reached) and reached > least:  # of what lies above the least, which is all that HiGHS sees
        relative = min(1.0, gap * max(reached, NEGLIGIBLE) / (reached - least))
    lowest = -np.inf
    for attempt in range(_LAST_ATTEMPT):
        exact = attempt < _EXACT_ATTEMPTS  # after many cuts the limits shrink by a hair, which proves nothing any more
        answer = program.run((1 - _TILT) * relative, deadline, hair=0.0 if exact else _HAIR)
        if exact:
            lowest = max(lowest, answer.bound + least - tilt)
        if answer.picks is None:
            return Found(None, lowest, answer.finished and exact)
        cut = _cover_cut(rest, rest.tree.chosen(answer.picks), limits)
        if cut is None:
            chosen = columns[rest.tree.chosen(answer.picks)]
            return Found(_widened(table.tree, chosen, table.tree.starts), lowest, answer.finished)
        program = program.with_cut(*cut)
    return Found(None, lowest, False)


def _program(table: Table, goal: Floats, limits: Mapping[str, int], reached: float) -> tuple[Program, float]:
    """The program of a narrowed table, in what columns add to the least, and the least goal.

    Limits are shares of their slack; a row that every choice keeps is left out. Where the slack is 0, narrowing left
    only columns at the minimum, and the row is one of those.
    """
    rows = []
    for name, limit in limits.items():
        regret, slack = table.regrets[name][0], table.slack(name, limit)
        if -table.tree.regrets(-regret)[1] > slack:
            rows.append(regret / slack)
    regret, least = table.tree.regrets(goal)
    size = reached - least if math.isfinite(reached) else float(-table.tree.regrets(-regret)[1])
    return Program(table.tree, regret, np.array(rows).reshape(len(rows), len(goal)), size), least


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


def _narrow(table: Table, limits: Mapping[str, int], useful: Mask | None = None) -> Mask | None:
    """Drop, until nothing changes, columns that no choice of the `useful` ones can afford; None if there is none."""
    kept = table.tree.closure(np.ones(len(table.goal), dtype=bool) if useful is None else useful)
    while kept is not None:
        rest = table.only(kept)
        affordable = np.ones(len(rest.goal), dtype=bool)
        for name, limit in limits.items():
            slack = rest.slack(name, limit)
            if slack < 0:
                return None
            affordable &= rest.tree.forced(rest.regrets[name][0]) <= slack
        if affordable.all():
            return kept
        narrowed = kept.copy()
        narrowed[np.flatnonzero(kept)] = affordable
        kept = table.tree.closure(narrowed)  # None: what one limit leaves of a group, another excludes
    return None


def _cover_cut(table: Table, chosen: Integers, limits: Mapping[str, int]) -> tuple[Mask, int] | None:
    """For a choice that breaks a limit in integers: columns of which at most `count` can be chosen together.

    What the chosen columns of a few groups add to the least already breaks the limit; so does any choice that takes
    columns that add at least as much in all of those groups.
    """
    group = table.tree.group
    for name, limit in limits.items():
        regret, slack = table.regrets[name][0], table.slack(name, limit)
        spent = regret[chosen]
        order = np.argsort(-spent, kind="stable")
        over = np.cumsum(spent[order]) > slack
        if not over[-1]:
            continue
        cover = chosen[order[: int(np.argmax(over)) + 1]]
        least = np.full(len(table.tree.parent), np.iinfo(np.int64).max)
        least[group[cover]] = regret[cover]
        return regret >= least[group], len(cover) - 1
    return None


def _widened(tree: Tree, chosen: Integers, others: Integers) -> Integers:
    """The chosen columns as picks of every group [G]; of closed groups those in `others`."""
    picks = others.copy()
    picks[tree.group[chosen]] = chosen
    return picks
