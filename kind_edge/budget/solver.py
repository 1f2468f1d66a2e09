"""Choose, for every branch and matrix, how it is stored: the least predicted loss that the budget affords.

Groups of options, one option of each open group is chosen: an option may open groups of its own (a branch that is kept
opens its matrices, a precision opens the ranks). The sum of losses is smallest, the sum of every limited cost within
its limit; or, the other question, one cost is smallest and the loss within its limit. Costs are integers from start to
end; the search is `kind_edge.budget.knapsack`, and `recheck` adds its answer up again without trusting it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from kind_edge.budget.exchange import Exchanges, total
from kind_edge.budget.infeasible import Infeasible, no_plan_error
from kind_edge.budget.knapsack import LARGEST_COST, NEGLIGIBLE, Found, relaxed_bound, search, smallest_total
from kind_edge.budget.table import Table, undominated
from kind_edge.budget.tree import Floats, Integers, Tree
from kind_edge.errors import KindEdgeError, NoPlanError
from kind_edge.units import format_seconds

TIE_BREAKERS = ("latency_ns", "weight_bytes")
"""Among equal losses the lower of these wins, the first one first."""

LOSS: Final = "loss"
LOSS_UNIT = 1e-9
"""The loss as a limited cost is counted in whole billionths, rounded up."""

GAP = 9e-4
"""Relative to the smallest objective: how far from the best an answer may be."""


@dataclass(frozen=True)
class Option:
    """One way to do one thing: to store a part of a matrix, to quantize it, to keep a branch or to drop it.

    `what` and `rank` are the caller's words. `loss` is the predicted relative increase of the model's loss: finite, at
    least 0. `costs`: name -> integer of at least 0 ("flops", "weight_bytes", "peak_memory_bytes", "latency_ns"; the
    same names in all options). `opens`: the groups that are chosen from when this option is.
    """

    what: str
    rank: int
    loss: float
    costs: Mapping[str, int]
    opens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What may be chosen and what it may cost.

    `options`: group -> its options; a group that an option opens stands behind that option's group, and no other option
    opens it. `fixed`: the cost of everything that is not chosen; missing = 0. `limits`: upper bound on fixed + chosen;
    missing = unbounded. `minimise`: LOSS, or the name of a cost. `max_loss`: upper bound on the sum of losses.
    Raises `KindEdgeError` for a malformed problem: the caller builds problems from checked plans, so it is our bug.
    """

    options: Mapping[str, tuple[Option, ...]]
    fixed: Mapping[str, int]
    limits: Mapping[str, int]
    minimise: str = LOSS
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if not self.options or not all(self.options.values()):
            raise KindEdgeError("Problem.options: want at least one group, and at least one option in each")
        names = set(self.cost_names())
        for group, options in self.options.items():
            for option in options:
                _check_option(group, option, names)
        for kind, amounts in (("fixed", self.fixed), ("limits", self.limits)):
            for name, amount in amounts.items():
                if name not in names or not _is_integer(amount):
                    raise KindEdgeError(f"Problem.{kind}[{name!r}] = {amount!r}: want an integer for one of {names}")
        if self.minimise not in {LOSS, *names} or not (self.max_loss is None or self.max_loss >= 0):
            raise KindEdgeError(f"Problem: cannot minimise {self.minimise!r} at a loss of at most {self.max_loss!r}")
        self._check_opening()

    def _check_opening(self) -> None:
        order = {group: number for number, group in enumerate(self.options)}
        seen: set[str] = set()
        for group, options in self.options.items():
            for opened in (name for option in options for name in option.opens):
                if opened in seen or order.get(opened, -1) <= order[group]:
                    raise KindEdgeError(f"Problem.options[{group!r}]: cannot open {opened!r}, which is opened already")
                seen.add(opened)

    def within(self, limits: Mapping[str, int], max_loss: float | None) -> Problem:
        """The same choices, which are checked already, within other limits. Where the same costs are limited, what is
        known of them holds."""
        same = self.limits.keys() == limits.keys() and (self.max_loss is None) == (max_loss is None)
        known = {"columns": self.columns} if same else {}  # where `cached_property` keeps them
        other = copy.copy(self)
        vars(other).pop("columns", None)
        vars(other).update(limits=limits, max_loss=max_loss, **known)
        return other

    def cost_names(self) -> tuple[str, ...]:
        return tuple(next(iter(self.options.values()))[0].costs)

    def free(self) -> dict[str, int]:
        """What each limit leaves to the chosen options, once the fixed parts are paid; of the loss, all."""
        free = {name: limit - self.fixed.get(name, 0) for name, limit in self.limits.items()}
        return free if self.max_loss is None else {**free, LOSS: math.ceil(self.max_loss / LOSS_UNIT * (1 - 1e-12))}

    @cached_property
    def columns(self) -> tuple[Table, tuple[Option, ...]]:
        """The options worth considering as columns, and the option of each column.

        Dominance looks at the goal, the limited costs and the tie-breakers: what it drops changes no answer.
        """
        options = [option for group in self.options.values() for option in group]
        order = {group: number for number, group in enumerate(self.options)}
        parent = np.full(len(order), -1, dtype=np.int64)
        for column, option in enumerate(options):
            parent[[order[name] for name in option.opens]] = column
        names = [name for name in self.cost_names() if name in self.limits or name in TIE_BREAKERS]
        costs = {name: np.array([option.costs[name] for option in options], dtype=np.int64) for name in names}
        if self.max_loss is not None:
            whole = [math.ceil(option.loss / LOSS_UNIT * (1 - 1e-12)) for option in options]
            costs[LOSS] = np.array(whole, dtype=np.int64)
        goal = [option.loss if self.minimise == LOSS else float(option.costs[self.minimise]) for option in options]
        group = np.repeat(np.arange(len(order)), [len(each) for each in self.options.values()])
        table = Table(Tree(group, parent), np.array(goal, dtype=np.float64), costs)
        kept = table.tree.closure(undominated(table))
        if kept is None:
            raise KindEdgeError("Problem.options: dominance left a group empty")
        return table.only(kept), tuple(options[column] for column in np.flatnonzero(kept))


