"""Parity and placement of a bundle's denoisers on QNN; called by verify-on-qnn in an environment that has its provider.

On a PC that is Qualcomm's simulator of a Snapdragon 8 Gen 3: what its compiler takes, and what comes out, is what the
phone's would be; its times mean nothing and are not printed. Needs numpy, onnxruntime and onnxruntime-qnn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.deploy.bench_worker import random_inputs
from kind_edge.deploy.bundle import open_bundle, verified_manifest
from kind_edge.deploy.manifest import ModelEntry
from kind_edge.deploy.parity import gates_db, sqnr_db
from kind_edge.deploy.placement import check_placement, summary
from kind_edge.deploy.session import open_session
from kind_edge.deploy.verify import load_reference
from kind_edge.errors import KindEdgeError

QNN = "qnn"


def predictions(file: Path, entry: ModelEntry, reference: Mapping[str, Any], provider: str) -> np.ndarray[Any, Any]:
    """Of all points of the reference, as many to a call as the file's batch has; the last call is filled up."""
    session, count = open_session(file, 1, provider), len(reference["sample"])
    rows = next((int(tensor.shape[0]) for tensor in entry.inputs if isinstance(tensor.shape[0], int)), 1)
    parts = []
    for at in range(0, count, rows):
        here = np.arange(at, at + rows) % count
        feeds = {tensor.name: reference[tensor.name][here].astype(tensor.dtype) for tensor in entry.inputs}
        parts.append(session.run([entry.outputs[0].name], feeds)[0])
    return np.concatenate(parts)[:count]


def worst_db(reference: Mapping[str, Any], output: np.ndarray[Any, Any]) -> float:
    """SQNR against the gated model, worst over class and timestep."""
    points = np.stack([reference["class_index"], reference["step_index"]], 1)
    groups = [(points == point).all(1) for point in np.unique(points, axis=0)]
    return min(sqnr_db(reference["prediction"][group], output[group]) for group in groups)


def told(folder: Path, entry: ModelEntry, reference: Mapping[str, Any]) -> tuple[str, bool]:
    """One line on a file, and whether QNN runs it within its gate."""
    file = folder / entry.path
    feeds = random_inputs(open_session(file))
    with tempfile.TemporaryDirectory(prefix="kind-edge-qnn-") as scratch:
        placement = check_placement(file, feeds, QNN, 1, Path(scratch), allow_fallback=True)
    if placement.products_outside:
        return f"{len(placement.products_outside)} matrix products stay on the CPU; QNN wants fixed shapes", False
    gate = gates_db(entry.role)[entry.precision]
    here, there = (worst_db(reference, predictions(file, entry, reference, provider)) for provider in (QNN, "cpu"))
    left = f"; on the CPU {summary(placement)}" if placement.outside else ""
    return f"{here:.1f} dB on QNN, {there:.1f} dB in ONNX Runtime, gate {gate:.0f} dB{left}", here >= gate


def main() -> int:
    parser = argparse.ArgumentParser(prog="verify-on-qnn", description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("files", nargs="*", help="denoisers of the bundle; all .onnx ones if none is named")
    asked = parser.parse_args()
    passed = True
    try:
        with open_bundle(asked.bundle) as folder:
            manifest, reference = verified_manifest(folder, asked.bundle), load_reference(folder)
            for path, entry in manifest.models.items():
                wanted = path in asked.files if asked.files else path.endswith(".onnx")
                if entry.role == "denoiser" and wanted:
                    line, kept = told(folder, entry, reference)
                    print(f"{'passed' if kept else 'FAILED'}  {path}  {line}", flush=True)
                    passed &= kept
    except KindEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
