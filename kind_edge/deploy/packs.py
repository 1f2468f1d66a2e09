"""What a model file of several classes is made of: bytes that all classes share, and rows of tables that belong to one.

A *core* describes every model file as a sequence of parts, so that a file for any set of classes is written, and taken
apart again, by concatenation. Standard library only; `docs/packs.md` has the format, for other languages.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kind_edge.bounded import is_safe_path, parse_json
from kind_edge.errors import InputError

CORE_FILE = "packs/core.json"
CORE_SCHEMA = 2
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
"""Element types by their names in safetensors."""

Part: TypeAlias = int | Mapping[str, Any]
"""An integer n: the next n bytes that all classes share. {"rows": table}: the rows of that table, class after class.
{"count": n}: K + n as a protobuf varint. {"int64": n}: K + n in 8 bytes, little-endian. {"message": parts}: the length
of what follows, as a varint, then the parts. {"metadata": n}: all that is left, protobuf fields of number n: what the
file says of itself. K is the number of classes."""

Rows: TypeAlias = Mapping[str, bytes]
"""One class: its row of every table."""


@dataclass(frozen=True)
class Table:
    """One row of a table: what one class adds to it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class CoreFile:
    """A model file: `sha256` is that of the file without any class and without metadata."""

    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Core:
    """What packs are for: the files that an app loads, of one precision; its hash is that of its text.

    `sampling` is what the packs' reference images were drawn with. `weights`: what the files were folded from, a digest
    for every layer that all classes share, before rounding. The hash says everything about what the classes share, and
    nothing about which classes there are, or what the files say of whose they are.
    """

    sha256: str
    precision: str
    sampling: Mapping[str, Any]
    tables: Mapping[str, Table]
    files: Mapping[str, CoreFile]
    weights: Mapping[str, str]

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows of one class."""
        return sum(table.row_bytes for table in self.tables.values())

    def tables_of(self, path: str) -> list[str]:
        """The tables of one file, in the order in which they lie in it."""
        return list(_tables(self.files[path].parts))


def core_text(core: Core) -> bytes:
    """`core.json`: the same core gives the same bytes."""
    values = {
        "schema_version": CORE_SCHEMA,
        "precision": core.precision,
        "sampling": core.sampling,
        "tables": {name: {"dtype": table.dtype, "shape": table.shape} for name, table in core.tables.items()},
        "files": {path: {"sha256": file.sha256, "parts": file.parts} for path, file in core.files.items()},
        "weights": core.weights,
    }
    return json.dumps(values, separators=(",", ":"), sort_keys=True, allow_nan=False).encode() + b"\n"


def read_core(text: bytes, where: str) -> Core:
    """Parse `core.json`; `InputError` for anything that is not one."""
    values = parse_json(text, where)
    try:
        if values["schema_version"] != CORE_SCHEMA:
            raise InputError(
                f"{where}: schema_version {values['schema_version']}, this kind-edge reads {CORE_SCHEMA}; export the "
                "bundle again"
            )
        tables = {name: _table(each["dtype"], each["shape"]) for name, each in values["tables"].items()}
        files = {path: CoreFile(str(each["sha256"]), _parts(each["parts"])) for path, each in values["files"].items()}
        weights = {name: str(digest) for name, digest in values["weights"].items()}
        sha256 = hashlib.sha256(text).hexdigest()
        core = Core(sha256, values["precision"], dict(values["sampling"]), tables, files, weights)
        if not all(is_safe_path(path) and set(core.tables_of(path)) <= set(tables) for path in files):
            raise ValueError("files")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: not the core of a bundle ({error!r}); export the bundle again") from error
    return core


def _table(dtype: Any, shape: Any) -> Table:
    if dtype not in ITEM_BYTES or not all(isinstance(size, int) and 0 <= size < 2**31 for size in shape):
        raise ValueError(f"table of {dtype} {shape!r:.60}")
    return Table(dtype, tuple(shape))


def _parts(listed: Any) -> tuple[Part, ...]:
    """Parts are numbers and objects of one pair; the numbers count bytes, or what is added to the number of classes."""
    kinds = {"rows": str, "count": int, "int64": int, "message": list, "metadata": int}
    for part in listed:
        if isinstance(part, dict) and len(part) == 1:
            ((kind, value),) = part.items()
            if isinstance(value, kinds[kind]) and (not isinstance(value, int) or 0 <= value < 2**31):
                if kind == "message":
                    _parts(value)
                continue
        elif isinstance(part, int) and 0 <= part < 2**31:
            continue
        raise ValueError(f"part {part!r:.60}")
    return tuple(listed)


def join_file(core: Core, path: str, shared: bytes, classes: Sequence[Rows]) -> bytes:
    """The model file at `path` for these classes, in this order; `shared` is what `take_apart` returns of it."""
    reader = _Reader(memoryview(shared))
    chunks, _ = _written(core.files[path].parts, reader, classes)
    if reader.at != len(shared):
        raise InputError(f"{path}: {len(shared) - reader.at} bytes are left over; the core is for another file")
    return b"".join(chunks)


def take_apart(
    core: Core, path: str, content: bytes, count: int, checked: bool = True
) -> tuple[bytes, list[dict[str, bytes]]]:
    """A model file of `count` classes as the bytes that they share, and every class's rows of the file's own tables.

    Raises `InputError` where `content` is not what the core says; its hash is left out unless `checked`.
    """
    reader, shared = _Reader(memoryview(content)), list[memoryview]()
    rows: list[dict[str, bytes]] = [{} for _ in range(count)]
    _read(core, core.files[path].parts, reader, shared, rows)
    whole = b"".join(shared)
    if reader.at != len(content) or (checked and bare_sha256(core, path, whole) != core.files[path].sha256):
        raise InputError(f"{path}: not the file that {CORE_FILE} describes; export or copy the bundle again")
    return whole, rows


def bare_sha256(core: Core, path: str, shared: bytes) -> str:
    """SHA-256 of a model file without classes and without metadata: what its weights and its graph are."""
    chunks, _ = _written(core.files[path].parts, _Reader(memoryview(shared)), (), metadata=False)
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Bytes from front to back."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.at = content, 0

    def take(self, count: int) -> memoryview:
        if count < 0 or self.at + count > len(self.content):
            raise InputError("a model file ends before the core says so; export or copy the bundle again")
        self.at += count
        return self.content[self.at - count : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    def fields(self, number: int) -> memoryview:
        """All that is left: fields of bytes of this number, and no others."""
        start = self.at
        while self.at < len(self.content):
            if self.varint() != number << 3 | 2:
                raise InputError("a model file holds more than the core says; export or copy the bundle again")
            self.take(self.varint())
        return self.content[start:]


def _written(
    parts: Sequence[Part], reader: _Reader, classes: Sequence[Rows], metadata: bool = True
) -> tuple[list[bytes | memoryview], int]:
    """The parts as chunks, and how many bytes these are; without what the file says of itself unless `metadata`."""
    chunks: list[bytes | memoryview] = []
    total = 0
    for part in parts:
        if isinstance(part, int):
            new: list[bytes | memoryview] = [reader.take(part)]
            size = part
        else:
            (kind, value), *_ = part.items()
            if kind == "message":
                new, inner = _written(value, reader, classes, metadata)
                new.insert(0, varint(inner))
                size = inner + len(new[0])
            elif kind == "metadata":
                new = [reader.fields(value)] if metadata else []
                size = sum(map(len, new))
            else:
                new = list(_value(kind, value, classes))
                size = sum(map(len, new))
        chunks += new
        total += size
    return chunks, total


def _value(kind: str, value: Any, classes: Sequence[Rows]) -> Iterator[bytes]:
    if kind == "rows":
        yield from (rows[value] for rows in classes)
    elif kind == "count":
        yield varint(len(classes) + value)
    elif kind == "int64":
        yield (len(classes) + value).to_bytes(8, "little")
    else:
        raise InputError(f"{CORE_FILE}: unknown part {kind!r}; update kind-edge, or export the bundle again")


def _read(
    core: Core, parts: Sequence[Part], reader: _Reader, shared: list[memoryview], rows: list[dict[str, bytes]]
) -> None:
    """`_written`, the other way round."""
    skip: Mapping[str, Callable[[], object]] = {"count": reader.varint, "int64": lambda: reader.take(8)}
    for part in parts:
        if isinstance(part, int):
            shared.append(reader.take(part))
            continue
        (kind, value), *_ = part.items()
        if kind == "message":
            reader.varint()
            _read(core, value, reader, shared, rows)
        elif kind == "metadata":
            shared.append(reader.fields(value))
        elif kind == "rows":
            for own in rows:
                own[value] = bytes(reader.take(core.tables[value].row_bytes))
        else:
            skip[kind]()


def _tables(parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, int):
            continue
        if "message" in part:
            yield from _tables(part["message"])
        elif "rows" in part:
            yield part["rows"]
