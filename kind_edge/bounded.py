"""Files that somebody else may have made, read with a bound on what they can cost: sizes first, contents after.

Every function raises `InputError` for what is missing, too large, damaged, or not what it claims to be, and nothing
else. Standard library only; NumPy where arrays are read.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kind_edge.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TEXT_BYTES = 64 * 2**20
"""Of a JSON or TOML file: far above any of ours."""
ARRAYS_BYTES = 2**30
"""Of the arrays in one `.npz`."""
MAX_MEMBERS = 10_000
MAX_RATIO, SMALL_BYTES = 100, 64 * 2**20
"""An archive may grow a hundredfold (weights hardly shrink, texts tenfold), and to this much in any case."""

_NOT_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
"""What `zipfile` raises: RuntimeError for an encrypted member, NotImplementedError for an unknown compression."""


def read_bytes(path: Path | str, most_bytes: int, what: str = "the file") -> bytes:
    """All of a file, if that is no more than `most_bytes`."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            # As much as is asked for is allocated at once, so ask for what is there.
            size = found.st_size if stat.S_ISREG(found.st_mode) else most_bytes
            content = file.read(min(size, most_bytes) + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror}") from error
    if len(content) > most_bytes:
        raise InputError(f"{path}: refused: {what} has over {most_bytes} bytes, more than any that kind-edge writes")
    return content


def read_text(path: Path | str, what: str = "the file") -> str:
    content = read_bytes(path, TEXT_BYTES, what)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot read {what}: not text in UTF-8 ({error})") from error


def read_json(path: Path | str, what: str = "the file") -> Any:
    return parse_json(read_bytes(path, TEXT_BYTES, what), f"{path}: cannot read {what}")


def read_object(path: Path | str, what: str = "the file") -> dict[str, Any]:
    """A JSON file that holds an object."""
    values = read_json(path, what)
    if not isinstance(values, dict):
        raise InputError(f"{path}: cannot read {what}: want a JSON object, not {type(values).__name__}")
    return values


def parse_json(content: bytes, where: str) -> Any:
    """JSON without NaN and infinities, which JavaScript could not read either; as deep as Python's stack allows."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON ({error})") from error


def read_toml(path: Path | str, what: str = "the file") -> dict[str, Any]:
    return parse_toml(read_text(path, what), f"{path}: cannot read {what}")


def parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not TOML ({error})") from error


def is_safe_path(path: str) -> bool:
    """Whether `path` is plain and stays inside its folder on every system: relative, forward slashes, no `..`."""
    parts = PurePosixPath(path).parts
    clean = "/".join(parts) == path and not path.startswith("/") and ".." not in parts
    return bool(parts) and clean and not any(character in path for character in "\\:\0")


def safe_members(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The files in a `.zip` by name: plain ones, inside, each once, readable, and not many times what they take here.

    Sizes are what the archive declares; `zipfile` stops reading a member at that size.
    """
    listed = archive.infolist()
    if len(listed) > MAX_MEMBERS:
        raise InputError(f"{where}: refused: {len(listed)} members, want {MAX_MEMBERS} at most")
    members: dict[str, zipfile.ZipInfo] = {}
    for member in listed:
        if member.is_dir() and is_safe_path(member.filename.rstrip("/")):
            continue
        # `orig_filename` is what the file says; `filename` was already tidied by zipfile.
        if not is_safe_path(member.orig_filename):
            raise InputError(f"{where}: refused: member {member.orig_filename!r} does not stay inside")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise InputError(f"{where}: refused: member {member.filename!r} is a link or a special file")
        if member.filename in members:
            raise InputError(f"{where}: refused: member {member.filename!r} occurs twice")
        if member.flag_bits & 1:
            raise InputError(f"{where}: refused: member {member.filename!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{where}: refused: member {member.filename!r} is neither stored nor deflated")
        members[member.filename] = member
    packed, whole = (sum(getattr(m, size) for m in members.values()) for size in ("compress_size", "file_size"))
    if whole > max(SMALL_BYTES, MAX_RATIO * packed):
        raise InputError(f"{where}: refused: {packed} bytes that unpack to {whole}")
    return members


def read_npz(path: Path, what: str = "the arrays") -> dict[str, NDArray[Any]]:
    """Arrays of numbers by name; never pickles, and no header is believed that its member is too small for."""
    content = io.BytesIO(read_bytes(path, ARRAYS_BYTES, what))
    try:
        with zipfile.ZipFile(content) as archive:
            members = safe_members(archive, str(path))
            if sum(member.file_size for member in members.values()) > ARRAYS_BYTES:
                raise InputError(f"{path}: refused: arrays of over {ARRAYS_BYTES} bytes")
            return {
                name.removesuffix(".npy"): _array(archive.read(member), f"{path}: cannot read {what}: {name}")
                for name, member in members.items()
            }
    except _NOT_ZIP as error:
        raise InputError(f"{path}: cannot read {what}: {error}") from error


def _array(content: bytes, where: str) -> NDArray[Any]:
    import numpy as np

    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(f"{where}: not an array of NumPy ({error})") from error
    if dtype.kind not in "biuf" or any(size < 0 for size in shape):
        raise InputError(f"{where}: holds {dtype} {list(shape)}, want numbers")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise InputError(f"{where}: {len(content) - file.tell()} bytes are not {dtype} {list(shape)}; copy it again")
    values: NDArray[np.generic] = np.frombuffer(content, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran else "C")


@contextlib.contextmanager
def well_formed(where: str) -> Iterator[None]:
    """Round the code that takes apart what a file says: what trips over a wrong type or a missing part is its fault."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: damaged, or not what it claims to be ({error!r:.120})") from error
