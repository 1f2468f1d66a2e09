"""What is measured of a model in fp32 over real calls: ranges of activations, and how the inputs of matrices vary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kind_edge.exporters.trajectories import Call, open_model

Floats = NDArray[np.float64]

_BINS = 2048
_VALUES = 16_384
"""So many values of a tensor are counted in one call."""
_PLENTIFUL, _ROOM = 1024, 1.5
_SHARES = np.linspace(0.2, 1.0, 33)


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's values fell into equal bins from `low` to `high`."""

    low: float
    high: float
    counts: NDArray[np.int64]

    def range(self, levels: int) -> tuple[float, float]:
        """The range, zero in it, that `levels` steps round with the least mean square error.

        Inside the error is that of uniform rounding, a twelfth of a step's square; what lies outside is cut off. Where
        steps are plentiful, there is room for half as much again as was ever seen.
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if high == low:
            return 0.0, 1e-4  # always zero; a range of a size that NPUs accept
        if levels > _PLENTIFUL:
            return _ROOM * low, _ROOM * high
        width = (self.high - self.low) / len(self.counts)
        centres = self.low + (np.arange(len(self.counts)) + 0.5) * width
        lows, highs = low * _SHARES, high * _SHARES
        cut_low = np.array([(self.counts * np.maximum(end - centres, 0) ** 2).sum() for end in lows])
        cut_high = np.array([(self.counts * np.maximum(centres - end, 0) ** 2).sum() for end in highs])
        rounding = ((highs[None] - lows[:, None]) / (levels - 1)) ** 2 / 12 * self.counts.sum()
        at_low, at_high = np.unravel_index(np.argmin(cut_low[:, None] + cut_high[None] + rounding), rounding.shape)
        return float(lows[at_low]), max(float(highs[at_high]), float(lows[at_low]) + 1e-4)


def histograms(model: onnx.ModelProto, names: Sequence[str], calls: Sequence[Call]) -> Mapping[str, Histogram]:
    """Of tensors of a model in fp32, by name: once through the calls for the ends, once more for the counts."""
    inner, session = _showing(model, names)
    ends = dict.fromkeys(names, (np.inf, -np.inf))
    counts = {name: np.zeros(_BINS, np.int64) for name in names}
    for counting in (False, True):
        for call in calls:
            values = dict(zip(inner, session.run(inner, dict(call.feeds)), strict=True)) | dict(call.feeds)
            for name in names:
                array, (low, high) = values[name], ends[name]
                if counting:
                    counts[name] += np.histogram(_some(array), _BINS, (low, max(high, low + 1e-12)))[0]
                else:
                    ends[name] = (min(low, float(array.min())), max(high, float(array.max())))
    return {name: Histogram(*ends[name], counts[name]) for name in names}


def _some(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Enough of a large tensor's values, spread over all its channels."""
    stride = max(1, array.size // _VALUES)
    while math.gcd(stride, array.shape[-1]) > 1:
        stride += 1
    return array.ravel()[::stride]


def covariances(model: onnx.ModelProto, names: Sequence[str], calls: Sequence[Call]) -> Mapping[str, Floats]:
    """Of tensors [.., m] by name: the mean of x x^T over everything but the last axis, [m, m] in float64."""
    inner, session = _showing(model, list(dict.fromkeys(names)))
    sums: dict[str, Floats] = {}
    rows = dict.fromkeys(inner, 0)
    for call in calls:
        for name, array in zip(inner, session.run(inner, dict(call.feeds)), strict=True):
            x = array.reshape(-1, array.shape[-1]).astype(np.float64)
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] += len(x)
    return {name: total / rows[name] for name, total in sums.items()}


def _showing(model: onnx.ModelProto, names: Sequence[str]) -> tuple[list[str], Any]:
    """A session of the model that gives out these tensors, too; those of them that are no inputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in [*model.graph.input, *model.graph.output]}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    inputs = {value.name for value in model.graph.input}
    return [name for name in names if name not in inputs], open_model(shown)
