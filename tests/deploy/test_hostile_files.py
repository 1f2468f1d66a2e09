"""Damaged and hostile files of every kind that is read: refused in words or harmless, and never large in memory."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import random
import shutil
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kind_edge.bounded import ARRAYS_BYTES, MAX_MEMBERS, parse_json, parse_toml, read_bytes, read_npz
from kind_edge.budget.influence import read_sensitivity
from kind_edge.budget.plan import read_plan
from kind_edge.budget.profile import load_profile
from kind_edge.cli.inspect import print_inspection
from kind_edge.cli.terminal import Terminal
from kind_edge.deploy.bundle import verify_hashes, zip_bundle
from kind_edge.deploy.class_sets import read_class_sets
from kind_edge.deploy.inspection import inspect
from kind_edge.deploy.mac_results import read_mac_results
from kind_edge.deploy.packs import read_core, take_apart
from kind_edge.deploy.packs_file import read_pack
from kind_edge.deploy.session import open_session
from kind_edge.deploy.signing import read_signing_key
from kind_edge.errors import InputError, UsageError
from kind_edge.training.config import read_config
from kind_edge.training.data import FILE_NAMES, load_fashion_mnist
from kind_edge.training.mapping import read_class_map
from kind_edge.training.pictures import UnreadablePictureError, decode
from kind_edge.training.tars import open_tars

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 64 * 2**20
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 1e308, "", "x", "../x", [], {}, [[]], {"a": 1}, [1, 2, 3], {"message": [{"rows": 1}]},
)  # fmt: skip
CONFIG = """images = 100
[model]
image_size = 8
channels = 1
patch_size = 2
width = 16
depth = 2
heads = 2
num_classes = 4
learngene_rank = 6
tailor_rank = 2
[provenance]
licence = "MIT"
"""


def damaged(content: bytes, seed: int) -> bytes:
    """Cut, with bits turned, with bytes put in, or, of JSON, with another value somewhere."""
    dice = random.Random(seed)
    kind = dice.choice(["cut", "bits", "more", "value", "value"])
    if kind == "value" and content[:1] in b"{[":
        return with_another_value(json.loads(content), dice)
    if kind == "cut":
        return content[: dice.randrange(len(content))]
    changed = bytearray(content)
    near = min(len(content), dice.choice([64, 600, len(content)]))  # most of what is parsed stands at the front
    if kind == "more":
        at = dice.randrange(near)
        changed[at:at] = dice.randbytes(dice.choice([1, 4, 40]))
    for _ in range(dice.choice([1, 1, 3, 20])):
        changed[dice.randrange(near)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def with_another_value(values: Any, dice: random.Random) -> bytes:
    *way, last = dice.choice(list(ways(values)))
    place = functools.reduce(lambda inner, key: inner[key], way, values)
    if dice.random() < 0.2:
        del place[last]
    else:
        place[last] = dice.choice(VALUES)
    return json.dumps(values).encode()


def ways(values: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield (*way, key)
        yield from ways(value, (*way, key))


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


Kinds = dict[str, tuple[bytes, Callable[[bytes], object]]]


@pytest.fixture(scope="module")
def kinds(packed: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """By name the bytes of a sound file, and what reads such a file."""
    place = tmp_path_factory.mktemp("hostile")
    bundle = shutil.copytree(packed, place / "bundle")
    model = shutil.copytree(tiny_folder, place / "model")
    zipped = zip_bundle(bundle).read_bytes()
    core = (packed / "packs" / "core.json").read_bytes()
    mac = {"kind": "x", "schema_version": 1, "manifest_sha256": "0", "machine": {}, "results": {}, "runs": 1}
    terminal = Terminal()
    terminal.out.file = io.StringIO()

    def of(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def run(content: bytes) -> object:
            (place / name).write_bytes(content)
            return read(place / name)

        return run

    def within(folder: Path, name: str) -> tuple[bytes, Callable[[bytes], object]]:
        """A file of something whole, which `inspect` shows."""
        sound = (folder / name).read_bytes()

        def run(content: bytes) -> None:
            (folder / name).write_bytes(content)
            try:
                print_inspection(terminal, inspect(folder))
            finally:
                (folder / name).write_bytes(sound)

        return sound, run

    def take_all_apart(content: bytes) -> None:
        found = read_core(content, "core.json")
        for path in found.files:
            take_apart(found, path, (packed / path).read_bytes() if (packed / path).is_file() else b"", 4)

    picture = (bundle / "preview.png").read_bytes()
    shard = tar_of(("a.png", picture[:300]), ("a.cls", b"3"), ("b.png", picture[:300]), ("b.json", b'{"label": "x"}'))
    return {
        "manifest": within(bundle, "manifest.json"),
        "configuration": within(model, "config.json"),
        "weights": within(model, "model.safetensors"),
        "onnx": (
            (bundle / "onnx" / "denoiser.onnx").read_bytes(),
            of("m.onnx", lambda path: print_inspection(terminal, inspect(path))),
        ),
        "zip": (zipped, of("b.zip", verify_hashes)),
        "npz": ((bundle / "verify" / "reference.npz").read_bytes(), of("r.npz", read_npz)),
        "plan": ((bundle / "plan.json").read_bytes(), of("plan.json", read_plan)),
        "sensitivity": ((model / "sensitivity.json").read_bytes(), of("s.json", read_sensitivity)),
        "core": (core, take_all_apart),
        "pack": ((packed / "packs" / "bag.safetensors").read_bytes(), of("bag.safetensors", read_pack)),
        "profile": (
            (ROOT / "profiles" / "apple-a18.toml").read_bytes(),
            of("p.toml", lambda path: load_profile(str(path))),
        ),
        "training": (CONFIG.encode(), of("c.toml", read_config)),
        "class map": (b'{"shoe": ["a", "b"], "hat": ["c"]}', of("m.json", read_class_map)),
        "sets": (b"shoes: [sneaker, bag]\nday: [2001-12-14]\nall: &all [coat]\n", of("s.yaml", read_class_sets)),
        "mac": (json.dumps(mac).encode(), of("mac.json", lambda path: read_mac_results(path, bundle))),
        "tar": (shard, of("s.tar", lambda path: open_tars([path], "s.tar"))),
        "picture": (picture, lambda content: decode(content, 28, 1)),
        "key": (b"-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----\n", of("k.pem", read_signing_key)),
    }


NAMES = (
    "manifest", "configuration", "weights", "onnx", "zip", "npz", "plan", "sensitivity", "core", "pack", "profile",
    "training", "class map", "sets", "mac", "tar", "picture", "key",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_is_refused_or_harmless(kinds: Kinds, name: str, seed: int) -> None:
    sound, read = kinds[name]
    with contextlib.suppress(InputError, UsageError, UnreadablePictureError):
        read(damaged(sound, seed))


def test_every_kind_is_tried(kinds: Kinds) -> None:
    assert set(kinds) == set(NAMES)


def peak_bytes(call: Callable[[], object], message: str) -> int:
    """What refusing takes."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def zip_of(path: Path, compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    zeros = bytes(MOST_BYTES + 2**20)
    bomb = zip_of(tmp_path / "bomb.zip", zeros=zeros)
    assert bomb.stat().st_size < 2**20
    assert peak_bytes(lambda: verify_hashes(bomb), "that unpack to") < 2**20
    assert peak_bytes(lambda: read_npz(bomb), "that unpack to") < 2**20
    many = zip_of(tmp_path / "many.zip", **{str(number): b"" for number in range(MAX_MEMBERS + 1)})
    assert peak_bytes(lambda: verify_hashes(many), f"want {MAX_MEMBERS} at most") < MOST_BYTES
    with pytest.raises(InputError, match="neither stored nor deflated"):
        verify_hashes(zip_of(tmp_path / "bz.zip", zipfile.ZIP_BZIP2, a=b"a"))
    locked = bytearray(zip_of(tmp_path / "locked.zip", a=b"a").read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(InputError, match="is encrypted"):
        verify_hashes(tmp_path / "locked.zip")
    (tmp_path / FILE_NAMES[0]).write_bytes(gzip.compress(zeros) * 8)
    for name in FILE_NAMES[1:]:
        (tmp_path / name).write_bytes(gzip.compress(b""))
    assert peak_bytes(lambda: load_fashion_mnist(tmp_path), "is corrupt") < 2 * MOST_BYTES


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    for shape, descr, message in (
        ((2**40,), "<f4", "0 bytes are not float32"),
        ((-1, 4), "<f4", "want numbers"),
        ((1,), "|O", "want numbers"),
        ((4,), "<U10", "want numbers"),
    ):
        path = zip_of(tmp_path / "a.npz", **{"a.npy": npy_header(shape, descr)})
        assert peak_bytes(lambda path=path: read_npz(path), message) < 2**20
    sparse = tmp_path / "large.json"
    with sparse.open("wb") as file:
        file.truncate(ARRAYS_BYTES)
    assert peak_bytes(lambda: read_bytes(sparse, 2**20, "the plan"), "the plan has over") < 2**23
    assert peak_bytes(lambda: parse_json(b"[" * 2**20, "x"), "not readable as JSON") < MOST_BYTES
    assert peak_bytes(lambda: parse_toml("a = " + "[" * 2**16, "x"), "not TOML") < MOST_BYTES


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_of_a_models_folder_are_not_read(tmp_path: Path, absolute: bool) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    place = str(tmp_path / "secret") if absolute else "../secret"
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    path = tmp_path / "bundle" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    with pytest.raises(InputError, match="External data path validation failed"):
        open_session(path)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": np.array(1)}
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    read = read_npz(tmp_path / "a.npz")
    assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in arrays.items())
