"""`kind-edge resize`, and what can be done with the result: it is an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.model.checkpoint import HELDOUT, checkpoint_hash, load_checkpoint


@pytest.fixture(scope="module")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kind_edge.cli import main

    folder = tmp_path_factory.mktemp("resized") / "small"
    command = ["resize", tiny_folder, "--depth", "1", "--width", "8", "--method", "front", "-o", folder]
    assert main([str(word) for word in command]) == 0
    return folder


def test_it_says_what_it_made(call: Callable[..., Any], tiny_folder: Path, tmp_path: Path) -> None:
    command = ("resize", tiny_folder, "--width", 32, "--method", "bot", "--tailor-rank", 3, "-o", tmp_path / "out")
    said = call(*command, "--json").json()
    assert (said["model"]["width"], said["model"]["heads"], said["model"]["depth"]) == (32, 4, 2)
    assert (said["model"]["learngene_rank"], said["model"]["tailor_rank"]) == (12, 3)
    assert said["resized"]["source_sha256"] == checkpoint_hash(tiny_folder)
    assert "source" in said["resized"]["split"]
    assert (tmp_path / "out" / HELDOUT).read_bytes() == (tiny_folder / HELDOUT).read_bytes()
    again = call(*command)
    assert (again.code, "not empty" in again.err) == (2, True)


def test_the_result_plans_and_exports(call: Callable[..., Any], small: Path, tmp_path: Path) -> None:
    assert (load_checkpoint(small).spec.depth, load_checkpoint(small).spec.width) == (1, 8)
    command = ("export", small, "--profile", "raspberry-pi-5", "--classes", "bag", "--steps", 2, "-o", tmp_path / "b")
    parity = call(*command, "--precision", "fp32", "--json").json()["parity"]
    assert min(parity.values()) > 100


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, ("--depth or --width",)),
        (("--width", 20), 4, ("width: got 20", "16, 24")),
        (("--depth", 9), 4, ("depth: got 9", "nearest: 8")),
        (("--width", 24, "--learngene-rank", 30), 4, ("learngene_rank: got 30", "nearest is 24")),
    ],
)
def test_what_there_cannot_be(
    call: Callable[..., Any], tiny_folder: Path, tmp_path: Path, arguments: Any, code: int, words: tuple[str, ...]
) -> None:
    answer = call("resize", tiny_folder, "--method", "front", "-o", tmp_path / "out", *arguments)
    assert (answer.code, [word for word in words if word not in answer.err]) == (code, [])
    assert not (tmp_path / "out").exists()


def test_the_shipped_model_is_distilled(call: Callable[..., Any], tmp_path: Path) -> None:
    answer = call("resize", "fashion-mnist", "--depth", 4, "--method", "front", "-o", tmp_path / "out")
    assert (answer.code, "distil again" in answer.err) == (2, True)


def test_train_wants_one_thing_to_begin_with(call: Callable[..., Any], small: Path, tmp_path: Path) -> None:
    answer = call("train", "--from", small, "--preset", "smoke", "-o", tmp_path / "out")
    assert (answer.code, "--from" in answer.err) == (2, True)
