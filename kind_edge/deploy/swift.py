"""`coreml/KindEdge.swift`: one Swift actor round the bundle's Core ML packages, and the words on adding it to an app.

Both are written from the manifest, so that names, shapes and types are the packages' own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.deploy.app_source import guidance_words, is_guided, render
from kind_edge.deploy.noise import gaussian_noise
from kind_edge.model.tiles import tiles_of
from kind_edge.units import format_bytes

SWIFT_FILE, DENOISER, DECODER = "coreml/KindEdge.swift", "coreml/Denoiser.mlpackage", "coreml/Decoder.mlpackage"
SAMPLER = "coreml/Sampler.mlpackage"

_SYSTEMS = {"iOS16": "iOS 16.0, macOS 13.0", "iOS17": "iOS 17.0, macOS 14.0", "iOS18": "iOS 18.0, macOS 15.0"}
_UNITS = {"npu": "cpuAndNeuralEngine", "gpu": "cpuAndGPU", "cpu": "all"}
"""What is asked of Core ML for a plan of that unit; a plan of the CPU has no wish of its own."""
_SEED, _NUMBER, _BLOCK = 42, 7, 195
"""Of the noise that the class compares its own with: a vector of docs/noise.md."""


def write_swift(folder: Path, values: Mapping[str, Any]) -> None:
    """Beside Core ML packages; nothing where there are none."""
    if DENOISER in values["models"]:
        context = {**_context(values), "fingerprint": _fingerprint(folder), "vector": _vector()}
        (folder / SWIFT_FILE).write_text(render("coreml/KindEdge.swift.j2", context), encoding="utf-8")


def app_words(values: Mapping[str, Any]) -> str:
    """The section of the bundle's README on adding the packages to an app; "" where there are none."""
    if DENOISER not in values["models"]:
        return ""
    context = _context(values)
    files = [path for path in (DENOISER, DECODER) if path in values["models"]]
    size = sum(values["models"][path].get("package_bytes", 0) for path in files)
    more = {
        "packages": files,
        "size": format_bytes(size),
        "sampler": SAMPLER if SAMPLER in values["models"] else None,
        "first": _quoted(values["classes"][0]),
        "peak_memory": format_bytes(values["plan"]["peak_memory_bytes"]),
    }
    return render("coreml/README.md.j2", {**context, **more})


def _context(values: Mapping[str, Any]) -> dict[str, Any]:
    entry = values["models"][DENOISER]
    names = [each["name"] for each in entry["inputs"]]
    drawn, unit, target = (
        values.get("latent", values["image"]),
        values["plan"].get("unit"),
        entry.get("target", "iOS18"),
    )
    decoder = DECODER in values["models"]
    shape = [drawn[side] for side in ("channels", "height", "width")]
    return {
        "sampler": values["sampler"],
        "version": values["tools"]["kind_edge"],
        "name": _line(values["name"]),
        "licence": _line(values["licence"]),
        "classes": [_quoted(name) for name in values["classes"]],
        "class_words": _line(", ".join(values["classes"])),
        "image": values["image"] if decoder else drawn,
        "latent_shape": shape,
        "inputs": [
            {"name": each["name"], "swift": _tensor(each["name"], each["dtype"], shape)} for each in entry["inputs"]
        ],
        "output": entry["outputs"][0]["name"],
        "packs": [
            {"name": name, "classes": [_quoted(each) for each in classes]}
            for name, classes in entry.get("functions", {}).items()
        ],
        "switches": "class_index" in names,
        "takes_timestep": "timestep" in names,
        "guided": is_guided(values),
        "guidance_words": guidance_words(values),
        "decoder": decoder,
        "tiles": _tiles(values) if decoder else None,
        "weight_bytes": format_bytes(entry["weight_bytes"]),
        "target": target,
        "available": _SYSTEMS[target],
        "async_prediction": target != "iOS16",
        "compute_units": _UNITS.get(unit, "all"),
        "unit_words": "GPU" if unit == "gpu" else "Neural Engine",
    }


def _tiles(values: Mapping[str, Any]) -> dict[str, Any]:
    """How a picture is put together of what the decoder makes."""
    side, scale = values["latent"]["height"], values["image"]["height"] // values["latent"]["height"]
    tiles = tiles_of(side, values["decoder"]["tiles"], scale)
    return {"count": tiles.count, "size": tiles.size, "starts": tiles.starts, "scale": scale}


def _tensor(name: str, dtype: str, shape: list[int]) -> str:
    """Swift that makes an input's array of the type that the package declares."""
    kind = {"float32": "Float", "int32": "Int32"}[dtype]
    made = {
        "sample": f"scalars: samples, shape: [batch, {', '.join(map(str, shape))}]",
        "timestep": "repeating: Self.timestep[row], shape: [batch]",
        "step_index": "repeating: Int32(row), shape: [batch]",
        "class_index": "scalars: classIndices, shape: [batch]",
    }[name]
    return f'inputs["{name}"] = MLMultiArray(MLShapedArray<{kind}>({made}))'


def _quoted(text: str) -> str:
    """As a literal of Swift."""
    kept = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(kept.get(c, c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text) + '"'


def _line(text: str) -> str:
    """For a comment of one line."""
    return "".join(c if c.isprintable() else " " for c in text)


def _fingerprint(folder: Path) -> str:
    """Of the packages: what an app has compiled of others is not theirs."""
    digest = hashlib.sha256()
    for file in sorted(path for path in (folder / "coreml").glob("*.mlpackage/**/*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _vector() -> dict[str, Any]:
    """The last values of a picture's noise, as the bits of their floats."""
    count = 4 * (_BLOCK + 1)
    last = gaussian_noise(_SEED, _NUMBER, 1, (count,))[0, -4:].astype(np.float32)
    bits = [f"0x{value:08X}" for value in last.view(np.uint32).tolist()]
    return {"seed": _SEED, "number": _NUMBER, "count": count, "bits": bits}
