"""How the parts of an ONNX file are found: protobuf's own framing, walked down to the tables that belong to classes.

Standard library only. Symbols: K classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kind_edge.budget.precision import PRECISIONS
from kind_edge.deploy.packs import (
    ITEM_BYTES,
    Core,
    CoreFile,
    Part,
    Table,
    bare_sha256,
    core_text,
    read_core,
    take_apart,
)
from kind_edge.errors import KindEdgeError

_INNER = {("model", 7): "graph", ("graph", 1): "node", ("node", 5): "attribute", ("attribute", 6): "graph"}
"""Where graphs lie in a model, by message and field number; the body of a loop is an attribute of its node."""
_INITIALIZER = ("graph", 5)
_METADATA = 14
"""Of a model: `metadata_props`, which lie at its end, as protobuf writes fields in the order of their numbers."""
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_TYPES = {1: "F32", 2: "U8", 3: "I8", 6: "I32", 7: "I64", 10: "F16", 16: "BF16"}
"""ONNX element types; narrower ones are counted in bytes."""
_NUMBERS = ("null_index", "sampler.null")
"""Constants that hold K."""
_TABLES = {"tailors", "y_embed"}
"""Words in the names of tables whose first axis is the class; the null class's row, if there is one, is the last."""


@dataclass
class _Parts:
    """Parts as they are found: neighbouring shared bytes are one part."""

    found: list[Part] = field(default_factory=list)

    def shared(self, count: int) -> None:
        if count and self.found and isinstance(self.found[-1], int):
            self.found[-1] += count
        elif count:
            self.found.append(count)

    def own(self, kind: str, value: Any) -> None:
        self.found.append({kind: value})

    @property
    def any_own(self) -> bool:
        return any(not isinstance(part, int) for part in self.found)


@dataclass(frozen=True)
class _Field:
    """One field of a message: tag from `start`, value from `value` (of bytes, what follows their length) to `end`."""

    number: int
    wire: int
    start: int
    value: int
    end: int
    tag_end: int


def joinable(path: str, entry: Mapping[str, Any]) -> bool:
    """Whether a model file can be joined from packs: ranges that were calibrated belong to the classes they saw."""
    traits = PRECISIONS.get(entry["precision"])
    return path.endswith(".onnx") and entry["role"] in ("denoiser", "sampler") and not (traits and traits.static)


def make_core(
    files: Mapping[str, bytes], count: int, precision: str, sampling: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[bytes, Core]:
    """The core of a bundle's model files of one precision, of `count` classes; its text, and itself.

    `weights`: digests of the layers that the files were folded from (see `packs_make.shared_weights`). Tables of one
    name are the same in all files. The core is proven: every file is taken apart by it.
    """
    tables: dict[str, Table] = {}
    parts = {path: _file(memoryview(each), count, tables) for path, each in files.items()}
    made = Core("", precision, sampling, tables, {path: CoreFile("", each) for path, each in parts.items()}, weights)
    rows: dict[str, bytes] = {}
    for path, content in files.items():
        made = _hashed(made, path, content, count, rows)
    text = core_text(made)
    return text, read_core(text, "core.json")


def _hashed(core: Core, path: str, content: bytes, count: int, rows: dict[str, bytes]) -> Core:
    """With the hash of one file without classes."""
    shared, own = take_apart(core, path, content, count, checked=False)
    for name in own[0] if own else ():
        joined = b"".join(each[name] for each in own)
        if rows.setdefault(name, joined) != joined:
            raise KindEdgeError(f"{path}: {name} is not what it is in the other files")
    file = CoreFile(bare_sha256(core, path, shared), core.files[path].parts)
    return dataclasses.replace(core, files={**core.files, path: file})


def _file(data: memoryview, count: int, tables: dict[str, Table]) -> tuple[Part, ...]:
    """Parts of a model file; its metadata, which are no part of the core, are the last."""
    end = next((each.start for each in _fields(data) if each.number == _METADATA), len(data))
    return (*_message(data[:end], "model", count, tables).found, {"metadata": _METADATA})


def _message(data: memoryview, kind: str, count: int, tables: dict[str, Table]) -> _Parts:
    """Parts of one message that holds graphs."""
    parts, at = _Parts(), 0
    for each in _fields(data):
        inner = _INNER.get((kind, each.number))
        if each.wire != _BYTES or (inner is None and (kind, each.number) != _INITIALIZER):
            continue
        content = data[each.value : each.end]
        found = _message(content, inner, count, tables) if inner else _tensor(content, count, tables)
        if found.any_own:
            parts.shared(each.tag_end - at)
            parts.own("message", found.found)
            at = each.end
    parts.shared(len(data) - at)
    return parts


def _tensor(data: memoryview, count: int, tables: dict[str, Table]) -> _Parts:
    """Parts of an initializer: one piece of shared bytes unless it belongs to classes."""
    fields = list(_fields(data))
    name = next((str(data[f.value : f.end], "utf-8") for f in fields if f.number == _NAME), "")
    dims = [_number(data, f) for f in fields if f.number == _DIMS]
    raw = next((f for f in fields if f.number == _RAW), None)
    parts, at = _Parts(), 0
    table = _is_table(name, dims)
    if not table and name not in _NUMBERS:
        return parts
    size = 0 if raw is None else raw.end - raw.value
    if raw is None or (dims[:1] not in ([count], [count + 1]) if table else size != 8):
        raise KindEdgeError(
            f"{name}, {dims}: want a table of {count} classes, or their number in 64 bits, as raw bytes"
        )
    if table:
        first = next(f for f in fields if f.number == _DIMS)
        parts.shared(first.tag_end)
        parts.own("count", dims[0] - count)
        at = first.end
        stored, left = divmod(size, dims[0])
        if left:
            raise KindEdgeError(f"{name}: its rows are not whole bytes")
        dtype = _TYPES.get(next(_number(data, f) for f in fields if f.number == _TYPE), "U8")
        shape = tuple(dims[1:]) if math.prod(dims[1:]) * ITEM_BYTES[dtype] == stored else (stored,)
        tables[name] = Table(dtype, shape)
        parts.shared(raw.tag_end - at)
        parts.own("message", [{"rows": name}, *([stored] if dims[0] > count else [])])
    else:
        parts.shared(raw.value)
        parts.own("int64", int.from_bytes(data[raw.value : raw.end], "little") - count)
    parts.shared(len(data) - raw.end)
    return parts


def _is_table(name: str, dims: list[int]) -> bool:
    """Tailors and label embeddings; modulation, where it was baked for every class."""
    words = name.split(".")
    return (len(dims) > 1 and bool(_TABLES & {*words})) or (words[:2] == ["modulation", "table"] and len(dims) == 3)


def _fields(data: memoryview) -> Iterator[_Field]:
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        tag_end = at
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(data, at)
            yield _Field(tag >> 3, wire, start, tag_end, at, tag_end)
        elif wire == _BYTES:
            size, value = _varint(data, at)
            at = value + size
            yield _Field(tag >> 3, wire, start, value, at, tag_end)
        elif wire in (_EIGHT, _FOUR):
            at += 8 if wire == _EIGHT else 4
            yield _Field(tag >> 3, wire, start, tag_end, at, tag_end)
        else:
            raise KindEdgeError(f"protobuf wire type {wire} at byte {start}")


def _number(data: memoryview, at: _Field) -> int:
    return _varint(data, at.value)[0]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next one begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
