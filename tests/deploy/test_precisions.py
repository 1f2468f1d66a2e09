"""Bundles in precisions that are asked for by name, or chosen for a unit: written alone, proven, and ready to draw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from kind_edge.budget.plan import read_plan
from kind_edge.budget.precision import PRECISIONS, Precision, denoiser_path
from kind_edge.cli.options import PrecisionChoice
from kind_edge.deploy import pipeline
from kind_edge.deploy.cut import make_cut
from kind_edge.deploy.merge import fold
from kind_edge.deploy.parity import psnr_db
from kind_edge.deploy.request import open_model
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import load_reference
from kind_edge.errors import InputError, UsageError
from kind_edge.registry import exporters

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
PHONE, CLASSES = "snapdragon8g3", ["shirt", "bag"]
OTHERS = {"manifest.json", "plan.json", "README.md", "NOTICE", "preview.png", "report.html", "verify/full.png"}
OTHERS |= {"verify/reference.npz"}


def made(tiny_folder: Path, made_once: MadeOnce, unit: str, precision: str) -> Path:
    def export(folder: Path) -> None:
        asked = {"profile": PHONE, "classes": CLASSES, "unit": unit, "precision": precision}
        pipeline.export(tiny_folder, **asked, output=folder / "b")  # type: ignore[arg-type]

    return made_once(f"precision-{unit}-{precision}", export) / "b"


@pytest.mark.parametrize(("unit", "precision"), [("npu", "auto"), ("cpu", "int4")])
def test_a_bundle_of_another_precision(
    unit: str, precision: str, tiny_folder: Path, made_once: MadeOnce, tmp_path: Path
) -> None:
    bundle = made(tiny_folder, made_once, unit, precision)
    plan = read_plan(bundle / "plan.json")
    assert plan.precision == precision or (precision, plan.precision) in {("auto", "int8-qdq"), ("auto", "a16w8")}
    assert (plan.unit, plan.precisions, plan.latency_source) == (unit, (plan.precision,), "roofline estimate")
    static, file = PRECISIONS[plan.precision].static, denoiser_path(plan.precision)  # type: ignore[index]
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == OTHERS | {file} | (set() if static else {"onnx/sampler.onnx", "packs/core.json"})
    assert (bundle / file).stat().st_size == pytest.approx(
        plan.weight_bytes, rel=0.1
    )  # names weigh most in one so tiny
    assert pipeline.verify(bundle, checkpoint=tiny_folder).passed
    assert ("no control flow" in (bundle / "README.md").read_text()) == static

    loaded, reference = load_bundle(bundle), load_reference(bundle)
    assert loaded.batch_images == (1 if static else 32)
    drawn = (loaded.sample_float(reference["noise"], reference["image_class"]) + 1) / 2
    worst = min(psnr_db(*pair) for pair in zip(reference["image"], drawn, strict=True))
    assert worst > PRECISIONS[plan.precision].image_gate_db  # type: ignore[index]
    assert np.array_equal(loaded.generate("bag", n=3)[:1], loaded.generate("bag", n=1)) or not static

    if static:
        again = pipeline.export(tiny_folder, plan=plan, output=tmp_path / "again")
        assert (again.path / file).read_bytes() == (bundle / file).read_bytes()


@pytest.mark.slow
def test_a_file_in_int8_keeps_the_size_that_its_plan_promised(tmp_path: Path) -> None:
    """Or `plan --max-size -o` would write plans that `export --plan` refuses: never larger, and by little smaller."""
    model = open_model("fashion-mnist")
    plan = pipeline.plan(model, profile=PHONE, classes=["bag"], form="single", precision="int8", max_size="1MiB")
    table = sampler_table(plan.sampler, model.checkpoint.spec.objective, plan.steps)
    plain = fold(make_cut(model, plan).truncated, plan, torch.from_numpy(table.timestep))
    (onnx,) = exporters(("onnx",))
    onnx.export(plain, tmp_path, ("int8",))
    spare_bytes = plan.weight_bytes - (tmp_path / denoiser_path("int8")).stat().st_size
    assert 0 <= spare_bytes <= 0.01 * plan.weight_bytes


def test_a_plan_says_what_it_is(tiny_folder: Path, made_once: MadeOnce, tmp_path: Path) -> None:
    """Plans that were changed by hand: matrices of another precision, and units that do not run it."""
    values = json.loads((made(tiny_folder, made_once, "cpu", "int4") / "plan.json").read_text())
    first = next(iter(values["matrices"].values()))
    for change, message in (
        ({"unit": "gpu"}, "int4, which does not run on the gpu"),
        ({"precision": "a16w8", "precisions": ["a16w8"]}, "is a16w8, but its matrix"),
        ({"precisions": ["int4", "int3"]}, "precisions int4, int3 cannot be written"),
    ):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(InputError, match=message):
            pipeline.export(tiny_folder, plan=read_plan(path), output=tmp_path / "out")
    first["precision"] = "fp32"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"is int4, but its matrix .* is fp32"):
        pipeline.export(tiny_folder, plan=read_plan(path), output=tmp_path / "out")


def test_the_command_line_knows_every_precision() -> None:
    assert get_args(PrecisionChoice) == ("auto", *PRECISIONS)
    assert get_args(Precision) == tuple(PRECISIONS)


def test_what_a_unit_cannot_run_is_refused_at_once(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="--precision int8: runs on cpu, not on npu"):
        pipeline.plan(tiny_folder, profile=PHONE, precision="int8", unit="npu")
    with pytest.raises(UsageError, match="value for --precision 'int5'"):
        pipeline.plan(tiny_folder, profile=PHONE, precision="int5")
