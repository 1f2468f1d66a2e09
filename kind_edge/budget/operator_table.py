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


_LAYERS = {"dense": 3, "factored": 4, "tailor": 4}
KINDS: Mapping[str, int] = {
    **{f"{role}_{part}": sizes for role in ("square", "wide") for part, sizes in _LAYERS.items()},
    "attention": 3, "mlp": 3, "ends": 3,
}  # fmt: skip
"""The parts of a table, and how many sizes a time of each stands for. Those of layers begin with a precision."""


def is_layer(kind: str) -> bool:
    """Whether times of that kind begin with a precision."""
    return kind.startswith(("square", "wide"))


class Grid:
    """Times over sizes of at least 1: every axis has the values that occur; missing corners follow their neighbours."""

    def __init__(self, times: Mapping[tuple[int, ...], float]) -> None:
        self._axes = [sorted(set(values)) for values in zip(*times, strict=True)]
        known = {key: math.log(max(value, _LEAST_US)) for key, value in times.items()}
        self._logs = {key: self._known_or_near(known, key) for key in itertools.product(*self._axes)}
        self.at = functools.cache(self._at)

    def _known_or_near(self, known: Mapping[tuple[int, ...], float], key: tuple[int, ...]) -> float:
        """The nearest measured point, times the ratio of the sizes: widths have ranks of their own."""
        if key in known:
            return known[key]

        def distance(other: tuple[int, ...]) -> float:
            return sum(abs(math.log(a / b)) for a, b in zip(key, other, strict=True))

        near = min(known, key=distance)
        return known[near] + sum(math.log(a / b) for a, b in zip(key, near, strict=True))

    def _at(self, *sizes: float) -> float:
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

    Of layers, `square` are the D x D ones of attention, `wide` the D x 4 D ones of MLPs. Keys: `*_dense` (precision,
    batch, tokens, width); `*_factored`, `*_tailor` (precision, batch, tokens, width, rank); `attention` and `mlp`
    (batch, tokens, width), a branch of a block without its layers; `ends` (batch, tokens, width), all that lies outside
    the blocks, the call of the runtime included.
    """

    square_dense: Times
    square_factored: Times
    square_tailor: Times
    wide_dense: Times
    wide_factored: Times
    wide_tailor: Times
    attention: Times
    mlp: Times
    ends: Times
    source: str = "measured"

    def __len__(self) -> int:
        return sum(len(getattr(self, kind)) for kind in KINDS)

    @functools.cached_property
    def precisions(self) -> frozenset[str]:
        """Those that every kind of layer was measured in."""
        kinds = [getattr(self, kind) for kind in KINDS if is_layer(kind)]
        return frozenset.intersection(*(frozenset(str(key[0]) for key in times) for times in kinds))

    def has(self, precision: str) -> bool:
        """Whether everything was measured in that precision."""
        return precision in self.precisions

    def layer_us(
        self, part: str, precision: str, batch: int, tokens: int, inputs: int, outputs: int, *rank: int
    ) -> float:
        """One layer, its quantization included: its "dense" weight, its "factored" one of a rank, or what a picked
        "tailor" of a rank adds to it. An MLP of another width than 4 D counts as one of as large matrices."""
        role, width = ("square", inputs) if inputs == outputs else ("wide", math.sqrt(inputs * outputs) / 2)
        return self._grids(f"{role}_{part}", precision).at(batch, tokens, width, *rank)

    def branch_us(self, kind: str, batch: int, tokens: int, width: int) -> float:
        """A branch of a block ("attention" or "mlp") without its layers."""
        return self._grids(kind, None).at(batch, tokens, width)

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
