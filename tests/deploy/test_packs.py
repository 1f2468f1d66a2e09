"""Class packs: joined files are what an export would write, byte for byte, and nothing that does not fit gets in."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kind_edge.budget.plan import read_plan
from kind_edge.budget.profile import load_profile
from kind_edge.deploy import pipeline
from kind_edge.deploy.bundle import open_bundle
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.packs import Core, CoreFile, Table, bare_sha256, join_file, take_apart
from kind_edge.deploy.packs_bundle import change_bundle
from kind_edge.deploy.packs_file import pack_bytes, pack_names, read_pack
from kind_edge.deploy.packs_join import core_of
from kind_edge.deploy.packs_recipe import make_core
from kind_edge.deploy.request import as_replayed, make_source, open_model
from kind_edge.deploy.runtime import load_bundle
from kind_edge.errors import GateError, InputError, UsageError
from kind_edge.registry import exporter

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
DEVICE = "raspberry-pi-5"
ROOT = Path(__file__).parents[2]
CLASSES = ("sneaker", "bag", "coat", "shirt")
FP32, MODELS = "onnx/denoiser.onnx", ("onnx/denoiser.int8.onnx", "onnx/sampler.onnx")
"""The plan is int8: that is what an app loads, and what its packs hold."""


@pytest.fixture(scope="module")
def direct(tiny_folder: Path, fold_plan: Any, packed: Path, made_once: MadeOnce) -> Path:
    """The same plan's model files for two of the classes, written by the exporter itself."""
    plan = dataclasses.replace(read_plan(packed / "plan.json"), classes=("sneaker", "coat"))
    return made_once(
        "packs-direct", lambda f: exporter("onnx").export(fold_plan(tiny_folder, plan), f, plan.precisions)
    )


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(packed, tmp_path / "bundle"))


def pack_of(packed: Path, name: str) -> Path:
    return packed / "packs" / f"{name}.safetensors"


def models_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MODELS}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_core_and_packs_are_a_direct_export(packed: Path, direct: Path, tmp_path: Path) -> None:
    """In whichever order they are added; with a manifest that is true, and images that are those of the export."""
    core = Path(shutil.copy(packed / "packs/core.zip", tmp_path))
    changed = change_bundle(core, [pack_of(packed, name) for name in ("coat", "sneaker")])
    assert [path.name for path in tmp_path.iterdir()] == ["core.zip"]
    assert changed.manifest.classes == ("sneaker", "coat")
    assert changed.manifest.sampler.null_index == 2
    assert changed.report.parity.keys() == set(MODELS)
    assert pipeline.verify(core).passed
    with open_bundle(core) as folder:
        assert models_of(folder) == models_of(direct)
        assert json.loads((folder / "plan.json").read_text()) == changed.manifest.raw["plan"]
        assert "0 sneaker, 1 coat, 2 none" in (folder / "README.md").read_text()
    for model in MODELS:
        whole, joined = load_bundle(packed, model, threads=1), load_bundle(core, model, threads=1)
        for name in joined.classes:
            np.testing.assert_array_equal(joined.generate(name, 2, seed=1), whole.generate(name, 2, seed=1))


def test_files_in_fp32_are_joined_alike(packed: Path, direct: Path) -> None:
    whole, wanted = (folder / FP32 for folder in (packed, direct))
    core = make_core({FP32: whole.read_bytes()}, 4, "fp32", {}, {})[1]
    shared, rows = take_apart(core, FP32, whole.read_bytes(), 4)
    assert join_file(core, FP32, shared, [rows[0], rows[2]]) == wanted.read_bytes()
    assert make_core({FP32: wanted.read_bytes()}, 2, "fp32", {}, {})[1] == core