@dataclass(frozen=True)
class Solution:
    """A choice that keeps every limit (rechecked in integers).

    `choice`: one option of every open group. `loss`: the sum of its losses; `totals`: fixed + chosen, for every cost
    name. `objective`: what was minimised (of a cost without the fixed parts); no choice has a smaller one than
    `lower_bound`; `optimality_gap` = (objective - lower_bound) / objective, at most the gap asked for unless time ran
    out. `binding`: the limits that stand in the way of a better plan. Every exchange of one group's option for one of
    lower objective breaks at least one limit; a limit binds when some exchange breaks it and no other. Where every such
    exchange breaks several at once, the smallest sets of limits broken together bind. Empty: no limit costs anything.
    """

    choice: Mapping[str, Option]
    loss: float
    totals: Mapping[str, int]
    binding: tuple[str, ...]
    optimality_gap: float
    objective: float
    lower_bound: float


def solve(problem: Problem, time_limit_s: float = 20.0, gap: float = GAP) -> Solution:
    """The choice of the smallest objective, proven to the relative `gap` unless `time_limit_s` ends the proof first.

    Ties: no exchange of a single option keeps the objective and lowers latency, or keeps both and lowers bytes.
    Across groups a small term in the objective, far below the gap, prefers the same.
    Raises `NoPlanError` when no choice fits (its `diagnosis` holds `Infeasible` entries), or when time ran out before
    one was found; `KindEdgeError` when the answer fails `recheck`.
    """
    deadline = time.monotonic() + time_limit_s
    table, options = problem.columns
    limits = problem.free()
    tie_breakers = tuple(name for name in TIE_BREAKERS if name in table.costs)
    found = search(table, limits, gap, deadline, _tie_shares(table, tie_breakers))
    if found.picks is None:
        raise _refusal(problem, found, time_limit_s)
    exchanges = Exchanges(table.tree, table.goal, table.costs, limits, tie_breakers)
    picks = exchanges.improve(found.picks)
    objective = total(table.tree, picks, table.goal)
    lower_bound = min(objective, max(found.bound, 0.0))
    groups = list(problem.options)
    choice = {groups[table.tree.group[column]]: options[column] for column in table.tree.chosen(picks)}
    return Solution(
        choice=choice,
        loss=math.fsum(option.loss for option in choice.values()),
        totals=recheck(problem, choice),
        binding=_binding(exchanges, picks, limits),
        optimality_gap=(objective - lower_bound) / max(objective, NEGLIGIBLE),
        objective=objective,
        lower_bound=lower_bound,
    )


def lower_bound(problem: Problem) -> float:
    """No choice within the limits has a smaller objective; infinite where there is none. No search: found at once."""
    return max(relaxed_bound(problem.columns[0], problem.free()), 0.0)


