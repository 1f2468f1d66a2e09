"""A checkpoint comes back bit for bit, and whatever is wrong with one is said with its place."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kind_edge.model.checkpoint as module
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Checkpoint,
    as_stored,
    checkpoint_hash,
    load_checkpoint,
    save_checkpoint,
    stored_dtype,
    write_file,
    write_tensors,
)
from kind_edge.model.shipped import find_model

MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture
def saved(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    save_checkpoint(tmp_path / "ck", make_checkpoint())
    return tmp_path / "ck"


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.spec, a.class_names, dict(a.provenance)) == (b.spec, b.class_names, dict(b.provenance))
    assert set(a.tensors) == set(b.tensors)
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype
        assert torch.equal(tensor, b.tensors[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shard_bytes", [None, 8_000])
def test_round_trip_is_bit_exact(
    dtype: torch.dtype,
    shard_bytes: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_checkpoint: MakeCheckpoint,
) -> None:
    if shard_bytes:
        monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    first = make_checkpoint(label_embedding=True)
    save_checkpoint(tmp_path, first, dtype)
    once = load_checkpoint(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 2 and (tmp_path / INDEX).exists()) if shard_bytes else files == [WEIGHTS]
    cast = {name: tensor.to(dtype) for name, tensor in first.tensors.items()}
    assert_same(once, Checkpoint(first.spec, first.class_names, cast, first.provenance))
    save_checkpoint(tmp_path / "again", once)
    assert_same(load_checkpoint(tmp_path / "again"), once)
    assert checkpoint_hash(tmp_path / "again") == checkpoint_hash(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "write", [lambda path: write_tensors(path, {"a": torch.zeros(3)}), lambda path: write_file(path, b"text")]
)
def test_two_may_write_one_file_at_once(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two processes that measure one model: the second writes all of it before the first has renamed its own."""
    replace = os.replace

    def with_another(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", with_another)
    write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_saving_over_a_sharded_one_leaves_no_stale_shards(
    saved: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "SHARD_BYTES", 20_000)
        save_checkpoint(saved, make_checkpoint(seed=1))
        assert (saved / INDEX).exists()
        assert not (saved / WEIGHTS).exists()
    save_checkpoint(saved, make_checkpoint(seed=2))
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert_same(load_checkpoint(saved), make_checkpoint(seed=2))


def test_tensor_names_are_those_of_the_contract(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(label_embedding=True, channels=2)
    d, h, n_g, n_t, c = 16, 64, 6, 2, 4
    wanted: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (d, 2, 2, 2), "patch_embed.bias": (d,), "pos_embed": (16, d),
        "t_embed.fc1.weight": (d, 256), "t_embed.fc1.bias": (d,),
        "t_embed.fc2.weight": (d, d), "t_embed.fc2.bias": (d,),
        "y_embed.weight": (c + 1, d),
        "final.adaln.weight": (2 * d, d), "final.adaln.bias": (2 * d,),
        "final.linear.weight": (8, d), "final.linear.bias": (8,),
    }  # fmt: skip
    for i in range(2):
        wanted |= {f"blocks.{i}.adaln.weight": (6 * d, d), f"blocks.{i}.adaln.bias": (6 * d,)}
        shapes = {"attn.q": (d, d), "attn.k": (d, d), "attn.v": (d, d), "attn.o": (d, d)}
        for part, (n, m) in {**shapes, "mlp.fc1": (h, d), "mlp.fc2": (d, h)}.items():
            name = f"blocks.{i}.{part}"
            wanted |= {f"{name}.learngene.U": (n, n_g), f"{name}.learngene.s": (n_g,), f"{name}.learngene.V": (m, n_g)}
            wanted |= {
                f"{name}.tailors.U": (c, n, n_t),
                f"{name}.tailors.s": (c, n_t),
                f"{name}.tailors.V": (c, m, n_t),
            }
            wanted[f"{name}.bias"] = (n,)
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()} == wanted
    assert "y_embed.weight" not in make_checkpoint().tensors


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 300, -1])
def test_truncated_weights(saved: Path, size: int) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:size])
    refused(saved, str(saved / WEIGHTS), "truncated or corrupt")


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).unlink()
    refused(saved, str(saved / WEIGHTS), "missing")
    (saved / CONFIG).unlink()
    refused(saved, str(saved), "no config.json")
    refused(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved: Path, value: float) -> None:
    tensors = load_file(saved / WEIGHTS)
    tensors["blocks.1.mlp.fc1.tailors.V"][3, 2, 1] = value
    save_file(tensors, saved / WEIGHTS)
    refused(saved, "blocks.1.mlp.fc1.tailors.V", "NaN or infinity")


