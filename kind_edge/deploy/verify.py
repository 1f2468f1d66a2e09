"""Does an artefact compute the same function? Layers: names, types, shapes, finiteness, then SQNR in float64.

SQNR = 10 log10(sum ref^2 / sum (ref - out)^2) in dB, per class and timestep; the worst one counts.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.deploy.manifest import Manifest, ModelEntry, TensorInfo
from kind_edge.errors import GateError, InputError
from kind_edge.registry import Interpreter, exporter

GATES_DB: Mapping[str, float] = {"fp32": 100.0, "fp16": 45.0, "int8": 25.0}
MERGE_GATE_DB = 100.0
REFERENCE_FILE = "verify/reference.npz"
TIMESTEPS = 5
REFERENCE_ARRAYS = {"sample", "step_index", "timestep", "class_index", "prediction"}
EXACT_DB = 400.0
"""What is reported for outputs that do not differ at all: more than float64 can tell apart, and still a JSON number."""

Reference = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class FileParity:
    """One artefact: its gate, its worst SQNR, the SQNR of every class and timestep, and everything that is wrong."""

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
        """Worst SQNR in dB by file."""
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


def load_reference(folder: Path) -> Reference:
    path = folder / REFERENCE_FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            reference = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot read the stored reference: {error}") from error
    if set(reference) != REFERENCE_ARRAYS or len({len(array) for array in reference.values()}) != 1:
        raise InputError(f"{path}: want arrays of one length named {', '.join(sorted(REFERENCE_ARRAYS))}")
    return reference


def verify_models(folder: Path, manifest: Manifest, reference: Reference) -> VerifyReport:
    """Compare every model file of a bundle that lies in `folder` with the reference, which must cover everything.

    `InputError` if the reference lacks a class, the null class or a timestep: a gap must not pass for parity.
    """
    sampler = manifest.sampler
    labels = 1
    if manifest.switches:
        labels = len(manifest.classes) + (sampler.null_index is not None)
    steps = min(TIMESTEPS, len(sampler.tables))
    points = set(zip(reference["class_index"].ravel().tolist(), reference["step_index"].ravel().tolist(), strict=True))
    if {c for c, _ in points} != set(range(labels)) or len(points) != labels * steps:
        raise InputError(f"{REFERENCE_FILE}: has {len(points)} points, want {labels} classes at {steps} timesteps each")
    return VerifyReport(
        tuple(verify_model(folder, entry, reference, manifest.classes) for entry in manifest.models.values())
    )


def verify_model(folder: Path, entry: ModelEntry, reference: Reference, classes: tuple[str, ...]) -> FileParity:
    """One model file; its format is the first part of its path."""
    if entry.precision not in GATES_DB:
        raise InputError(f"{entry.path}: precision {entry.precision!r}, want one of {', '.join(GATES_DB)}")
    gate = GATES_DB[entry.precision]
    failures = list(_interface_failures(entry, reference))
    points: list[Mapping[str, Any]] = []
    if not failures:
        run = exporter(entry.path.split("/")[0]).open(folder / entry.path)
        output = _evaluate(run, entry, reference)
        failures += _output_failures(entry.outputs[0], output, reference["prediction"])
        if not failures:
            points = list(_points(output, reference, classes))
            failures += [
                f"{point['class']} at step {point['step_index']}: {point['sqnr_db']:.1f} dB, want {gate:.0f} dB or more"
                for point in points
                if point["sqnr_db"] < gate
            ]
    worst = min((point["sqnr_db"] for point in points), default=None)
    return FileParity(entry.path, gate, worst, tuple(points), tuple(failures))


def _interface_failures(entry: ModelEntry, reference: Reference) -> Iterator[str]:
    """Names, types and shapes of the inputs, as the bundle contract has them."""
    known = {"sample": "float32", "step_index": "int32", "timestep": "float32", "class_index": "int64"}
    names = entry.input_names()
    if names[:1] != ("sample",) or len({"step_index", "timestep"} & set(names)) != 1:
        yield f"inputs are {list(names)}, want sample, then step_index or timestep, then class_index if it switches"
    for tensor in entry.inputs:
        if tensor.name not in known:
            yield f"unknown input {tensor.name!r}"
            continue
        wanted = tuple(reference[tensor.name].shape[1:])
        if tensor.dtype != known[tensor.name]:
            yield f"input {tensor.name} is {tensor.dtype}, want {known[tensor.name]}"
        if tuple(tensor.shape[1:]) != wanted:
            yield f"input {tensor.name} has shape {list(tensor.shape)}, want [batch, {', '.join(map(str, wanted))}]"
    if [tensor.name for tensor in entry.outputs] != ["prediction"]:
        yield f"outputs are {[tensor.name for tensor in entry.outputs]}, want prediction alone"


def _output_failures(declared: TensorInfo, output: NDArray[Any], wanted: NDArray[Any]) -> Iterator[str]:
    if str(output.dtype) != declared.dtype or declared.dtype != "float32":
        yield f"prediction is {output.dtype}, the manifest says {declared.dtype}, want float32"
    if output.shape != wanted.shape:
        yield f"prediction has shape {list(output.shape)}, want {list(wanted.shape)}"
    elif not np.isfinite(output).all():
        yield f"prediction holds {int((~np.isfinite(output)).sum())} values that are not finite"


def _evaluate(run: Interpreter, entry: ModelEntry, reference: Reference) -> NDArray[Any]:
    """All points; int8 one by one, because dynamic quantization has one range for a whole batch."""
    inputs = {name: reference[name] for name in entry.input_names()}
    count = len(reference["sample"])
    size = 1 if entry.precision == "int8" else count
    parts = [run({name: array[at : at + size] for name, array in inputs.items()}) for at in range(0, count, size)]
    return np.concatenate(parts)


def _points(output: NDArray[Any], reference: Reference, classes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """SQNR of every class and timestep of the reference."""
    pairs = sorted(set(zip(reference["class_index"].tolist(), reference["step_index"].tolist(), strict=True)))
    for c, step in pairs:
        here = (reference["class_index"] == c) & (reference["step_index"] == step)
        name = classes[c] if c < len(classes) else "null"
        value = sqnr_db(reference["prediction"][here], output[here])
        yield {"class": name, "step_index": step, "sqnr_db": round(value, 2)}
