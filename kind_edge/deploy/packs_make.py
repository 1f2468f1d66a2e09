"""Class packs for a bundle that was exported before: what its checkpoint learned later is a small download, too.

`adapt` freezes everything that classes share, so at the ranks of the bundle's plan the shared part of the adapted
checkpoint is the core's, bit for bit. That is checked layer by layer; then rows are folded for the new classes alone,
and proven in the bundle's own files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.budget.plan import Plan
from kind_edge.deploy import assemble
from kind_edge.deploy.bundle import open_bundle, verified_manifest
from kind_edge.deploy.cut import quality_of, timesteps_of
from kind_edge.deploy.manifest import MANIFEST_NAME, Manifest
from kind_edge.deploy.merge import class_indices, fold, truncate
from kind_edge.deploy.packs import Core
from kind_edge.deploy.packs_bundle import class_packs, copy_files
from kind_edge.deploy.packs_file import ClassPack, pack_bytes, pack_names
from kind_edge.deploy.packs_join import core_of, join
from kind_edge.deploy.packs_recipe import make_core
from kind_edge.deploy.parity import VerifyReport
from kind_edge.deploy.quality import Quality
from kind_edge.deploy.reference import make_images, make_reference
from kind_edge.deploy.replay import check_planned
from kind_edge.deploy.request import OpenedModel, open_model
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint, write_file
from kind_edge.model.one_thread import one_thread
from kind_edge.model.provenance import file_metadata
from kind_edge.model.spec import Ranks
from kind_edge.registry import exporter

DIGEST_DIGITS = 16
_LABELS = "y_embed.weight"
_PARTS = re.compile(r"(\.learngene)?\.(U|s|V|weight|bias)$")
_SHOWN = 4

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class MadePacks:
    """`files`: bytes of every pack by path; `row_bytes` of one class in all model files; `report`: the bundle's files
    with the new classes in them; `quality`: what the core's ranks cost these classes."""

    core_sha256: str
    classes: tuple[str, ...]
    files: Mapping[str, int]
    row_bytes: int
    report: VerifyReport
    quality: tuple[Quality, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "core": self.core_sha256,
            "classes": list(self.classes),
            "packs": dict(self.files),
            "row_bytes": self.row_bytes,
            "parity": self.report.parity,
            "quality": {each.name: each.to_dict() for each in self.quality},
        }


def shared_weights(truncated: Checkpoint) -> dict[str, str]:
    """A digest of every layer that all classes share ("blocks.0.attn.q", "pos_embed"), of its values in float32.

    Of labels only the null one is shared. Learngenes that nest are cut without arithmetic, and so have these digests on
    every machine.
    """
    layers: dict[str, Any] = {}
    for name in sorted(truncated.tensors):
        if ".tailors." in name:
            continue
        tensor = truncated.tensors[name].float()
        values = tensor[-1:] if name == _LABELS else tensor
        digest = layers.setdefault(_PARTS.sub("", name), hashlib.sha256())
        digest.update(f"{name} {list(values.shape)} ".encode() + values.contiguous().numpy().tobytes())
    return {name: digest.hexdigest()[:DIGEST_DIGITS] for name, digest in layers.items()}


def make_packs(
    bundle: str | Path,
    model: str | Path | OpenedModel,
    classes: Sequence[str] | None = None,
    output: str | Path = ".",
    *,
    calibration: str | Path | None = None,
    autoencoder: str | Path | None = None,
    on_stage: OnStage = lambda _: None,
) -> MadePacks:
    """Write a pack for each of these classes of a checkpoint into the folder `output`; they fit the core of `bundle`.

    The checkpoint is the one that the bundle was exported from, or was adapted from it. `classes`: those that the
    bundle lacks unless given. `calibration`: the checkpoint with which the core was cut, where its learngene does not
    nest.

    Raises `InputError` for a checkpoint whose shared weights are not the core's, `GateError` if the bundle's files miss
    their gate with the new classes in them. Then nothing is written.
    """
    on_stage("reading the bundle")
    with open_bundle(bundle) as folder:
        manifest = verified_manifest(folder, str(bundle))
        core = core_of(folder, manifest, str(bundle))
        on_stage("reading the model")
        opened = open_model(model, autoencoder=autoencoder)
        names = _wanted(opened, manifest, classes)
        plan = dataclasses.replace(
            Plan.from_dict(manifest.raw["plan"], f"{MANIFEST_NAME}: plan"),
            model=opened.name, checkpoint_sha256=opened.sha256, classes=names, precisions=(core.precision,),
        )  # fmt: skip
        check_planned(plan, opened.autoencoder)
        on_stage("comparing the weights")
        advice = _advice(manifest.raw)
        _check_shape(opened, plan, advice)
        by = opened if calibration is None else open_model(calibration)
        truncated = truncate(opened.checkpoint, plan, by.calibration)  # never resized: a core of another size is healed
        _check_shared(truncated, core, f"{opened.name} ({opened.sha256[:12]})", advice)
        on_stage("exporting")
        packs = _packs(opened, plan, truncated, core, manifest.models[manifest.default_model].wide_operators)
        on_stage("verifying")
        report = _proven(folder, manifest, core, packs)
    quality = quality_of(opened, plan, truncated)
    files = {
        Path(output, file): pack_bytes(pack, core) for file, pack in zip(pack_names(names).values(), packs, strict=True)
    }
    for path, content in files.items():
        _write(path, content)
    sizes = {str(path): len(content) for path, content in files.items()}
    return MadePacks(core.sha256, names, sizes, core.row_bytes, report, quality)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error}); make room, or choose another place") from error


