"""A bundle with other classes: joined from what its files share, from its own rows, and from packs. numpy alone.

Symbols: K classes of the bundle.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.deploy.manifest import Manifest
from kind_edge.deploy.packs import CORE_FILE, Core, join_file, read_core, take_apart
from kind_edge.deploy.packs_file import IMAGES, POINTS, ClassPack, check_pack, read_pack
from kind_edge.errors import InputError, UsageError, unknown


@dataclass(frozen=True)
class Joined:
    """`values`: the manifest but for its files and what is measured; its plan is the one that the ranks come from.
    `models`: content by path."""

    values: Mapping[str, Any]
    models: Mapping[str, bytes]
    reference: Mapping[str, NDArray[Any]]

    @property
    def classes(self) -> list[str]:
        return list(self.values["classes"])


def core_of(folder: Path, manifest: Manifest, where: str) -> Core:
    """The core of a bundle that lies in `folder`; a `UsageError` where it has none."""
    told = manifest.raw.get("packs")
    if CORE_FILE not in manifest.files or not isinstance(told, dict):
        raise UsageError(
            f"{where}: its classes cannot be changed: it has no {CORE_FILE}, which every bundle of --form switch has "
            "unless its ranges were calibrated (int8-qdq, a16w8); export it again"
        )
    core = read_core((folder / CORE_FILE).read_bytes(), f"{where}: {CORE_FILE}")
    missing = [path for path in core.files if path not in manifest.models]
    if told.get("core") != core.sha256 or not isinstance(told.get("order"), list) or missing:
        raise InputError(f"{where}: {CORE_FILE} is not that of this bundle; export or copy it again")
    if manifest.default_model not in core.files:
        raise UsageError(
            f"{where}: {manifest.default_model} cannot take other classes; export it for those that you want "
            f"({', '.join(core.files)} can)"
        )
    return core


def read_packs(files: Sequence[Path | str], core: Core, classes: Sequence[str]) -> list[ClassPack]:
    """Packs for a bundle of these classes: checked, each class once, none that is there already."""
    packs: list[ClassPack] = []
    for file in files:
        pack = read_pack(file)
        check_pack(pack, core, str(file))
        if pack.class_name in classes:
            raise InputError(
                f"{file}: the bundle has {pack.class_name!r} already; take it out first: kind-edge pack remove"
            )
        if any(pack.class_name == other.class_name for other in packs):
            raise InputError(f"{file}: {pack.class_name!r} is given twice; want every class once")
        packs.append(pack)
    return packs


def join(
    folder: Path,
    manifest: Manifest,
    core: Core,
    reference: Mapping[str, NDArray[Any]] | None,
    add: Sequence[ClassPack] = (),
    remove: Sequence[str] = (),
    only: Collection[str] | None = None,
) -> Joined:
    """The bundle in `folder` with packs added and classes removed; `only` these of its model files, if given.

    `reference` is that of the bundle; None leaves it out. Classes keep the order of the export, whatever order they
    come in; those that it did not know stand at the end.
    Raises `UsageError` for a class that is not there, `InputError` for files that are not the core's.
    """
    for name in remove:
        if name not in manifest.classes:
            raise unknown("class", name, manifest.classes)
    told = manifest.raw["packs"]
    order = list(dict.fromkeys([*told["order"], *manifest.classes, *(pack.class_name for pack in add)]))
    present = {*manifest.classes, *(pack.class_name for pack in add)} - set(remove)
    classes = [name for name in order if name in present]
    models = {}
    for path in core.files if only is None else only:
        shared, own = take_apart(core, path, (folder / path).read_bytes(), len(manifest.classes))
        rows: dict[str, Mapping[str, bytes]] = dict(zip(manifest.classes, own, strict=True))
        rows |= {pack.class_name: pack.rows for pack in add}
        models[path] = join_file(core, path, shared, [rows[name] for name in classes])
    values = _values(manifest, core, classes, order, add)
    return Joined(values, models, {} if reference is None else _reference(manifest, reference, classes, add))


def _values(
    manifest: Manifest, core: Core, classes: list[str], order: list[str], add: Sequence[ClassPack]
) -> dict[str, Any]:
    """What the manifest says of the same core with these classes."""
    values: dict[str, Any] = copy.deepcopy({
        key: value for key, value in manifest.raw.items() if key not in ("files", "latency", "verification", "report")
    })  # fmt: skip
    values["classes"] = classes
    kept = [path for path, entry in manifest.models.items() if path in core.files or entry.role == "decoder"]
    values["models"] = {path: values["models"][path] for path in kept}
    if manifest.sampler.null_index is not None:
        values["sampler"]["null_index"] = len(classes)
    values["packs"] = {"core": core.sha256, "order": order}
    values["provenance"] = _provenance(values, classes, add)
    quality = values.get("quality", {})  # of added classes nothing was measured here
    values["quality"] = {name: each for name, each in quality.items() if name in classes or name not in order}
    return values


def _provenance(values: Mapping[str, Any], classes: list[str], add: Sequence[ClassPack]) -> dict[str, Any]:
    """The lineage of the rest, and under `later` what packs of other checkpoints say of their classes."""
    told = values.get("provenance")
    found = dict(told) if isinstance(told, dict) else {}
    before = found.pop("later", None)
    later = {name: own for name, own in before.items() if name in classes} if isinstance(before, dict) else {}
    source = values["source"]["checkpoint_sha256"]
    later |= {pack.class_name: dict(pack.told) for pack in add if pack.told["checkpoint_sha256"] != source}
    return {**found, **({"later": later} if later else {})}


def _reference(
    manifest: Manifest, stored: Mapping[str, NDArray[Any]], classes: list[str], add: Sequence[ClassPack]
) -> dict[str, NDArray[Any]]:
    """Reference rows of these classes, class after class, those of the null class at the end, numbered anew."""
    for pack in add:
        _check_reference(pack, stored)
    packs = {pack.class_name: pack.reference for pack in add}
    points: dict[str, list[NDArray[Any]]] = {name: [] for name in (*POINTS, "class_index")}
    images: dict[str, list[NDArray[Any]]] = {name: [] for name in (*IMAGES, "image_class")}

    def put(parts: dict[str, list[NDArray[Any]]], label: str, rows: Mapping[str, NDArray[Any]], number: int) -> None:
        for name in rows:
            parts[name].append(rows[name])
        count = len(next(iter(rows.values()))) if rows else 0
        parts[label].append(np.full(count, number, np.int64))

    for number, name in enumerate(classes):
        rows = packs[name] if name in packs else class_reference(stored, manifest.classes.index(name))
        put(points, "class_index", {key: rows[key] for key in POINTS}, number)
        put(images, "image_class", {key: rows[key] for key in IMAGES if key in rows}, number)
    null = class_reference(stored, len(manifest.classes))
    put(points, "class_index", {key: null[key] for key in POINTS}, len(classes))
    put(images, "image_class", {key: stored[key][:0] for key in IMAGES if key in stored}, 0)
    return {name: np.concatenate(parts) for name, parts in (points | images).items() if parts}


def _check_reference(pack: ClassPack, stored: Mapping[str, NDArray[Any]]) -> None:
    """A pack's reference must be of the bundle's shapes and types."""
    for name in (*POINTS, *(name for name in IMAGES if name in stored)):
        found, wanted = pack.reference.get(name), stored[name]
        if found is None or (found.dtype, found.shape[1:]) != (wanted.dtype, wanted.shape[1:]):
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise InputError(
                f"the pack of {pack.class_name!r}: verify/{name}: got {got}, want {wanted.dtype} "
                f"[n, {', '.join(map(str, wanted.shape[1:]))}]; export it again"
            )


def class_reference(stored: Mapping[str, NDArray[Any]], index: int) -> dict[str, NDArray[Any]]:
    """The reference rows of one class of a bundle."""
    rows = {name: stored[name][stored["class_index"] == index] for name in POINTS}
    if "image_class" in stored:
        rows |= {name: stored[name][stored["image_class"] == index] for name in IMAGES if name in stored}
    return rows
