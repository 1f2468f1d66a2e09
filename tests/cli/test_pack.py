"""`kind-edge pack`: what it prints, and with which code it ends."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.deploy.packs_file import read_pack

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, made_once: MadeOnce) -> Path:
    """As in tests/deploy/test_packs.py, which makes it if it comes first. Only to be read."""
    from kind_edge.deploy import pipeline

    asked: dict[str, Any] = {
        "profile": "raspberry-pi-5",
        "max_flops": "60%",
        "precision": "int8",
        "formats": ["packs", "android"],
    }
    return made_once("packs", lambda place: pipeline.export(tiny_folder, **asked, output=place / "b")) / "b"


def test_classes_come_and_go(call: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    bundle, bag = shutil.copytree(exported, tmp_path / "bundle"), exported / "packs/bag.safetensors"
    listed = call("pack", "list", bundle, "--json").json()
    assert listed["classes"] == ["sneaker", "bag", "coat", "shirt"]
    assert set(listed["packs"]) == {f"packs/{name}.safetensors" for name in listed["classes"]}
    assert call("pack", "list", bag, "--json").json() | {"packs": {}} == {
        "core": listed["core"], "classes": ["bag"], "row_bytes": listed["row_bytes"], "file_row_bytes": {},
        "bytes": bag.stat().st_size, "packs": {},
    }  # fmt: skip
    removed = call("pack", "remove", bundle, "bag", "shirt", "--json").json()
    assert (removed["classes"], removed["core"]) == (["sneaker", "coat"], listed["core"])
    assert removed["left_out"] == ["onnx/denoiser.onnx"]
    assert removed["files"].keys() > removed["parity"].keys() == {"onnx/denoiser.int8.onnx", "onnx/sampler.onnx"}
    shown = call("pack", "add", bundle, bag)
    assert shown.code == 0
    assert "sneaker, bag, coat" in shown.out
    assert "25 dB" in shown.out
    assert "sneaker, bag, coat" in call("pack", "list", bundle).out


def test_a_pack_is_made_for_a_bundle_that_lacks_the_class(
    call: Callable[..., Any], exported: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Of the checkpoint that it was exported from: the same rows as in the pack of the export."""
    bundle = shutil.copytree(exported, tmp_path / "bundle")
    call("pack", "remove", bundle, "bag")
    shown = call("pack", "make", bundle, tiny_folder, "-o", tmp_path / "new")
    made = tmp_path / "new/bag.safetensors"
    assert shown.code == 0
    assert re.search(rf"{made.name}\s.*\n.*Proven.*denoiser.int8.onnx.*25 dB", shown.out, re.DOTALL)
    assert f"kind-edge pack add {bundle} {made}" in shown.out
    assert "held-out" in shown.out
    assert read_pack(made).rows == read_pack(exported / "packs/bag.safetensors").rows
    assert call("pack", "add", bundle, made).code == 0
    nothing = call("pack", "make", bundle, tiny_folder, "-o", tmp_path / "none")
    assert (nothing.code, (tmp_path / "none").exists()) == (2, False)


def test_what_does_not_fit_ends_with_its_code(call: Callable[..., Any], exported: Path, bundle: Path) -> None:
    bag = exported / "packs/bag.safetensors"
    twice = call("pack", "add", exported, bag)
    assert (twice.code, twice.out) == (4, "")
    assert "the bundle has 'bag' already" in twice.err
    unknown = call("pack", "remove", exported, "bags")
    assert unknown.code == 2
    assert "did you mean: bag?" in unknown.err
    plain = call("pack", "add", bundle, bag)
    assert plain.code == 2
    assert "it has no packs/core.json" in plain.err
    single = call("export", "--profile", "raspberry-pi-5", "--form", "single", "--classes", "bag", "--formats", "packs")
    assert single.code == 2
    assert "only --form switch keeps classes apart" in single.err
