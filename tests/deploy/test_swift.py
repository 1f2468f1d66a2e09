"""`KindEdge.swift`: Swift by its grammar, every name in it known, and every shape, type and number the model's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.swift import DECODER, DENOISER, SAMPLER, SWIFT_FILE, app_words, write_swift
from kind_edge.model.tiles import tiles_of

Values = dict[str, Any]
CLASSES = ['say "hi"', "t-shirt", r"back\(slash)", "two\nlines"]
TABLES = {
    "timestep": [999.5, 500.25], "p": [1.0, -0.5], "q": [0.1, 1.0], "a": [1.0, 0.3],
    "b": [-0.25, -1e-5], "c": [0.0, 0.7],
}  # fmt: skip
SDK = {
    "MLModel", "MLModelConfiguration", "MLComputeUnits", "MLMultiArray", "MLShapedArray",
    "MLDictionaryFeatureProvider", "MLFeatureProvider", "CoreML", "computeUnits", "functionName", "all",
    "cpuAndNeuralEngine", "cpuAndGPU", "load", "contentsOf", "configuration", "prediction", "from",
    "featureValue", "for", "multiArrayValue", "compileModel", "at", "dictionary", "scalars", "shape",
    "repeating", "converting", "Foundation", "Bundle", "main", "url", "forResource", "withExtension",
    "bundlePath", "FileManager", "default", "URL", "appendingPathComponent", "fileExists", "atPath", "path",
    "cachesDirectory", "in", "userDomainMask", "create", "appropriateFor", "createDirectory",
    "deletingLastPathComponent", "withIntermediateDirectories", "moveItem", "to", "Data", "CFData", "log",
    "cos", "sin", "CoreGraphics", "CGImage", "CGDataProvider", "CGColorSpace", "CGColorSpaceCreateDeviceGray",
    "sRGB", "data", "name", "CGColorSpaceCreateDeviceRGB", "CGBitmapInfo", "CGImageAlphaInfo", "none",
    "rawValue", "bitsPerComponent", "space", "bitsPerPixel", "bytesPerRow", "bitmapInfo", "provider", "decode",
    "shouldInterpolate", "intent", "defaultIntent", "Float", "Double", "Int", "Int32", "Int64", "UInt8",
    "UInt32", "UInt64", "String", "Bool", "Array", "Error", "Sendable", "Task", "checkCancellation", "Self",
    "available", "preconcurrency", "iOS", "macOS", "error", "count", "indices", "map", "firstIndex", "of",
    "flatMap", "min", "max", "prefix", "suffix", "zip", "allSatisfy", "abs", "bitPattern", "append",
    "reserveCapacity", "enumerated", "squareRoot", "rounded", "toNearestOrEven", "isNaN", "multipliedFullWidth",
    "by", "high", "low", "truncatingIfNeeded", "$0", "$1", "Void",
}  # fmt: skip
"""Of Core ML, Foundation, Core Graphics and the language: what the file may use without declaring it."""


def values(**changes: Any) -> Values:
    """What a manifest says, as far as the class is written from it."""
    inputs = {"sample": "float32", changes.get("step", "step_index"): "int32", "class_index": "int32"}
    inputs |= {"timestep": "float32"} if "timestep" in inputs else {}
    if not changes.get("switches", True):
        del inputs["class_index"]
    guided = changes.get("guided", True)
    tiles = changes.get("tiles", 0)
    entry: Values = {
        "role": "denoiser", "weight_bytes": 3_000_000, "package_bytes": 3_200_000,
        "target": changes.get("target", "iOS18"),
        "inputs": [{"name": name, "dtype": dtype, "shape": ["batch"]} for name, dtype in inputs.items()],
        "outputs": [{"name": "prediction", "dtype": "float32", "shape": ["batch"]}],
    }  # fmt: skip
    if changes.get("packs"):
        entry["functions"] = {"shoes": ["t-shirt"], "default": CLASSES[:2]}
    drawn = {"channels": 4, "height": 8, "width": 8} if tiles else {"channels": 1, "height": 8, "width": 6}
    made: Values = {
        "name": "tiny\nmodel", "licence": "Apache-2.0", "classes": CLASSES, "image": drawn, "models": {DENOISER: entry},
        "tools": {"kind_edge": "0.1"}, "plan": {"unit": changes.get("unit", "cpu"), "peak_memory_bytes": 2**25},
        "sampler": {"kind": "euler", "steps": 2, "tables": TABLES, "inside_guidance": None,
                    "guidance": 1.5 if guided else 1.0, "null_index": len(CLASSES) if guided else None},
    }  # fmt: skip
    if tiles:
        made |= {"latent": drawn, "image": {"channels": 3, "height": 64, "width": 64}, "decoder": {"tiles": tiles}}
        made["models"][DECODER] = {"role": "decoder", "package_bytes": 10}
    return made


VARIANTS: dict[str, Values] = {
    "ordinary": {}, "network": {"step": "timestep", "unit": "npu"}, "folded": {"switches": False, "guided": False},
    "decoded": {"tiles": 1, "unit": "gpu"}, "in tiles": {"tiles": 2, "target": "iOS16"},
    "packs": {"packs": True, "tiles": 1}, "old": {"target": "iOS16", "guided": False},
}  # fmt: skip


def written(folder: Path, **changes: Any) -> str:
    (folder / "coreml").mkdir(exist_ok=True)
    write_swift(folder, values(**changes))
    return (folder / SWIFT_FILE).read_text()


def names_of(root: Any) -> Iterator[str]:
    """Of what is used and of what is declared."""
    if root.type in ("simple_identifier", "type_identifier"):
        yield root.text.decode().strip("`")
    for child in root.children:
        yield from names_of(child)


def declared(swift: str) -> set[str]:
    """Everything that the file itself gives a name: types, cases, functions, their parameters, variables, tuples."""
    code = re.sub(r'"(\\.|[^"\\])*"', '""', re.sub(r"//.*", "", swift))
    found = set(re.findall(r"\b(?:actor|struct|enum|func|let|var|extension|case)\s+`?(\w+)", code))
    found |= set(re.findall(r"[(,]\s*(?:_\s+)?(\w+)\s*:", code)) | set(re.findall(r"^\s*(\w+): ", code, re.M))
    for each in re.findall(r"\b(?:let|for)\s+\(([^)]*)\)", code) + re.findall(r"\blet\s+(\w[^\n]*=.*)", code):
        found |= set(re.findall(r"\b([a-zA-Z]\w*)\b(?=\s*[=,]|$)", each))
    return found | set(re.findall(r"\bfor (\w+) in", code)) | set(re.findall(r"[,.]\s*`(\w+)`", code))


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_swift_in_which_every_name_is_known(variant: str, tmp_path: Path, parse_swift: Callable[[str], Any]) -> None:
    swift = written(tmp_path, **VARIANTS[variant])
    root = parse_swift(swift)
    assert [node.type for node in root.children if node.type != "comment"][-3:] == ["class_declaration"] * 3
    assert set(names_of(root)) <= declared(swift) | SDK
    assert max(map(len, swift.splitlines())) <= 160 or "static let" in max(swift.splitlines(), key=len)


def test_a_wrong_name_would_be_found(tmp_path: Path, parse_swift: Callable[[str], Any]) -> None:
    swift = written(tmp_path).replace("Self.gaussianNoise(", "Self.gausianNoise(")
    assert set(names_of(parse_swift(swift))) - declared(swift) - SDK == {"gausianNoise"}
    with pytest.raises(AssertionError):
        parse_swift(swift.replace("guard let", "guard lte", 1))


@pytest.mark.parametrize("step", ["step_index", "timestep"])
def test_agrees_with_its_package(step: str, tmp_path: Path) -> None:
    assert not (tmp_path / SWIFT_FILE).exists()
    swift = written(tmp_path, step=step)
    found = dict(re.findall(r'inputs\["(\w+)"\] = MLMultiArray\(MLShapedArray<(\w+)>', swift))
    assert found == {"sample": "Float", step: "Int32" if step == "step_index" else "Float", "class_index": "Int32"}
    assert "shape: [batch, 1, 8, 6]" in swift
    assert "width = 6, height = 8, channels = 1" in swift
    for column in ("p", "q", "a", "b", "c", *(["timestep"] if step == "timestep" else [])):
        listed = re.search(rf"static let {column}: \[Float\] = \[(.*)\]", swift)
        assert listed
        np.testing.assert_array_equal(np.float32(listed[1].split(", ")), np.float32(TABLES[column]))
    assert ("static let timestep" in swift) == (step == "timestep")
    assert r'["say \"hi\"", "t-shirt", "back\\(slash)", "two\u{a}lines"]' in swift
    assert "[classIndex, Int32(classes.count)]" in swift, "the null class comes last"
    assert "+ 1.5e+00 *" in swift
    assert 'run(denoiser, inputs, "prediction")' in swift


def test_is_for_the_systems_and_the_unit_of_the_plan(tmp_path: Path) -> None:
    new, old = written(tmp_path, unit="npu"), written(tmp_path, target="iOS16", unit="gpu", guided=False)
    assert "@available(iOS 18.0, macOS 15.0, *)" in new
    assert "computeUnits: MLComputeUnits = .cpuAndNeuralEngine" in new
    assert "try await model.prediction" in new
    assert "@available(iOS 16.0, macOS 13.0, *)" in old
    assert ".cpuAndGPU" in old
    assert "await model.prediction" not in old, "that is of iOS 17"
    assert "both" not in old
    packs = written(tmp_path, packs=True)
    assert "case main, `shoes`, `default`" in packs
    assert 'case .`shoes`: return ["t-shirt"]' in packs
    assert "configuration.functionName = pack.rawValue" in packs


def test_tiles_are_those_of_the_decoder(tmp_path: Path) -> None:
    swift, tiles = written(tmp_path, tiles=2), tiles_of(8, 2, 8)
    assert f"let starts = [{tiles.starts[0]}, {tiles.starts[1]}], size = {tiles.size}, scale = 8," in swift
    assert "static func share" not in written(tmp_path, tiles=1)
    assert "width = 64, height = 64, channels = 3" in swift
    assert "size = 4 * 8 * 8" in swift


def test_the_noise_has_a_vector_of_the_specification(tmp_path: Path) -> None:
    swift = written(tmp_path)
    bits = re.findall(r"0x([0-9A-F]{8})[,\]]", swift)
    document = (Path(__file__).parents[2] / "docs/noise.md").read_text()
    assert " ".join(bits).lower() in document
    seed, number, count = map(int, re.search(r"seed: (\d+), number: (\d+), count: (\d+)\)", swift).groups())  # type: ignore[union-attr]
    wanted = gaussian_noise(seed, number, 1, (count,))[0, -4:].view(np.uint32)
    assert [int(each, 16) for each in bits] == wanted.tolist()


def test_the_readme_tells_every_step(tmp_path: Path) -> None:
    told = app_words(values())
    for each in (
        "`coreml/Denoiser.mlpackage`", "target membership", "drawing.cancel()", "increased-memory-limit", "3.05 MiB",
        "os_proc_available_memory", "NSBundleResourceRequest", '"say \\"hi\\""', "cgImage",
    ):  # fmt: skip
        assert each in told, each
    assert SAMPLER not in told
    with_sampler = values()
    with_sampler["models"][SAMPLER] = {"role": "sampler"}
    assert f"Leave `{SAMPLER}` out" in app_words(with_sampler)
    assert "KindEdge(pack: .shoes)" in app_words(values(packs=True))
    assert "`coreml/Decoder.mlpackage`" in app_words(values(tiles=2))
    assert app_words({"models": {}}) == ""
