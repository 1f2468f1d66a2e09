"""Choices that open further choices: one column per open group, and a column may open groups of its own.

A group is open when it has no parent, or when the column that is its parent is chosen. Exactly one column of every open
group is chosen, none of the others. What a choice costs is the sum over its columns; the least that any choice costs is
found from the leaves up, without a search.

Symbols: n columns, G groups. Columns are sorted by group, and a group comes after the column that opens it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Numbers = TypeVar("Numbers", Floats, Integers)


@dataclass(frozen=True)
class Tree:
    """`group` [n] counts from 0 without holes; `parent` [G] is the column that opens a group, -1: always open."""

    group: Integers
    parent: Integers

    @cached_property
    def starts(self) -> Integers:
        return np.searchsorted(self.group, np.arange(len(self.parent))).astype(np.int64)

    @cached_property
    def levels(self) -> int:
        """How many groups lie above one another at most."""
        depth = np.zeros(len(self.parent), dtype=np.int64)
        inner = np.flatnonzero(self.parent >= 0)
        for group in inner:
            depth[group] = depth[self.group[self.parent[group]]] + 1
        return int(depth.max()) + 1

    @cached_property
    def leaves(self) -> Mask:
        """Columns that open nothing, [n]."""
        found = np.ones(len(self.group), dtype=bool)
        found[self.parent[self._inner]] = False
        return found

    def least(self, cost: Numbers) -> tuple[Numbers, Numbers]:
        """Per column [n] its cost with the cheapest choice of what it opens, and the cheapest of every group [G]."""
        whole = cost
        for _ in range(self.levels):
            best = np.minimum.reduceat(whole, self.starts)
            whole = self._with_opened(cost, best)
        return whole, best

    def regrets(self, cost: Numbers) -> tuple[Numbers, int | float]:
        """What every column [n] adds to the cheapest choice of its group, at least 0, and the cheapest choice of all.

        The cost of any choice is that least plus the regrets of its columns.
        """
        whole, best = self.least(cost)
        return whole - best[self.group], sum(best[self.parent < 0].tolist())

    def forced(self, regret: Numbers) -> Numbers:
        """What a choice that takes a column costs above the least, at least: its regret and those of its ancestors."""
        extra, above = regret, self.parent[self.group]
        for _ in range(self.levels - 1):
            extra = regret + np.where(above >= 0, extra[above], 0)
        return extra

    def under(self, picks: Integers, cost: Numbers) -> Numbers:
        """Per column [n] its cost with that of the picked columns [G] in the groups that it opens."""
        whole = cost
        for _ in range(self.levels - 1):
            whole = self._with_opened(cost, whole[picks])
        return whole

    def open(self, picks: Integers) -> Mask:
        """Which groups [G] are open when the picked column of every open group is chosen."""
        state: Mask = np.ones(len(self.parent), dtype=bool)
        inner = self._inner
        above = self.group[self.parent[inner]]
        for _ in range(self.levels - 1):
            state[inner] = state[above] & (picks[above] == self.parent[inner])
        return state

    def chosen(self, picks: Integers) -> Integers:
        """The columns of a choice, from the picked column of every group [G], open or not."""
        columns: Integers = picks[self.open(picks)]
        return columns

    def closure(self, kept: Mask) -> Mask | None:
        """Of the kept columns those that a choice can have; None if there is no choice."""
        inner = self._inner
        while True:
            alive = np.logical_or.reduceat(kept, self.starts)
            if not alive[self.parent < 0].all():
                return None
            able = np.ones(len(kept), dtype=bool)
            able[self.parent[inner[~alive[inner]]]] = False
            reached = np.where(self.parent >= 0, kept[self.parent], True)
            rest = kept & able & reached[self.group]
            if (rest == kept).all():
                return rest
            kept = rest

    def only(self, kept: Mask) -> Tree:
        """The tree of the kept columns, which must be a closure."""
        alive = np.logical_or.reduceat(kept, self.starts)
        number = np.cumsum(kept) - 1
        parent = self.parent[alive]
        return Tree((np.cumsum(alive) - 1)[self.group[kept]], np.where(parent >= 0, number[parent], -1))

    @cached_property
    def _inner(self) -> Integers:
        return np.flatnonzero(self.parent >= 0).astype(np.int64)

    def _with_opened(self, cost: Numbers, of_group: Numbers) -> Numbers:
        opened = np.zeros_like(cost)
        np.add.at(opened, self.parent[self._inner], of_group[self._inner])
        return cost + opened
