"""`coreml/KindEdge.swift`: one Swift class round the bundle's Core ML packages, written from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kind_edge.deploy.app_source import guidance_words, is_guided, render
from kind_edge.units import format_bytes

SWIFT_FILE, DENOISER, DECODER = "coreml/KindEdge.swift", "coreml/Denoiser.mlpackage", "coreml/Decoder.mlpackage"


def write_swift(folder: Path, values: Mapping[str, Any]) -> None:
    """Beside Core ML packages; nothing where there are none."""
    if DENOISER in values["models"]:
        (folder / SWIFT_FILE).write_text(render("coreml/KindEdge.swift.j2", _context(values)), encoding="utf-8")


def _context(values: Mapping[str, Any]) -> dict[str, Any]:
    entry = values["models"][DENOISER]
    names = [each["name"] for each in entry["inputs"]]
    return {
        **{key: values[key] for key in ("name", "licence", "classes", "sampler", "tools")},
        "image": values.get("latent", values["image"]),
        "inputs": [{"name": each["name"], "swift": _tensor(each["name"], each["dtype"])} for each in entry["inputs"]],
        "output": entry["outputs"][0]["name"],
        "switches": "class_index" in names,
        "takes_timestep": "timestep" in names,
        "guided": is_guided(values),
        "guidance_words": guidance_words(values),
        "decoder": DECODER in values["models"],
        "weight_bytes": format_bytes(entry["weight_bytes"]),
    }


def _tensor(name: str, dtype: str) -> str:
    """Swift that makes an input's array of the type that the package declares."""
    if name == "sample":
        return (
            'inputs["sample"] = try MLMultiArray(shape: Self.shape(batch), dataType: .float32)\n'
            '        Self.fill(inputs["sample"]!, samples)'
        )
    value = {"timestep": "Self.timestep[row]", "step_index": "row", "class_index": "classIndices[index]"}[name]
    kind = {"float32": ".float32", "int32": ".int32"}[dtype]
    return (
        f'inputs["{name}"] = try MLMultiArray(shape: [NSNumber(value: batch)], dataType: {kind})\n'
        f'        for index in 0..<batch {{ inputs["{name}"]![index] = NSNumber(value: {value}) }}'
    )