def test_a_plan_for_other_classes_costs_what_it_is_planned_to(
    packed: Path, tiny_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    """Figures of the joined bundle's plan are those that a replay finds, and nothing claims to be the best."""
    change_bundle(bundle, remove=["bag", "shirt"])
    plan = read_plan(bundle / "plan.json")
    assert (plan.predicted_loss_increase, plan.optimality_gap, dict(plan.limits)) == (None, None, {})
    found = as_replayed(plan, make_source(open_model(tiny_folder)), load_profile(DEVICE))
    for name in ("params", "flops", "weight_bytes", "evaluations_per_step"):
        assert getattr(plan, name) == getattr(found, name), name
    assert plan.peak_memory_bytes == pytest.approx(found.peak_memory_bytes, rel=1e-3)
    assert set(read_manifest(bundle).raw["quality"]) == {"sneaker", "coat", "null"}
    assert pipeline.verify(bundle, tiny_folder).passed  # the reference computed anew, for these classes


def test_removed_and_added_again_is_the_same(packed: Path, direct: Path, bundle: Path) -> None:
    change_bundle(bundle, remove=["bag", "shirt"])
    assert models_of(bundle) == models_of(direct)
    assert '"sneaker", "coat"' in (bundle / "android" / "KindEdge.kt").read_text()
    change_bundle(bundle, [pack_of(bundle, "shirt")])
    change_bundle(bundle, [pack_of(bundle, "bag")])
    assert read_manifest(bundle).classes == CLASSES
    assert models_of(bundle) == models_of(packed)
    made = [name for name in content(packed) if name.startswith(("android/", "packs/"))]
    assert [name for name in made if content(bundle)[name] != content(packed)[name]] == []
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_the_runtime_joins_without_touching_the_bundle(packed: Path, bundle: Path) -> None:
    change_bundle(bundle, remove=["coat", "bag"])
    before = content(bundle)
    more = load_bundle(bundle, "int8", threads=1, packs=[pack_of(packed, "coat")])
    assert more.classes == ("sneaker", "coat", "shirt")
    wanted = load_bundle(packed, "int8", threads=1)
    for name in more.classes:
        np.testing.assert_array_equal(more.generate(name, 1, seed=5), wanted.generate(name, 1, seed=5))
    assert content(bundle) == before


def test_a_core_alone_draws_nothing(packed: Path, bundle: Path) -> None:
    with pytest.raises(UsageError, match="a core without classes; add some: kind-edge pack add"):
        load_bundle(packed / "packs/core.zip")
    with pytest.raises(UsageError, match="a core without classes"):
        pipeline.verify(packed / "packs/core.zip")
    with pytest.raises(UsageError, match=r"would leave no class; the core alone is packs/core\.zip"):
        change_bundle(bundle, remove=CLASSES)


def refused(bundle: Path, files: list[Path], error: type[Exception], words: str) -> None:
    """Adding these fails so, and leaves the bundle and what is beside it as they are."""
    before = content(bundle.parent)
    with pytest.raises(error, match=words):
        change_bundle(bundle, files)
    assert content(bundle.parent) == before


def test_what_does_not_fit_is_refused(packed: Path, bundle: Path) -> None:
    change_bundle(bundle, remove=["bag", "coat"])
    core = core_of(bundle, read_manifest(bundle), "")
    bag, coat = read_pack(pack_of(packed, "bag")), read_pack(pack_of(packed, "coat"))
    file = bundle.parent / "made.safetensors"

    def made(**changes: Any) -> list[Path]:
        file.write_bytes(pack_bytes(dataclasses.replace(bag, **changes), core))
        return [file]

    refused(bundle, [pack_of(packed, "shirt")], InputError, "has 'shirt' already")
    refused(bundle, [pack_of(packed, "bag")] * 2, InputError, "'bag' is given twice")
    refused(bundle, made(core_sha256="ab" * 32), InputError, "pack of 'bag' is for core abababababab, this bundle has")
    refused(bundle, [bundle / MODELS[0]], InputError, "not a class pack")
    refused(bundle, [bundle / "none"], InputError, "cannot read the pack")
    # Whole, of this core, and yet another class's: only its reference can tell.
    refused(bundle, made(rows=coat.rows), GateError, "parity failed: .*bag at step")
    less = {name: array for name, array in bag.reference.items() if name != "noise"}
    refused(bundle, made(reference=less), InputError, "pack of 'bag': verify/noise: got nothing, want float32")
    wide = {**bag.reference, "sample": bag.reference["sample"][:, :, :4]}
    refused(
        bundle,
        made(reference=wide),
        InputError,
        r"verify/sample: got float32 \[4, 1, 4, 8\], want float32 \[n, 1, 8, 8\]",
    )
    refused(bundle, made(rows={**bag.rows, next(iter(bag.rows)): b"x"}), InputError, "lacks rows that its core has")
    assert made()[0].read_bytes() == pack_of(packed, "bag").read_bytes()
    with pytest.raises(UsageError, match="unknown class 'bags'; did you mean: bag"):
        change_bundle(packed, remove=["bags"])


@given(data=st.data())
def test_a_damaged_pack_never_passes(data: st.DataObject, packed: Path, tmp_path_factory: Any) -> None:
    """Cut anywhere, or with any one byte changed."""
    whole = pack_of(packed, "bag").read_bytes()
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    at = data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(whole) - 1)))
    cut = data.draw(st.booleans())
    byte = bytes([data.draw(st.integers(1, 255)) ^ whole[at]])
    file.write_bytes(whole[:at] if cut else whole[:at] + byte + whole[at + 1 :])
    with pytest.raises(InputError):
        read_pack(file)


def test_a_bundle_that_was_changed_is_refused(packed: Path, bundle: Path) -> None:
    """Even where its hashes were made to match: the core knows its files."""
    path = bundle / MODELS[0]
    path.write_bytes(path.read_bytes().replace(b"LayerNormalization", b"layerNormalization"))
    refused(bundle, [], InputError, "denoiser.int8.onnx: sha256 is")
    (bundle / "packs/core.zip").unlink()
    values = json.loads((bundle / "manifest.json").read_text())
    del values["files"]["packs/core.zip"]
    from kind_edge.deploy.bundle import hash_file

    values["files"][MODELS[0]]["sha256"] = hash_file(path)
    (bundle / "manifest.json").write_text(json.dumps(values))
    refused(bundle, [], InputError, "not the file that packs/core.json describes")


