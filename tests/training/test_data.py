"""Fashion-MNIST is found where it should be, and nothing but the published bytes is accepted."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.errors import InputError
from kind_edge.training.data import (
    CLASS_NAMES,
    FILE_NAMES,
    FashionMNIST,
    TrainingData,
    cache_folder,
    find_fashion_mnist,
    load_fashion_mnist,
)


@pytest.fixture(scope="module")
def data(fashion_folder: Path) -> FashionMNIST:
    return load_fashion_mnist(fashion_folder)


def test_arrays_are_what_the_docstring_says(data: FashionMNIST) -> None:
    assert (data.train_images.shape, data.train_images.dtype) == ((60_000, 28, 28), np.uint8)
    assert (data.test_images.shape, data.test_images.dtype) == ((10_000, 28, 28), np.uint8)
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert np.bincount(data.train_labels).tolist() == [6_000] * len(CLASS_NAMES)
    assert np.bincount(data.test_labels).tolist() == [1_000] * len(CLASS_NAMES)
    assert CLASS_NAMES[data.train_labels[0]] == "ankle-boot"  # the first picture that everybody knows


def test_the_users_cache_comes_first_and_other_compression_is_welcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fashion_folder: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_folder().mkdir(parents=True)
    for name in FILE_NAMES:
        (cache_folder() / name).symlink_to(fashion_folder / name)
    (cache_folder() / FILE_NAMES[3]).unlink()
    recompressed = gzip.compress(gzip.decompress((fashion_folder / FILE_NAMES[3]).read_bytes()), compresslevel=1)
    (cache_folder() / FILE_NAMES[3]).write_bytes(recompressed)

    assert find_fashion_mnist() == cache_folder() == tmp_path / "kind-edge" / "fashion-mnist"
    load_fashion_mnist()


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 999), latent=st.booleans())
def test_items_are_found_in_whichever_shard_they_lie(sizes: list[int], seed: int, latent: bool) -> None:
    generator = np.random.default_rng(seed)
    total = sum(sizes)
    whole = generator.integers(0, 256, (total, 2, 3, 3)).astype(np.float16 if latent else np.uint8)
    shards = tuple(np.split(whole, np.cumsum(sizes)[:-1]))
    rows = torch.from_numpy(generator.permutation(total)[: total // 2 + 1])
    items = TrainingData(torch.zeros(len(rows), dtype=torch.int64), ("a",), (2, 3, 3), "none", shards, rows)
    chosen = torch.from_numpy(generator.integers(0, max(1, len(rows)), 5 if len(rows) else 0))
    wanted = torch.from_numpy(whole)[rows[chosen]]
    assert torch.equal(items.stored(chosen), wanted)
    assert torch.equal(items.batch(chosen), wanted.float() if latent else wanted.float() / 127.5 - 1)


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    (tmp_path / FILE_NAMES[0]).touch()
    with pytest.raises(InputError, match="fetch-fashion-mnist") as caught:
        load_fashion_mnist(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path} lacks {', '.join(FILE_NAMES[1:])}" in message
    assert "--data DIR" in message


@pytest.mark.parametrize("damage", ["one bit", "cut short", "not gzip"])
def test_damage_is_refused_with_the_files_name(tmp_path: Path, damage: str, fashion_folder: Path) -> None:
    for name in FILE_NAMES:
        shutil.copy(fashion_folder / name, tmp_path / name)
    victim = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(victim.read_bytes()))
    content[1_000] ^= 1
    packed = victim.read_bytes()
    victim.write_bytes(
        {"one bit": gzip.compress(content), "cut short": packed[:-500], "not gzip": b"<html>404"}[damage]
    )
    with pytest.raises(InputError, match=victim.name) as caught:
        load_fashion_mnist(tmp_path)
    if damage == "one bit":
        assert "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9" in str(caught.value)