def test_a_tensor_that_disagrees_with_the_config_is_named_with_both_shapes(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    name = "blocks.1.attn.q.learngene.U"
    tensors[name] = tensors[name][:, :5].contiguous()
    save_file(tensors, saved / WEIGHTS)
    refused(saved, str(saved), f"{name}: file has (16, 5), model wants (16, 6)")
    del tensors[name]
    save_file({**tensors, "blocks.9.adaln.bias": torch.zeros(1)}, saved / WEIGHTS)
    refused(saved, f"{name}: missing, want (16, 6)", "blocks.9.adaln.bias: unexpected")


def test_many_disagreements_are_summed_up(saved: Path) -> None:
    edit_model(saved, learngene_rank=5)
    refused(saved, "file has (16, 6), model wants (16, 5)", "and 33 more")


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def edit_model(folder: Path, **changes: Any) -> None:
    edit_config(folder, model={**json.loads((folder / CONFIG).read_text())["model"], **changes})


def test_an_unknown_config_key_is_refused_with_the_nearest(saved: Path) -> None:
    edit_model(saved, learngen_rank=6)
    refused(saved, str(saved / CONFIG), "'learngen_rank'", "learngene_rank")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, ("schema_version is 2", "reads 1")),
        ({"schema_version": "1"}, ("schema_version is '1'",)),
        ({"class_names": ["a", "b", "c"]}, ("got 3 class names", "want 4")),
        ({"class_names": ["a", "b", "c", "c"]}, ("class names", "different")),
        ({"class_names": 4}, ("class_names", "4")),
        ({"class_names": [1, 2, 3, 4]}, ("class_names",)),
        ({"model": "DiT-B/2"}, ("model", "DiT-B/2")),
        ({"provenance": "mine"}, ("provenance", "mine")),
    ],
)
def test_a_config_that_makes_no_sense(saved: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    edit_config(saved, **changes)
    refused(saved, str(saved / CONFIG), *words)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"3", b""])
def test_a_config_that_is_no_object(saved: Path, content: bytes) -> None:
    (saved / CONFIG).write_bytes(content)
    refused(saved, str(saved / CONFIG))


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[]"])
def test_an_index_that_is_none(saved: Path, content: str) -> None:
    (saved / INDEX).write_text(content)
    refused(saved, str(saved / INDEX), "not a safetensors index")


def test_an_index_cannot_reach_outside_the_folder(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes((saved / WEIGHTS).read_bytes())
    (saved / INDEX).write_text(json.dumps({"weight_map": {"pos_embed": "../secret.safetensors"}}))
    refused(saved, str(saved / "secret.safetensors"), "missing")


def test_a_failed_save_leaves_the_old_weights(
    saved: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint
) -> None:
    def half(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    before = checkpoint_hash(saved)
    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(UsageError, match=r"no space left.*the earlier model\.safetensors is untouched"):
        save_checkpoint(saved, make_checkpoint(seed=9))
    assert checkpoint_hash(saved) == before
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_the_hash_is_of_weights_and_meaning(saved: Path, make_checkpoint: MakeCheckpoint) -> None:
    before = checkpoint_hash(saved)
    edit_config(saved, provenance={"seconds": 3})
    assert checkpoint_hash(saved) == before
    edit_config(saved, class_names=["bag", "sneaker", "coat", "shirt"])
    assert checkpoint_hash(saved) != before
    save_checkpoint(saved, make_checkpoint(seed=1))
    assert checkpoint_hash(saved) != before


def test_find_model_takes_folders_and_refuses_the_rest(saved: Path) -> None:
    assert find_model(saved) == saved
    with pytest.raises(InputError, match="no checkpoint folder and no shipped model"):
        find_model("fashion-minst")


def test_a_checkpoint_as_stored_is_what_is_read_again(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    exact = make_checkpoint()
    for dtype in (torch.float16, torch.float32):
        source = dataclasses.replace(exact, tensors={name: t.to(dtype) for name, t in exact.tensors.items()})
        stored = as_stored(exact, source)
        save_checkpoint(tmp_path, stored, stored_dtype(source))
        read = load_checkpoint(tmp_path).float_tensors()
        assert all(torch.equal(tensor, read[name]) for name, tensor in stored.tensors.items())
