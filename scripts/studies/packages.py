"""Core ML packages of the shipped model: what every way to store weights takes, and how close each stays.

Sizes are of the whole package `Denoiser`, beside the fp32 ONNX file of the same plan; distances are of the saved
package, run in NumPy, from the gated model: SQNR, worst over classes and timesteps, as `kind-edge verify` has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from kind_edge.budget.coreml_weights import WEIGHTS, Layout, Target, Weights
from kind_edge.deploy.cut import make_cut
from kind_edge.deploy.merge import fold
from kind_edge.deploy.parity import COREML_GATES_DB, sqnr_db
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.request import open_model
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.exporters.coreml_choices import batches, class_sets
from kind_edge.exporters.coreml_compress import compress, forget_clusters
from kind_edge.exporters.coreml_convert import convert, interface_of
from kind_edge.exporters.coreml_functions import add_functions
from kind_edge.exporters.coreml_graph import Denoiser
from kind_edge.exporters.coreml_mixed import mixed_bits
from kind_edge.exporters.coreml_package import Description, package_bytes, save_package, weight_bytes
from kind_edge.registry import exporter
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject

NAME = "coreml"
PROFILE = "apple-a18"
KINDS: tuple[tuple[Target, Layout, tuple[Weights, ...]], ...] = (
    ("iOS18", "tokens", WEIGHTS),
    ("iOS18", "channels", ("fp16", "int8", "palette4")),
    ("iOS16", "tokens", ("fp16", "int8", "palette4", "palette6")),
)

SETS = ("shoes", "tops", "bag")
"""Class packs that are measured, each a function of one package: the shoes, what is worn above, and one class alone."""
_OF_SETS: Mapping[str, tuple[str, ...]] = {
    "shoes": ("sandal", "sneaker", "ankle-boot"), "tops": ("t-shirt", "pullover", "coat", "shirt"), "bag": ("bag",),
}  # fmt: skip
SHARED_WAYS: tuple[Weights, ...] = ("fp16", "int8")


def run(subject: Subject, output: Path) -> list[Record]:
    store = Store(output, NAME, subject)
    for target, layout, ways in KINDS:
        conditions = {
            "kind": "packages", "profile": PROFILE, "target": target, "layout": layout, "weights": list(ways),
        }  # fmt: skip
        store.run(
            f"{target.lower()}-{layout}", conditions, functools.partial(_measured, subject.folder, target, layout, ways)
        )
    forget_clusters()
    for way in SHARED_WAYS:
        conditions = {"kind": "functions", "profile": PROFILE, "sets": list(SETS), "weights": way}
        store.run(f"functions-{way}", conditions, functools.partial(_functions, subject.folder, way))
    return store.finished()


@functools.cache
def _plain(folder: Path) -> PlainDiT:
    """The model of the profile's plan."""
    opened = open_model(folder)
    plan = make_plan(opened, profile=PROFILE, precision="fp32")
    table = sampler_table(plan.sampler, opened.checkpoint.spec.objective, plan.steps)
    return fold(make_cut(opened, plan).truncated, plan, torch.from_numpy(table.timestep))


def _measured(folder: Path, target: Target, layout: Layout, ways: Sequence[Weights]) -> dict[str, Any]:
    model = _plain(folder)
    denoiser = Denoiser(model, layout)
    sizes = batches(target, "fixed", model.origin.plan.evaluations_per_step)
    program = convert(denoiser, interface_of(denoiser), target, sizes)
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        rows = [{"weights": way, **_package(model, denoiser, program, way, target, place)} for way in ways]
    return {"onnx_fp32_bytes": _onnx_bytes(folder), "packages": rows}


@functools.cache
def _onnx_bytes(folder: Path) -> int:
    with TemporaryDirectory() as temporary:
        exporter("onnx").export(_plain(folder), Path(temporary), ("fp32",))
        return Path(temporary, "onnx/denoiser.onnx").stat().st_size


def _package(
    model: PlainDiT, denoiser: Denoiser, program: Any, weights: Weights, target: Target, folder: Path
) -> dict[str, Any]:
    chosen = mixed_bits(denoiser, program, model.origin, target) if weights == "mixed" else weights
    path = folder / f"{weights}.mlpackage"
    save_package(compress(program, chosen, target), path, Description("", "", "", "", {}))
    origin = model.origin
    reference = make_reference(origin.truncated, origin.plan.form, origin.timesteps, None)
    output = exporter("coreml").open(path)({name: reference[name] for name in model.input_names})
    found = {"package_bytes": package_bytes(path), "sqnr_db": min(_distances(reference, output))}
    if isinstance(chosen, Mapping):
        found["bits"] = dict(chosen)
    return found


