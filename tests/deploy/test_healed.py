"""A healed bundle: what it says, what it is proven against, and that healing is taken only where it helps."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kind_edge.training.healing as healing
from kind_edge.deploy import pipeline
from kind_edge.deploy.cut import judged, make_cut
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.packs_make import make_packs
from kind_edge.deploy.request import open_model
from kind_edge.errors import GateError, InputError, UsageError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.training.healing import HealingProgress

DEVICE = "raspberry-pi-5"
ASKED: dict[str, Any] = {"profile": DEVICE, "classes": ["shirt", "bag"], "max_flops": "60%", "precision": "fp32"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "POOL", 12)
    monkeypatch.setattr(healing, "RATE", 3e-3)


@pytest.fixture(scope="module")
def bundle(distilled_folder: Path, made_once: Callable[..., Path]) -> Path:
    def write(folder: Path) -> None:
        stages: list[str] = []
        made = pipeline.export(distilled_folder, **ASKED, output=folder / "b", heal="2s", on_stage=stages.append)
        (folder / "export.json").write_text(json.dumps({**made.to_dict(), "stages": stages}))

    return made_once("healed", write)


@pytest.mark.slow
def test_it_says_what_healing_brought_and_leaves_nothing_beside_it(bundle: Path) -> None:
    printed = json.loads((bundle / "export.json").read_text())
    assert printed["stages"][2:8] == ["merging", "exporting", "verifying", "healing", "exporting", "verifying"]
    found = printed["healing"]
    assert found["kept"] is True
    assert found["after"] < found["before"]
    assert (found["measure"], found["seconds"] >= 2, found["steps"] > 0) == ("held-out deviation", True, True)
    manifest = read_manifest(bundle / "b")
    told = manifest.raw["healing"]["told"]
    assert told.startswith("healed 2")
    assert told in (bundle / "b/README.md").read_text()
    assert {"healed/config.json", "healed/model.safetensors"} <= set(manifest.files)
    assert printed["parity"]["onnx/denoiser.onnx"] >= 100
    assert sorted(path.name for path in bundle.iterdir() if not path.name.endswith((".lock", ".done"))) == [
        "b", "export.json",
    ]  # fmt: skip
    # The quality in the manifest is that of the healed weights.
    quality = manifest.raw["quality"].values()
    assert sum(each["difference"] for each in quality) / sum(each["full"] for each in quality) == found["after"]


@pytest.mark.slow
def test_it_is_verified_against_its_own_gated_checkpoint(
    bundle: Path, distilled_folder: Path, tiny_folder: Path
) -> None:
    stored = pipeline.verify(bundle / "b")
    anew = pipeline.verify(bundle / "b", checkpoint=distilled_folder)
    assert anew.passed
    assert anew.reference.startswith("the healed gated model in the bundle, cut from ")
    assert anew.parity != stored.parity
    healed = load_checkpoint(bundle / "b/healed")
    assert healed.class_names == ("shirt", "bag")
    assert healed.provenance["healed"]["steps"] > 0
    with pytest.raises(InputError, match="the plan's guidance is not that inside the model"):
        pipeline.verify(bundle / "b", checkpoint=tiny_folder)


@pytest.mark.slow
def test_a_class_of_the_checkpoint_that_was_healed_does_not_fit(bundle: Path, distilled_folder: Path) -> None:
    """Healing has changed what the classes share."""
    with pytest.raises(InputError, match=r"layers that all classes share differ .* was healed, so .* its own healed/"):
        make_packs(bundle / "b", distilled_folder, ["coat"], bundle / "packs")


@pytest.mark.parametrize(("factor", "told"), [(1.5, r"\(.* % -> .* %\)"), (math.nan, r"\(.* % -> no number\)")])
@pytest.mark.parametrize("held_out", [True, False])
def test_weights_that_are_no_better_are_not_taken(
    factor: float, told: str, held_out: bool, distilled_folder: Path
) -> None:
    """Also where no image is held out, and the deviation on walks decides."""
    model = open_model(distilled_folder)
    model = model if held_out else dataclasses.replace(model, heldout=None)
    plan = pipeline.plan(distilled_folder, **ASKED)
    cut = make_cut(model, plan)
    tensors = {name: t * factor if ".learngene.s" in name else t for name, t in cut.truncated.tensors.items()}
    worse = dataclasses.replace(cut.truncated, tensors=tensors)
    deviations = {id(cut.truncated): 0.1}
    found = judged(model, plan, cut, worse, 300.0, 7, lambda each: deviations.get(id(each), 0.1 * factor))
    assert found.truncated is cut.truncated
    assert not found.healed
    assert found.quality == cut.quality
    assert found.healing is not None
    assert found.healing.measure == ("held-out deviation" if held_out else "deviation")
    assert re.search(f"healing for 5 min made it no better {told}: the weights are as", found.healing.told())
    json.dumps(found.healing.to_dict(), allow_nan=False)


def test_a_stopped_export_keeps_what_was_learned_and_no_bundle(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritten(*arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(cut=arguments[-1], model_bytes=0, package_bytes=0, values={"models": {}})

    def stop(now: HealingProgress) -> None:
        if now.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_models", unwritten)
    monkeypatch.setattr(healing, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(healing, "SAVING_SHARE", math.inf)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(tiny_folder, **ASKED, output=tmp_path / "b", heal="1h", on_healing=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".b.heal"]
    steps: list[int] = []

    def see(now: HealingProgress) -> None:
        steps.append(now.step)
        raise GateError("enough")

    with pytest.raises(GateError, match="enough"):
        pipeline.export(tiny_folder, **ASKED, output=tmp_path / "b", heal="1h", on_healing=see)
    assert steps == [4]  # three were saved
    with pytest.raises(GateError, match="enough"):  # another cut begins anew
        pipeline.export(tiny_folder, **{**ASKED, "max_flops": "70%"}, output=tmp_path / "b", heal="1h", on_healing=see)
    assert steps == [4, 1]


@pytest.mark.parametrize("text", ["5", "5x", "-5m", "40%", "0s"])
def test_what_is_no_time_is_refused_at_once(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--heal .*; write for example 90s, 5m or 1h"):
        pipeline.export(tmp_path / "none", profile=DEVICE, heal=text)
