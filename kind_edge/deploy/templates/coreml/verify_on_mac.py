#!/usr/bin/env python3
"""Runs the Core ML packages of a kind-edge bundle on a Mac: do they compute what the gated model computes, how fast?

Stand-alone: needs Python 3.10 or newer, numpy and coremltools (pip install coremltools), and this one file.

Every package is loaded for each compute unit, its predictions for the bundle's stored inputs are compared with the
stored outputs (worst over classes and timesteps), and one prediction is timed. The result is a JSON file; what is in it
is described in docs/coreml-verify.md of kind-edge. Exit codes: 0 all gates kept, 1 one missed, 2 usage, 4 a bad bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA_VERSION = 1
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
WARM_UPS = 3
EXACT_DB = 400.0
"""What stands for outputs that do not differ at all."""

Array = Any
Arrays = Mapping[str, Array]
Predict = Callable[[Arrays], Arrays]


class BundleError(Exception):
    """The bundle is not what it claims to be (exit code 4)."""


class UnfitError(Exception):
    """This computer cannot do it (exit code 2)."""


@dataclass(frozen=True)
class Opened:
    """A package that is loaded for one unit: the batch of its inputs, and what runs it."""

    batch: int
    predict: Predict


Open = Callable[[Path, str, "str | None"], Opened]
"""Path of a package, compute unit, and function (None: the default one)."""


def open_with_coreml(path: Path, unit: str, function: str | None) -> Opened:
    """The only place that needs a Mac."""
    if platform.system() != "Darwin":
        raise UnfitError(f"Core ML predicts on macOS alone, and this is {platform.system()}; run it on a Mac")
    try:
        import coremltools as ct
    except ImportError as error:
        raise UnfitError(f"coremltools is missing ({error}): {sys.executable} -m pip install coremltools") from error
    chosen = {} if function is None else {"function_name": function}
    model = ct.models.MLModel(str(path), compute_units=getattr(ct.ComputeUnit, unit), **chosen)
    description = model.get_spec().description
    described = {one.name: one.input for one in description.functions}
    features = described.get(function or description.defaultFunctionName, description.input)
    return Opened(int(features[0].type.multiArrayType.shape[0]), model.predict)


@dataclass(frozen=True)
class Case:
    """One function of one package: inputs of every point [n, ...], what should come of them, and what each point is."""

    package: str
    function: str | None
    output: str
    metric: str
    gate_db: float
    inputs: Arrays
    wanted: Array
    labels: tuple[Mapping[str, Any], ...]
    tiles: int = 1

    @property
    def name(self) -> str:
        return self.package if self.function is None else f"{self.package}#{self.function}"


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Manifest and stored reference; every file of the Core ML packages is checked against its hash."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        with np.load(folder / "verify" / "reference.npz", allow_pickle=False) as stored:
            reference = {name: stored[name] for name in stored.files}
        files = {path: entry["sha256"] for path, entry in manifest["files"].items() if path.startswith("coreml/")}
        for path, wanted in files.items():
            if hashlib.sha256((folder / path).read_bytes()).hexdigest() != wanted:
                raise BundleError(f"{folder / path} was changed after the export; export again, or copy it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{folder}: not a bundle (a folder with manifest.json and verify/): {error!r}") from error
    return manifest, reference


def cases_of(manifest: Mapping[str, Any], reference: Arrays) -> Iterator[Case]:
    """Of every Core ML package its default function, and those of its class packs."""
    packages = {path: entry for path, entry in manifest["models"].items() if path.startswith("coreml/")}
    if not packages:
        raise BundleError("the bundle has no Core ML package; export with --formats onnx,coreml")
    gates = manifest.get("verification", {}).get("gates", {})
    for path, entry in packages.items():
        names = {None: list(manifest["classes"]), **entry.get("functions", {})}
        for function, classes in names.items():
            gate = float(gates.get(path, 0.0))
            if entry["role"] == "denoiser":
                yield _of_denoiser(path, function, gate, entry, reference, manifest["classes"], classes)
            elif "image" in reference:
                tiles = int(manifest.get("decoder", {}).get("tiles", 1)) if entry["role"] == "decoder" else 1
                yield _of_images(path, function, gate, entry, reference, manifest["classes"], classes, tiles)


def _renumbered(index: Array, known: Sequence[str], classes: Sequence[str]) -> tuple[Array, Array]:
    """Which points a function has a class for, and their class indices in it; the null class comes last in both."""
    order = [known.index(name) for name in classes] + [len(known)]
    number = {old: new for new, old in enumerate(order)}
    kept = np.isin(index, order)
    return kept, np.array([number[int(one)] for one in index[kept]], np.int32)


def _of_denoiser(
    path: str, function: str | None, gate: float, entry: Any, reference: Arrays, known: list[str], classes: list[str]
) -> Case:
    kept, index = _renumbered(reference["class_index"], known, classes)
    given = {name: array[kept] for name, array in reference.items() if len(array) == len(kept)}
    given["class_index"] = index
    names = [*classes, "null"]
    steps = given["step_index"].tolist()
    labels = tuple({"class": names[c], "step_index": step} for c, step in zip(index.tolist(), steps, strict=True))
    inputs = _inputs(path, entry, given)
    return Case(path, function, "prediction", "sqnr", gate, inputs, given["prediction"], labels)


def _of_images(
    path: str,
    function: str | None,
    gate: float,
    entry: Any,
    reference: Arrays,
    known: list[str],
    classes: list[str],
    tiles: int,
) -> Case:
    """Of a sampler or a decoder; a decoder may make pictures in `tiles` x `tiles` pieces."""
    kept, index = _renumbered(reference["image_class"], known, classes)
    given = {name: reference[name][kept] for name in ("noise", "latent", "image") if name in reference}
    given["class_index"] = index
    labels = tuple({"class": classes[c]} for c in index.tolist())
    return Case(path, function, "image", "psnr", gate, _inputs(path, entry, given), given["image"], labels, tiles)


def _inputs(path: str, entry: Any, given: Arrays) -> dict[str, Array]:
    """In the types that the manifest has."""
    missing = [one["name"] for one in entry["inputs"] if one["name"] not in given]
    if missing:
        raise BundleError(f"{path}: the stored reference has nothing for input {', '.join(missing)}")
    return {one["name"]: given[one["name"]].astype(one["dtype"]) for one in entry["inputs"]}


def distance_db(metric: str, wanted: Array, got: Array) -> float:
    """SQNR 10 log10(sum wanted^2 / sum error^2), or PSNR 10 log10(1 / mean error^2); in float64."""
    wanted, error = wanted.astype(np.float64), wanted.astype(np.float64) - got.astype(np.float64)
    signal = float((wanted**2).sum()) if metric == "sqnr" else float(wanted.size)
    noise = float((error**2).sum())
    if noise == 0.0:
        return EXACT_DB
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -EXACT_DB


def run_all(case: Case, opened: Opened) -> Array:
    """Predictions of all points, in parts of the package's batch; the last one is filled up."""
    count, parts = len(case.wanted), []
    for start in range(0, count, opened.batch):
        at = np.minimum(np.arange(start, start + opened.batch), count - 1)
        outputs = opened.predict({name: array[at] for name, array in case.inputs.items()})
        if set(outputs) != {case.output}:
            raise ValueError(f"outputs are {', '.join(outputs)}, want {case.output}")
        parts.append(np.asarray(outputs[case.output])[: count - start])
    return np.concatenate(parts)


