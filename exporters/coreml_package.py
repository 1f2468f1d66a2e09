"""A package on disk: described for Xcode, and the same bytes for the same model."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kind_edge.exporters.coreml_tools import quiet, require_coremltools

PROGRAM, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
AUTHOR = "com.apple.CoreML"


@dataclass(frozen=True)
class Description:
    """What Xcode shows of a model: texts of the model and of its inputs and outputs by name, and free `facts`.

    `function_facts`: of a package with several functions, the classes of each.
    """

    short: str
    author: str
    licence: str
    version: str
    features: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)


def save_package(source: Any, path: Path, description: Description) -> None:
    """Write an `MLModel`, or the package at a path, as `path`, described.

    Identifiers are derived from the contents, and nothing in it tells time, place or machine.
    """
    ct = require_coremltools()
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as temporary, quiet():
        raw = source
        if not isinstance(source, Path):
            raw = Path(temporary, "raw.mlpackage")
            source.save(str(raw))
        spec = ct.utils.load_spec(str(raw))
        _describe(spec.description, description)
        program = spec.SerializeToString(deterministic=True)
        shutil.rmtree(path, ignore_errors=True)
        (path / "Data" / WEIGHTS).mkdir(parents=True)
        (path / "Data" / PROGRAM).write_bytes(program)
        for file in sorted((raw / "Data" / WEIGHTS).iterdir()):
            shutil.copyfile(file, path / "Data" / WEIGHTS / file.name)
    (path / "Manifest.json").write_text(json.dumps(_manifest(path), indent=4, sort_keys=True) + "\n", encoding="utf-8")


def weight_bytes(path: Path) -> int:
    """Of the weight file, which every function of a package shares."""
    return sum(file.stat().st_size for file in (path / "Data" / WEIGHTS).iterdir())


def package_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _describe(target: Any, description: Description) -> None:
    """Into the specification: of every function where there are several."""
    metadata = target.metadata
    metadata.shortDescription, metadata.author = description.short, description.author
    metadata.license, metadata.versionString = description.licence, description.version
    metadata.userDefined.clear()  # coremltools notes the day there
    for key, value in description.facts.items():
        metadata.userDefined[key] = value
    for each in [target, *target.functions]:
        for feature in [*each.input, *each.output]:
            feature.shortDescription = description.features.get(feature.name, "")


def _manifest(path: Path) -> dict[str, Any]:
    """Manifest.json, with identifiers made from the contents in place of random ones."""
    entries = {}
    for item, what in ((PROGRAM, "CoreML Model Specification"), (WEIGHTS, "CoreML Model Weights")):
        place = path / "Data" / item
        digest = hashlib.sha256()
        for file in [place] if place.is_file() else sorted(place.iterdir()):
            digest.update(file.read_bytes())
        identifier = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{item} {digest.hexdigest()}")).upper()
        entries[identifier] = {"author": AUTHOR, "description": what, "name": Path(item).name, "path": item}
    root = next(name for name, entry in entries.items() if entry["path"] == PROGRAM)
    return {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
