"""Bits per matrix: the fewest bytes whose predicted error keeps a wanted distance, by the solver that makes plans.

Every matrix is compressed alone, at every width, and the model run on the points that verification looks at: what that
adds to the error of each point is measured, not guessed. Errors of different matrices are taken to add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.budget.coreml_weights import Target, palette_bytes
from kind_edge.budget.knapsack import search
from kind_edge.budget.table import Table
from kind_edge.budget.tree import Tree
from kind_edge.deploy.plain import Origin
from kind_edge.deploy.reference import make_reference
from kind_edge.errors import GateError
from kind_edge.exporters.coreml_compress import (
    compressible,
    constants,
    matrix_of,
    palettized,
    parameter_of,
)
from kind_edge.exporters.coreml_graph import Denoiser

WIDTHS = (4, 6, 8, 16)
WANTED_DB = 26.5
"""SQNR of the worst point: the gate of 8-bit weights, with room for errors that do not just add up."""

_POINTS = 32
_UNITS = 1_000_000  # limits are integers: so many to what a point may lose
_SOLVER_S = 20.0

OnProgress = Callable[[int, int], None]


def mixed_bits(
    denoiser: Denoiser, model: Any, origin: Origin, target: Target, on_progress: OnProgress | None = None
) -> dict[str, int]:
    """Bits by matrix ("blocks.0.attn.q"). `model` is the denoiser's `MLModel` in fp16.

    `GateError` where not even fp16 in every matrix would do, which only a broken model can cause.
    """
    weights = _weights_by_matrix(denoiser, model)
    inputs = _points(denoiser, origin)
    wanted = _run(denoiser, inputs)
    allowed = (wanted.double() ** 2).flatten(1).sum(1) * 10 ** (-WANTED_DB / 10)
    rows: list[tuple[int, int, NDArray[np.int64]]] = []
    tell = on_progress or (lambda done, total: None)
    total = len(weights) * (len(WIDTHS) - 1)
    for values in weights.values():
        for bits in WIDTHS:
            size = sum(palette_bytes(value.shape, bits, target) for value in values.values())
            lost = torch.zeros(len(wanted), dtype=torch.float64)
            if bits < 16:
                replaced = {name: palettized(value, bits, target) for name, value in values.items()}
                lost = ((_run(denoiser, inputs, replaced) - wanted).double() ** 2).flatten(1).sum(1)
                tell(len([row for row in rows if row[0] < 16]) + 1, total)
            rows.append((bits, size, np.ceil((lost / allowed).numpy() * _UNITS).astype(np.int64)))
    picks = _solved(rows, len(weights))
    return {name: rows[pick][0] for name, pick in zip(weights, picks, strict=True)}


def _solved(rows: list[tuple[int, int, NDArray[np.int64]]], groups: int) -> NDArray[np.int64]:
    tree = Tree(np.repeat(np.arange(groups), len(WIDTHS)), np.full(groups, -1))
    sizes = np.array([float(size) for _, size, _ in rows])
    losses = np.stack([lost for _, _, lost in rows], 1)  # [points, columns]
    table = Table(tree, sizes, {f"point {i}": lost for i, lost in enumerate(losses)})
    limits = dict.fromkeys(table.costs, _UNITS)
    found = search(table, limits, gap=1e-4, deadline=time.monotonic() + _SOLVER_S)
    if found.picks is None:
        raise GateError(f"--coreml-weights mixed: no choice of bits keeps {WANTED_DB} dB; take fp16")
    return found.picks


def _weights_by_matrix(denoiser: Denoiser, model: Any) -> Mapping[str, Mapping[str, NDArray[np.float16]]]:
    """Matrix -> parameter -> its weights as the package holds them."""
    names, values = [name for name, _ in denoiser.named_parameters()], constants(model)
    found: dict[str, dict[str, NDArray[np.float16]]] = {}
    for constant in compressible(model):
        parameter, matrix = parameter_of(constant, names), matrix_of(constant)
        if parameter is not None and matrix is not None:
            found.setdefault(matrix, {})[parameter] = values[constant]
    return found


def _points(denoiser: Denoiser, origin: Origin) -> list[torch.Tensor]:
    """Inputs of at most so many points, spread over classes and steps."""
    reference = make_reference(origin.truncated, origin.plan.form, origin.timesteps, None)
    count = len(reference["sample"])
    chosen = np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(int))
    inputs = [torch.from_numpy(reference[name][chosen]) for name in denoiser.input_names]
    return [each if each.is_floating_point() else each.int() for each in inputs]


@torch.no_grad()
def _run(
    denoiser: Denoiser, inputs: list[torch.Tensor], replaced: Mapping[str, NDArray[Any]] | None = None
) -> torch.Tensor:
    """The prediction with some of the parameters replaced."""
    values = {name: torch.from_numpy(value.astype(np.float32)) for name, value in (replaced or {}).items()}
    return torch.func.functional_call(denoiser, values, tuple(inputs))
