"""The whole way, from a checkpoint folder to a bundle that proves itself, and every way in which it must fail."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import kind_edge
import kind_edge.exporters.onnx_precisions as onnx_precisions
from kind_edge.budget.plan import Plan, read_plan
from kind_edge.budget.profile import HOST, load_profile
from kind_edge.deploy import pipeline
from kind_edge.deploy.assemble import latency_gate
from kind_edge.deploy.bench import LatencyReport
from kind_edge.deploy.bundle import zip_bundle
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.merge import truncate
from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.request import open_model
from kind_edge.deploy.runtime import load_bundle, to_pixels
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import GateError, InputError, NoPlanError, UsageError
from kind_edge.model.sampling import guided, sample

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
DEVICE = "raspberry-pi-5"
FP32, INT8 = "onnx/denoiser.onnx", "onnx/denoiser.int8.onnx"
SAMPLER = "onnx/sampler.onnx"
CORE = "packs/core.json"
FILES = {"manifest.json", "plan.json", "README.md", "NOTICE", "preview.png", "report.html", "verify/full.png"}
FILES |= {"verify/reference.npz", FP32, INT8, SAMPLER, CORE}


@pytest.fixture(scope="module")
def made(exported_bundle: Path) -> Path:
    return exported_bundle


@pytest.fixture(scope="module")
def bundle(made: Path) -> Path:
    return made / "b"


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_bundle_holds_what_its_manifest_says(made: Path, bundle: Path, tiny_folder: Path) -> None:
    assert files_of(bundle) == FILES
    manifest, printed = read_manifest(bundle), json.loads((made / "export.json").read_text())
    assert set(manifest.files) == FILES - {"manifest.json"}
    assert (manifest.raw["licence"], manifest.raw["provenance"]["data"][0]["licence"]) == ("CC0-1.0", "MIT")
    assert "CC0-1.0" in (bundle / "NOTICE").read_text()
    props = {entry.key: entry.value for entry in onnx.load_model(bundle / SAMPLER).metadata_props}
    assert "model" not in props  # a name is that of a folder, and the same checkpoint gives the same bytes in any
    assert (props["model_license"], props["training_data"][:26]) == ("CC0-1.0", "Fashion-MNIST (licence MIT")
    assert manifest.classes == ("shirt", "bag")
    assert manifest.sampler.null_index == 2
    assert (manifest.sampler.steps, manifest.sampler.guidance, len(manifest.sampler.tables)) == (4, 1.5, 4)
    assert manifest.raw["source"]["checkpoint_sha256"] == open_model(tiny_folder).sha256
    assert manifest.raw["plan"] == printed["plan"] == json.loads((bundle / "plan.json").read_text())
    assert printed["files"].keys() == FILES
    assert all(printed["files"][name] == (bundle / name).stat().st_size for name in FILES)
    assert printed["parity"].keys() == {FP32, INT8, SAMPLER}
    assert printed["parity"][SAMPLER] >= 80
    assert printed["parity"][FP32] >= 100 > printed["parity"][INT8] >= 25
    assert printed["merge_parity"] >= 100
    assert set(printed["quality"]) == {"shirt", "bag", "null"}
    assert all(times["p50"] <= times["p90"] <= times["p99"] for times in printed["latency_ms"].values())
    assert manifest.raw["verification"]["passed"] is True
    assert manifest.raw["latency"]["models"][FP32]["conditions"]["provider"]
    assert not [name for name in FILES if str(Path.home()).encode() in (bundle / name).read_bytes()]
    readme = (bundle / "README.md").read_text()
    assert all(word in readme for word in ("shirt", "bag", "step_index", "class_index", manifest.default_model))


@pytest.mark.slow
def test_a_single_call_draws_the_loop_s_images(bundle: Path) -> None:
    """Guided, through the manifest's own contract: the sampler in the graph and the loop outside it are one."""
    loop, once = load_bundle(bundle, threads=1), load_bundle(bundle, model=SAMPLER, threads=1)
    assert once.model.input_names() == ("noise", "class_index", "guidance")
    assert f"`{SAMPLER}`" in (bundle / "README.md").read_text()
    noise = np.random.default_rng(0).standard_normal((2, *loop.noise_shape), dtype=np.float32)
    classes = np.array([0, 1])
    wanted, got = loop.sample_float(noise, classes), once.sample_float(noise, classes)
    assert np.abs(wanted - got).max() < 1e-5
    wrong = load_reference(bundle)
    wrong = {**wrong, "image": wrong["image"][::-1]}
    failures = verify_models(bundle, read_manifest(bundle), wrong).failures
    assert failures
    assert all(f"{SAMPLER}: the image of" in failure for failure in failures)


