"""Does an artefact compute the same function? Layers: names, types, shapes, finiteness, then its distance in dB.

Of a denoiser SQNR per class and timestep, of a sampler or decoder PSNR per image; the worst one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.bounded import read_npz
from kind_edge.deploy.manifest import Manifest, ModelEntry, TensorInfo
from kind_edge.deploy.parity import FileParity, VerifyReport, gate_db, gates_db, psnr_db, sqnr_db
from kind_edge.errors import InputError
from kind_edge.model.tiles import Tiles, in_tiles, tiles_of
from kind_edge.registry import Interpreter, exporter

REFERENCE_FILE = "verify/reference.npz"
TIMESTEPS = 5
REFERENCE_ARRAYS = {"sample", "step_index", "timestep", "class_index", "prediction"}
IMAGE_ARRAYS = {"noise", "image_class", "image"}
"""Whole images of the gated model; only what `kind-edge` 0.1.0 wrote is without."""
LATENT_ARRAYS = IMAGE_ARRAYS | {"latent"}
"""The same of a model of latents with its decoder: `image` is decoded from `latent`."""

_OF_IMAGES = {"noise": "noise", "latent": "latent", "class_index": "image_class"}
"""Inputs of samplers and decoders, and where the reference has them."""

Reference = Mapping[str, NDArray[Any]]


def load_reference(folder: Path) -> Reference:
    path = folder / REFERENCE_FILE
    reference = read_npz(path, "the stored reference")
    images = {name: reference[name] for name in LATENT_ARRAYS & set(reference)}
    whole = LATENT_ARRAYS if "latent" in images else IMAGE_ARRAYS
    for names, found in ((REFERENCE_ARRAYS, set(reference) - set(images)), (whole, set(images) or whole)):
        if found != names or len({len(reference[name]) for name in found if name in reference}) > 1:
            raise InputError(f"{path}: want arrays of one length named {', '.join(sorted(names))}")
    return reference


def verify_models(folder: Path, manifest: Manifest, reference: Reference) -> VerifyReport:
    """Compare every model file of a bundle that lies in `folder` with the reference, which must cover everything.

    `InputError` if the reference lacks a class, the null class or a timestep: a gap must not pass for parity.
    """
    manifest.require_classes("BUNDLE")
    sampler = manifest.sampler
    labels = 1
    if manifest.switches:
        labels = len(manifest.classes) + (sampler.null_index is not None)
    steps = min(TIMESTEPS, len(sampler.tables))
    points = set(zip(reference["class_index"].ravel().tolist(), reference["step_index"].ravel().tolist(), strict=True))
    if {c for c, _ in points} != set(range(labels)) or len(points) != labels * steps:
        raise InputError(f"{REFERENCE_FILE}: has {len(points)} points, want {labels} classes at {steps} timesteps each")
    return VerifyReport(
        tuple(
            verify_images(folder, entry, reference, manifest)
            if entry.role in ("sampler", "decoder")
            else verify_model(folder, entry, reference, manifest.classes)
            for manifest, entry, reference in with_functions(manifest, reference)
        )
    )


def with_functions(manifest: Manifest, reference: Reference) -> Iterator[tuple[Manifest, ModelEntry, Reference]]:
    """Every model file with what to compare it with; every further function of one as a file of its own, with its own
    classes ("coreml/Denoiser.mlpackage#shoes")."""
    for entry in manifest.models.values():
        yield manifest, entry, reference
        for name, classes in entry.functions.items():
            own = _of_classes(reference, [manifest.classes.index(known) for known in classes], len(manifest.classes))
            if entry.role == "denoiser" or len(own.get("image", ())):  # whole images are stored of some classes only
                yield replace(manifest, classes=classes), replace(entry, path=f"{entry.path}#{name}"), own


def _of_classes(reference: Reference, classes: list[int], null: int) -> Reference:
    """The points and images of these classes, numbered anew by their order, and of the null class, which comes last."""
    order = [*classes, null]
    chosen = dict(reference)
    for index in ("class_index", "image_class"):
        if index in reference:
            kept = np.isin(reference[index], order)
            together = LATENT_ARRAYS if index == "image_class" else REFERENCE_ARRAYS
            chosen |= {name: reference[name][kept] for name in together & set(reference)}
            numbers = [order.index(number) for number in chosen[index].tolist()]
            chosen[index] = np.array(numbers, reference[index].dtype)
    return chosen


def verify_model(folder: Path, entry: ModelEntry, reference: Reference, classes: tuple[str, ...]) -> FileParity:
    """One denoiser; its format is the first part of its path."""
    gate = _gate_db(entry)
    failures = list(_interface_failures(entry, reference))
    points: list[Mapping[str, Any]] = []
    if not failures:
        run = exporter(entry.path.split("/")[0]).open(folder / entry.path)
        output = _evaluate(run, entry, reference)
        failures += _output_failures(entry.outputs[0], output, reference["prediction"])
        if not failures:
            points = list(_points(output, reference, classes))
            failures += [
                f"{point['class']} at step {point['step_index']}: {point['sqnr_db']:.1f} dB, want {gate:.0f} dB or more"
                for point in points
                if point["sqnr_db"] < gate
            ]
    worst = min((point["sqnr_db"] for point in points), default=None)
    return FileParity(entry.path, gate, worst, tuple(points), tuple(failures))


def verify_images(folder: Path, entry: ModelEntry, reference: Reference, manifest: Manifest) -> FileParity:
    """One sampler: its images, one call each, beside those that the gated model draws from the same noise; or one
    decoder, from the same latents."""
    gate, tiles = _gate_db(entry), _tiles(entry, manifest)
    failures = list(_image_failures(entry, reference, tiles))
    points: list[Mapping[str, Any]] = []
    if not failures:
        run = exporter(entry.path.split("/")[0]).open(folder / entry.path)
        inputs = {name: reference[_OF_IMAGES[name]] for name in entry.input_names() if name in _OF_IMAGES}
        once = (
            {"guidance": np.array(manifest.sampler.guidance, np.float32)} if "guidance" in entry.input_names() else {}
        )
        if tiles is not None:
            parts = [in_tiles(lambda piece: run({"latent": piece}), one[None], tiles) for one in reference["latent"]]
        else:
            each = range(len(reference["image"]))
            parts = [run({n: a[at : at + 1] for n, a in inputs.items()} | once) for at in each]
        output = np.concatenate(parts)
        failures += _output_failures(entry.outputs[0], output, reference["image"])
        if not failures:
            names = [manifest.classes[c] for c in reference["image_class"]]
            values = [round(psnr_db(*pair), 2) for pair in zip(reference["image"], output, strict=True)]
            points = [{"class": name, "psnr_db": value} for name, value in zip(names, values, strict=True)]
            failures += [
                f"the image of {name} is {value:.1f} dB from the gated model's, want {gate:.0f} dB or more"
                for name, value in zip(names, values, strict=True)
                if value < gate
            ]
    worst = min((point["psnr_db"] for point in points), default=None)
    return FileParity(entry.path, gate, worst, tuple(points), tuple(failures))


def _gate_db(entry: ModelEntry) -> float:
    gates = gates_db(entry.role, entry.path)
    for precision in (entry.precision, entry.table_precision or entry.precision):
        if precision not in gates:
            raise InputError(f"{entry.path}: precision {precision!r}, want one of {', '.join(gates)}")
    return gate_db(entry.role, entry.precision, entry.table_precision, entry.path)


def _class_index_type(entry: ModelEntry) -> str:
    """Core ML has no 64-bit integers, and NPUs do not want them."""
    return "int32" if entry.path.startswith("coreml/") or entry.fixed_batch is not None else "int64"


def _tiles(entry: ModelEntry, manifest: Manifest) -> Tiles | None:
    """Of a decoder in Core ML, which makes one tile of a picture at a time; others have their tiles inside."""
    if entry.role != "decoder" or not entry.path.startswith("coreml/") or manifest.latent is None:
        return None
    count = manifest.raw.get("decoder", {}).get("tiles", 1)
    if type(count) is not int or not 1 <= count <= manifest.latent.height:
        raise InputError(f"decoder.tiles: got {count!r:.60}, want 1 to {manifest.latent.height}")
    return tiles_of(manifest.latent.height, count, manifest.image.height // manifest.latent.height)


def _image_failures(entry: ModelEntry, reference: Reference, tiles: Tiles | None) -> Iterator[str]:
    """Names, types and shapes of a sampler's or decoder's inputs, as the bundle contract has them."""
    first = "latent" if entry.role == "decoder" else "noise"
    if not set(reference) >= IMAGE_ARRAYS | {first} or not len(reference["image"]):
        yield f"the reference holds no images to compare a {entry.role}'s with; export again"
        return
    shape = list(reference[first].shape[1:]) if tiles is None else [reference[first].shape[1], tiles.size, tiles.size]
    known: dict[str, tuple[str, list[int | str]]] = {first: ("float32", ["batch", *shape])}
    if entry.role == "sampler":
        known |= {"class_index": (_class_index_type(entry), ["batch"]), "guidance": ("float32", [])}
    if entry.input_names()[:1] != (first,):
        rest = ", then class_index and guidance where it has them" if entry.role == "sampler" else " alone"
        yield f"inputs are {list(entry.input_names())}, want {first}{rest}"
    for tensor in entry.inputs:
        if (tensor.dtype, list(tensor.shape)) != known.get(tensor.name):
            wanted = "{} {}".format(*known[tensor.name]) if tensor.name in known else "no such input"
            yield f"input {tensor.name} is {tensor.dtype} {list(tensor.shape)}, want {wanted}"
    if [tensor.name for tensor in entry.outputs] != ["image"]:
        yield f"outputs are {[tensor.name for tensor in entry.outputs]}, want image alone"


def _interface_failures(entry: ModelEntry, reference: Reference) -> Iterator[str]:
    """Names, types and shapes of the inputs, as the bundle contract has them."""
    known = {"sample": "float32", "step_index": "int32", "timestep": "float32", "class_index": _class_index_type(entry)}
    names = entry.input_names()
    if names[:1] != ("sample",) or len({"step_index", "timestep"} & set(names)) != 1:
        yield f"inputs are {list(names)}, want sample, then step_index or timestep, then class_index if it switches"
    for tensor in entry.inputs:
        if tensor.name not in known:
            yield f"unknown input {tensor.name!r}"
            continue
        wanted = tuple(reference[tensor.name].shape[1:])
        if tensor.dtype != known[tensor.name]:
            yield f"input {tensor.name} is {tensor.dtype}, want {known[tensor.name]}"
        if tuple(tensor.shape[1:]) != wanted:
            yield f"input {tensor.name} has shape {list(tensor.shape)}, want [batch, {', '.join(map(str, wanted))}]"
    if [tensor.name for tensor in entry.outputs] != ["prediction"]:
        yield f"outputs are {[tensor.name for tensor in entry.outputs]}, want prediction alone"


def _output_failures(declared: TensorInfo, output: NDArray[Any], wanted: NDArray[Any]) -> Iterator[str]:
    if str(output.dtype) != declared.dtype or declared.dtype != "float32":
        yield f"{declared.name} is {output.dtype}, the manifest says {declared.dtype}, want float32"
    if output.shape != wanted.shape:
        yield f"{declared.name} has shape {list(output.shape)}, want {list(wanted.shape)}"
    elif not np.isfinite(output).all():
        yield f"{declared.name} holds {int((~np.isfinite(output)).sum())} values that are not finite"


def _evaluate(run: Interpreter, entry: ModelEntry, reference: Reference) -> NDArray[Any]:
    """All points; int8 one by one, because dynamic quantization has one range for a whole batch.

    A fixed batch is filled up with the last point.
    """
    inputs = {tensor.name: reference[tensor.name].astype(tensor.dtype) for tensor in entry.inputs}
    count = len(reference["sample"])
    dynamic = entry.precision == "int8" and entry.path.startswith("onnx/")  # one range for the whole batch
    size = entry.fixed_batch or (1 if dynamic else count)
    rows = [np.minimum(np.arange(at, at + size), count - 1) for at in range(0, count, size)]
    return np.concatenate([run({name: array[own] for name, array in inputs.items()}) for own in rows])[:count]


def _points(output: NDArray[Any], reference: Reference, classes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """SQNR of every class and timestep of the reference."""
    pairs = sorted(set(zip(reference["class_index"].tolist(), reference["step_index"].tolist(), strict=True)))
    for c, step in pairs:
        here = (reference["class_index"] == c) & (reference["step_index"] == step)
        name = classes[c] if c < len(classes) else "null"
        value = sqnr_db(reference["prediction"][here], output[here])
        yield {"class": name, "step_index": step, "sqnr_db": round(value, 2)}