def test_a_pack_is_an_ordinary_safetensors_file(packed: Path) -> None:
    pack, tensors = read_pack(pack_of(packed, "coat")), load_file(pack_of(packed, "coat"))
    core = core_of(packed, read_manifest(packed), "")
    assert {name: tensor.tobytes() for name, tensor in tensors.items() if name in core.tables} == pack.rows
    assert {name: tensors[name].shape for name in core.tables} == {n: t.shape for n, t in core.tables.items()}
    assert all(np.array_equal(tensors[f"verify/{name}"], array) for name, array in pack.reference.items())
    assert len(pack.reference["prediction"]) == 4  # one of every timestep
    assert pack.told["checkpoint_sha256"] == read_manifest(packed).raw["source"]["checkpoint_sha256"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node here")
def test_javascript_adds_a_class(packed: Path, bundle: Path) -> None:
    change_bundle(bundle, remove=["bag"])
    shutil.copy(ROOT / "kind_edge/deploy/templates/web/packs.js", bundle.parent / "packs.mjs")
    script = bundle.parent / "join.mjs"
    script.write_text("""
import { readFileSync, writeFileSync } from "node:fs";
import { joinFile, readPack, takeApart } from "./packs.mjs";
const [folder, packed, ...paths] = process.argv.slice(2);
const bytes = (path) => new Uint8Array(readFileSync(path));
const core = JSON.parse(readFileSync(`${folder}/packs/core.json`)), added = await readPack(bytes(packed));
for (const path of paths) {
  const { shared, rows } = takeApart(core, path, bytes(`${folder}/${path}`), 3);
  writeFileSync(`${folder}/${path}`, joinFile(core, path, shared, [rows[0], added.rows, ...rows.slice(1)]));
}
console.log(added.className, added.core);
""")
    command = ["node", str(script), str(bundle), str(pack_of(packed, "bag")), *MODELS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["bag", read_manifest(bundle).raw["packs"]["core"]]
    assert models_of(bundle) == models_of(packed)


def test_packs_have_names_that_any_system_can_hold() -> None:
    names = pack_names(["T-shirt/top", "t-shirt top", "..", "Ä", "Ö"])
    assert list(names.values()) == [
        f"{n}.safetensors" for n in ("T-shirt-top", "t-shirt-top-2", "class", "class-2", "class-3")
    ]


@given(
    st.lists(st.integers(0, 300), max_size=4),
    st.integers(0, 300),
    st.integers(0, 2),
    st.integers(0, 40),
    st.binary(min_size=1, max_size=300),
)
def test_joining_and_taking_apart_are_inverse(
    inner: list[int], classes: int, extra: int, row: int, shared: bytes
) -> None:
    """Lengths of any number of bytes, at any number of classes."""
    parts: list[Any] = [{"count": extra}, {"message": [{"rows": "a"}, extra]}, {"int64": extra}]
    for size in inner:
        parts = [size, {"message": [*parts, size]}]
    core = Core("", "", {}, {"a": Table("U8", (row,))}, {"f": CoreFile("", (*parts, 1))}, {})
    needed = 2 * sum(inner) + extra + 1
    shared = (shared * needed)[:needed]
    rows = [{"a": bytes([i % 256]) * row} for i in range(classes)]
    whole = join_file(core, "f", shared, rows)
    core = dataclasses.replace(core, files={"f": CoreFile(bare_sha256(core, "f", shared), core.files["f"].parts)})
    assert take_apart(core, "f", whole, classes) == (shared, rows)
    with pytest.raises(InputError):
        take_apart(core, "f", whole[:-1], classes)


def test_without_torch_without_onnx(packed: Path, bundle: Path) -> None:
    """The command without PyTorch, the runtime with numpy and ONNX Runtime alone."""
    script = """
        import sys
        gone, work = sys.argv[1].split(","), sys.argv[2:]
        class Gone:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in gone:
                    raise ImportError(name)
        sys.meta_path.insert(0, Gone())
        if "PIL" in gone:
            from kind_edge.deploy.runtime import load_bundle
            print(load_bundle(work[0], packs=work[1:]).generate("coat").shape)
        else:
            from kind_edge.cli import main
            sys.exit(main(["pack", *work]))
    """
    coat = str(pack_of(packed, "coat"))

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    heavy = "torch,onnx,onnxscript,diffusers,safetensors,scipy"
    assert json.loads(run(heavy, "remove", str(bundle), "coat", "--json"))["classes"] == ["sneaker", "bag", "shirt"]
    assert run(f"{heavy},PIL,rich,typer,psutil", str(bundle), coat) == "(1, 8, 8, 1)\n"
    assert json.loads(run(heavy, "add", str(bundle), coat, "--json"))["classes"] == list(CLASSES)
    assert models_of(bundle) == models_of(packed)