@pytest.mark.slow
def test_the_plan_was_cut_and_the_prediction_of_its_size_is_close(bundle: Path) -> None:
    plan = read_plan(bundle / "plan.json")
    assert plan.predicted_loss_increase > 0
    assert plan.binding == ("max_flops",)
    assert plan.flops <= 0.6 * plan.dense["flops"]
    file = bundle / {"fp32": FP32, "int8": INT8}[plan.precision]
    # A tiny model's file is mostly nodes, of which the prediction counts a few hundred bytes each.
    assert abs(plan.weight_bytes - file.stat().st_size) < 300 * len(onnx.load_model(file).graph.node)


@pytest.mark.slow
def test_images_are_those_of_the_gated_model(bundle: Path, tiny_folder: Path) -> None:
    """ONNX Runtime with the manifest's tables against PyTorch with diffusers' scheduler, from the same noise."""
    opened, plan = open_model(tiny_folder), read_plan(bundle / "plan.json")
    model = truncate(opened.checkpoint, plan, opened.calibration).model()
    noise = torch.from_numpy(gaussian_noise(7, 0, 3, (1, 8, 8)))
    for index, name in enumerate(("shirt", "bag")):
        classes = torch.full((3,), index)
        images = sample(guided(model, 1.5, 2), noise, classes, "flow", 4).numpy()
        got = load_bundle(bundle, model="fp32").generate(name, n=3, seed=7)
        assert got.dtype == np.uint8
        assert np.abs(got.astype(int) - to_pixels(images.astype(np.float32)).astype(int)).max() <= 1
    loaded = kind_edge.load_bundle(bundle)
    assert not np.array_equal(loaded.generate("bag"), loaded.generate("shirt"))


