"""Measured times of the operators that our models consist of, and what lies between the measured points.

Times vary smoothly with shapes in logarithms, so the table interpolates log time linearly over the logarithm of each
size; beyond its ends it goes on with the slope of the last two points, which is kept between 0 and 2 (attention).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

Key = tuple[str | int, ...]
Times = Mapping[Key, float]

_LEAST_US = 0.05
"""A difference of two measured times can come out at nothing, or below."""

_STEEPEST = 2.0
"""Of the slopes by which times go on beyond the table: attention grows with the square of tokens."""


KINDS: Mapping[str, int] = {"product": 3, "tailor": 5, "attention": 3, "mlp": 3, "ends": 3}
"""The parts of a table, and how many sizes a time of each stands for."""


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
        ends = zip(sizes, self._axes, strict=True)
        inside = tuple(float(min(max(size, axis[0]), axis[-1])) for size, axis in ends)
        total = self._log_us(inside)
        for index, (size, axis) in enumerate(zip(sizes, self._axes, strict=True)):
            if size != inside[index] and len(axis) > 1:
                low, high = (axis[0], axis[1]) if size < axis[0] else (axis[-2], axis[-1])
                logs = [self._log_us((*inside[:index], float(end), *inside[index + 1 :])) for end in (low, high)]
                slope = min(max((logs[1] - logs[0]) / math.log(high / low), 0.0), _STEEPEST)
                total += slope * math.log(max(size, 1) / inside[index])
        return math.exp(total)

    def _log_us(self, sizes: tuple[float, ...]) -> float:
        """Within the axes: linear in every logarithm."""
        axes = []
        for axis, size in zip(self._axes, sizes, strict=True):
            at = min(max(bisect.bisect_right(axis, size), 1), len(axis) - 1)
            if len(axis) == 1 or size == axis[at]:
                axes.append([(axis[at], 1.0)])
                continue
            low, high = axis[at - 1], axis[at]
            share = math.log(size / low) / math.log(high / low)
            axes.append([(low, 1 - share), (high, share)])
        total = 0.0
        for corner in itertools.product(*axes):
            key, weights = zip(*corner, strict=True)
            total += math.prod(weights) * self._logs[key]
        return total


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
    source: str = "measured"

    def __len__(self) -> int:
        return sum(len(getattr(self, kind)) for kind in KINDS)

    @functools.cached_property
    def precisions(self) -> frozenset[str]:
        """Those that everything was measured in."""
        kinds = (self.product, self.tailor, self.attention, self.mlp)
        return frozenset.intersection(*(frozenset(str(key[0]) for key in times) for times in kinds))

    def has(self, precision: str) -> bool:
        """Whether everything was measured in that precision."""
        return precision in self.precisions

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
        if (kind, precision) not in self._made:
            times: Times = getattr(self, kind)
            own = times.items() if precision is None else ((k[1:], t) for k, t in times.items() if k[0] == precision)
            self._made[kind, precision] = Grid({tuple(int(size) for size in key): time for key, time in own})
        return self._made[kind, precision]

    @functools.cached_property
    def _made(self) -> dict[tuple[str, str | None], Grid]:
        """Grids, each made when it is first asked for."""
        return {}
