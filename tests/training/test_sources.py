"""Every kind of source is recognised, lists the same items, and refuses what it cannot be learned from."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kind_edge.errors import InputError, UsageError
from kind_edge.training.mapping import choose_classes, read_class_map
from kind_edge.training.sources import open_source

NAMES = ("cat", "dog")
LABELS = [0, 1, 1, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def images(make_png: Callable[..., bytes]) -> list[bytes]:
    return [make_png(number) for number in range(len(LABELS))]


def write_folder(path: Path, images: list[bytes]) -> Path:
    for number, (label, content) in enumerate(zip(LABELS, images, strict=True)):
        place = path / NAMES[label] / ("a/b" if number % 2 else "") / f"{number}.PNG"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (path / "cat" / "Thumbs.db").write_bytes(b"")
    (path / "cat" / ".hidden.png").write_bytes(b"")
    (path / "loose.png").write_bytes(images[0])
    return path


def write_tars(path: Path, images: list[bytes], label_of: Callable[[int], dict[str, object]]) -> Path:
    from webdataset import TarWriter

    path.mkdir()
    for shard in range(2):
        with TarWriter(str(path / f"data-{shard:02d}.tar")) as writer:
            for number in range(shard, len(images), 2):
                writer.write({"__key__": f"part.d/{number:04d}", "png": images[number], **label_of(number)})
    return path


def write_table(path: Path, images: list[bytes], kind: str) -> Path:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "n": datasets.Value("int64"), "y": None})
    features["y"] = datasets.ClassLabel(names=list(NAMES))
    rows = {"img": [{"bytes": b, "path": None} for b in images], "n": list(range(len(images))), "y": LABELS}
    table = datasets.Dataset.from_dict(rows, features=features)
    if kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "saved parts":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(path))
    elif kind == "parquet":
        (path / "data").mkdir(parents=True)
        table.select(range(4)).to_parquet(path / "data" / "train-00000-of-00002.parquet", batch_size=3)
        table.select(range(4, 7)).to_parquet(path / "data" / "train-00001-of-00002.parquet")
        table.select([0]).to_parquet(path / "data" / "test-00000-of-00001.parquet")
    else:
        table.save_to_disk(str(path))
        (path / "state.json").unlink()
    return path


def written(path: Path, images: list[bytes], kind: str) -> Path:
    if kind == "folder":
        return write_folder(path, images)
    if kind == "cls":
        return write_tars(path, images, lambda n: {"cls": NAMES[LABELS[n]]})
    if kind == "json":
        return write_tars(path, images, lambda n: {"json": {"label": NAMES[LABELS[n]], "width": 24}})
    if kind == "braces":
        return write_tars(path, images, lambda n: {"cls": NAMES[LABELS[n]]}) / "data-{00..01}.tar"
    return write_table(path, images, kind)


@pytest.mark.parametrize("kind", ["folder", "cls", "json", "braces", "saved", "saved parts", "parquet", "arrow"])
def test_all_kinds_hold_the_same(kind: str, images: list[bytes], tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "data", images, kind))
    assert source.class_names == NAMES
    found = [(NAMES[label], source.read(item)) for item, label in enumerate(source.labels.tolist())]
    assert sorted(found) == sorted((NAMES[label], content) for label, content in zip(LABELS, images, strict=True))
    assert len({source.name(item) for item in range(len(found))}) == len(found)
    files = source.files(np.arange(len(found)))
    assert all(path.is_file() for _, path in files)
    assert not any(str(tmp_path) in name for name, _ in files)  # a folder that moves keeps its cache
    if kind == "folder":
        assert source.notes == ("left out: 1 image outside of the class folders", "left out: 1 other file")
        cats = np.flatnonzero(source.labels == 0)
        assert {name.split("/")[0] for name, _ in source.files(cats)} == {"cat"}


def test_numbers_as_classes_are_in_their_order(images: list[bytes], tmp_path: Path) -> None:
    source = open_source(write_tars(tmp_path / "t", images, lambda n: {"cls": n + 7}))
    assert source.class_names == tuple(str(number) for number in range(7, 14))


def test_samples_without_a_label_are_named_not_dropped(images: list[bytes], tmp_path: Path) -> None:
    labels = [{"cls": "cat"}, {}, {"json": {"colour": 1}}, {"json": b"{"}, {"cls": b"\xff"}, {"cls": " "}, {"cls": 1}]
    source = open_source(write_tars(tmp_path / "t", images, lambda n: dict(labels[n])))
    assert source.class_names == ("1", "cat")
    assert [name for name, _ in source.broken] == [f"data-{n % 2:02d}.tar:part.d/{n:04d}" for n in (2, 4, 1, 3, 5)]
    assert all("label" in reason for _, reason in source.broken)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_source(path)
    return str(caught.value)


def test_what_cannot_be_learned_from_is_refused(images: list[bytes], tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nothing that is known; want a folder with one sub-folder" in refusal(empty)
    (empty / "a.png").write_bytes(images[0])
    assert "1 image and no sub-folder" in refusal(empty)
    (empty / "cat").mkdir()
    assert "no image in 1 sub-folder;" in refusal(empty)
    for part in ("train", "val"):
        write_folder(tmp_path / "parts" / part, images)
    assert "train, val are parts of a data set" in refusal(tmp_path / "parts")
    (tmp_path / "letter.txt").write_text("dear reader")
    assert "of no kind that is known" in refusal(tmp_path / "letter.txt")
    assert "2 of 2 shards are missing" in refusal(tmp_path / "x-{0..1}.tar")


@pytest.mark.parametrize("damage", ["compressed", "cut short", "two images", "twice", "no label at all", "a pipe"])
def test_a_damaged_shard_is_refused_by_name(damage: str, images: list[bytes], tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    members = [("a.png", images[0]), ("a.cls", b"cat"), ("b.png", images[1]), ("b.cls", b"dog")]
    if damage == "two images":
        members.insert(1, ("a.mask.png", images[1]))
    if damage == "twice":
        members.insert(1, ("a.png", images[1]))
    if damage == "no label at all":
        members = [member for member in members if member[0].endswith("png")]
    with tarfile.open(shard, "w:gz" if damage == "compressed" else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if damage == "cut short":
        shard.write_bytes(shard.read_bytes()[: 512 * 3])
    if damage == "a pipe":
        assert "no such file" in refusal(Path("pipe:touch here.tar"))
    else:
        assert "s.tar" in refusal(shard)


def test_tables_without_classes_are_refused(images: list[bytes], tmp_path: Path) -> None:
    import datasets

    rows = {"img": [{"bytes": images[0], "path": None}], "y": [0]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "plain"))
    assert "exactly one column of the feature Image; columns are: img, y" in refusal(tmp_path / "plain")
    features = datasets.Features({"img": datasets.Image(), "y": datasets.ClassLabel(names=["a"])})
    unlabelled = datasets.Dataset.from_dict({**rows, "y": [-1]}, features=features)
    unlabelled.to_parquet(tmp_path / "x.parquet")
    assert "1 of 1 rows have no class, the first is row 0" in refusal(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    assert "y.parquet: cannot be read as tables" in refusal(tmp_path / "y.parquet")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package in ("webdataset", "datasets", "braceexpand"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("x.tar", "x.parquet"):
        (tmp_path / name).write_bytes(b"")
    for name in ("x.tar", "x.parquet", "x{0..1}.tar"):
        with pytest.raises(UsageError, match=r"pip install 'kind-edge\[train\]'"):
            open_source(tmp_path / name)


# --- class maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["map.toml", "map.json"])
def test_a_class_map_keeps_its_order(name: str, tmp_path: Path) -> None:
    values = {"shoe": ["sneaker", "boot"], "a bag": ["bag"]}
    toml = 'shoe = ["sneaker", "boot"]\n"a bag" = ["bag"]\n'
    (tmp_path / name).write_text(json.dumps(values) if name.endswith("json") else toml)
    found = read_class_map(tmp_path / name)
    assert list(found.items()) == [("shoe", ("sneaker", "boot")), ("a bag", ("bag",))]
    assert choose_classes(found, ["bag", "boot", "coat", "sneaker"], "here") == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a class map names classes"),
        ("shoe = ", "cannot read the class map"),
        ("shoe = 'sneaker'", "shoe: got 'sneaker', want a list"),
        ("shoe = []", "shoe: got"),
        ("[shoe]\na = ['b']", "shoe: got"),
        ("a = ['x']\nb = ['x']", "'x' belongs to 'a' and to 'b'"),
    ],
)
def test_a_bad_class_map_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_class_map(tmp_path / "map.toml")


def test_unknown_and_unspeakable_classes_are_refused() -> None:
    with pytest.raises(InputError, match=r"here has no class 'sneeker' \(nearest: sneaker\)"):
        choose_classes({"shoe": ("sneeker",)}, ["bag", "sneaker"], "here")
    with pytest.raises(InputError, match=r"class 'a,b': --classes a,b could not name it"):
        choose_classes(None, ["a,b"], "here")
