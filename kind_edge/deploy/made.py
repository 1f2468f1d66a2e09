"""What is known of model files on their way into a bundle. No torch, so that any process can pass it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.deploy import assemble
from kind_edge.deploy.bench import LatencyReport


@dataclass(frozen=True)
class Made:
    """Model files that are written and proven. `values` are those of the manifest, `model_bytes` what an app loads of
    them, `rows` how many times the sampler asks, `parity` the worst dB by file; `package_bytes` what an app loads of
    Core ML's packages instead (0: there are none)."""

    values: Mapping[str, Any]
    model_bytes: int
    rows: int
    parity: Mapping[str, float | None]
    package_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """Latencies of every runnable file, and of a whole image, on this machine."""

    models: Mapping[str, LatencyReport]
    image: LatencyReport


def runnable(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The files that ONNX Runtime opens: what an app loads, and what can be measured here."""
    return {path: entry for path, entry in entries.items() if path.endswith((".onnx", ".ort"))}


def measure(folder: Path, made: Made) -> Measured:
    """Times are worth something only while nothing else runs."""
    return Measured(*assemble.measure(folder, made.values, runnable(made.values["models"])))
