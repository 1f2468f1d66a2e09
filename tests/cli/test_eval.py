"""`kind-edge eval`: no figure without what it was measured on, and refusals that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kind_edge.model.checkpoint import checkpoint_hash
from kind_edge.training.inception import FEATURES, Inception


def test_every_figure_comes_with_its_conditions(
    call: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 200)
    command = ["-q", "eval", checkpoint, "--images", 10, "--steps", 2, "--guidance", 2, "--seed", 7]
    values = call(*command, "--json").json()
    wanted = {
        "kind": "checkpoint", "checkpoint_sha256": checkpoint_hash(checkpoint), "weights_precision": "fp32",
        "sampler": "euler", "steps": 2, "guidance": 2.0, "seed": 7, "images": 10, "features": "classifier",
    }  # fmt: skip
    assert wanted.items() <= values.items()
    assert {"frechet", "precision", "recall", "per_class_accuracy", "entropy_nats", "judge_sha256"} <= values.keys()
    shown = call(*command).out
    assert f"{checkpoint_hash(checkpoint)[:12]}, fp32" in shown
    assert "10, euler, 2 steps, guidance 2, seed 7" in shown
    assert "ankle-boot" in shown


def test_inception_and_its_weights_go_together(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    alone = call("-q", "eval", checkpoint, "--features", "inception")
    assert (alone.code, alone.out) == (2, "")
    assert "--weights FILE" in alone.err
    assert call("-q", "eval", checkpoint, "--weights", tmp_path / "w.pth").code == 2
    missing = call("-q", "eval", checkpoint, "--features", "inception", "--weights", tmp_path / "w.pth")
    assert (missing.code, missing.out) == (4, "")
    assert "w.pth: no such file" in missing.err


def test_what_the_judge_does_not_know_is_refused_with_a_way_out(
    call: Callable[..., Any], checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["class_names"][:5] = [f"digit-{k}" for k in range(5)]
    (other / "config.json").write_text(json.dumps(config))
    answer = call("-q", "eval", other, "--images", 10, "--steps", 1)
    assert (answer.code, answer.out) == (2, "")
    assert "digit-0, digit-1, digit-2 and 2 more" in answer.err
    assert "knows Fashion-MNIST only" in answer.err
    assert "--features inception --weights FILE" in answer.err
    small = call("-q", "eval", tiny_folder, "--images", 10)
    assert small.code == 2
    assert "images of 8 x 8 pixels in 1 channels" in small.err


def test_a_bundle_is_compared_with_images_of_its_classes_alone(
    call: Callable[..., Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("bag", "cat", "sneaker"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for seed in range(9):
            pixels = np.random.default_rng([seed, len(name)]).integers(0, 256, (12, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{seed}.png")
    monkeypatch.setattr(Inception, "load", lambda path: Inception(torch.nn.Identity(), str(path)))
    monkeypatch.setattr(Inception, "embed", lambda _, images: np.resize(images, (len(images), FEATURES)) / 255.0)
    given = ("--data", tmp_path / "data", "--features", "inception", "--weights", "w.pth")
    values = call("-q", "eval", bundle, "--images", 8, *given, "--json").json()
    wanted = {"kind": "bundle", "images": 8, "real_images": 18, "reference_classes": ["sneaker", "bag"]}
    assert wanted.items() <= values.items()
    assert values["frechet"] > 0
