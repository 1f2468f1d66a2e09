"""The only door to HiGHS: one column per option, one chosen per group, rows of limits that end at 1.

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
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from kind_edge.errors import KindEdgeError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

# The objective is scaled to this size, far above the absolute gap (1e-6) at which HiGHS stops in any case.
_OBJECTIVE_SIZE = 1000.0
_TOLERANCE = 1e-5  # of the scaled objective: a hundred times the tolerance of HiGHS

_OPTIMAL, _STOPPED, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True)
class Relaxed:
    """The optimum of the linear relaxation: each column's share in it, [n], and what it proves.

    No choice has an objective above `bound`, and none that takes column j is above `bound + reduced_costs[j]`
    ([n], at most 0), both up to `tolerance`.
    """

    shares: Floats
    reduced_costs: Floats
    bound: float
    tolerance: float


@dataclass(frozen=True)
class Answer:
    """What the integer program returned: one column per group or None, an upper bound, and whether it came to an end
    (by proof, not by the clock)."""

    chosen: Integers | None
    bound: float
    finished: bool


@dataclass(frozen=True)
class Program:
    """Maximise `objective` [n]; `limit_rows` [limits, n] sum to at most 1; `group` [n] is sorted, without holes.

    `cuts`: a mask over the columns and how many of them may be chosen together.
    """

    group: Integers
    objective: Floats
    limit_rows: Floats
    cuts: tuple[tuple[Mask, int], ...] = ()

    def with_cut(self, columns: Mask, count: int) -> Program:
        return dataclasses.replace(self, cuts=(*self.cuts, (columns, count)))

    def relax(self) -> Relaxed | None:
        """Solve the linear relaxation (without cuts); None if not even that is feasible."""
        starts, scale = self._starts(), self._scale()
        goal = self.objective * scale
        prices, shares = np.zeros(len(self.limit_rows)), np.zeros(len(goal))
        if len(prices):
            with _silent_stdout():
                result = linprog(
                    -goal,
                    A_ub=self.limit_rows,
                    b_ub=np.ones(len(prices)),
                    A_eq=self._one_per_group(),
                    b_eq=np.ones(len(starts)),
                    bounds=(0, 1),
                )
            if result.status == _INFEASIBLE:
                return None
            if result.status != _OPTIMAL:
                raise KindEdgeError(f"the linear program could not be solved: {result.message}")
            # Any prices of at least 0 give a valid bound (weak duality), so rounding in them can do no harm.
            prices, shares = np.maximum(-result.ineqlin.marginals, 0.0), result.x
        worth = goal - prices @ self.limit_rows
        best = np.maximum.reduceat(worth, starts)
        if not len(prices):
            shares[_last_of_group(np.lexsort((worth, self.group)), self.group)] = 1.0
        bound = float(best.sum() + prices.sum())
        return Relaxed(shares, (worth - best[self.group]) / scale, bound / scale, _TOLERANCE / scale)

    def run(self, gap: float, deadline: float, hair: float) -> Answer:
        """Solve the integer program with every limit lowered by `hair`; `deadline` in `time.monotonic` seconds."""
        scale = self._scale()
        constraints = [LinearConstraint(self._one_per_group(), 1, 1)]
        if len(self.limit_rows):
            constraints.append(LinearConstraint(self.limit_rows, -np.inf, 1.0 - hair))
        if self.cuts:
            rows = csr_matrix(np.array([columns for columns, _ in self.cuts], dtype=np.float64))
            constraints.append(LinearConstraint(rows, -np.inf, [float(count) for _, count in self.cuts]))
        with _silent_stdout():
            result = milp(
                -self.objective * scale,
                integrality=np.ones(len(self.objective)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": gap, "time_limit": max(deadline - time.monotonic(), 0.01)},
            )
        if result.status not in (_OPTIMAL, _STOPPED, _INFEASIBLE):
            raise KindEdgeError(f"the integer program could not be solved: {result.message}")
        finished = result.status != _STOPPED
        if result.x is None:
            return Answer(None, -np.inf if finished else np.inf, finished)
        bound = np.inf if result.mip_dual_bound is None else -float(result.mip_dual_bound) / scale
        return Answer(_last_of_group(np.lexsort((result.x, self.group)), self.group), bound, finished)

    def _starts(self) -> Integers:
        return np.searchsorted(self.group, np.arange(self.group[-1] + 1)).astype(np.int64)

    def _scale(self) -> float:
        size = float(np.maximum.reduceat(np.abs(self.objective), self._starts()).sum())
        return _OBJECTIVE_SIZE / size if size > sys.float_info.min * _OBJECTIVE_SIZE else 1.0

    def _one_per_group(self) -> csr_matrix:
        count = len(self.group)
        return csr_matrix((np.ones(count), (self.group, np.arange(count))), shape=(self.group[-1] + 1, count))


def _last_of_group(order: Integers, group: Integers) -> Integers:
    """Of columns ordered by group and then by some key, the one of each group with the largest key."""
    last = np.append(np.flatnonzero(np.diff(group)), len(group) - 1)
    columns: Integers = order[last].astype(np.int64)
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
