"""The prepared folder equals direct decoding, survives kills, and notices every kind of damage."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.errors import InputError, UsageError
from kind_edge.training import prepare as prepare_module
from kind_edge.training.hashes import remembered_hashes
from kind_edge.training.open import hold_out, open_data
from kind_edge.training.pictures import decode
from kind_edge.training.prepare import Prepared, Work, prepare

BROKEN = {5: b"", 11: b"<html>"}


@pytest.fixture(scope="module")
def contents(make_png: Callable[..., bytes]) -> list[bytes]:
    return [BROKEN.get(number, make_png(number, 9 + number % 9)) for number in range(26)]


def work_of(contents: list[bytes], **changes: object) -> Work:
    labels = np.arange(len(contents)) % 3
    work = Work("k" * 64, labels, lambda n: f"item {n}", lambda n: contents[n], 12, 3, (3, 12, 12), shard_items=8)
    return dataclasses.replace(work, **changes)  # type: ignore[arg-type]


def prepared(work: Work, cache: Path, said: list[str] | None = None) -> Prepared:
    with remembered_hashes(cache) as sha256_of:
        return prepare(work, cache, sha256_of, said.append if said is not None else lambda _: None)


def whole(result: Prepared) -> np.ndarray:
    return np.concatenate([np.asarray(shard) for shard in result.shards])


def test_it_equals_direct_decoding_in_order(contents: list[bytes], tmp_path: Path) -> None:
    result = prepared(work_of(contents), tmp_path)
    good = [number for number in range(len(contents)) if number not in BROKEN]
    assert np.array_equal(whole(result), np.stack([decode(contents[n], 12, 3).pixels for n in good]))
    assert result.labels.tolist() == [n % 3 for n in good]
    assert [len(shard) for shard in result.shards] == [7, 7, 8, 2]
    assert all(isinstance(shard, np.memmap) for shard in result.shards)
    assert [name for name, _ in result.failures] == ["item 5", "item 11"]
    assert result.enlarged == sum(9 + n % 9 < 12 for n in good)
    listed = (tmp_path / f"{'k' * 32}.failures.txt").read_text()
    assert listed == "item 5\tempty\nitem 11\tno image format that is known\n"
    said: list[str] = []
    assert np.array_equal(whole(prepared(work_of(contents), tmp_path, said)), whole(result))
    assert said == [f"prepared before: {result.folder}"]


def kill_at(contents: list[bytes], cache: Path, item: int) -> None:
    """Prepare in this process until `item` is read, then die without a word."""

    def read(number: int) -> bytes:
        if number == item:
            os._exit(9)
        return contents[number]

    prepared(work_of(contents, read=read), cache)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forking beside threads: the child only dies
@pytest.mark.parametrize("item", [0, 9, 25])
def test_a_killed_run_goes_on_after_the_last_whole_shard(item: int, contents: list[bytes], tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=kill_at, args=(contents, tmp_path / "a", item))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not (tmp_path / "a" / ("k" * 32)).exists()
    read: list[int] = []

    def counted(number: int) -> bytes:
        read.append(number)
        return contents[number]

    result = prepared(work_of(contents, read=counted), tmp_path / "a")
    assert read == list(range(item // 8 * 8, 26))
    other = prepared(work_of(contents), tmp_path / "b")
    for path in sorted(other.folder.iterdir()):
        assert path.read_bytes() == (result.folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("victim", ["00001.npy", "00001.json", "index.json"])
@pytest.mark.parametrize("damage", ["one bit", "cut short", "gone", "empty"])
def test_damage_is_noticed_and_mended(victim: str, damage: str, contents: list[bytes], tmp_path: Path) -> None:
    before = whole(prepared(work_of(contents), tmp_path))
    path = tmp_path / ("k" * 32) / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes({"one bit": bytes(content), "cut short": content[:-5], "empty": b""}[damage])
    said: list[str] = []
    again = prepared(work_of(contents), tmp_path, said)
    assert np.array_equal(whole(again), before)
    named = "index.json" if victim == "index.json" else "shard 00001"
    assert f"{named} is damaged" in said[0]
    again_files = [file.name for file in (tmp_path / ("k" * 32)).iterdir()]
    assert len(again_files) == 9


def test_another_key_is_another_folder(contents: list[bytes], tmp_path: Path) -> None:
    prepared(work_of(contents), tmp_path)
    other = prepared(work_of(contents, key="z" * 64, channels=1, shape=(1, 12, 12)), tmp_path)
    assert other.folder.name == "z" * 32
    assert whole(other).shape == (24, 1, 12, 12)


def test_too_many_failures_are_refused_and_listed(contents: list[bytes], tmp_path: Path) -> None:
    broken = (("lost 1", "no label"), ("lost 2", "no label"))
    with pytest.raises(InputError, match=r"3 of 28 images cannot be read, more than 10%: lost 1 \(no label\); lost 2"):
        prepared(work_of(contents, broken=broken), tmp_path)
    assert "item 5\tempty" in (tmp_path / f"{'k' * 32}.failures.txt").read_text()
    fine = work_of([content for content in contents if content][:10])
    assert prepared(dataclasses.replace(fine, key="f" * 64), tmp_path).failures == ()


def test_a_full_disk_is_said_before_the_work(
    contents: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        prepared(work_of(contents, read=lambda _: pytest.fail("read before checked")), tmp_path)


def test_checksums_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    with remembered_hashes(tmp_path) as sha256_of:
        one = sha256_of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(10**18, 10**18))  # same size and time: what a memory cannot tell
    with remembered_hashes(tmp_path) as sha256_of:
        assert sha256_of(path) == one
        os.utime(path, ns=(10**18, 10**18 + 1))
        assert sha256_of(path) != one
    (tmp_path / "hashes.sqlite").write_bytes(b"no database" * 100)
    with remembered_hashes(tmp_path) as sha256_of:
        assert sha256_of(path) != one


# --- held out ---------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 600), seed=st.integers(0, 2**32 - 1), different=st.integers(1, 800))
def test_no_copy_of_what_is_held_out_is_trained_on(count: int, seed: int, different: int) -> None:
    generator = np.random.default_rng(seed)
    digests = np.array([f"{number:04d}" for number in generator.integers(0, different, count)])
    classes = generator.integers(0, 4, count)
    training, heldout = hold_out(classes, digests)
    assert not set(digests[training]) & set(digests[heldout])
    for label in set(classes.tolist()):
        mine = classes == label
        assert (classes[heldout] == label).sum() == min(50, len(set(digests[mine])) // 10)
    again = hold_out(classes[::-1], digests[::-1])[1]
    assert sorted(digests[heldout]) == sorted(digests[::-1][again])  # whatever the order of the files


def test_half_of_many_images_is_never_held_out() -> None:
    digests = np.array([f"{number * 7919 % 100_003:06d}" for number in range(2_000)])
    training, heldout = hold_out(np.arange(2_000) % 2, digests)
    assert (len(training), len(heldout)) == (1_900, 100)


# --- the data of a run ------------------------------------------------------------------------------------------------


def test_a_batch_is_what_is_in_the_files(
    make_folder: Callable[..., Path], make_config: Callable[..., object], tmp_path: Path
) -> None:
    root = make_folder()
    said: list[str] = []
    split = open_data(make_config(), root, device=torch.device("cpu"), report=said.append, cache=tmp_path / "cache")
    training, heldout = split.training, split.heldout
    assert training.class_names == ("cat", "dog", "eel")
    assert training.shape == (3, 16, 16)
    assert training.labels.bincount().tolist() == [11, 18, 2]
    assert heldout.labels.bincount().tolist() == [1, 2]
    files = [decode(path.read_bytes(), 16, 3).pixels for path in root.rglob("*.png")]
    wanted = {torch.from_numpy(pixels).float().div(127.5).sub(1).numpy().tobytes() for pixels in files}
    order = torch.randperm(len(training.labels))
    shown = {item.numpy().tobytes() for item in (*training.batch(order), *heldout.batch(torch.arange(3)))}
    assert shown == wanted
    assert torch.equal(training.batch(order), training.batch(torch.arange(len(order)))[order])
    with pytest.raises(IndexError):
        training.batch(torch.tensor([len(order)]))
    assert any("none held out of eel: fewer than 10 different images" in line for line in said)


def test_only_what_matters_makes_a_new_cache(
    make_folder: Callable[..., Path], make_config: Callable[..., object], tmp_path: Path
) -> None:
    root = make_folder(cat=4, dog=4)
    class_map = tmp_path / "map.toml"
    class_map.write_text('pet = ["dog", "cat"]\n')

    def key(folder: Path = root, num_classes: int = 2, class_map: Path | None = None, **changes: int) -> str:
        config, cpu = make_config(num_classes, **changes), torch.device("cpu")
        return open_data(config, folder, class_map=class_map, device=cpu, cache=tmp_path / "c").training.sha256

    plain = key()
    assert key(width=32) == plain
    assert len({plain, key(image_size=32), key(channels=1)}) == 3
    (root / "notes.txt").write_text("no image")
    moved = root.rename(tmp_path / "moved")
    assert key(moved) == plain
    merged = key(moved, 1, class_map=class_map)
    victim = moved / "cat" / "000.png"
    victim.write_bytes((moved / "cat" / "001.png").read_bytes())
    assert len({plain, merged, key(moved)}) == 3
    class_map.write_text('a = ["dog"]\n')
    dogs = key(moved, 1, class_map=class_map)
    victim.unlink()  # a cat
    assert key(moved, 1, class_map=class_map) == dogs
