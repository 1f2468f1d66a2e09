"""The file that a Core ML package keeps its weights in, and the element types of an ML program.

The format is that of MILBlob's StorageFormat.hpp, version 2: a header of 64 bytes, then for every blob 64 bytes of
metadata and its data, each at a multiple of 64 bytes. All numbers are little-endian.

    header      uint32 count, uint32 version, zeros
    metadata    uint32 0xDEADBEEF, uint32 element type, uint64 size in bytes, uint64 offset of the data,
                uint64 unused bits at the end (elements of less than a byte), zeros
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kind_edge.errors import InputError

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II")
_METADATA = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class ElementType:
    """One element type: its number in a program, that in a blob (None: never in one), its bits in a file, and the NumPy
    type that holds it (one element of less than a byte in a byte)."""

    name: str
    program_code: int
    blob_code: int | None
    bits: int
    storage: str


ELEMENT_TYPES: Mapping[str, ElementType] = {
    name: ElementType(name, *facts)
    for name, facts in {
        "bool": (1, None, 8, "?"),
        "string": (2, None, 0, "U"),
        "fp16": (10, 1, 16, "<f2"),
        "fp32": (11, 2, 32, "<f4"),
        "int8": (21, 4, 8, "<i1"),
        "int16": (22, 6, 16, "<i2"),
        "int32": (23, 14, 32, "<i4"),
        "int64": (24, None, 64, "<i8"),
        "int4": (25, 8, 4, "<i1"),
        "uint8": (31, 3, 8, "<u1"),
        "uint16": (32, 7, 16, "<u2"),
        "uint32": (33, 15, 32, "<u4"),
        "uint4": (35, 11, 4, "<u1"),
        "uint2": (36, 10, 2, "<u1"),
        "uint1": (37, 9, 1, "<u1"),
        "uint6": (38, 13, 6, "<u1"),
        "uint3": (39, 12, 3, "<u1"),
    }.items()
}
BY_PROGRAM_CODE: Mapping[int, ElementType] = {element.program_code: element for element in ELEMENT_TYPES.values()}


def decode(data: bytes | memoryview, element: ElementType, count: int, where: str) -> NDArray[np.generic]:
    """`count` elements of packed bytes, flat; `InputError` if the bytes are not exactly that many."""
    if len(data) != math.ceil(count * element.bits / 8):
        raise InputError(f"{where}: {len(data)} bytes, want {count} elements of {element.bits} bits")
    if element.bits >= 8:
        return np.frombuffer(data, element.storage)
    return unpack_bits(np.frombuffer(data, np.uint8), element.bits, count, signed=element.name.startswith("int"))


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int, signed: bool = False) -> NDArray[np.generic]:
    """Elements of fewer than 8 bits, packed from the lowest bit upwards; one may lie across two bytes."""
    flat = np.unpackbits(packed, bitorder="little", count=count * bits).reshape(count, bits)
    values = np.packbits(flat, axis=1, bitorder="little")[:, 0]
    if not signed:
        return values
    return np.where(values >= 1 << (bits - 1), values.astype(np.int16) - (1 << bits), values).astype(np.int8)


class BlobFile:
    """A weight file, mapped into memory. Every refusal is an `InputError` that names the file and the offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        except OSError as error:
            raise InputError(f"{path}: cannot read the weights: {error.strerror}") from error
        if len(self._bytes) < ALIGNMENT:
            raise InputError(f"{path}: {len(self._bytes)} bytes, which is no weight file; its header alone has 64")
        self.count, version = _HEADER.unpack_from(self._bytes.data)
        if version != VERSION:
            raise InputError(f"{path}: weight format version {version}, want {VERSION}")

    def read(self, offset: int, element: ElementType, count: int) -> NDArray[np.generic]:
        """`count` elements, flat, of the blob whose metadata lies at `offset`."""
        where = f"{self.path} at {offset}"
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= len(self._bytes) - ALIGNMENT:
            raise InputError(f"{where}: no blob can lie there in a file of {len(self._bytes)} bytes")
        sentinel, code, size_bytes, start, unused_bits = _METADATA.unpack_from(self._bytes.data, offset)
        if sentinel != SENTINEL:
            raise InputError(f"{where}: no blob begins there (it reads {sentinel:#010x}, want {SENTINEL:#010x})")
        if code != element.blob_code:
            known = next((known.name for known in ELEMENT_TYPES.values() if known.blob_code == code), f"type {code}")
            raise InputError(f"{where}: the blob holds {known}, the program says {element.name}")
        if start % ALIGNMENT or start + size_bytes > len(self._bytes):
            raise InputError(f"{where}: its {size_bytes} bytes at {start} are not inside the file; it was cut short")
        if element.bits < 8 and 8 * size_bytes - unused_bits != count * element.bits:
            raise InputError(f"{where}: {8 * size_bytes - unused_bits} bits, want {count} elements of {element.bits}")
        return decode(self._bytes[start : start + size_bytes].data, element, count, where)
