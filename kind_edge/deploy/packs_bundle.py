"""Class packs and bundles on disk: written beside an export, added to a bundle, removed from it. No PyTorch.

Every change makes a whole new bundle, proves it, and takes the old one's place, or leaves it as it was.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.budget.memory import held_bytes
from kind_edge.budget.plan import Plan
from kind_edge.budget.precision import PRECISIONS
from kind_edge.deploy import assemble
from kind_edge.deploy.bundle import (
    hash_files,
    is_signed,
    open_bundle,
    verified_manifest,
    write_manifest,
    writing_bundle,
    zip_bundle,
)
from kind_edge.deploy.manifest import MANIFEST_NAME, Manifest
from kind_edge.deploy.notice import NOTICE, notice
from kind_edge.deploy.packs import CORE_FILE, Core, take_apart
from kind_edge.deploy.packs_file import IMAGES, PACK_SUFFIX, POINTS, ClassPack, pack_bytes, pack_names, read_pack
from kind_edge.deploy.packs_join import Joined, class_reference, core_of, join, read_packs
from kind_edge.deploy.packs_recipe import joinable, make_core
from kind_edge.deploy.parity import VerifyReport
from kind_edge.deploy.signing import SigningKey
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import UsageError
from kind_edge.model.provenance import file_metadata
from kind_edge.registry import packagers

if TYPE_CHECKING:
    from kind_edge.model.spec import ModelSpec

PACKS_FOLDER, CORE_BUNDLE = "packs", "packs/core.zip"
_STAY = ("packs/", "onnx/decoder")
"""Beginnings of what does not depend on the classes; everything else of a bundle is made anew or left out."""
_MADE_ANEW = ("android", "web")
"""Formats whose folders follow from the manifest and the model files."""

_UNKNOWN_NOW: Mapping[str, Any] = {
    "predicted_loss_increase": None, "predicted_frechet": None, "optimality_gap": None, "limits": {}, "binding": [],
    "prices": {},
}  # fmt: skip
"""Of a plan for other classes than it was solved for."""


OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Changed:
    """What adding or removing made: the new bundle, its parity, model files that could not come along, and whether
    it has lost its signature."""

    path: Path
    manifest: Manifest
    report: VerifyReport
    left_out: tuple[str, ...]
    unsigned: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "classes": list(self.manifest.classes),
            "core": self.manifest.raw["packs"]["core"],
            "files": {name: entry.size_bytes for name, entry in self.manifest.files.items()},
            "parity": self.report.parity,
            "left_out": list(self.left_out),
            "unsigned": self.unsigned,
        }


@dataclass(frozen=True)
class Listing:
    """The classes of a bundle, or of a pack the only one; `row_bytes` of one class, `packs` bytes by file name."""

    core_sha256: str
    classes: tuple[str, ...]
    row_bytes: int
    file_row_bytes: Mapping[str, int]
    size_bytes: int
    is_pack: bool
    packs: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "core": self.core_sha256,
            "classes": list(self.classes),
            "row_bytes": self.row_bytes,
            "file_row_bytes": dict(self.file_row_bytes),
            "bytes": self.size_bytes,
            "packs": dict(self.packs),
        }


def list_source(path: Path | str) -> Listing:
    """Of a pack by its suffix, else of a bundle."""
    if Path(path).suffix == PACK_SUFFIX:
        pack = read_pack(path)
        size = Path(path).stat().st_size
        return Listing(pack.core_sha256, (pack.class_name,), pack.row_bytes, {}, size, True, {})
    with open_bundle(path) as folder:
        manifest = verified_manifest(folder, str(path))
        core = core_of(folder, manifest, str(path))
    by_file = {file: sum(core.tables[name].row_bytes for name in core.tables_of(file)) for file in core.files}
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    packs = {n: size for n, size in sizes.items() if n.startswith(f"{PACKS_FOLDER}/") and n.endswith(PACK_SUFFIX)}
    return Listing(core.sha256, manifest.classes, core.row_bytes, by_file, sum(sizes.values()), False, packs)


def change_bundle(
    path: Path | str,
    add: Sequence[Path | str] = (),
    remove: Sequence[str] = (),
    on_stage: OnStage = lambda _: None,
    sign: SigningKey | None = None,
) -> Changed:
    """Add packs to a bundle (folder or `.zip`), or remove classes by name; the bundle is replaced when all is proven.

    A signature of the old bundle says nothing of the new one: it goes, or with `sign` is made anew.

    Raises `InputError` for a pack or a bundle that is damaged or does not fit, `UsageError` for a class that is not
    there, `GateError` if a file of the new bundle misses its gate. Then the bundle is what it was.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        on_stage("reading the bundle")
        folder = stack.enter_context(open_bundle(path))
        manifest, signed = verified_manifest(folder, str(path)), is_signed(folder)
        core = core_of(folder, manifest, str(path))
        packs = read_packs(add, core, manifest.classes)
        on_stage("joining")
        joined = join(folder, manifest, core, load_reference(folder), packs, remove)
        if not joined.classes:
            raise UsageError(f"{path}: that would leave no class; the core alone is {CORE_BUNDLE}")
        destination = path
        if not path.is_dir():
            destination = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kind-edge-")), "bundle")
        with writing_bundle(destination, key=sign) as new:
            report = _fill(folder, new, manifest, joined, on_stage)
        if destination != path:
            zip_bundle(destination, path)
        made = verified_manifest(destination, str(path))
        unsigned = signed and sign is None
    left_out = tuple(name for name in manifest.models if name not in made.models)
    return Changed(path, made, report, left_out, unsigned)


