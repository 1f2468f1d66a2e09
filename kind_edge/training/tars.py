"""WebDataset shards as a source: uncompressed .tar files whose members share a key, `cat-1.jpg` with `cat-1.cls`.

Names are grouped by the webdataset library, so a shard means here what it means there. Only headers and labels are read
when a shard is listed; an image is read where it lies.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kind_edge.errors import InputError
from kind_edge.training.pictures import SUFFIXES
from kind_edge.training.sources import Source, needed

LABEL_KEYS = ("class_name", "label", "class", "cls")
"""Of a sample's json, the first that is there; `cls` as a member of its own comes before."""
_LABEL_MEMBERS = ("cls", "json")
_LABEL_BYTES = 1 << 20


class _Slice(NamedTuple):
    """Where one image lies."""

    shard: int
    key: str
    offset: int
    size: int


class _NoSampleError(Exception):
    """A sample that cannot be learned from; the message says why."""


def expand(pattern: str) -> list[Path]:
    """The shards of a brace pattern; `InputError` names those that are missing."""
    paths = [Path(name) for name in needed("braceexpand", "a pattern of shards").braceexpand(pattern)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"--data {pattern}: {len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}"
        )
    return paths


def open_tars(shards: Sequence[Path], where: str) -> Source:
    """List the samples of shards, in the order of the shards.

    Raises:
        InputError: a shard that is no plain tar or cut short, a sample with several images, or no sample at all.
    """
    group_by_keys = needed("webdataset", "reading .tar shards").tariterators.group_by_keys
    slices: list[_Slice] = []
    labels: list[str] = []
    broken: list[tuple[str, str]] = []
    for number, shard in enumerate(shards):
        try:
            for sample in group_by_keys(_members(shard), handler=_reraise):
                try:
                    label, place = _label(sample), _Slice(number, sample["__key__"], *_image(sample, shard))
                    labels.append(label)
                    slices.append(place)
                except _NoSampleError as error:
                    broken.append((f"{shard.name}:{sample['__key__']}", str(error)))
        except (tarfile.TarError, EOFError, ValueError) as error:
            why = error.args[0] if error.args else error  # webdataset appends what it was working on
            raise InputError(f"{shard}: not a whole, uncompressed tar of samples ({why}); make it anew") from error
    if not slices:
        why = f"; {broken[0][0]}: {broken[0][1]}" if broken else ""
        raise InputError(f"--data {where}: no sample with an image and a label (cls, or json){why}")
    names = sorted(set(labels), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    numbers = {name: position for position, name in enumerate(names)}

    def read(item: int) -> bytes:
        place = slices[item]
        with shards[place.shard].open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    return Source(
        f"WebDataset of {len(shards)} shard{'s' if len(shards) > 1 else ''}",
        where,
        tuple(names),
        np.array([numbers[label] for label in labels], dtype=np.int64),
        lambda item: f"{shards[slices[item].shard].name}:{slices[item].key}",
        read,
        lambda _: [(shard.name, shard) for shard in shards],
        broken=tuple(broken),
    )


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """What webdataset's own reader yields, with an image's place instead of its bytes."""
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if not member.isreg() or member.name.startswith("__"):
                continue
            data: Any = (member.offset_data, member.size)
            if member.name.rpartition(".")[2].lower() in _LABEL_MEMBERS and member.size <= _LABEL_BYTES:
                opened = tar.extractfile(member)
                data = opened.read() if opened is not None else b""
            yield {"fname": member.name, "data": data, "__url__": str(shard)}
            tar.members = []  # type: ignore[attr-defined]  # or a shard's headers would all stay in memory


def _reraise(error: Exception) -> bool:
    raise error


def _label(sample: dict[str, Any]) -> str:
    """The class of a sample: text or number."""
    content = sample.get("cls", sample.get("json"))
    if not isinstance(content, bytes):
        raise _NoSampleError("no label: neither cls nor json")
    try:
        text = content.decode("utf-8").strip()
        value = text if "cls" in sample else _of_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _NoSampleError(f"unreadable label: {error}") from error
    name = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name:
        raise _NoSampleError(f"no label: want a name or a number in cls, or in json one of {', '.join(LABEL_KEYS)}")
    return name


def _of_json(values: Any) -> Any:
    found = [values[key] for key in LABEL_KEYS if key in values] if isinstance(values, dict) else []
    return found[0] if found else None


def _image(sample: dict[str, Any], shard: Path) -> tuple[int, int]:
    """Offset and size of the sample's one image."""
    images = sorted(suffix for suffix in sample if suffix.rpartition(".")[2] in SUFFIXES)
    if len(images) > 1:
        raise InputError(
            f"{shard}: {sample['__key__']} has several images ({', '.join(images)}); keep the one to learn from"
        )
    if not images:
        raise _NoSampleError("no image")
    offset, size = sample[images[0]]
    return offset, size
