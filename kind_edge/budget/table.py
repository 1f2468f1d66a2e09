"""The columns that a search chooses from, and what can be said of them without one. Needs numpy and scipy alone.

Limits are counted in integers: in what a column adds to the cheapest choice of all, which is at least 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kind_edge.budget.highs import Program
from kind_edge.budget.tree import Floats, Integers, Mask, Tree


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


def program(table: Table, goal: Floats, limits: Mapping[str, int], reached: float) -> tuple[Program, float]:
    """The program of a narrowed table, in what columns add to the least, and the least goal.

    Limits are shares of their slack; a row that every choice keeps is left out. Where the slack is 0, narrowing left
    only columns at the minimum, and the row is one of those.
    """
    rows = []
    for name, limit in limits.items():
        regret, slack = table.regrets[name][0], table.slack(name, limit)
        if -table.tree.regrets(-regret)[1] > slack:
            rows.append(regret / slack)
    added, least = table.tree.regrets(goal)
    size = reached - least if math.isfinite(reached) else float(-table.tree.regrets(-added)[1])
    return Program(table.tree, added, np.array(rows).reshape(len(rows), len(goal)), size), least


def narrow(table: Table, limits: Mapping[str, int], useful: Mask | None = None) -> Mask | None:
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


def cover_cut(table: Table, chosen: Integers, limits: Mapping[str, int]) -> tuple[Mask, int] | None:
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
