"""What every precision keeps of the picture: the shipped model's file in each, with all classes, on one plan's terms.

Images are drawn by the exported files through ONNX Runtime, as many each, from the same noise. SQNR is the worst that
`verify` finds over classes and steps; PSNR the worst of whole images beside those of the gated model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kind_edge.budget.precision import PRECISIONS
from kind_edge.deploy.evaluation import evaluate
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.parity import psnr_db
from kind_edge.deploy.pipeline import export
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.verify import load_reference
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import sampling_of
from kind_edge.units import format_bytes
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject

NAME = "precisions"
PROFILE, UNIT = "snapdragon8g3", "cpu"
"""Any does: nothing is limited, and nothing timed; the CPU runs every precision."""

IMAGES = 2_000


def run(subject: Subject, output: Path, images: int) -> list[Record]:
    store = Store(output, NAME, subject)
    advice = dataclasses.asdict(sampling_of(load_checkpoint(subject.folder)))
    for precision in PRECISIONS:
        conditions = {
            "kind": "precision", "precision": precision, "images": images, "seed": 0, **advice,
            "judge_sha256": Judge.load().judge_sha256,
        }  # fmt: skip
        store.run(f"{precision}-{images}-images", conditions, partial(figures, subject.folder, precision, images))
    return store.finished()


def figures(model: Path, precision: str, images: int) -> dict[str, Any]:
    """The file, how far it is from the gated model, and what the judge says of its images."""
    with TemporaryDirectory() as folder:
        bundle = export(model, profile=PROFILE, precision=precision, unit=UNIT, output=Path(folder, "out"))
        manifest = read_manifest(bundle.path)
        file = manifest.default_model
        quality = evaluate(bundle.path, images, 0).quality
        return {
            **dataclasses.asdict(quality),
            "file_bytes": bundle.files[file],
            "predicted_bytes": bundle.plan.weight_bytes,
            "sqnr_db": bundle.parity[file],
            "psnr_db": worst_psnr_db(bundle.path),
            "wide_operators": list(manifest.models[file].wide_operators),
        }


def worst_psnr_db(bundle: Path) -> float:
    """Of the images that the bundle's reference holds, drawn step by step from the same noise."""
    loaded, reference = load_bundle(bundle), load_reference(bundle)
    drawn = (loaded.sample_float(reference["noise"], reference["image_class"]) + 1) / 2
    return round(min(psnr_db(*pair) for pair in zip(reference["image"], drawn, strict=True)), 2)


def text(records: Sequence[Record]) -> str:
    """One row per precision, of the runs with the most images."""
    if not records:
        return ""
    most = max(record["conditions"]["images"] for record in records)
    by = {r["conditions"]["precision"]: r for r in records if r["conditions"]["images"] == most}
    rows = [_row(by[name]) for name in PRECISIONS if name in by]
    header = ("precision", "file", "SQNR", "gate", "PSNR", "Fréchet", "accuracy", "stays wide")
    own = next(iter(by.values()))["conditions"]
    told = (
        f"`scripts/results precisions`: all classes, {own['sampler']}, {own['steps']} steps, {most:,} images each from "
        f"the same noise, through ONNX Runtime on {next(iter(by.values()))['hardware']}; judge "
        f"{own['judge_sha256'][:12]}."
    )
    return f"{markdown(header, rows)}\n\n{paragraph(told)}"


def _row(record: Record) -> tuple[str, ...]:
    figures, name = record["figures"], record["conditions"]["precision"]
    return (
        f"`{name}`",
        format_bytes(figures["file_bytes"]),
        f"{figures['sqnr_db']:.1f} dB",
        f"{PRECISIONS[name].gate_db:.0f} dB",
        f"{figures['psnr_db']:.1f} dB",
        f"{figures['frechet']:.3f}",
        in_percent(figures["class_accuracy"], 2),
        ", ".join(figures["wide_operators"]) or "nothing",
    )
