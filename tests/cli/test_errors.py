"""Every way to be wrong has its exit code, one line on stderr that helps, and nothing on stdout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.cli import run
from kind_edge.errors import GateError, unknown

PLAN = ("plan", "--profile", "apple-a18")
ARCH = (*PLAN, "--arch", "DiT-B/2")

USAGE = {
    "verb": (("exprot",), "did you mean 'export'"),
    "option": (("plan", "--profil", "apple-a18"), "--profile"),
    "choice": ((*PLAN, "--form", "swich"), "'switch'"),
    "missing option": (("train", "--preset", "smoke"), "'--output' / '-o'"),
    "missing profile": (("export",), "kind-edge profiles list"),
    "profile": (("plan", "--profile", "snapdragon8g"), "snapdragon8g3"),
    "profile like none": (("plan", "--profile", "my-phone"), "known: apple-a17pro, "),
    "device of one's own": (("plan", "--profile", "my-phone"), "docs/profiles.md"),
    "profile to show": (("profiles", "show", "aple-a18"), "apple-a18"),
    "bare size": ((*PLAN, "--max-size", "300"), "MiB"),
    "bare latency": (("export", "--profile", "apple-a18", "--max-latency", "4"), "250ms"),
    "megabits": ((*PLAN, "--max-memory", "300Mb"), "bits"),
    "format": (("export", "--profile", "apple-a18", "--formats", "onx"), "onnx"),
    "no format": (("export", "--profile", "apple-a18", "--formats", ","), "onnx"),
    "Core ML not asked for": (("export", "--profile", "apple-a18", "--coreml-target", "iOS16"), "add coreml"),
    "Core ML of a plan": ((*PLAN, "--coreml-weights", "int8"), "add coreml"),
    "front of packages": ((*PLAN, "--pareto", "--formats", "coreml"), "--formats"),
    "packages without weights": ((*ARCH, "--num-classes", "9", "--formats", "coreml"), "--formats"),
    "nameless class pack": (
        ("export", "--profile", "apple-a18", "--formats", "coreml", "--coreml-function", "bag"), "shoes=",
    ),
    "bench of a package": (("bench", "b/coreml/Denoiser.mlpackage"), "kind-edge verify"),
    "steps": ((*PLAN, "--steps", "0"), "'--steps'"),
    "preset": (("train", "--preset", "smok", "-o", "x"), "smoke"),
    "two configurations": (("train", "--preset", "smoke", "--config", "c.toml", "-o", "x"), "either"),
    "architecture": ((*PLAN, "--arch", "DiT-C/2", "--num-classes", "9"), "DiT-B/2"),
    "classes of it": (ARCH, "--num-classes"),
    "limit of it": ((*ARCH, "--num-classes", "9", "--max-size", "1MiB"), "--max-size"),
    "rank of it": ((*ARCH, "--num-classes", "9", "--rank", "0"), "1 to 768"),
    "rank without it": ((*PLAN, "--rank", "9"), "--arch"),
    "unit of the paper": ((*ARCH, "--num-classes", "9", "--convention", "paper", "--unit", "cpu"), "--unit"),
    "not a picture": (("generate", "x", "-o", "x.jpg"), ".png"),
    "loud and quiet": (("-v", "profiles", "list", "-q"), "contradict"),
    "no folder": (("export", "--profile", "apple-a18", "-o", f"{os.devnull}/out"), os.devnull),
    "nowhere to write": (("train", "--preset", "smoke", "-o", "/proc/out"), "/proc"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "hint"), USAGE.values(), ids=USAGE)
def test_usage_errors_exit_2_and_help(call: Callable[..., Any], arguments: tuple[str, ...], hint: str) -> None:
    answer = call(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert hint.lower() in answer.err.lower()


def test_an_unknown_class_is_refused_with_the_nearest(call: Callable[..., Any], bundle: Path, checkpoint: Path) -> None:
    for answer in (
        call("generate", bundle, "--class", "sneker", "-o", "x.png"),
        call("-q", "plan", checkpoint, "--profile", "apple-a18", "--classes", "bag,sneker"),
    ):
        assert (answer.code, answer.out) == (2, "")
        assert "unknown class 'sneker'; did you mean: sneaker" in answer.err


def test_a_name_like_no_other_is_not_guessed_at() -> None:
    """Were all names "meant", the nearest would be lost among them; and a thousand classes are no help."""
    assert str(unknown("class", "xyz", ["bag", "coat"])) == "unknown class 'xyz'; known: bag, coat"
    many = [f"class {i:04}" for i in range(1000)]
    assert str(unknown("breed", "xyz", many)).endswith("class 0019 and 980 more")
    assert str(unknown("breed", "class 07", many)).count("class 0") == 4
    assert str(unknown("model", "a", [], "see elsewhere")) == "unknown model 'a'; see elsewhere"


def test_generate_names_the_classes_there_are(call: Callable[..., Any], bundle: Path) -> None:
    answer = call("generate", bundle, "-o", "x.png")
    assert answer.code == 2
    assert "sneaker, bag" in answer.err


@pytest.mark.parametrize("verb", ["inspect", "verify", "bench", "eval"])
def test_what_is_not_there_exits_4(call: Callable[..., Any], tmp_path: Path, verb: str) -> None:
    answer = call("-q", verb, tmp_path / "nothing")
    assert (answer.code, answer.out) == (4, "")
    assert "nothing" in answer.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"schema_version": 7}'),
        ("model.safetensors", b"\0" * 8),
        ("model.safetensors", None),
    ],
    ids=["not JSON", "of another version", "corrupt weights", "no weights"],
)
def test_a_bad_checkpoint_exits_4(
    call: Callable[..., Any], checkpoint: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    for arguments in (("plan", tmp_path, "--profile", "apple-a18"), ("inspect", tmp_path, "--json")):
        answer = call("-q", *arguments)
        assert (answer.code, answer.out) == (4, "")
        assert answer.err.startswith(f"error: {tmp_path}")


def test_a_damaged_bundle_exits_4(call: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "b/onnx").mkdir(parents=True)
    for file in bundle.rglob("*.*"):
        (tmp_path / "b" / file.relative_to(bundle)).write_bytes(file.read_bytes())
    with open(tmp_path / "b/onnx/denoiser.onnx", "ab") as file:
        file.write(b"\0")
    for verb in ("inspect", "verify", "bench"):
        answer = call("-q", verb, tmp_path / "b")
        assert (answer.code, answer.out) == (4, "")
        assert "onnx/denoiser.onnx" in answer.err


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (GateError("parity failed"), 1, "error: parity failed\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (
            RuntimeError("Error(s) in loading:\n" + "\tsize mismatch\n" * 500),
            70,
            "error: a bug in kind-edge: RuntimeError:",
        ),
        (ZeroDivisionError("division by zero"), 70, "error: a bug in kind-edge: ZeroDivisionError: division by zero;"),
    ],
    ids=["gate", "interrupt", "place", "long bug", "bug"],
)
def test_the_boundary(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, text: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(run, "app", broken)
    answer = call("profiles", "list")
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith(text)
    assert answer.err.count("\n") == 1
    assert len(answer.err) < 400
    with_traceback = call("profiles", "list", "-v")
    assert ("Traceback" in with_traceback.err) == (code == 70)


def test_of_several_processes_the_first_says_what_is_wrong(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "FIRST_SPEAKS_S", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = []
    for rank in "012":
        monkeypatch.setenv("LOCAL_RANK", rank)
        answer = call("train", "--preset", "smoke", "-o", tmp_path / "run", "--device", "cpu")
        assert answer.code == 2
        said.append(answer.err)
    assert "batch_size 40 cannot be divided by 3 processes x accumulation 1; choose a multiple of 3" in said[0]
    assert said[1:] == ["", ""]


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "kind_edge.cli", "profiles", "show", "apple-a18", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")
