"""Real calls of a denoiser: the sampler's own walk from noise to images, over classes and steps, null branch included.

What ranges are calibrated on, and what the error of a rounding is measured with. The seed is fixed: equal models give
equal files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kind_edge.deploy.ort import require_onnxruntime
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import Origin
from kind_edge.deploy.sampler_table import sampler_table

MOST_CALLS = 96
"""A trajectory of 20 steps for each of five classes, or ten classes in four steps twice."""
LEAST_CALLS = 32
_SEED = 2026
_WORST_CALLS = 8
"""Candidates are judged by where the error is largest."""
_SECOND_ROUND = 11
"""So many candidates, the best of the first round, are tried again after it."""
_NUMPY = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Call:
    """One evaluation: what goes in, and what the unrounded model says. Of a guided step both branches are one call."""

    class_index: int
    step_index: int
    feeds: Feeds
    prediction: NDArray[np.float32]


def open_model(model: onnx.ModelProto) -> Any:
    """A session on one thread, so that sums are always taken in the same order."""
    runtime = require_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def walk(model: onnx.ModelProto, origin: Origin) -> tuple[Call, ...]:
    """The calls of some trajectories with a denoiser in fp32; spread over the classes, each with every step."""
    plan, spec = origin.plan, origin.truncated.spec
    session = open_model(model)
    table = sampler_table(plan.sampler, spec.objective, plan.steps)
    rows, kept = len(table.timestep), len(plan.classes) if plan.form == "switch" else 1
    null_index = kept if plan.evaluations_per_step > 1 else None
    shown = np.unique(np.linspace(0, kept - 1, max(1, min(kept, MOST_CALLS // rows))).round().astype(int))
    rounds = max(1, math.ceil(LEAST_CALLS / (rows * len(shown))))
    calls: list[Call] = []
    for number, c in enumerate(shown.tolist() * rounds):
        noise = np.random.default_rng([_SEED, number])
        x = noise.standard_normal((1, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)
        before = np.zeros_like(x)
        for row in range(rows):
            call = _call(session, x, c, row, float(table.timestep[row]), null_index)
            calls.append(call)
            prediction = call.prediction[:, : spec.channels]
            if len(prediction) > 1:  # class, then null
                prediction = prediction[1:] + np.float32(plan.guidance) * (prediction[:1] - prediction[1:])
            p, q, a, b, e = (np.float32(column[row]) for column in (table.p, table.q, table.a, table.b, table.c))
            direction = p * x + q * prediction
            x, before = a * x + b * direction + e * before, direction
    return tuple(calls)


def _call(session: Any, x: NDArray[np.float32], c: int, row: int, timestep: float, null_index: int | None) -> Call:
    """One evaluation of an image; both branches where the null class has an index."""
    labels = [c] if null_index is None else [c, null_index]
    each = {"step_index": row, "timestep": timestep}
    values = {name: np.full(len(labels), value) for name, value in each.items()}
    values |= {"sample": np.repeat(x, len(labels), 0), "class_index": np.array(labels)}
    feeds = {each.name: values[each.name].astype(_NUMPY[each.type]) for each in session.get_inputs()}
    return Call(c, row, feeds, session.run(None, feeds)[0])


def call_dbs(model: onnx.ModelProto, calls: Sequence[Call]) -> list[float]:
    """SQNR of a rounded model in every call, the worst of its branches."""
    session = open_model(model)
    kinds = {each.name: _NUMPY[each.type] for each in session.get_inputs()}
    found = []
    for call in calls:
        output = session.run(None, {name: values.astype(kinds[name]) for name, values in call.feeds.items()})[0]
        found.append(min(sqnr_db(*pair) for pair in zip(call.prediction, output, strict=True)))
    return found


def chosen_wide(
    rounded: Callable[[tuple[str, ...]], onnx.ModelProto],
    candidates: Sequence[str],
    calls: Sequence[Call],
    wanted_db: float,
    most: int,
) -> tuple[str, ...]:
    """Which candidates stay in higher precision: none where the worst call is good enough already; else, one after the
    other, the one that helps the worst calls most, until `wanted_db` is met; never more than `most`.

    `rounded` makes the model in which the named candidates are wide.
    """
    wide: tuple[str, ...] = ()
    while True:
        found = call_dbs(rounded(wide), calls)
        if min(found) >= wanted_db or len(wide) == most or not candidates:
            return wide
        worst = [calls[i] for i in np.argsort(found, kind="stable")[:_WORST_CALLS]]
        alone = {name: min(call_dbs(rounded((*wide, name)), worst)) for name in candidates}
        first, *others = sorted(candidates, key=lambda name: -alone[name])
        wide, candidates = (*wide, first), others[:_SECOND_ROUND]