@pytest.mark.slow
def test_verify_passes_for_folder_zip_and_checkpoint(bundle: Path, tiny_folder: Path, tmp_path: Path) -> None:
    report = pipeline.verify(bundle)
    assert report.passed
    assert report.gates == {FP32: 100, INT8: 25, SAMPLER: 80}
    assert len(report.files[0].points) == 3 * 4
    assert pipeline.verify(zip_bundle(bundle, tmp_path / "b.zip")).parity == report.parity
    anew = pipeline.verify(bundle, checkpoint=tiny_folder)
    assert anew.passed
    assert anew.parity != report.parity  # other noise, another reference


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_a_changed_byte_is_noticed(name: str, copy: Path) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: sha256 is") as caught:
        pipeline.verify(copy)
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_verifying_against_another_checkpoint_is_refused(
    bundle: Path, tmp_path: Path, make_checkpoint_folder: Callable[..., Path]
) -> None:
    other = make_checkpoint_folder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="the plan was made for checkpoint"):
        pipeline.verify(bundle, checkpoint=other)
    with pytest.raises(InputError, match="solve again"):
        pipeline.export(other, plan=read_plan(bundle / "plan.json"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_replayed_plan_gives_the_same_bytes(bundle: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Interrupted before it is measured, as only the model files matter here; `keep_failed` keeps them."""
    plan = read_plan(bundle / "plan.json")
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(
            tiny_folder, plan=plan, output=tmp_path / "again", keep_failed=True, on_stage=interrupt_at("measuring")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["again.failed"]
    for name in (FP32, INT8, "verify/reference.npz"):
        assert (tmp_path / "again.failed" / name).read_bytes() == (bundle / name).read_bytes(), name


def interrupt_at(wanted: str) -> Callable[[str], None]:
    def on_stage(stage: str) -> None:
        if stage == wanted:
            raise KeyboardInterrupt

    return on_stage


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices", [{"classes": ["bag"]}, {"max_size": "1MB"}, {"steps": 3}, {"guidance": 2.0}, {"form": "union"}]
)
def test_a_plan_is_replayed_as_it_is(choices: dict[str, Any], bundle: Path, tiny_folder: Path) -> None:
    plan = read_plan(bundle / "plan.json")
    with pytest.raises(UsageError, match="--plan has its own --" + next(iter(choices)).replace("_", "-")):
        pipeline.export(tiny_folder, plan=plan, **choices)
    with pytest.raises(UsageError, match="the plan was made for raspberry-pi-5"):
        pipeline.export(tiny_folder, plan=plan, profile="apple-a18")


@pytest.fixture
def graph_of_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Spare the seconds of exporting: the bundle's own graph is taken, with one weight off by a share of itself."""

    def take(error: float = 0.0) -> None:
        graph = onnx.load_model(bundle / FP32)
        weight = next(t for t in graph.graph.initializer if t.name == "patch_embed.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1 + error), weight.name))
        monkeypatch.setattr(onnx_precisions, "to_onnx", lambda model: graph)

    return take


@pytest.mark.slow
@pytest.mark.parametrize("keep_failed", [False, True])
def test_a_file_that_computes_something_else_is_not_shipped(
    keep_failed: bool, bundle: Path, tiny_folder: Path, tmp_path: Path, graph_of_bundle: Callable[[float], None]
) -> None:
    graph_of_bundle(1e-3)
    plan = read_plan(bundle / "plan.json")
    words = r"parity failed: onnx/denoiser\.onnx: shirt at step 0: .* want 100 dB"
    with pytest.raises(GateError, match=words) as caught:
        pipeline.export(tiny_folder, plan=plan, output=tmp_path / "out", keep_failed=keep_failed)
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == (["out.failed"] if keep_failed else [])


@pytest.mark.slow
def test_a_size_limit_is_checked_on_the_file(
    bundle: Path, tiny_folder: Path, tmp_path: Path, graph_of_bundle: Callable[[float], None]
) -> None:
    graph_of_bundle(0.0)
    plan = read_plan(bundle / "plan.json")
    size = (bundle / read_manifest(bundle).default_model).stat().st_size
    tight = dataclasses.replace(plan, limits={**plan.limits, "max_size": float(size - 1)})
    with pytest.raises(GateError, match=r"--max-size: the model file takes .*, 1 B over the limit"):
        pipeline.export(tiny_folder, plan=tight, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_that_turns_out_too_large_is_solved_again(
    tmp_path: Path, make_checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction is made too small on purpose; the second plan leaves room for what the first file showed."""
    import kind_edge.budget.graph_bytes as graph_bytes

    folder = make_checkpoint_folder(tmp_path / "model", depth=1, width=32, learngene_rank=12)
    monkeypatch.setattr(graph_bytes, "GRAPH_BYTES_PER_OPERATOR", 20)
    asked: dict[str, Any] = {"profile": DEVICE, "classes": ["bag"], "precision": "fp32", "form": "single"}
    limit = pipeline.plan(folder, **asked).weight_bytes + 1000
    stages: list[str] = []

    def on_stage(stage: str) -> None:
        stages.append(stage)
        if stage == "measuring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.export(
            folder, **asked, max_size=f"{limit}B", output=tmp_path / "out", keep_failed=True, on_stage=on_stage
        )
    assert stages.count("exporting") == 2
    assert (tmp_path / "out.failed" / FP32).stat().st_size <= limit


@pytest.mark.slow
def test_single_has_no_class_input_and_two_of_them_are_larger_than_a_switch(
    bundle: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"profile": DEVICE, "classes": ["bag"], "form": "single", "max_flops": "60%"}
    single = pipeline.export(tiny_folder, **asked, precision="fp32", output=tmp_path / "single")
    assert files_of(single.path) == FILES - {INT8, CORE}
    assert single.files == {name: (single.path / name).stat().st_size for name in FILES - {INT8, CORE}}
    assert (single.plan.form, single.plan.guidance, single.plan.evaluations_per_step) == ("single", 1.0, 1)
    manifest = read_manifest(single.path)
    assert manifest.models[FP32].input_names() == ("sample", "step_index")
    assert manifest.sampler.null_index is None
    assert pipeline.verify(single.path, checkpoint=tiny_folder).passed
    assert single.merge_db >= 100
    assert load_bundle(single.path).generate(n=2).shape == (2, 8, 8, 1)
    assert manifest.models[SAMPLER].input_names() == ("noise",)
    assert (bundle / FP32).stat().st_size < 2 * single.files[FP32]


@pytest.mark.parametrize("stage", ["reading the model", "planning", "merging", "exporting"])
def test_an_interrupt_leaves_nothing(stage: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(tiny_folder, profile=DEVICE, output=tmp_path / "out", on_stage=interrupt_at(stage))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_noticed_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise GateError("merge: at full rank the merged model differs: 40.0 dB, want at least 100 dB")

    monkeypatch.setattr("kind_edge.deploy.cut.check_merge", refuse)
    with pytest.raises(GateError, match="merge"):
        pipeline.export(tiny_folder, profile=DEVICE, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_is_checked_before_anything_is_made(tiny_folder: Path, tmp_path: Path) -> None:
    ask: dict[str, Any] = {"output": tmp_path / "out", "profile": DEVICE}
    with pytest.raises(UsageError, match="unknown profile"):
        pipeline.export(tiny_folder, output=tmp_path / "out", profile="raspberry-pie-5")
    with pytest.raises(UsageError, match="--profile is missing"):
        pipeline.export(tiny_folder, output=tmp_path / "out")
    with pytest.raises(UsageError, match="unknown format"):
        pipeline.export(tiny_folder, **ask, formats=["onnxx"])
    with pytest.raises(InputError, match="no checkpoint folder"):
        pipeline.export(tmp_path / "none", **ask)
    with pytest.raises(NoPlanError, match="--max-size"):
        pipeline.export(tiny_folder, **ask, max_size="1kB")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a kind-edge bundle"):
        pipeline.export(tiny_folder, **ask)
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_the_checkpoint_is_only_read(tiny_folder: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tiny_folder.iterdir()}
    first = pipeline.plan(tiny_folder, profile=DEVICE, max_flops="60%")
    assert pipeline.plan(tiny_folder, profile=DEVICE, max_flops="60%") == first  # and a plan is a function of its input
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tiny_folder.iterdir()} == before


@pytest.mark.slow
def test_the_latency_gate_is_for_this_machine_alone(made: Path, bundle: Path) -> None:
    plan = read_plan(bundle / "plan.json")
    report = LatencyReport(**read_manifest(bundle).raw["latency"]["image"])
    limit_ns = report.p90_ms * 1e6

    def gate(device: str, limits: dict[str, float]) -> None:
        profile = dataclasses.replace(load_profile(DEVICE), name=device)
        latency_gate(dataclasses.replace(plan, limits=limits), profile, report)

    gate(HOST, {"max_latency": limit_ns * 1.01})
    gate(HOST, {})
    gate(DEVICE, {"max_latency": limit_ns / 2})
    with pytest.raises(GateError, match=r"--max-latency: one image took .* here \(p90 of 5\)"):
        gate(HOST, {"max_latency": limit_ns * 0.99})


def test_plans_are_values(tiny_folder: Path, tmp_path: Path) -> None:
    plan = kind_edge.plan(tiny_folder, profile=DEVICE, classes=["bag"])
    assert isinstance(plan, Plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    assert read_plan(tmp_path / "plan.json") == plan
