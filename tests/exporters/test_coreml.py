"""Core ML packages: the same function in both layouts, compressed or not, and what Xcode is told of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kind_edge.budget.coreml import Packaging, coreml_estimate
from kind_edge.budget.coreml_weights import SMALLEST, WEIGHTS, palette_bytes, palette_group, weights_for
from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling
from kind_edge.budget.profile import load_profile
from kind_edge.deploy import pipeline
from kind_edge.deploy.manifest import ModelEntry, TensorInfo, read_manifest
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.parity import COREML_GATES_DB, psnr_db, sqnr_db
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_images, make_reference
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import verify_images, verify_model
from kind_edge.errors import UsageError
from kind_edge.exporters import coreml_convert
from kind_edge.exporters.coreml_choices import LARGEST_BATCH, check_weights
from kind_edge.exporters.coreml_compress import PREFIXES, clusters, compress, palettized
from kind_edge.exporters.coreml_graph import Denoiser, Sampler
from kind_edge.exporters.coreml_mixed import mixed_bits
from kind_edge.exporters.coreml_package import Description, package_bytes, save_package, weight_bytes
from kind_edge.exporters.coreml_tools import require_coremltools
from kind_edge.exporters.mil_reference import open_package, package_weights
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import branch_of
from kind_edge.registry import exporter

MakeCheckpoint = Callable[..., Checkpoint]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
CLASSES = ("coat", "sneaker", "bag")
WIDE = {"width": 32, "depth": 1, "learngene_rank": 12}
DISTILLED = {"step_counts": (1, 2, 4), "inside_guidance": 1.75}
LABELLED = {"label_embedding": True, "learned_sigma": True, "objective": "epsilon", "channels": 4}
# One matrix of a block each: both storages with and without tailors, and nothing but a tailor.
MATRICES = {
    "attn.q": ("factored", 9, 2), "attn.k": ("dense", 12, 1), "attn.v": ("factored", 5, 0), "attn.o": ("dropped", 0, 2),
    "mlp.fc1": ("dense", 12, 0), "mlp.fc2": ("factored", 12, 2),
}  # fmt: skip
PACKS = (("shoes", ("sneaker",)), ("rest", ("bag", "coat")))
PACKAGE = "Model.mlpackage"
DENOISER, SAMPLER = "coreml/Denoiser.mlpackage", "coreml/Sampler.mlpackage"


def plain_model(checkpoint: Checkpoint, form: str = "switch", dropped: tuple[str, ...] = (), **known: Any) -> PlainDiT:
    """A model of three classes with every kind of matrix, baked unless it has a label embedding."""
    spec = checkpoint.spec
    matrices = {}
    for matrix in spec.matrices():
        storage, shared, tailor = MATRICES[matrix.name.split(".", 2)[2]]
        if branch_of(matrix.name) in dropped:
            storage, shared, tailor = "dropped", 0, 0
        if form == "switch":
            matrices[matrix.name] = MatrixPlan(storage, "fp32", shared, tailor)
        else:
            matrices[matrix.name] = MatrixPlan(storage, "fp32", rank=shared)
    sampler = "euler" if spec.objective == "flow" else "ddim"
    unknown = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(**{
        **unknown, "checkpoint_sha256": "ab" * 32, "model": "tiny", "form": form, "classes": CLASSES, "steps": 2,
        "matrices": matrices, "sampler": sampler, "guidance": 1.0 if spec.distilled else 2.0, "precision": "fp32",
        "evaluations_per_step": 1 if spec.distilled or form != "switch" else 2, "inside_guidance": spec.inside_guidance,
        "modulation": "network" if spec.label_embedding else "baked", **known,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table(sampler, spec.objective, 2).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps)


@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("form", ["switch", "union"])
@pytest.mark.parametrize("overrides", [{}, DISTILLED, LABELLED, {"label_embedding": True, **DISTILLED}])
@pytest.mark.parametrize("modulation", ["baked", "network"])
@pytest.mark.parametrize("dropped", [(), ("blocks.0.attn",), ("blocks.0.attn", "blocks.0.mlp")])
def test_layouts_compute_the_same(
    make_checkpoint: MakeCheckpoint,
    layout: Any,
    form: str,
    overrides: dict[str, Any],
    modulation: str,
    dropped: tuple[str, ...],
) -> None:
    plain = plain_model(make_checkpoint(**{**WIDE, **overrides}), form, dropped, modulation=modulation)
    denoiser, spec = Denoiser(plain, layout, mapped=form == "switch"), plain.spec
    sample = torch.randn(5, spec.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    baked = plain.input_names[1] == "step_index"
    step = torch.tensor([0, 1, 0, 1, 0]).int() if baked else torch.tensor([999.0, 1.0, 500.0, 0.5, 0.0])
    classes = (torch.tensor([0, 1, 2, 2, 1 if spec.distilled else 3]).int(),) if form == "switch" else ()
    assert sqnr_db(plain(sample, step, *classes).numpy(), denoiser(sample, step, *classes).detach().numpy()) > 110


def export(model: PlainDiT, folder: Path, **choices: Any) -> None:
    files = exporter("coreml", choices).export(model, folder, ())
    (folder / "entries.json").write_text(json.dumps({file.path: file.entry for file in files}))


def entry_of(folder: Path, path: str) -> tuple[dict[str, Any], ModelEntry]:
    raw = json.loads((folder / "entries.json").read_text())[path]

    def infos(kind: str) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in raw[kind])

    return raw, ModelEntry(path, raw["role"], raw["precision"], infos("inputs"), infos("outputs"))


def assert_parity(model: PlainDiT, folder: Path) -> None:
    """Every package of the folder against the gated model, by the gates of `kind-edge verify`."""
    origin = model.origin
    reference = make_reference(origin.truncated, origin.plan.form, origin.timesteps, None)
    reference |= make_images(origin.truncated, origin.plan) if model.spec.distilled else {}
    for path in json.loads((folder / "entries.json").read_text()):
        _, entry = entry_of(folder, path)
        if entry.role == "sampler":
            names = type("Manifest", (), {"classes": CLASSES})
            checked = verify_images(folder, entry, reference, names)  # type: ignore[arg-type]
        else:
            checked = verify_model(folder, entry, reference, CLASSES)
        assert checked.failures == (), path
        assert checked.gate_db == COREML_GATES_DB[entry.precision]


@pytest.fixture(scope="module")
def distilled(make_checkpoint: MakeCheckpoint) -> PlainDiT:
    return plain_model(make_checkpoint(**WIDE, **DISTILLED))


@pytest.fixture(scope="module")
def packed(distilled: PlainDiT, made_once: MadeOnce) -> Path:
    """fp16 for iOS18, with two class packs."""
    return made_once("coreml-packs", lambda folder: export(distilled, folder, functions=PACKS))


def specification(path: Path) -> Any:
    return require_coremltools().utils.load_spec(str(path))


def test_packages_keep_their_gates(distilled: PlainDiT, packed: Path) -> None:
    assert_parity(distilled, packed)


def test_xcode_is_told_what_a_package_is(distilled: PlainDiT, packed: Path) -> None:
    for path, inputs in ((DENOISER, ["sample", "step_index", "class_index"]), (SAMPLER, ["noise", "class_index"])):
        described = specification(packed / path).description
        assert described.metadata.license == distilled.origin.lineage()["licence"]
        assert described.metadata.author.startswith("kind-edge")
        assert described.metadata.versionString == "ab" * 6
        assert json.loads(described.metadata.userDefined["classes"]) == list(CLASSES)
        assert [function.name for function in described.functions] == ["main", "shoes", "rest"]
        for function in described.functions:
            assert [each.name for each in function.input] == inputs
            assert all(each.shortDescription for each in [*function.input, *function.output])
            assert "1 sneaker" in function.input[-1].shortDescription or function.name != "main"
            shapes = function.input[0].type.multiArrayType.enumeratedShapes.shapes
            assert [list(shape.shape) for shape in shapes] == [[1, 1, 8, 8], [2, 1, 8, 8]]


def test_class_packs_share_all_weights(distilled: PlainDiT, packed: Path, tmp_path: Path) -> None:
    weights = sum(2 * parameter.numel() for parameter in Denoiser(distilled, "tokens").parameters())
    raw, _ = entry_of(packed, DENOISER)
    tensors = len(list(Denoiser(distilled, "tokens").parameters()))
    padding = tensors * 192  # every tensor starts at 64 bytes, behind a header of 64
    assert raw["functions"] == {name: list(classes) for name, classes in PACKS}
    assert raw["weight_bytes"] <= 1.03 * weights + padding
    sample = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)
    for name, classes in PACKS:
        run, whole = open_package(packed / DENOISER, name), open_package(packed / DENOISER)
        for at, label in enumerate(classes):
            inputs = {"sample": sample, "step_index": np.array([1], np.int32)}
            got = run({**inputs, "class_index": np.array([at], np.int32)})
            wanted = whole({**inputs, "class_index": np.array([CLASSES.index(label)], np.int32)})
            assert np.array_equal(got, wanted), (name, label)


@pytest.fixture(scope="module")
def labelled(make_checkpoint: MakeCheckpoint) -> PlainDiT:
    return plain_model(make_checkpoint(**WIDE, **LABELLED), unit="npu", precision="int4")


@pytest.fixture(scope="module")
def channels(labelled: PlainDiT, made_once: MadeOnce) -> Path:
    """Palettes of 4 bits for iOS16, in the layout for the Neural Engine."""
    return made_once("coreml-channels", lambda folder: export(labelled, folder, target="iOS16"))


def test_the_oldest_target_in_the_neural_engines_layout(labelled: PlainDiT, channels: Path) -> None:
    assert_parity(labelled, channels)  # timesteps up to 999 among them: their sines are not for fp16
    raw, entry = entry_of(channels, DENOISER)
    assert (entry.precision, raw["layout"], raw["target"]) == ("palette4", "channels", "iOS16")
    found = specification(channels / DENOISER)
    assert list(found.description.input[0].type.multiArrayType.shape) == [2, 4, 8, 8]  # class and null in one call
    assert not (channels / SAMPLER).exists()
    kinds = {op.type for block in found.mlProgram.functions["main"].block_specializations.values()
             for op in block.operations}  # fmt: skip
    assert {"conv", "constexpr_lut_to_dense", "layer_norm"} <= kinds
    assert not kinds & {"transpose", "rsqrt"}
    weights = package_weights(channels / DENOISER)
    assert all(name.startswith(PREFIXES) for name, array in weights.items() if np.size(array) >= SMALLEST), "not fused"


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(labelled: PlainDiT, channels: Path, tmp_path: Path) -> None:
    torch.save(labelled, tmp_path / "model.pt")
    script = """
