"""The only door to HiGHS: one column per option, one chosen per open group, rows of limits that end at 1.

Floats only; `kind_edge.budget.knapsack` builds the rows from integers and checks what comes back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from kind_edge.budget.tree import Floats, Integers, Mask, Tree
from kind_edge.errors import KindEdgeError

# The objective is scaled to this size, far above the absolute gap (1e-6) at which HiGHS stops in any case.
_OBJECTIVE_SIZE = 1000.0
_TOLERANCE = 1e-5  # of the scaled objective: a hundred times the tolerance of HiGHS

_OPTIMAL, _STOPPED, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True)
class Relaxed:
    """The optimum of the linear relaxation: each column's share in it, [n], and what it proves.

    No choice has an objective below `bound`, and none that takes column j is below `bound + forced[j]` ([n], at least
    0), both up to `tolerance`.
    """

    shares: Floats
    forced: Floats
    bound: float
    tolerance: float


@dataclass(frozen=True)
class Answer:
    """What the integer program returned: the picked column of every group or None, a lower bound, and whether it came
    to an end (by proof, not by the clock)."""

    picks: Integers | None
    bound: float
    finished: bool


@dataclass(frozen=True)
class Program:
    """Minimise the sum of `objective` [n], at least 0, over the choices of a tree; `limit_rows` [limits, n] sum to at
    most 1.

    `size`: how large the objective of a good choice is about; what is far below it is lost in rounding.
    `cuts`: a mask over the columns and how many of them may be chosen together.
    """

    tree: Tree
    objective: Floats
    limit_rows: Floats
    size: float
    cuts: tuple[tuple[Mask, int], ...] = ()

    def with_cut(self, columns: Mask, count: int) -> Program:
        return dataclasses.replace(self, cuts=(*self.cuts, (columns, count)))

    def relax(self) -> Relaxed | None:
        """Solve the linear relaxation (without cuts); None if not even that is feasible."""
        scale = self._scale()
        goal = self.objective * scale
        prices, shares = np.zeros(len(self.limit_rows)), np.zeros(len(goal))
        if len(prices):
            rows, ends = self._one_per_open_group()
            with _silent_stdout():
                result = linprog(
                    goal, A_ub=self.limit_rows, b_ub=np.ones(len(prices)), A_eq=rows, b_eq=ends, bounds=(0, 1)
                )
            if result.status == _INFEASIBLE:
                return None
            if result.status != _OPTIMAL:
                raise KindEdgeError(f"the linear program could not be solved: {result.message}")
            # Any prices of at least 0 give a valid bound (weak duality), so rounding in them can do no harm.
            prices, shares = np.maximum(-result.ineqlin.marginals, 0.0), result.x
        whole, best = self.tree.least(goal + prices @ self.limit_rows)
        regret = whole - best[self.tree.group]
        if not len(prices):
            shares[self.tree.chosen(_first_of_group(whole, self.tree))] = 1.0
        bound = float(best[self.tree.parent < 0].sum() - prices.sum())
        return Relaxed(shares, self.tree.forced(regret) / scale, bound / scale, _TOLERANCE / scale)

    def run(self, gap: float, deadline: float, hair: float) -> Answer:
        """Solve the integer program to a relative gap with every limit lowered by `hair`; `deadline` in
        `time.monotonic` seconds."""
        scale = self._scale()
        rows, ends = self._one_per_open_group()
        constraints = [LinearConstraint(rows, ends, ends)]
        if len(self.limit_rows):
            constraints.append(LinearConstraint(self.limit_rows, -np.inf, 1.0 - hair))
        if self.cuts:
            cuts = csr_matrix(np.array([columns for columns, _ in self.cuts], dtype=np.float64))
            constraints.append(LinearConstraint(cuts, -np.inf, [float(count) for _, count in self.cuts]))
        with _silent_stdout():
            result = milp(
                self.objective * scale,
                integrality=np.ones(len(self.objective)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": gap, "time_limit": max(deadline - time.monotonic(), 0.01)},
            )
        if result.status not in (_OPTIMAL, _STOPPED, _INFEASIBLE):
            raise KindEdgeError(f"the integer program could not be solved: {result.message}")
        finished = result.status != _STOPPED
        if result.x is None:
            return Answer(None, np.inf if finished else -np.inf, finished)
        bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) / scale
        return Answer(_first_of_group(-result.x, self.tree), bound, finished)

    def _scale(self) -> float:
        return _OBJECTIVE_SIZE / self.size if self.size > sys.float_info.min * _OBJECTIVE_SIZE else 1.0

    def _one_per_open_group(self) -> tuple[csr_matrix, Floats]:
        """Rows and right-hand sides: the columns of a group sum to 1, or to the share of the column that opens it."""
        tree, count, groups = self.tree, len(self.tree.group), len(self.tree.parent)
        inner = np.flatnonzero(tree.parent >= 0)
        values = np.concatenate([np.ones(count), -np.ones(len(inner))])
        places = (np.concatenate([tree.group, inner]), np.concatenate([np.arange(count), tree.parent[inner]]))
        return csr_matrix((values, places), shape=(groups, count)), (tree.parent < 0).astype(np.float64)


def _first_of_group(key: Floats, tree: Tree) -> Integers:
    """The column with the smallest key of every group."""
    columns: Integers = np.lexsort((key, tree.group))[tree.starts].astype(np.int64)
    return columns


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
