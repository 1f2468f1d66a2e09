"""A class that is learned after an export: its pack fits the core that is in users' hands, and nothing else does."""

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

from kind_edge.budget.plan import read_plan
from kind_edge.deploy import pipeline
from kind_edge.deploy.cut import timesteps_of
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.packs_bundle import change_bundle
from kind_edge.deploy.packs_file import read_pack
from kind_edge.deploy.packs_join import core_of
from kind_edge.deploy.packs_make import make_packs, shared_weights
from kind_edge.deploy.packs_recipe import make_core
from kind_edge.deploy.request import open_model
from kind_edge.deploy.runtime import load_bundle
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import CONFIG, Checkpoint, load_checkpoint
from kind_edge.registry import exporter
from kind_edge.training.adapt import adapt_config, adapt_to
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.newcomers import Request

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
OLD, NEW = ("sneaker", "bag", "coat", "shirt"), "hat"
MODELS = ("onnx/denoiser.int8.onnx", "onnx/sampler.onnx")
LICENCE = "CC-BY-4.0"


@pytest.fixture(scope="module")
def adapted(tiny_folder: Path, made_once: MadeOnce) -> Path:
    """The tiny model with a fifth class, under another licence."""

    def make(folder: Path) -> None:
        request = Request(load_checkpoint(tiny_folder), (NEW,), start="bag")
        pixels = np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
        data = in_memory(pixels, torch.zeros(24, dtype=torch.int64), (NEW,), "cd" * 32)
        split = DataSplit(data, data, {"kind": "hats"})
        adapt_to(request, adapt_config(request, "files", 1_000), split, folder / "more", device=torch.device("cpu"))
        config = folder / "more" / CONFIG
        values = json.loads(config.read_text())
        values["provenance"]["stated"]["licence"] = LICENCE
        config.write_text(json.dumps(values))

    return made_once("packs-adapted", make) / "more"


@pytest.fixture(scope="module")
def hat(adapted: Path, packed: Path, tiny_folder: Path, made_once: MadeOnce) -> Path:
    """The pack for the core of `packed`, whose learngene was cut and does not nest; the core alone is enough."""
    core, names = packed / "packs/core.zip", [NEW]
    place = made_once("packs-hat", lambda f: make_packs(core, adapted, names, f, calibration=tiny_folder))
    return place / f"{NEW}.safetensors"