def _wanted(model: OpenedModel, manifest: Manifest, classes: Sequence[str] | None) -> tuple[str, ...]:
    known = model.checkpoint.class_names
    if classes is None:
        classes = [name for name in known if name not in manifest.classes]
        if not classes:
            raise UsageError(
                f"{model.name} has no class that the bundle lacks ({', '.join(known)}); name some: --classes"
            )
    class_indices(model.checkpoint, tuple(classes))
    if not classes or len(set(classes)) != len(classes):
        raise UsageError(f"--classes: got {', '.join(classes) or 'none'}; want at least one class, each once")
    return tuple(classes)


def _advice(raw: Mapping[str, Any]) -> str:
    """Which checkpoint fits the core of a bundle; `raw` is the manifest."""
    if raw.get("healing", {}).get("kept"):
        return "the bundle was healed, so its shared weights are in no checkpoint but its own healed/: adapt that one"
    source = raw["source"]
    return (
        f"take {source['model']} ({source['checkpoint_sha256'][:12]}), which the bundle was exported from, or what was "
        "adapted from it; or export a new core with its packs: --formats packs"
    )


def _check_shape(model: OpenedModel, plan: Plan, advice: str) -> None:
    """`InputError` for a model that cannot be cut by the core's plan."""
    spec = model.checkpoint.spec
    has = {shape.name: spec.ranks(shape.name) for shape in spec.matrices()}
    for name, matrix in plan.matrices.items():
        wanted = Ranks(matrix.shared_rank, matrix.tailor_rank or 0)
        own = has.pop(name, Ranks(0, 0))
        if wanted.learngene > own.learngene or wanted.tailor > own.tailor:
            raise InputError(
                f"{model.name}: {name}: the core has a learngene of rank {wanted.learngene} and tailors of "
                f"{wanted.tailor}, this model {own.learngene} and {own.tailor}; {advice}"
            )
    if has:
        raise InputError(f"{model.name} has {', '.join(list(has)[:_SHOWN])}, which the core has not; {advice}")
    if plan.inside_guidance != spec.inside_guidance or (spec.distilled and plan.steps not in spec.step_counts):
        raise InputError(
            f"{model.name}: the core takes {plan.steps} steps{_guided(plan.inside_guidance)}, this model "
            f"{', '.join(map(str, spec.step_counts)) or 'any number'}{_guided(spec.inside_guidance)}; {advice}"
        )


def _guided(inside: float | None) -> str:
    return "" if inside is None else f" with guidance {inside:g} inside"


def _check_shared(truncated: Checkpoint, core: Core, model: str, advice: str) -> None:
    """`InputError` that names the layers in which the model is another one than the core's."""
    found = shared_weights(truncated)
    differ = [name for name in {**core.weights, **found} if core.weights.get(name) != found.get(name)]
    if not differ:
        return
    matrices = {shape.name for shape in truncated.spec.matrices()}
    if not truncated.spec.nested and matrices >= set(differ):
        advice += (
            ". Where a learngene does not nest, cutting it follows from the calibration, which adapting changes: then "
            "add --calibration with the checkpoint that the bundle was exported from"
        )
    raise InputError(
        f"{model} has not the weights of the core: {len(differ)} of {len(core.weights)} layers that all classes share "
        f"differ ({', '.join(differ[:_SHOWN])}{', ...' if differ[_SHOWN:] else ''}); {advice}"
    )


def _packs(model: OpenedModel, plan: Plan, truncated: Checkpoint, core: Core, wide: tuple[str, ...]) -> list[ClassPack]:
    """The plan's classes, folded and rounded as the core was."""
    timesteps = timesteps_of(model, plan)
    plain = fold(truncated, plan, timesteps)
    plain.origin = dataclasses.replace(plain.origin, autoencoder=model.autoencoder, wide=wide)
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as place:
        exporter("onnx").export(plain, Path(place), (core.precision,))
        files = {path: Path(place, path).read_bytes() for path in core.files}
    made = make_core(files, len(plan.classes), core.precision, core.sampling, core.weights)[1]
    if made.tables != core.tables:
        raise InputError(
            f"this kind-edge writes other tables ({', '.join(made.tables)}) than the one that wrote the core "
            f"({', '.join(core.tables)}); make the pack with that one, or export a new core"
        )
    with one_thread():
        images = make_images(truncated, plan, model.autoencoder, every_class=True)
        own = model.heldout_of(plan.classes)
        reference = make_reference(truncated, plan.form, timesteps, own) | images
    told = file_metadata(plain.origin.lineage())
    return list(class_packs(made, files, plan.classes, reference, core.sha256, told))


def _proven(folder: Path, manifest: Manifest, core: Core, packs: Sequence[ClassPack]) -> VerifyReport:
    """The bundle's own files with these classes alone, against the gated model."""
    names = {pack.class_name for pack in packs}
    old = [name for name in manifest.classes if name not in names]
    joined = join(folder, manifest, core, load_reference(folder), packs, old)
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as place:
        copy_files(folder, Path(place), manifest, joined)
        made = assemble.manifest_of({**joined.values, "verification": None}, Path(place))
        return verify_models(Path(place), made, joined.reference).require()
