"""What a choice turns into when one column is exchanged for another of its group: the last improvements, and which
limits stand in the way of more.

A column that opens groups is tried with the best choice of what it opens. Symbols: n columns, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from kind_edge.budget.tree import Floats, Integers, Mask, Tree

_GRAIN = 1e-12  # of the largest goal


class Exchanges:
    """All single exchanges of a table's choices. A choice is given by its picks [G], the column of every group.

    Goals are counted in grains: whole numbers, which add up exactly in any order. So every exchange that is made lowers
    goal and ties for good, and they come to an end.
    """

    def __init__(
        self,
        tree: Tree,
        goal: Floats,
        costs: Mapping[str, Integers],
        limits: Mapping[str, int],
        tie_breakers: Sequence[str] = (),
    ) -> None:
        self._tree, self._costs, self._limits = tree, costs, limits
        self._goal: Floats = np.rint(goal / (_GRAIN * (float(np.abs(goal).max()) or 1.0)))
        self._tie_breakers = tuple(tie_breakers)

    @cached_property
    def richest(self) -> Integers:
        """Of every group the column with the smallest goal, what it opens included, [G]."""
        whole, _ = self._tree.least(self._goal)
        ties = [self._tree.least(self._costs[name])[0] for name in reversed(self._tie_breakers)]
        return np.lexsort((*ties, whole, self._tree.group))[self._tree.starts].astype(np.int64)

    @cached_property
    def _best(self) -> tuple[Floats, dict[str, Integers]]:
        """Per column its goal and costs with the richest choice of what it opens, [n]."""
        costs = {name: self._tree.under(self.richest, cost) for name, cost in self._costs.items()}
        return self._tree.under(self.richest, self._goal), costs

    def improve(self, picks: Integers) -> Integers:
        """Exchange columns while that lowers the goal, or keeps it and lowers the tie-breaking costs, first one first.

        Limits hold before and after. Afterwards every exchange that would lower the goal breaks a limit.
        """
        picks = picks.copy()
        while True:
            gains = [-change for change in self._changes(picks)]
            fits = ~np.array([*self.broken(picks).values(), np.zeros(len(self._goal), bool)]).any(axis=0)
            better, tied = np.zeros(len(self._goal), bool), self._open_columns(picks)
            for gain in gains:
                better |= tied & (gain > 0)
                tied = tied & (gain == 0)
            candidates = np.flatnonzero(fits & better)
            if not len(candidates):
                return picks
            best = candidates[np.lexsort([gain[candidates] for gain in reversed(gains)])[-1]]
            picks = self._exchanged(picks, int(best))

    def broken(self, picks: Integers) -> dict[str, Mask]:
        """Limit -> [n]: would that limit break if the column alone replaced its group's picked one?"""
        tree, broken = self._tree, {}
        for name, limit in self._limits.items():
            cost = self._costs[name]
            left = limit - int(total(tree, picks, cost))
            now = tree.under(picks, cost)[picks]
            broken[name] = self._best[1][name] - now[tree.group] > left
        return broken

    def gaining(self, picks: Integers) -> Mask:
        """Which columns [n] would lower the goal."""
        return self._open_columns(picks) & (self._changes(picks)[0] < 0)

    def _changes(self, picks: Integers) -> list[Floats]:
        """Goal and tie-breaking costs after each exchange less those before, [n] each."""
        tree, (goal, costs) = self._tree, self._best
        change = goal - tree.under(picks, self._goal)[picks][tree.group]
        now = [tree.under(picks, self._costs[name])[picks][tree.group] for name in self._tie_breakers]
        ties = [costs[name] - before for name, before in zip(self._tie_breakers, now, strict=True)]
        return [change, *(tie.astype(np.float64) for tie in ties)]

    def _open_columns(self, picks: Integers) -> Mask:
        columns: Mask = self._tree.open(picks)[self._tree.group]
        return columns

    def _exchanged(self, picks: Integers, column: int) -> Integers:
        """The picks with `column` in its group, and the richest choice in what it opens."""
        changed = picks.copy()
        changed[self._tree.group[column]] = column
        opened = np.flatnonzero(self._tree.parent == column)
        while len(opened):
            changed[opened] = self.richest[opened]
            opened = np.flatnonzero(np.isin(self._tree.parent, changed[opened]))
        return changed


def total(tree: Tree, picks: Integers, amounts: Floats | Integers) -> float:
    """The sum over the columns of a choice, without rounding; of integers an integer."""
    chosen = amounts[tree.chosen(picks)].tolist()
    return math.fsum(chosen) if amounts.dtype == np.float64 else sum(chosen)
