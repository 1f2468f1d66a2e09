"""How close two outputs are, and the verdict on every artefact of a bundle.

SQNR = 10 log10(sum ref^2 / sum (ref - out)^2) in dB, of predictions; PSNR = 10 log10(1 / mean (ref - out)^2) in dB, of
whole images in [0, 1]. Both in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.precision import PRECISIONS
from kind_edge.errors import GateError

GATES_DB: Mapping[str, float] = {name: traits.gate_db for name, traits in PRECISIONS.items()}
"""Of a denoiser's prediction, SQNR."""
IMAGE_GATES_DB: Mapping[str, float] = {name: traits.image_gate_db for name, traits in PRECISIONS.items()}
"""Of a sampler's image, PSNR: what every step adds has added up there. 80 dB are 1e-4 of an image's range."""
COREML_GATES_DB: Mapping[str, float] = {
    "fp16": 40.0, "int8": 25.0, "palette8": 25.0, "mixed": 25.0, "palette6": 20.0, "int4": 12.0, "palette4": 10.0,
}  # fmt: skip
"""By the weights of a Core ML package, whose arithmetic is fp16 always: SQNR of predictions, PSNR of images."""
MERGE_GATE_DB = 100.0
EXACT_DB = 400.0
"""What is reported for outputs that do not differ at all: more than float64 can tell apart, and still a JSON number."""


def gates_db(role: str, path: str = "") -> Mapping[str, float]:
    """Gate by precision, of a denoiser, or of a sampler or decoder; `path` tells its format."""
    if path.startswith("coreml/"):
        return COREML_GATES_DB
    return IMAGE_GATES_DB if role in ("sampler", "decoder") else GATES_DB


def gate_db(role: str, precision: str, table_precision: str | None = None, path: str = "") -> float:
    """The gate of a file whose table of modulation may be of a lower precision than the rest."""
    gates = gates_db(role, path)
    return min(gates[name] for name in (precision, table_precision or precision))


@dataclass(frozen=True)
class FileParity:
    """One artefact: its gate, its worst figure and that of every point, in dB, and everything that is wrong.

    Of a denoiser SQNR by class and timestep, of a sampler or decoder PSNR by image.
    """

    file: str
    gate_db: float
    worst_db: float | None
    points: tuple[Mapping[str, Any], ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """All artefacts of a bundle; `passed` only if every one kept its gate.

    `reference`: where the gated outputs came from.
    """

    files: tuple[FileParity, ...]
    reference: str = "the stored outputs of the gated model"

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"{parity.file}: {failure}" for parity in self.files for failure in parity.failures)

    @property
    def parity(self) -> dict[str, float | None]:
        """Worst SQNR (of a sampler or decoder PSNR) in dB by file."""
        return {parity.file: parity.worst_db for parity in self.files}

    @property
    def gates(self) -> dict[str, float]:
        return {parity.file: parity.gate_db for parity in self.files}

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "parity": self.parity,
            "gates": self.gates,
            "failures": list(self.failures),
            "points": {parity.file: [dict(point) for point in parity.points] for parity in self.files},
        }

    def require(self) -> VerifyReport:
        """Itself if everything passed; `GateError` that lists every failure otherwise."""
        if not self.passed:
            raise GateError("parity failed: " + "; ".join(self.failures), self.to_dict())
        return self


def sqnr_db(reference: NDArray[Any], output: NDArray[Any]) -> float:
    """SQNR in dB, in float64; `EXACT_DB` for equal arrays."""
    wanted, got = reference.astype(np.float64), output.astype(np.float64)
    noise = float(((wanted - got) ** 2).sum())
    signal = float((wanted**2).sum())
    if noise == 0.0:
        return EXACT_DB
    return 10 * math.log10(signal / noise) if signal > 0 else -EXACT_DB


def psnr_db(reference: NDArray[Any], output: NDArray[Any]) -> float:
    """PSNR in dB of images in [0, 1], in float64; `EXACT_DB` for equal arrays."""
    noise = float(((reference.astype(np.float64) - output.astype(np.float64)) ** 2).mean())
    return EXACT_DB if noise == 0.0 else -10 * math.log10(noise)
