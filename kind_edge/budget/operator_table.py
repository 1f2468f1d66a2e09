"""Measured times of the operators that our models consist of, and what lies between the measured points.

Times vary smoothly with shapes in logarithms, so the table interpolates log time linearly over the logarithm of each
size; beyond its ends it goes on with the slope of the last two points, which is kept between 0 and 2 (attention).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Key = tuple[str | int, ...]
Times = Mapping[Key, float]

_LEAST_US = 0.05
"""A difference of two measured times can come out at nothing, or below."""

_STEEPEST = 2.0


class Grid:
    """Times over sizes of at least 1: every axis has the values that occur; missing corners follow their neighbours."""

    def __init__(self, times: Mapping[tuple[int, ...], float]) -> None:
        self._axes = [sorted(set(values)) for values in zip(*times, strict=True)]
        known = {key: math.log(max(value, _LEAST_US)) for key, value in times.items()}
        self._logs = {key: self._known_or_near(known, key) for key in itertools.product(*self._axes)}
        self.at = functools.cache(self._at)

    def _known_or_near(self, known: Mapping[tuple[int, ...], float], key: tuple[int, ...]) -> float:
        """The nearest measured point, times the ratio of the sizes: nothing is missing but the largest products."""
        if key in known:
            return known[key]

        def distance(other: tuple[int, ...]) -> float:
            return sum(abs(math.log(a / b)) for a, b in zip(key, other, strict=True))

        near = min(known, key=distance)
        return known[near] + sum(math.log(a / b) for a, b in zip(key, near, strict=True))

    def _at(self, *sizes: int) -> float:
        """Microseconds at any sizes."""
        total, corners = 0.0, list(self._corners(sizes))
        for key, weight in corners:
            total += weight * self._logs[key]
        return math.exp(total)

    def _corners(self, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
        """The points around, with their weights; outside, weights below 0 and above 1 go on with the last slope."""
        axes = []
        for axis, size in zip(self._axes, sizes, strict=True):
            if len(axis) == 1:
                axes.append([(axis[0], 1.0)])
                continue
            at = min(max(bisect.bisect_right(axis, size), 1), len(axis) - 1)
            low, high = axis[at - 1], axis[at]
            share = math.log(max(size, 1) / low) / math.log(high / low)
            axes.append([(low, 1 - share), (high, share)])
        for combination in itertools.product(*axes):
            key, weights = zip(*combination, strict=True)
            yield key, math.prod(weights)


@dataclass(frozen=True)
class OperatorTable:
    """Microseconds of the parts of one evaluation on one compute unit.

    Keys: `product` (precision, rows, inputs, outputs); `tailor` (precision, batch, tokens, inputs, outputs, rank);
    `attention` and `mlp` (precision, batch, tokens, width), a branch of a block without its matrices; `ends` (batch,
    tokens, width), all that lies outside the blocks, the call of the runtime included.
    """

    product: Times
    tailor: Times
    attention: Times
    mlp: Times
    ends: Times

    def has(self, precision: str) -> bool:
        """Whether products of that precision were measured."""
        return any(key[0] == precision for key in self.product)

    def product_us(self, precision: str, rows: int, inputs: int, outputs: int) -> float:
        """One product rows x inputs x outputs with a constant matrix, its quantization included."""
        return self._grids("product", precision).at(rows, inputs, outputs)

    def tailor_us(self, precision: str, batch: int, tokens: int, inputs: int, outputs: int, rank: int) -> float:
        """What a picked tailor adds to a layer: gathers, two thin products, a sum."""
        return self._grids("tailor", precision).at(batch, tokens, inputs, outputs, rank)

    def branch_us(self, kind: str, precision: str, batch: int, tokens: int, width: int) -> float:
        """A branch of a block ("attention" or "mlp") without its matrices."""
        return self._grids(kind, precision).at(batch, tokens, width)

    def ends_us(self, batch: int, tokens: int, width: int) -> float:
        """Everything outside the blocks."""
        return self._grids("ends", None).at(batch, tokens, width)

    def _grids(self, kind: str, precision: str | None) -> Grid:
        grids = self.__dict__.get("_cached")
        if grids is None:  # a frozen value may still remember what follows from it
            grids = {}
            object.__setattr__(self, "_cached", grids)
        if (kind, precision) not in grids:
            times: Times = getattr(self, kind)
            own = times.items() if precision is None else ((k[1:], t) for k, t in times.items() if k[0] == precision)
            grids[kind, precision] = Grid({tuple(int(size) for size in key): time for key, time in own})
        return grids[kind, precision]  # type: ignore[no-any-return]