def recheck(problem: Problem, choice: Mapping[str, Option]) -> dict[str, int]:
    """The totals of a choice, added up anew; trusts nothing but the problem.

    Raises `KindEdgeError` (our bug) unless every open group, and no other, has exactly one of its own options, and
    every limit holds.
    """
    opened = {name for options in problem.options.values() for option in options for name in option.opens}
    opened_here = {name for option in choice.values() for name in option.opens}
    wanted = (set(problem.options) - opened) | opened_here
    if set(choice) != wanted:
        raise KindEdgeError(f"recheck: not exactly one option per open group: {sorted(set(choice) ^ wanted)}")
    for group, option in choice.items():
        if option not in problem.options[group]:
            raise KindEdgeError(f"recheck: {group} was given an option that is not one of its own: {option}")
    totals = {name: problem.fixed.get(name, 0) for name in problem.cost_names()}
    for option in choice.values():
        for name in totals:
            totals[name] += option.costs[name]
    for name, limit in problem.limits.items():
        if totals[name] > limit:
            raise KindEdgeError(f"recheck: {name} adds up to {totals[name]}, over its limit {limit}")
    loss = math.fsum(option.loss for option in choice.values())
    if problem.max_loss is not None and loss > problem.max_loss * (1 + 1e-9) + LOSS_UNIT:
        raise KindEdgeError(f"recheck: the loss adds up to {loss}, over its limit {problem.max_loss}")
    return totals


def diagnose(problem: Problem, time_limit_s: float = 10.0) -> tuple[Infeasible, ...]:
    """Why no choice fits: every limit that fails alone; else the members of one smallest conflict; () if one fits.

    Where time runs out, a conflict may not be the smallest, nor `smallest` the least that would do (it does, though).
    """
    table, limits = problem.columns[0], problem.free()
    fixed = {name: problem.fixed.get(name, 0) for name in limits}
    alone = [name for name, limit in limits.items() if table.slack(name, limit) < 0]
    if alone:
        return tuple(
            Infeasible(name, limits[name] + fixed[name], table.regrets[name][1] + fixed[name], fixed[name])
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
            entries.append(Infeasible(name, limits[name] + fixed[name], smallest + fixed[name], fixed[name], rest))
    return tuple(entries)


def _refusal(problem: Problem, found: Found, time_limit_s: float) -> NoPlanError:
    if found.infeasible:
        return no_plan_error(diagnose(problem, time_limit_s))
    seconds = format_seconds(time_limit_s)
    return NoPlanError(f"no plan was found within {seconds}, nor proven impossible; relax a limit")


def _tie_shares(table: Table, tie_breakers: tuple[str, ...]) -> Floats:
    """Per column the tie-breaking costs as shares of their range, a thousandth each of the one before; the sum over
    any choice is between 0 and 1."""
    shares = np.zeros(len(table.goal))
    for weight, name in zip((0.999, 0.001), tie_breakers, strict=False):
        regret = table.regrets[name][0]
        widest = -table.tree.regrets(-regret)[1]
        if widest > 0:
            shares += weight * regret / widest
    return shares


def _binding(exchanges: Exchanges, picks: Integers, limits: Mapping[str, int]) -> tuple[str, ...]:
    """The union of the smallest (by inclusion) sets of limits that an exchange for a lower objective breaks."""
    broken = exchanges.broken(picks)
    gains = np.flatnonzero(exchanges.gaining(picks))
    patterns = {frozenset(name for name in broken if broken[name][column]) for column in gains}
    smallest = [pattern for pattern in patterns if not any(other < pattern for other in patterns)]
    return tuple(name for name in limits if any(name in pattern for pattern in smallest))


def _impossible(table: Table, limits: Mapping[str, int], seconds: float) -> bool:
    anything = Table(table.tree, np.zeros(len(table.goal)), table.costs)
    return search(anything, limits, gap=1.0, deadline=time.monotonic() + seconds).infeasible


def _check_option(group: str, option: Option, names: set[str]) -> None:
    where = f"Problem.options[{group!r}]"
    if not (math.isfinite(option.loss) and option.loss >= 0):
        raise KindEdgeError(f"{where}: loss {option.loss!r}, want a finite number of at least 0")
    if set(option.costs) != names:
        raise KindEdgeError(f"{where}: costs {sorted(option.costs)}, want {sorted(names)} as in the first option")
    for name, cost in option.costs.items():
        if not _is_integer(cost) or not 0 <= cost <= LARGEST_COST:
            raise KindEdgeError(f"{where}: {name} = {cost!r}, want an integer from 0 to 2^53")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
