"""A model's sensitivity, measured once: by how much its loss rises when one matrix alone loses output energy.

The table holds, per factored matrix, measured pairs of lost energy and loss increase. Lost energy is that of the
matrix's output under its own inputs, which the whitened spectra know at every rank, for every set of classes and in
every form; so a few measured ranks serve them all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.bounded import read_object
from kind_edge.budget.response import Response
from kind_edge.errors import InputError

SCHEMA_VERSION = 1

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Loss increase over lost energy, at measured points: both [P], `lost` rising and above 0."""

    lost: FloatArray
    increase: FloatArray

    @classmethod
    def through(cls, lost: list[float], increase: list[float]) -> Curve:
        """Sorted by lost energy and made monotone: what loses more can by measurement only seem to cost less."""
        pairs = sorted((energy, change) for energy, change in zip(lost, increase, strict=True) if energy > 0)
        energies, changes = (np.array([pair[axis] for pair in pairs], dtype=np.float64) for axis in (0, 1))
        return cls(energies, np.maximum.accumulate(changes) if len(pairs) else changes)

    def at(self, lost: FloatArray) -> FloatArray:
        """Increases [R] for lost energies [R]: straight lines in logarithms between points, proportional outside them.

        Small errors of a layer's output reach the model's in proportion.
        """
        found = np.zeros(len(lost))
        seen = self.increase > 0
        if not seen.any():
            return found
        x, y = np.log(self.lost[seen]), np.log(self.increase[seen])
        some = lost > 0
        wanted = np.log(lost[some])
        below, above = np.minimum(wanted - x[0], 0), np.maximum(wanted - x[-1], 0)
        found[some] = np.exp(np.interp(wanted, x, y) + below + above)
        return found


@dataclass(frozen=True)
class MatrixInfluence:
    """One matrix: curves of its learngene and of its tailors, and what int8 costs at full rank."""

    shared: Curve
    tailor: Curve
    int8: float


@dataclass(frozen=True)
class Sensitivity:
    """The table of one checkpoint, as it lies beside it. `branches`: the loss increase where one is dropped whole.

    `conditions` say what it was measured on.
    """

    checkpoint_sha256: str
    conditions: Mapping[str, Any]
    matrices: Mapping[str, MatrixInfluence]
    branches: Mapping[str, float]
    response: Response | None = None

    def to_dict(self) -> dict[str, Any]:
        matrices = {
            name: {"shared": _pairs(own.shared), "tailor": _pairs(own.tailor), "int8": _rounded(own.int8)}
            for name, own in self.matrices.items()
        }
        values = {
            "schema_version": SCHEMA_VERSION,
            "checkpoint_sha256": self.checkpoint_sha256,
            "conditions": dict(self.conditions),
            "matrices": matrices,
            "branches": {name: _rounded(value) for name, value in self.branches.items()},
        }
        return values | ({"response": self.response.to_dict()} if self.response else {})

    def to_json(self) -> str:
        """One line for each matrix: short, and two tables can be compared by eye."""
        values = self.to_dict()
        matrices = ",\n".join(f"    {json.dumps(name)}: {json.dumps(own)}" for name, own in values["matrices"].items())
        rest = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items() if key != "matrices"]
        return "{\n" + ",\n".join([*rest, f'  "matrices": {{\n{matrices}\n  }}']) + "\n}\n"

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Sensitivity:
        """`InputError` for what is no such table."""
        if not isinstance(values, Mapping) or values.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{where}: not a sensitivity table of schema version {SCHEMA_VERSION}; remove it, and it is measured "
                "anew"
            )
        try:
            matrices = {
                str(name): MatrixInfluence(_curve(own["shared"]), _curve(own["tailor"]), measured_number(own["int8"]))
                for name, own in values["matrices"].items()
            }
            branches = {str(name): measured_number(value) for name, value in values["branches"].items()}
            response = Response.from_dict(values["response"]) if "response" in values else None
            return cls(str(values["checkpoint_sha256"]), dict(values["conditions"]), matrices, branches, response)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: damaged ({error!r:.80}); remove it, and it is measured anew") from error


def read_sensitivity(path: Path) -> Sensitivity:
    try:
        values = read_object(path, "the sensitivity")
    except InputError as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and it is measured anew") from error
    return Sensitivity.from_dict(values, str(path))


def _pairs(curve: Curve) -> list[list[float]]:
    return [[_rounded(a), _rounded(b)] for a, b in zip(curve.lost, curve.increase, strict=True)]


def _curve(pairs: list[list[float]]) -> Curve:
    lost, increase = ([measured_number(pair[axis]) for pair in pairs] for axis in (0, 1))
    if any(len(pair) != 2 for pair in pairs) or sorted(lost) != lost or sorted(increase) != increase:
        raise ValueError("a curve must rise")
    return Curve(np.array(lost), np.array(increase))


def measured_number(value: Any) -> float:
    """Of a table that was measured, as JSON has it; `ValueError` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"got {value!r}, want a number of at least 0")
    return float(value)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