def _functions(folder: Path, weights: Weights) -> dict[str, Any]:
    """One package for all classes and each of SETS: its weight file beside that of all classes alone, and beside the
    bare tensors, the core's and every tailor's (fp16; compressed ones have no bytes but those of a file)."""
    model = _plain(folder)
    denoiser = Denoiser(model, "tokens", mapped=True)
    sizes = batches("iOS18", "fixed", model.origin.plan.evaluations_per_step)
    program = compress(convert(denoiser, interface_of(denoiser), "iOS18", sizes), weights, "iOS18")
    nothing = Description("", "", "", "", {})
    null = len(model.origin.plan.classes) if model.origin.plan.null_branch else None
    sets = class_sets(tuple(_OF_SETS.items()), model.origin.plan.classes, null is not None)
    with TemporaryDirectory() as temporary:
        single, joined = Path(temporary, "single.mlpackage"), Path(temporary, "packs.mlpackage")
        save_package(program, single, nothing)
        save_package(add_functions(single, sets, Path(temporary)), joined, nothing)
        return {
            "tensor_bytes": sum(2 * parameter.numel() for parameter in denoiser.parameters()),
            "single_weight_bytes": weight_bytes(single),
            "weight_bytes": weight_bytes(joined),
            "single_package_bytes": package_bytes(single),
            "package_bytes": package_bytes(joined),
        }


def _distances(reference: Mapping[str, Any], output: Any) -> Iterator[float]:
    """Of every class at every timestep."""
    points = np.stack([reference["class_index"], reference["step_index"]], 1)
    for point in np.unique(points, axis=0):
        here = (points == point).all(1)
        yield round(sqnr_db(reference["prediction"][here], output[here]), 2)


def text(records: Sequence[Record]) -> str:
    """One table: a row for every target, layout and way to store weights."""
    shared = [record for record in records if record["conditions"]["kind"] == "functions"]
    records = [record for record in records if record not in shared]
    header = ("target, layout, weights", "package", "of the fp32 ONNX file", "SQNR", "gate")
    rows = [row for record in records for row in _rows(record)]
    figures = records[0]["figures"] if records else {"onnx_fp32_bytes": 0}
    told = (
        f"The shipped model's plan for {PROFILE}: package `Denoiser`, all classes; the fp32 ONNX file of the same plan "
        f"has {figures['onnx_fp32_bytes']:,} bytes:"
    )
    parts = [paragraph(told), markdown(header, rows), paragraph(_bits(records)), *_shared_text(shared)]
    return "\n\n".join(part for part in parts if part)


def _shared_text(records: Sequence[Record]) -> Iterator[str]:
    """What class packs cost."""
    if not records:
        return
    packs = ", ".join(f"`{name}` ({len(classes)})" for name, classes in _OF_SETS.items())
    yield paragraph(
        f"Class packs: one package for iOS18 with all classes and the functions {packs}, beside a package with all "
        "classes alone. The core and all tailors are the bare tensors, in fp16:"
    )
    header = ("weights", "weight file", "of all classes alone", "core and all tailors", "larger by", "package")
    yield markdown(header, [_shared_row(record) for record in records])


def _shared_row(record: Record) -> tuple[str, ...]:
    weights, found = record["conditions"]["weights"], record["figures"]
    bare = found["tensor_bytes"] if weights == "fp16" else None
    larger = found["weight_bytes"] / (bare or found["single_weight_bytes"]) - 1
    return (
        weights, f"{found['weight_bytes']:,} B", f"{found['single_weight_bytes']:,} B", f"{bare:,} B" if bare else "",
        in_percent(larger, 2), f"{found['package_bytes']:,} B",
    )  # fmt: skip


def _rows(record: Record) -> Iterator[tuple[str, ...]]:
    own, figures = record["conditions"], record["figures"]
    for row in figures["packages"]:
        share = row["package_bytes"] / figures["onnx_fp32_bytes"]
        yield (
            f"{own['target']}, {own['layout']}, {row['weights']}", f"{row['package_bytes']:,} B", in_percent(share, 1),
            f"{row['sqnr_db']:.1f} dB", f"{COREML_GATES_DB[row['weights']]:.0f} dB",
        )  # fmt: skip


def _bits(records: Sequence[Record]) -> str:
    """How many matrices have how many bits, where the solver chose."""
    told = []
    for record in records:
        for row in record["figures"]["packages"]:
            counts = {bits: list(row.get("bits", {}).values()).count(bits) for bits in (4, 6, 8, 16)}
            if any(counts.values()):
                chosen = ", ".join(f"{count} of {bits} bits" for bits, count in counts.items() if count)
                told.append(f"{record['conditions']['target']}, {record['conditions']['layout']}: {chosen}")
    return f"Matrices in mixed: {'; '.join(told)}." if told else ""