import sys, torch, pathlib
from kind_edge.registry import exporter
model = torch.load(sys.argv[1], weights_only=False)
exporter("coreml", {"target": "iOS16"}).export(model, pathlib.Path(sys.argv[2]), ())
"""
    command = [sys.executable, "-P", "-W", "ignore", "-c", script, str(tmp_path / "model.pt"), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"}, stdout=subprocess.DEVNULL)
    files = [path.relative_to(channels) for path in (channels / "coreml").rglob("*") if path.is_file()]
    assert len(files) == 3
    for file in files:
        assert (channels / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.fixture(scope="module")
def program(distilled: PlainDiT) -> Any:
    denoiser = Denoiser(distilled, "tokens")
    return coreml_convert.convert(denoiser, coreml_convert.interface_of(denoiser), "iOS18", (1, 2))


def test_compression_keeps_gates_and_tables(program: Any, distilled: PlainDiT, tmp_path: Path) -> None:
    origin, sizes = distilled.origin, {}
    reference = make_reference(origin.truncated, origin.plan.form, origin.timesteps, None)
    inputs = {name: reference[name] for name in distilled.input_names}
    bits = mixed_bits(Denoiser(distilled, "tokens"), program, origin, "iOS18")
    assert set(bits) <= {matrix.name for matrix in distilled.spec.matrices()}
    for weights in WEIGHTS:
        path = tmp_path / f"{weights}.mlpackage"
        chosen = bits if weights == "mixed" else weights
        save_package(compress(program, chosen, "iOS18"), path, Description("", "", "", "", {}))
        run = exporter("coreml").open(path)
        assert sqnr_db(reference["prediction"], run(inputs)) >= COREML_GATES_DB[weights], weights
        sizes[weights] = weight_bytes(path)
        assert weight_bytes(path) < package_bytes(path)
    assert sizes["palette4"] < sizes["palette6"] < sizes["palette8"] < sizes["fp16"]
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"]
    assert sizes["mixed"] <= sizes["fp16"]


@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_sizes_are_as_predicted(layout: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Of a model whose weights are most of its package, as those of real ones are."""
    plain = plain_model(make_checkpoint(width=192, depth=1, learngene_rank=12, num_classes=3), unit="cpu")
    denoiser, plan = Denoiser(plain, layout), plain.origin.plan
    interface = coreml_convert.interface_of(denoiser)
    request = Request(load_profile("apple-a18"), CLASSES, Sampling("euler", 2, 2.0, 2), "switch")
    candidate = Candidate("switch", "fp32", "cpu", "baked")
    deployment = Deployment(
        make_checkpoint(width=192, depth=1, learngene_rank=12, num_classes=3).spec, request, candidate
    )
    targets: dict[Any, tuple[Any, ...]] = {"iOS18": ("fp16", "int8", "palette4"), "iOS16": ("int8",)}
    for target, ways in targets.items() if layout == "tokens" else [("iOS18", ("fp16", "int4"))]:
        program = coreml_convert.convert(denoiser, interface, target, (2,))
        for weights in ways:
            save_package(compress(program, weights, target), tmp_path / PACKAGE, Description("", "", "", "", {}))
            found = coreml_estimate(deployment, plan.matrices, Packaging(target, weights, layout))
            assert package_bytes(tmp_path / PACKAGE) == pytest.approx(found["denoiser_bytes"], rel=0.03), (
                target,
                weights,
            )


