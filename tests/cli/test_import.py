"""`kind-edge import`: what it says, and that a bad file runs no code, exits 4 and leaves nothing behind."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.dit import DiT
from kind_edge.model.dit_layouts import channels_last
from kind_edge.model.spec import ModelSpec

RANKS = ("--learngene-rank", "8", "--tailor-rank", "2")


def facebook_state() -> dict[str, torch.Tensor]:
    """A small DiT's weights by the names of facebookresearch/DiT."""
    spec = ModelSpec(8, 1, 2, 16, 1, 2, 2, label_embedding=True, objective="epsilon", factored=False)
    torch.manual_seed(0)
    ours = DiT(spec).state_dict()
    renamed = {"patch_embed": "x_embedder.proj", "t_embed.fc1": "t_embedder.mlp.0", "t_embed.fc2": "t_embedder.mlp.2",
        "y_embed": "y_embedder.embedding_table", "final.adaln": "final_layer.adaLN_modulation.1",
        "final.linear": "final_layer.linear", "blocks.0.adaln": "blocks.0.adaLN_modulation.1",
        "blocks.0.attn.o": "blocks.0.attn.proj"}  # fmt: skip
    state = {"pos_embed": ours.pop("pos_embed")[None]}
    for kind in ("weight", "bias"):
        state[f"blocks.0.attn.qkv.{kind}"] = torch.cat([ours.pop(f"blocks.0.attn.{part}.{kind}") for part in "qkv"])
        ours[f"final.linear.{kind}"] = channels_last(ours[f"final.linear.{kind}"], 2)
    for name, tensor in ours.items():
        layer, kind = name.rsplit(".", 1)
        state[f"{renamed.get(layer, layer)}.{kind}"] = tensor
    return state


class Planted:
    """Unpickled the ordinary way, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def test_names_from_a_file_and_what_is_said(call: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(facebook_state(), tmp_path / "dit.pt")
    (tmp_path / "names.txt").write_text("cat, the animal\n\ndog\n")
    answer = call("import", tmp_path / "dit.pt", "-o", tmp_path / "out", *RANKS, "--heads", "2",
        "--classes", tmp_path / "names.txt", "--json")  # fmt: skip
    said = answer.json()
    assert load_checkpoint(tmp_path / "out").class_names == tuple(said["classes"]) == ("cat, the animal", "dog")
    assert said["learngene_energy"] < said["active_energy"] < 1
    again = call("import", tmp_path / "dit.pt", "-o", tmp_path / "out", *RANKS, "--heads", "2", "--classes", "cat,dog")
    assert again.code == 2
    assert "not empty" in again.err
    printed = call(
        "import", tmp_path / "dit.pt", "-o", tmp_path / "out2", *RANKS, "--heads", "2", "--classes", "cat,dog"
    )
    assert printed.code == 0
    assert "rank 8 of 16" in printed.out


def damaged(tmp_path: Path) -> dict[str, bytes]:
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(facebook_state(), buffer)
    torch.save(facebook_state(), old, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    names = whole.index(b"x_embedder")
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "cut": whole[: len(whole) // 2],
        "cut in the pickle": whole[: names + 3],
        "cut at the end": whole[:-1],
        "other bytes": whole[:names] + bytes(byte ^ 0x55 for byte in whole[names : names + 64]) + whole[names + 64 :],
        "old format, cut": old.getvalue()[: len(old.getvalue()) // 2],
        "an object": pickle.dumps(Planted(tmp_path / "ran")),
        "an object among tensors": saved({**facebook_state(), "extra": Planted(tmp_path / "ran")}),
        "a whole model": saved(torch.nn.Linear(2, 2)),
    }


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_damaged_or_dangerous_file_exits_4_and_leaves_nothing(call: Callable[..., Any], tmp_path: Path) -> None:
    for name, content in damaged(tmp_path).items():
        (tmp_path / "dit.pt").write_bytes(content)
        answer = call("-q", "import", tmp_path / "dit.pt", "-o", tmp_path / "deep" / "out", *RANKS, "--heads", "2")
        assert (answer.code, answer.out) == (4, ""), f"{name}: {answer.err}"
        assert answer.err.startswith(f"error: {tmp_path / 'dit.pt'}: "), name
        assert answer.err.count("\n") == 1, name
        assert [path.name for path in tmp_path.iterdir()] == ["dit.pt"], name


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", None),
        ("diffusion_pytorch_model.safetensors", b"\0" * 8),
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.safetensors.index.json", b"[]"),
        ("model_index.json", json.dumps({"_class_name": "PixArtAlphaPipeline"}).encode()),
    ],
)
def test_a_damaged_folder_exits_4(call: Callable[..., Any], tmp_path: Path, file: str, content: bytes | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    if content is None:
        (tmp_path / file).unlink(missing_ok=True)
    else:
        (tmp_path / file).write_bytes(content)
    answer = call("-q", "import", tmp_path, "-o", tmp_path / "out", *RANKS)
    assert (answer.code, answer.out) == (4, "")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_our_own_needs_no_import(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    answer = call("-q", "import", checkpoint, "-o", tmp_path / "out", *RANKS)
    assert (answer.code, answer.out) == (4, "")
    assert f"{checkpoint}: is a checkpoint of kind-edge already; give it to plan" in answer.err


def test_a_write_that_fails_leaves_nothing(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(facebook_state(), tmp_path / "dit.pt")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("kind_edge.model.checkpoint.write_text", full)  # after the weights have been written
    answer = call("-q", "import", tmp_path / "dit.pt", "-o", tmp_path / "out", *RANKS, "--heads", "2")
    assert answer.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["dit.pt"]
