"""A bundle is whole or absent, says when it was touched, and a hostile .zip gets nowhere."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.deploy.bundle import (
    Manifest,
    hash_file,
    open_bundle,
    read_manifest,
    verify_hashes,
    write_manifest,
    writing_bundle,
    zip_bundle,
)
from kind_edge.errors import InputError, KindEdgeError, UsageError

Contents = Callable[[Path], dict[str, bytes]]
MODELS = ["onnx/denoiser.onnx", "onnx/denoiser.int8.onnx", "onnx/sampler.onnx"]


@pytest.fixture
def light(tmp_path: Path, bundle_values: Callable[..., dict[str, Any]]) -> Callable[[str], Path]:
    """A bundle whose files are text: what is tested here is how they are kept, not what is in them."""

    def write(text: str) -> Path:
        with writing_bundle(tmp_path / "out") as folder:
            fill(folder, text, bundle_values())
        return tmp_path / "out"

    return write


def fill(folder: Path, text: str, values: dict[str, Any]) -> None:
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} {text}")
    write_manifest(folder, values)


def fail_halfway(destination: Path, failure: BaseException, keep_failed: bool = False) -> None:
    with writing_bundle(destination, keep_failed) as folder:
        (folder / "half").write_text("written")
        raise failure


def test_written_bundle_verifies_and_replaces_the_earlier_one(light: Callable[[str], Path], contents: Contents) -> None:
    folder = light("old")
    before = contents(folder)
    assert light("new") == folder
    assert contents(folder) != before
    manifest = verify_hashes(folder)
    assert sorted(manifest.files) == sorted(MODELS)
    assert manifest.files[MODELS[0]].sha256 == hash_file(folder / MODELS[0])
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert light("old") == folder
    assert contents(folder) == before  # equal input, equal bytes


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("earlier", [True, False])
def test_failure_leaves_what_was_there(
    tmp_path: Path,
    light: Callable[[str], Path],
    failure: BaseException,
    earlier: bool,
    contents: Contents,
) -> None:
    before = contents(light("old")) if earlier else {}
    with pytest.raises(type(failure)):
        fail_halfway(tmp_path / "out", failure)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if earlier else [])
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("failure", [OSError("disk"), KeyboardInterrupt()])
def test_failed_rename_restores_the_earlier_bundle(
    light: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    failing_call: int,
    failure: BaseException,
    contents: Contents,
) -> None:
    folder = light("old")
    before = contents(folder)
    rename, calls = Path.rename, 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(failure)):
        light("new")
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_unfinished_bundle_is_kept_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kept in ("out.failed", "out.failed-2"):
        with pytest.raises(ZeroDivisionError):
            fail_halfway(tmp_path / "out", ZeroDivisionError(), keep_failed=True)
        assert (tmp_path / kept / "half").read_text() == "written"
        assert capsys.readouterr().err.endswith(f"{tmp_path / kept}\n")


@pytest.mark.parametrize("change", [None, {"sampler": {}}, {}], ids=["no manifest", "invalid", "no model files"])
def test_bundle_that_could_not_be_read_is_never_published(
    tmp_path: Path, bundle_values: Callable[..., dict[str, Any]], change: dict[str, Any] | None
) -> None:
    def write() -> None:
        with writing_bundle(tmp_path / "out") as folder:
            if change is not None:
                write_manifest(folder, bundle_values() | change)

    with pytest.raises(KindEdgeError, match=r"without a valid manifest\.json"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_and_files_are_never_replaced(tmp_path: Path, light: Callable[[str], Path]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/manifest.json").write_text('{"schema_version": 1, "files": {}}')
    for name in ("file", "thesis"):
        with pytest.raises(UsageError, match="exists and is not a kind-edge bundle"), writing_bundle(tmp_path / name):
            pytest.fail("the block must not run")
    folder = light("old")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        light("new")
    assert (folder / "notes.txt").read_text() == "mine"


def test_empty_folder_is_replaced_but_not_the_current_one(
    tmp_path: Path, light: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(UsageError, match="folder you are in"):
        light("new")
    monkeypatch.chdir(tmp_path)
    verify_hashes(light("new"))


def test_every_difference_is_named(light: Callable[[str], Path]) -> None:
    folder = light("x")
    (folder / MODELS[0]).write_text("onnx/denoiser.onnx y")
    (folder / MODELS[1]).write_text("shorter")
    (folder / MODELS[2]).unlink()
    (folder / "stranger.txt").write_text("?")
    with pytest.raises(InputError) as caught:
        verify_hashes(folder)
    lines = str(caught.value).splitlines()[1:]
    names = [line.split(":")[0].strip() for line in lines]
    assert names == [*sorted(MODELS), "stranger.txt"]
    assert hash_file(folder / MODELS[0]) in lines[names.index(MODELS[0])]
    assert "7 bytes, the manifest says 25" in lines[names.index(MODELS[1])]


def test_link_is_no_part_of_a_bundle(light: Callable[[str], Path]) -> None:
    folder = light("x")
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="links"):
        verify_hashes(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2.*update kind-edge"),
        ({"default_model": "onnx/x.onnx"}, "default_model 'onnx/x.onnx' is not one of"),
        ({"classes": ["a", "a"]}, "each once"),
        ({"classes": [1, 2]}, r"classes\[0\]: got 1, want text"),
        ({"image": {"channels": 1, "height": 6}}, "image: missing key 'width'"),
        ({"image": {"channels": 1, "height": 6, "width": True}}, "width: got True, want an integer"),
        ({"files": {"../up": {"bytes": 1, "sha256": ""}}}, "'../up' is not a plain relative path"),
        ({"files": {}}, "'onnx/denoiser.onnx' is not among the files"),
    ],
)
def test_manifest_refusals_say_where(light: Callable[[str], Path], change: dict[str, Any], message: str) -> None:
    values = json.loads((light("x") / "manifest.json").read_text())
    with pytest.raises(InputError, match=message):
        Manifest.from_dict(values | change)


def test_tables_must_be_finite_and_equally_long(light: Callable[[str], Path]) -> None:
    text = (light("x") / "manifest.json").read_text()
    values = json.loads(text)
    values["sampler"]["tables"]["b"].pop()
    with pytest.raises(InputError, match="'b': 3"):
        Manifest.from_dict(values)
    with pytest.raises(InputError, match="NaN is not JSON"):
        Manifest.from_bytes(text.replace("0.75", "NaN").encode())


def test_zip_is_deterministic_and_equal_to_the_folder(
    light: Callable[[str], Path], tmp_path: Path, contents: Contents
) -> None:
    first = zip_bundle(light("x"))
    assert first == tmp_path / "out.zip"
    os.utime(tmp_path / "out" / MODELS[0], (1, 1))
    assert zip_bundle(tmp_path / "out", tmp_path / "second.zip").read_bytes() == first.read_bytes()
    with open_bundle(first) as folder:
        assert contents(folder) == contents(tmp_path / "out")
    assert verify_hashes(first) == read_manifest(tmp_path / "out")
    (tmp_path / "out" / MODELS[0]).write_text("touched")
    with pytest.raises(InputError, match=r"denoiser\.onnx"):
        zip_bundle(tmp_path / "out")


def rezip(source: Path, target: Path, extra: dict[str, bytes], drop: str = "", mode: int = 0) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            if member.filename != drop:
                new.writestr(member.filename, old.read(member))
        for name, data in extra.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            new.writestr(member, data)
    return target


@pytest.mark.parametrize(
    ("extra", "mode", "message"),
    [
        ({"../evil": b""}, 0, "does not stay inside"),
        ({"/tmp/evil": b""}, 0, "does not stay inside"),
        ({"a/../../evil": b""}, 0, "does not stay inside"),
        ({"..\\evil": b""}, 0, "does not stay inside"),
        ({"C:evil": b""}, 0, "does not stay inside"),
        ({"link": b"/etc/passwd"}, stat.S_IFLNK | 0o777, "link or a special file"),
        ({"stranger": b""}, 0, "not in the manifest"),
        ({MODELS[0]: bytes(10**7)}, 0, "10000000 bytes, the manifest says"),
    ],
)
def test_hostile_zip_is_refused(
    light: Callable[[str], Path], tmp_path: Path, extra: dict[str, bytes], mode: int, message: str
) -> None:
    attack = rezip(zip_bundle(light("x")), tmp_path / "attack.zip", extra, drop=next(iter(extra)), mode=mode)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        verify_hashes(attack)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_broken_zips_are_refused(light: Callable[[str], Path], tmp_path: Path) -> None:
    good = zip_bundle(light("x"))
    with pytest.raises(InputError, match="occurs twice"):
        verify_hashes(rezip(good, tmp_path / "twice.zip", {MODELS[0]: b"second"}))
    with pytest.raises(InputError, match=r"no manifest\.json"):
        verify_hashes(rezip(good, tmp_path / "bare.zip", {}, drop="manifest.json"))
    data = good.read_bytes()
    for name, damaged in {"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=r"not a readable \.zip"):
            verify_hashes(tmp_path / name)
    (tmp_path / "bit").write_bytes(data.replace(b"onnx/sampler.onnx x", b"onnx/sampler.onnx y"))
    with pytest.raises(InputError, match="CRC"):
        verify_hashes(tmp_path / "bit")
    with pytest.raises(InputError, match="no such bundle"):
        verify_hashes(tmp_path / "nowhere")