def _fill(old: Path, new: Path, manifest: Manifest, joined: Joined, on_stage: OnStage) -> VerifyReport:
    """Write all of a joined bundle into the folder `new`, and prove its model files."""
    core = core_of(old, manifest, str(old))
    plan = _plan(joined.values["plan"], core, manifest.default_model, joined.classes)
    values = {**joined.values, "plan": plan, "verification": None}
    copy_files(old, new, manifest, joined)
    on_stage("verifying")
    made = assemble.manifest_of(values, new)
    report = verify_models(new, made, joined.reference).require()
    merge_db = manifest.raw.get("verification", {}).get(
        "merge_db"
    )  # of the uncut model: no class joined since changes it
    values["verification"] = {**report.to_dict(), "merge_db": merge_db}
    on_stage("drawing the preview")
    assemble.draw_preview(new, made)
    assemble.write_texts(new, Plan.from_dict(plan, f"{MANIFEST_NAME}: plan"), values)
    for each in packagers([name for name in _MADE_ANEW if any(f.startswith(f"{name}/") for f in manifest.files)]):
        each.write(new, values)
    write_manifest(new, values)
    return report


def copy_files(old: Path, new: Path, manifest: Manifest, joined: Joined) -> None:
    """The joined model files, their reference, and what stays as it is."""
    for name, content in joined.models.items():
        _write(new / name, content)
    assemble.save_reference(new, joined.reference)
    for name in manifest.files:
        if name.startswith(_STAY) and name not in joined.models:
            _write(new / name, (old / name).read_bytes())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _plan(plan: Mapping[str, Any], core: Core, default_model: str, classes: list[str]) -> dict[str, Any]:
    """The plan with other classes: every class has the same share of parameters and bytes."""
    if plan["classes"] == classes:
        return {**plan, "precisions": [core.precision]}
    tables = [core.tables[name] for name in core.tables_of(default_model)]
    counts = (len(plan["classes"]), len(classes))
    held = [sum(held_bytes(count * table.row_bytes) for table in tables) for count in counts]
    more = {
        "params": _params(core, default_model) * (counts[1] - counts[0]),
        "weight_bytes": sum(table.row_bytes for table in tables) * (counts[1] - counts[0]),
        "peak_memory_bytes": held[1] - held[0],
    }
    changed = {name: plan[name] + each for name, each in more.items()}
    return {**plan, **_UNKNOWN_NOW, **changed, "classes": classes, "precisions": [core.precision]}


def _params(core: Core, path: str) -> int:
    """Weights of one class in a file: not the scales of quantized ones, and two to a byte of 4 bits."""
    tables = {name: core.tables[name] for name in core.tables_of(path) if not name.endswith((".scale", ".scales"))}
    return sum(math.prod(table.shape) * (2 if name.endswith(".int4") else 1) for name, table in tables.items())


