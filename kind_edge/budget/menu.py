"""What a request leaves to be chosen: branches, precisions and ranks, with what each costs and loses."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite

from kind_edge.budget.loss import MatrixLoss
from kind_edge.budget.plan import Storage
from kind_edge.budget.precision import PRECISIONS, Precision
from kind_edge.budget.problem import Candidate, Deployment, Request, Source, branch_kind
from kind_edge.budget.solver import Option, Problem
from kind_edge.model.names import weight_type
from kind_edge.model.spec import MatrixShape, branch_of


def build_problem(source: Source, request: Request, candidate: Candidate) -> Problem:
    """The choices of one candidate. Groups: a branch, its matrices' precisions, and below each of these the ranks.

    A kept branch costs what it has beside its matrices; one that is dropped costs nothing and opens nothing. The half
    of the branches that would be missed most is always kept: where more is gone, losses do not just add up any more.
    Where blocks have weights in common, the groups are weight types, with one precision and one rank for all blocks,
    and no branch is dropped: fewer blocks would save next to nothing of the file.
    """
    deployment = Deployment(source.spec, request, candidate)
    losses = source.losses(candidate.form, request.classes)
    fixed = deployment.fixed_costs()
    options: dict[str, tuple[Option, ...]] = {}
    branches: dict[str, list[MatrixShape]] = {}
    for matrix in source.spec.matrices():
        branches.setdefault(branch_of(matrix.name), []).append(matrix)
    menu = _Menu(deployment)
    if source.spec.shared_factors and candidate.form == "switch":
        for kind in source.spec.weight_types():
            members = [matrix for matrix in source.spec.matrices() if weight_type(matrix.name) == kind]
            options |= menu.matrices(kind, {matrix: losses.matrices[matrix.name] for matrix in members})
        return Problem(options, fixed, deployment.limits(), request.minimise, request.max_loss)
    by_loss = sorted(losses.branches, key=lambda branch: losses.branches[branch])
    spared = set(by_loss[: len(by_loss) // 2])
    for branch, matrices in branches.items():
        beside = menu.branch(branch_kind(branch))
        fixed = {name: amount - beside[name] for name, amount in fixed.items()}
        options[branch] = (Option("kept", 0, 0.0, beside, tuple(matrix.name for matrix in matrices)),)
        if branch in spared:
            options[branch] += (Option("dropped", 0, _loss(losses.branches[branch]), dict.fromkeys(beside, 0)),)
        for matrix in matrices:
            options |= menu.matrices(matrix.name, {matrix: losses.matrices[matrix.name]})
    return Problem(options, fixed, deployment.limits(), request.minimise, request.max_loss)


class _Menu:
    """The options of matrices; what equal shapes cost is computed once."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._tailored = deployment.candidate.form == "switch"
        self._free = dict.fromkeys(deployment.fixed_costs(), 0)
        self.branch = functools.cache(deployment.branch_costs)
        self._cost = functools.cache(self._cost_of)

    def matrices(self, group: str, members: Mapping[MatrixShape, MatrixLoss]) -> dict[str, tuple[Option, ...]]:
        """The group of matrices that are stored alike, mostly of a single one: its options are precisions, and below
        each of these there is one rank for all, and one for the tailors of each."""
        groups: dict[str, tuple[Option, ...]] = {}
        precisions = []
        tailored = [matrix for matrix, loss in members.items() if self._tailored and len(loss.tailor) > 1]
        for precision in self._deployment.precisions:
            shared = f"{group}/{precision}/shared"
            groups[shared] = tuple(self._shared(members, precision, len(tailored) == len(members)))
            opens = [shared]
            for matrix in tailored:
                opens.append(f"{matrix.name}/{precision}/tailors")
                groups[opens[-1]] = tuple(self._tailors(matrix, members[matrix], precision))
            cost = _loss(sum(loss.int8 for loss in members.values()) * PRECISIONS[precision].int8_losses)
            precisions.append(Option(precision, 0, cost, self._free, tuple(opens)))
        return {group: tuple(precisions), **groups}

    def _shared(
        self, members: Mapping[MatrixShape, MatrixLoss], precision: Precision, tailors: bool
    ) -> Iterator[Option]:
        """Every factored level that was measured, and at full rank also dense: below it, dense costs the same and keeps
        less.

        Nothing at all only where tailors remain: a matrix alone is not dropped.
        """
        full = len(next(iter(members.values())).shared) - 1
        levels: list[tuple[Storage, int]] = [("factored", rank) for rank in rank_levels(full)]
        if tailors or not full:
            levels.insert(0, ("dropped", 0))
        for storage, rank in [*levels, ("dense", full)] if full else levels:
            if isfinite(lost := sum(float(loss.shared[rank]) for loss in members.values())):
                cost = _sum([self._cost(self._key(matrix), storage, rank, precision) for matrix in members])
                yield Option(storage, rank, _loss(lost), cost)

    def _tailors(self, matrix: MatrixShape, loss: MatrixLoss, precision: Precision) -> Iterator[Option]:
        """Never rank 0: a class without tailors is none, however little that costs the loss."""
        for rank in rank_levels(len(loss.tailor) - 1):
            if isfinite(loss.tailor[rank]):
                cost = self._cost(self._key(matrix), None, rank, precision)
                yield Option("tailors", rank, _loss(loss.tailor[rank]), cost)

    def _key(self, matrix: MatrixShape) -> MatrixShape:
        """Equal where costs are: whose matrix it is matters only where the file holds something for others with it."""
        return matrix if matrix.name in self._deployment.first_of_types else matrix._replace(name="")

    def _cost_of(self, matrix: MatrixShape, storage: Storage | None, rank: int, precision: Precision) -> dict[str, int]:
        if storage is None:
            return self._deployment.matrix_costs(self._deployment.tailors(matrix, rank, precision), precision)
        return self._deployment.matrix_costs(self._deployment.shared(matrix, storage, rank, precision), precision)


def _sum(costs: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(cost[name] for cost in costs) for name in costs[0]}


def rank_levels(full: int) -> list[int]:
    """About sixteen ranks from small to full: fine enough to fill a budget, coarse enough to be solved at once."""
    step = max(1, full // 16)
    return [*range(step, full, step), full] if full else []


def _loss(value: float) -> float:
    """Without the digits in which sums over classes in another order differ."""
    return float(f"{max(value, 0.0):.10g}")