def run_tiles(case: Case, opened: Opened) -> Array:
    """Pictures decoded in overlapping tiles that fade into one another, as the app decodes them.

    A tile is as long as its share of a side, plus a quarter of it that overlaps; the first and the last meet the ends.
    """
    latents, side, count = case.inputs["latent"], case.inputs["latent"].shape[-1], case.tiles
    size, f = math.ceil(side / (count - 0.25 * (count - 1))), case.wanted.shape[-1] // side
    starts = np.linspace(0, side - size, count).round().astype(int)
    weights = np.ones((count, size * f), np.float32)
    for i in range(count - 1):
        both = int(starts[i] + size - starts[i + 1]) * f
        ramp = (np.arange(both, dtype=np.float32) + np.float32(0.5)) / np.float32(max(both, 1))
        weights[i, size * f - both :] *= 1 - ramp
        weights[i + 1, :both] *= ramp
    images = np.zeros_like(case.wanted)
    for (i, top), (j, left) in itertools.product(enumerate(starts), repeat=2):
        piece = latents[:, :, top : top + size, left : left + size]
        parts = [np.asarray(opened.predict({"latent": one[None]})[case.output]) for one in piece]
        place = images[:, :, top * f : (top + size) * f, left * f : (left + size) * f]
        place += np.concatenate(parts) * weights[i][:, None] * weights[j]
    return images


def points_of(case: Case, got: Array) -> list[dict[str, Any]]:
    """The distance of every class and timestep, over all its points together; of an image, of every class."""
    if got.shape != case.wanted.shape:
        raise ValueError(f"{case.output} has shape {list(got.shape)}, want {list(case.wanted.shape)}")
    members: dict[tuple[Any, ...], list[int]] = {}
    for at, label in enumerate(case.labels):
        members.setdefault(tuple(label.items()), []).append(at)
    return [
        {**dict(label), f"{case.metric}_db": round(distance_db(case.metric, case.wanted[at], got[at]), 2)}
        for label, at in members.items()
    ]


