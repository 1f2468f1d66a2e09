"""`kind-edge adapt`: what it says, that Fashion-MNIST's files serve as they lie, and that the result exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.model.checkpoint import load_checkpoint


@pytest.fixture
def model(tmp_path: Path, make_checkpoint_folder: Callable[..., Path]) -> Path:
    return make_checkpoint_folder(tmp_path / "model", image_size=28, patch_size=7, depth=1)


def test_what_is_said(call: Callable[..., Any], model: Path, fashion_folder: Path, tmp_path: Path) -> None:
    common = ("adapt", model, "--data", fashion_folder, "-o", tmp_path / "out", "--device", "cpu")
    refused = call(*common, "--classes", "dress,sneaker")
    assert (refused.code, refused.out) == (2, "")
    assert "the model knows 'sneaker' already" in refused.err
    answer = call(*common, "--classes", "ankle-boot, dress", "--from", "nearest", "--images", 240)
    assert answer.code == 0, answer.err
    assert "ankle-boot as " in answer.out
    assert "kind-edge export" in answer.out
    assert load_checkpoint(tmp_path / "out").class_names == ("sneaker", "bag", "coat", "shirt", "ankle-boot", "dress")
    shown = call("inspect", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert "adapted" in shown.out


@pytest.mark.slow
def test_it_exports(call: Callable[..., Any], model: Path, fashion_folder: Path, tmp_path: Path) -> None:
    classes = ("--classes", "dress", "--device", "cpu", "--images", 240)
    assert call("adapt", model, "--data", fashion_folder, "-o", tmp_path / "out", *classes).code == 0
    limits = ("--classes", "dress,bag", "--max-flops", "60%", "--steps", 2, "--precision", "fp32")
    bundle = call(
        "export", tmp_path / "out", "--profile", "snapdragon8g3", *limits, "-o", tmp_path / "b", "--json"
    ).json()
    assert min(bundle["parity"].values()) >= 100
    assert call("verify", bundle["bundle"], "--checkpoint", tmp_path / "out").code == 0
