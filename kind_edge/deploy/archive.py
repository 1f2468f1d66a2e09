"""A bundle as one `.zip`: the same bytes every time when written, nothing trusted when read. Standard library only."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from kind_edge.bounded import safe_members
from kind_edge.deploy.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from kind_edge.deploy.signing import SIGNATURE_BYTES, SIGNATURE_NAME
from kind_edge.errors import InputError

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest date a zip can hold: a fixed one, so that equal bundles are equal files."""

_UNIX = 3
_MODE = (stat.S_IFREG | 0o644) << 16


def write_zip(folder: Path, names: Sequence[str], file: BinaryIO) -> None:
    """Write the named files of `folder`, in that order.

    Stored, not deflated: weights hardly shrink, and versions of zlib differ in their bytes.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            member = zipfile.ZipInfo(name, _EPOCH)
            member.create_system, member.external_attr = _UNIX, _MODE
            member.file_size = (folder / name).stat().st_size
            with open(folder / name, "rb") as source, archive.open(member, "w") as target:
                shutil.copyfileobj(source, target, 2**20)


def extract_zip(path: Path, folder: Path) -> None:
    """Extract a bundle into the empty `folder`.

    Only members that the manifest inside names are written, each with exactly the size it names, and the manifest's
    signature. Raises `InputError` for anything else: what `safe_members` refuses, strangers, members larger than they
    declare.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = safe_members(archive, str(path))
            manifest = _manifest(archive, members, path)
            _check_sizes(manifest, members, path, shutil.disk_usage(folder).free)
            for name, member in members.items():
                _extract(archive, member, folder / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError is how zipfile reports an encrypted member, NotImplementedError an unknown compression.
        raise InputError(f"{path}: not a readable .zip ({error}); copy or export the bundle again") from error


def _manifest(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> Manifest:
    member = members.get(MANIFEST_NAME)
    if member is None:
        raise InputError(f"{path}: not a kind-edge bundle: no {MANIFEST_NAME} at the top of the .zip")
    if member.file_size > MAX_MANIFEST_BYTES:
        raise InputError(
            f"{path}: refused: {MANIFEST_NAME} of {member.file_size} bytes; want {MAX_MANIFEST_BYTES} at most"
        )
    with archive.open(member) as file:
        content = file.read(member.file_size)
    return Manifest.from_bytes(content, f"{path}: {MANIFEST_NAME}")


def _check_sizes(manifest: Manifest, members: dict[str, zipfile.ZipInfo], path: Path, free_bytes: int) -> None:
    """The manifest bounds what is unpacked, so a small file cannot fill the disk with what nobody asked for."""
    for name, member in members.items():
        if name == MANIFEST_NAME or (name == SIGNATURE_NAME and member.file_size == SIGNATURE_BYTES):
            continue
        entry = manifest.files.get(name)
        if entry is None:
            raise InputError(f"{path}: refused: member {name!r} is not in the manifest")
        if member.file_size != entry.size_bytes:
            raise InputError(f"{path}: {name}: {member.file_size} bytes, the manifest says {entry.size_bytes}")
    total_bytes = sum(member.file_size for member in members.values())
    if total_bytes > free_bytes:
        raise InputError(f"{path}: unpacks to {total_bytes} bytes, but only {free_bytes} are free for temporary files")


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write one member; zipfile checks its CRC and stops at the declared size."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, 2**20)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{archive.filename}: refused: member {member.filename!r} collides with another one"
        ) from error