@dataclass(frozen=True)
class PacksPackager:
    """Writes `packs/`: the core as a bundle without classes, and every class apart."""

    def check(self, spec: ModelSpec) -> None:
        """Which plans can be taken apart is known when there is one."""

    def write(self, folder: Path, values: Mapping[str, Any]) -> None:
        write_packs(folder, values, load_reference(folder))


PACKAGER = PacksPackager()


def check_packable(plan: Plan) -> None:
    """`UsageError` for a plan whose model files are not made of classes."""
    if plan.form != "switch" or PRECISIONS[plan.precision].static:  # type: ignore[index]  # a plan is checked
        raise UsageError(
            f"--formats packs: this plan is {plan.form} in {plan.precision}; only --form switch keeps classes apart, "
            "and ranges that were calibrated (int8-qdq, a16w8) are not for others"
        )


def write_core(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], plan: Plan, weights: Mapping[str, str]
) -> dict[str, Any] | None:
    """Write `packs/core.json` of the files that an app loads of a *switch* bundle, those of the plan's precision.

    `weights` are digests of what they were folded from. Returns the manifest's section; None where classes cannot be
    added or removed.
    """
    files = {
        path: (folder / path).read_bytes()
        for path, entry in entries.items()
        if entry["precision"] == plan.precision and joinable(path, entry)
    }
    if plan.form != "switch" or not files:
        return None
    sampling = {"sampler": plan.sampler, "steps": plan.steps, "guidance": plan.strength}
    text, core = make_core(files, len(plan.classes), plan.precision, sampling, weights)
    _write(folder / CORE_FILE, text)
    return {"core": core.sha256, "order": list(plan.classes)}


def write_packs(folder: Path, values: Mapping[str, Any], reference: Mapping[str, NDArray[Any]]) -> None:
    """Write a pack for every class, and the core as a bundle without classes; `values` are the bundle's manifest."""
    manifest = assemble.manifest_of(values, folder)
    core = core_of(folder, manifest, values["name"])
    files = {path: (folder / path).read_bytes() for path in core.files}
    told = file_metadata(values["provenance"])
    packs = class_packs(core, files, manifest.classes, reference, core.sha256, told)
    for pack, name in zip(packs, pack_names(manifest.classes).values(), strict=True):
        _write(folder / PACKS_FOLDER / name, pack_bytes(pack, core))
    bare = join(folder, manifest, core, reference, remove=manifest.classes)
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as temporary:
        with writing_bundle(Path(temporary, "core")) as new:
            for name in (CORE_FILE, *(name for name in hash_files(folder) if name.startswith(_STAY))):
                if not name.startswith(f"{PACKS_FOLDER}/") or name == CORE_FILE:
                    _write(new / name, (folder / name).read_bytes())
            for name, content in bare.models.items():
                _write(new / name, content)
            assemble.save_reference(new, bare.reference)
            (new / NOTICE).write_text(notice(values), encoding="utf-8")
            # Not what was measured, nor by which commit: the same weights give the same core.
            write_manifest(new, {key: each for key, each in bare.values.items() if key not in ("quality", "revision")})
        zip_bundle(Path(temporary, "core"), folder / CORE_BUNDLE)


def class_packs(
    core: Core,
    files: Mapping[str, bytes],
    classes: Sequence[str],
    reference: Mapping[str, NDArray[Any]],
    fits: str,
    told: Mapping[str, str],
) -> Iterator[ClassPack]:
    """Every class of the model files that `core` describes, as a pack for the core whose hash is `fits`."""
    apart = [take_apart(core, path, content, len(classes))[1] for path, content in files.items()]
    for index, name in enumerate(classes):
        rows = {table: row for own in apart for table, row in own[index].items()}
        yield ClassPack(name, fits, told, rows, _one_per_point(class_reference(reference, index)))


def _one_per_point(rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One image per timestep: half the size, and every class and timestep is still there."""
    _, first = np.unique(rows["step_index"], return_index=True)
    return {name: rows[name][first] for name in POINTS} | {name: rows[name] for name in IMAGES if name in rows}