def time_ms(case: Case, opened: Opened, runs: int) -> dict[str, float]:
    """Percentiles of one prediction at the package's batch, after a few that do not count."""
    inputs = {name: np.resize(array, (opened.batch, *array.shape[1:])) for name, array in case.inputs.items()}
    if case.tiles > 1:  # one tile, as the app asks for it
        size = math.ceil(inputs["latent"].shape[-1] / (case.tiles - 0.25 * (case.tiles - 1)))
        inputs = {"latent": inputs["latent"][:, :, :size, :size]}
    taken = []
    for _ in range(WARM_UPS + runs):
        start = time.perf_counter()
        opened.predict(inputs)
        taken.append((time.perf_counter() - start) * 1e3)
    return {f"p{q}": round(float(np.percentile(taken[WARM_UPS:], q)), 4) for q in (50, 90)}


def measure(case: Case, folder: Path, unit: str, runs: int, open_package: Open) -> dict[str, Any]:
    """Everything about one function on one unit. What the system cannot load or run is a failure in the result."""
    result: dict[str, Any] = {"unit": unit, "gate_db": case.gate_db, "failures": []}
    try:
        loads = []
        for _ in range(2):  # the first one compiles for the unit; what the system caches serves the second
            start = time.perf_counter()
            opened = open_package(folder / case.package, unit, case.function)
            loads.append(round(time.perf_counter() - start, 3))
        result |= {"cold_load_s": loads[0], "warm_load_s": loads[1], "batch": opened.batch}
        points = points_of(case, (run_all if case.tiles == 1 else run_tiles)(case, opened))
        worst = min(points, key=lambda point: point[f"{case.metric}_db"])
        result |= {f"worst_{case.metric}_db": worst[f"{case.metric}_db"], "points": points}
        if worst[f"{case.metric}_db"] < case.gate_db:
            result["failures"].append(f"{worst}, want {case.gate_db:.0f} dB or more")
        result["predict_ms"] = time_ms(case, opened, runs)
    except (UnfitError, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001  # Core ML raises what it likes, and the other units are still of interest
        result["failures"].append(f"{type(error).__name__}: {error}")
    return {**result, "passed": not result["failures"]}


def machine() -> dict[str, str]:
    """What the figures were measured on."""

    def said_by(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except OSError:
            return "unknown"
        return done.stdout.strip() or "unknown"

    try:
        from importlib.metadata import version

        tools = version("coremltools")
    except ImportError:
        tools = "unknown"
    return {
        "model": said_by("sysctl", "-n", "hw.model"),
        "chip": said_by("sysctl", "-n", "machdep.cpu.brand_string"),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "python": platform.python_version(),
        "coremltools": tools,
        "numpy": np.__version__,
    }


def verify(folder: Path, units: Sequence[str], runs: int, open_package: Open) -> dict[str, Any]:
    """The JSON's content."""
    manifest, reference = read_bundle(folder)
    results: dict[str, list[dict[str, Any]]] = {}
    for case in cases_of(manifest, reference):
        for unit in units:
            result = measure(case, folder, unit, runs, open_package)
            results.setdefault(case.name, []).append(result)
            print(line(case, result), flush=True)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "kind-edge coreml verification",
        "bundle": manifest["name"],
        "manifest_sha256": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "runs": runs,
        "passed": all(result["passed"] for many in results.values() for result in many),
        "results": results,
    }


def line(case: Case, result: Mapping[str, Any]) -> str:
    said = f"  {case.name:<32} {result['unit']:<12}"
    if result["failures"]:
        return f"{said} FAILED: {'; '.join(result['failures'])}"
    taken = result["predict_ms"]
    return (
        f"{said} {result[f'worst_{case.metric}_db']:6.1f} dB (gate {case.gate_db:.0f})   "
        f"p50 {taken['p50']:.2f} ms, p90 {taken['p90']:.2f} ms   cold load {result['cold_load_s']:.2f} s"
    )


def main(arguments: Sequence[str] | None = None, open_package: Open = open_with_coreml) -> int:
    own = Path(__file__).resolve().parent.parent  # this file lies in the bundle's coreml folder
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=own, help="folder of the bundle (default: this one)")
    parser.add_argument("--units", default=",".join(UNITS), help=f"some of {', '.join(UNITS)} (default: all)")
    parser.add_argument("--runs", type=int, default=50, help="predictions that are timed (default: 50)")
    parser.add_argument("-o", "--output", type=Path, default=Path("coreml-verification.json"), help="the JSON file")
    given = parser.parse_args(arguments)
    units = given.units.split(",")
    if wrong := [unit for unit in units if unit not in UNITS]:
        parser.error(f"--units: unknown {', '.join(wrong)}; want some of {', '.join(UNITS)}")
    if given.runs < 1:
        parser.error(f"--runs: got {given.runs}, want 1 or more")
    try:
        result = verify(given.bundle, units, given.runs, open_package)
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (BundleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except UnfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"  written: {given.output}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