def test_any_batch_and_the_whole_loop_without_a_switch(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """In the layout for the Neural Engine, and with blocks of four bits though ranks do not divide by 32."""
    plain = plain_model(make_checkpoint(**WIDE), "union")
    sampler = Sampler(Denoiser(plain, "channels"), sampler_table("euler", "flow", 2))
    program = coreml_convert.convert(sampler, coreml_convert.interface_of(sampler), "iOS18", None)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for weights in ("fp16", "int4"):
        save_package(compress(program, weights, "iOS18"), tmp_path / PACKAGE, Description("", "", "", "", {}))
        shape = specification(tmp_path / PACKAGE).description.input[0].type.multiArrayType.shapeRange.sizeRanges[0]
        assert (shape.lowerBound, shape.upperBound) == (1, LARGEST_BATCH)
        image = exporter("coreml").open(tmp_path / PACKAGE)({"noise": noise.numpy()})
        assert psnr_db(sampler(noise).detach().numpy(), image) >= COREML_GATES_DB[weights]


def test_running_a_package_needs_neither_torch_nor_coremltools(packed: Path) -> None:
    script = """
import sys, pathlib
from kind_edge.registry import exporter
exporter("coreml").open(pathlib.Path(sys.argv[1]))
assert not {"torch", "onnx", "coremltools"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-P", "-c", script, str(packed / SAMPLER)], check=True)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(2, 20), st.sampled_from([4, 6, 8]), st.integers(0, 9))
def test_palettes_are_good_and_of_one_class_alone(classes: int, size: int, bits: int, seed: int) -> None:
    shape = (classes, 4 * size, 8)
    tailors = np.random.default_rng(seed).normal(size=shape).astype(np.float16)
    table, indices = clusters(tailors, bits)
    assert len(table) == 2**bits
    found = np.unique(table[indices])
    lost = np.abs(tailors.ravel() - table[indices])
    assert (lost <= np.abs(tailors.reshape(-1, 1) - found).min(1) + 2e-3).all()  # each has the nearest, which is fp16
    even = np.linspace(tailors.min(), tailors.max(), 2**bits).astype(np.float32)
    assert (lost**2).sum() <= (np.abs(tailors.reshape(-1, 1) - even).min(1) ** 2).sum() + 1e-3
    if palette_group(shape, bits, "iOS18") == 1 < classes:
        other = tailors.copy()
        other[-1] *= 2  # another class's weights do not matter
        assert np.array_equal(palettized(other, bits, "iOS18")[:-1], palettized(tailors, bits, "iOS18")[:-1])
    assert palette_bytes(shape, bits, "iOS18") <= 1.06 * palette_bytes(shape, bits, "iOS16") + 2**9


def test_what_a_target_lacks_is_refused(distilled: PlainDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_for("int4", "iOS17") == "palette4"
    assert [weights_for(name, "iOS18") for name in ("fp32", "fp16", "int8", "a16w8", "int4")] == [
        "fp16", "fp16", "int8", "int8", "int4",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="blocks of 4 bits need iOS18"):
        check_weights("int4", "iOS16")
    for choices, said in [
        ({"functions": PACKS, "target": "iOS17"}, "need iOS18"),
        ({"functions": (("main", ("bag",)),)}, "not main"),
        ({"functions": (("two", ("bag", "bag")),)}, "each class once"),
    ]:
        with pytest.raises(UsageError, match=said):
            exporter("coreml", choices).check(distilled.spec)
    with pytest.raises(UsageError, match="unknown class 'bagg'; did you mean: bag"):
        exporter("coreml", {"functions": (("one", ("bagg",)),)}).export(distilled, tmp_path, ())
    monkeypatch.setitem(sys.modules, "coremltools.optimize.coreml", None)
    with pytest.raises(UsageError, match=r"pip install 'kind-edge\[coreml\]'"):
        exporter("coreml").check(distilled.spec)


def test_a_failed_conversion_names_module_and_operator(distilled: PlainDiT) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor, pick: object) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    broken = Denoiser(distilled, "tokens")
    broken.blocks[0].mlp.fc1, broken.blocks[0].mlp.fc2 = Odd(), Odd()
    with pytest.raises(UsageError, match=r"module 'blocks\.0\.mlp\.fc1', operator special_bessel_j0"):
        coreml_convert.convert(broken, coreml_convert.interface_of(broken), "iOS18", (1,))


@pytest.mark.slow
def test_a_bundle_with_packages_proves_itself(
    tiny_folder: Path, tmp_path: Path, parse_swift: Callable[[str], Any]
) -> None:
    asked: dict[str, Any] = {"profile": "apple-a18", "classes": ["shirt", "bag"], "precision": "int8"}
    uncut = pipeline.plan(tiny_folder, **asked)
    written = {"formats": ["coreml"], "format_choices": {"coreml": {"target": "iOS17", "layout": "channels"}}}
    limit = int(uncut.coreml["app_bytes"])  # of smaller packages than these
    asked |= {**written, "max_size": f"{limit}B"}
    bundle = pipeline.export(tiny_folder, **asked, output=tmp_path / "b")
    assert bundle.plan == pipeline.plan(tiny_folder, **asked)
    assert bundle.plan.weight_bytes < uncut.weight_bytes < limit, "the packages alone were too large"
    assert bundle.parity[DENOISER] >= COREML_GATES_DB["int8"]
    assert DENOISER not in bundle.latency  # Core ML runs on Apple's systems alone
    entry = read_manifest(bundle.path).raw["models"][DENOISER]
    assert (entry["precision"], entry["target"], entry["layout"]) == ("int8", "iOS17", "channels")
    size = sum(size for name, size in bundle.files.items() if name.startswith(DENOISER))
    assert size == entry["package_bytes"] <= limit
    assert (bundle.plan.coreml["weights"], bundle.plan.coreml["target"]) == ("int8", "iOS17")
    assert pipeline.verify(bundle.path).parity == bundle.parity
    report = (bundle.path / "report.html").read_text()
    assert "Core ML packages" in report
    assert "int8, iOS17, channels" in report
    assert "target membership" in (bundle.path / "README.md").read_text()

    swift = (bundle.path / "coreml/KindEdge.swift").read_text()
    parse_swift(swift)
    made = re.findall(r'inputs\["(\w+)"\] = MLMultiArray\(MLShapedArray<(\w+)>\(.*shape: \[batch(.*)\]\)\)', swift)
    found = {name: (kind, [int(size) for size in shape.split(",")[1:]]) for name, kind, shape in made}
    kinds = {65568: "Float", 131104: "Int32"}
    arrays = {each.name: each.type.multiArrayType for each in specification(bundle.path / DENOISER).description.input}
    assert found == {name: (kinds[array.dataType], list(array.shape)[1:]) for name, array in arrays.items()}