def nameless(content: bytes) -> bytes:
    """A model file without what it says of itself."""
    model = onnx.load_model_from_string(content)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def test_it_joins_to_what_a_new_export_would_be(
    adapted: Path, hat: Path, packed: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Of old and new classes with the ranks of the old plan, to the byte: so the new class is drawn as its own
    checkpoint draws it. The core of that export is the old one, whatever its files say of checkpoint and licence."""
    model, calibration = open_model(adapted), open_model(tiny_folder).calibration
    plan = dataclasses.replace(read_plan(packed / "plan.json"), classes=(*OLD, NEW), checkpoint_sha256=model.sha256)
    truncated = truncate(model.checkpoint, plan, calibration)
    plain = fold(truncated, plan, timesteps_of(model, plan))
    manifest = read_manifest(packed)
    plain.origin = dataclasses.replace(plain.origin, wide=manifest.models[MODELS[0]].wide_operators)
    exporter("onnx").export(plain, tmp_path / "direct", plan.precisions)
    direct = {path: (tmp_path / "direct" / path).read_bytes() for path in MODELS}
    core = core_of(packed, manifest, "")
    assert make_core(direct, 5, core.precision, core.sampling, shared_weights(truncated))[1] == core

    bundle = Path(shutil.copytree(packed, tmp_path / "bundle"))
    changed = change_bundle(bundle, [hat])
    assert changed.manifest.classes == (*OLD, NEW)
    for path in MODELS:
        joined = (bundle / path).read_bytes()
        assert joined != direct[path], "these say whose they are"
        assert nameless(joined) == nameless(direct[path])
        before, after = (load_bundle(folder, path, threads=1) for folder in (packed, bundle))
        for name in OLD:
            np.testing.assert_array_equal(after.generate(name, 1, seed=3), before.generate(name, 1, seed=3))
    told = changed.manifest.raw["provenance"]["later"]
    assert told == {NEW: read_pack(hat).told}
    assert (told[NEW]["checkpoint_sha256"], told[NEW]["model_license"]) == (model.sha256, LICENCE)
    notice = (bundle / "NOTICE").read_text()
    assert f"Later class hat\n  licence {LICENCE}, Fashion-MNIST (licence MIT" in notice
    assert f"hats (licence not stated, sha256 cdcdcdcdcdcd), sha256 {model.sha256[:12]}\n" in notice
    with pytest.raises(UsageError, match=r"classes of other checkpoints \(hat\)"):
        pipeline.verify(bundle, tiny_folder)
    assert "later" not in change_bundle(bundle, remove=[NEW]).manifest.raw["provenance"]


def test_a_bundle_of_some_classes_gets_it_in_fp32(
    adapted: Path, exported_bundle: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """The bundle stays as it is; a class that its own checkpoint had, but not the export, comes the same way."""
    bundle, place = exported_bundle / "b", tmp_path / "packs"
    made = make_packs(bundle, adapted, [NEW, "coat"], place, calibration=tiny_folder)
    assert made.report.parity["onnx/denoiser.onnx"] > 100
    assert {file: place.joinpath(file).stat().st_size for file in map(Path, made.files)} == {
        Path(file): size for file, size in made.files.items()
    }
    drawn = load_bundle(bundle, threads=1, packs=list(made.files))
    assert drawn.classes == ("shirt", "bag", NEW, "coat")
    assert drawn.generate(NEW, 1).shape == (1, 8, 8, 1)


def test_other_weights_are_refused_by_name(
    adapted: Path, packed: Path, tiny_folder: Path, tmp_path: Path, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    tiny = open_model(tiny_folder)

    def refused(checkpoint: Checkpoint, words: str, **choices: Any) -> None:
        model = dataclasses.replace(tiny, name="other", sha256="ab" * 32, checkpoint=checkpoint)
        with pytest.raises(InputError, match=words):
            make_packs(packed, model, ["bag"], tmp_path / "packs", **choices)
        assert not (tmp_path / "packs").exists()

    again = r"other \(abababababab\) has not the weights .*: 19 of 20 layers .* \(blocks.0.adaln, .*\.\.\.\); take "
    refused(make_checkpoint(1), again + rf"{tiny.name} \({tiny.sha256[:12]}\)", calibration=tiny_folder)
    refused(make_checkpoint(depth=1), r"other: blocks\.1\.\S+: the core has a learngene of rank .* this model 0 and 0")
    refused(make_checkpoint(depth=3), r"other has blocks\.2\.attn\.q, .*, which the core has not; take ")
    few = make_checkpoint(step_counts=(1, 4), inside_guidance=1.5)
    refused(few, r"the core takes 4 steps, this model 1, 4 with guidance 1.5 inside")
    name = "blocks.1.mlp.fc2.bias"
    touched = {**tiny.checkpoint.tensors, name: tiny.checkpoint.tensors[name].float() + 1e-6}
    refused(dataclasses.replace(tiny.checkpoint, tensors=touched), r"1 of \d+ layers .* \(blocks\.1\.mlp\.fc2\);")
    # An adapted model has another calibration, so that its learngene, which does not nest, is cut otherwise.
    with pytest.raises(InputError, match=r"\(blocks\.0\..*Where a learngene does not nest.* add --calibration"):
        make_packs(packed, adapted, output=tmp_path / "packs")
    with pytest.raises(UsageError, match="has no class that the bundle lacks"):
        make_packs(packed, tiny, output=tmp_path / "packs")
