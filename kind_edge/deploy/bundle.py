"""Bundles on disk: written whole or not at all, hashed, checked, and packed into one `.zip`. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kind_edge.bounded import parse_json
from kind_edge.deploy.archive import extract_zip, write_zip
from kind_edge.deploy.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    manifest_bytes,
    read_manifest,
)
from kind_edge.deploy.signing import SIGNATURE_NAME, SigningKey, check_signature
from kind_edge.errors import InputError, KindEdgeError, UsageError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "check_replaceable",
    "hash_file",
    "hash_files",
    "is_signed",
    "open_bundle",
    "read_manifest",
    "verified_manifest",
    "verify_hashes",
    "write_manifest",
    "writing_bundle",
    "zip_bundle",
]

_DESKTOP_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""Files that file managers drop into every folder that somebody looks at; no part of any bundle."""
_UNLISTED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
"""What a manifest cannot name: itself, and its signature."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as 64 lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file below `folder`, by path with forward slashes, sorted; all but its manifest and
    the signature of that.

    Raises `InputError` for a link or a special file: it would not survive a move.
    """
    return {
        name: FileEntry((folder / name).stat().st_size, hash_file(folder / name))
        for name in _file_names(folder)
        if name not in _UNLISTED
    }


def verify_hashes(path: Path | str) -> Manifest:
    """Compare every file of a bundle (folder or `.zip`) with its manifest and return the manifest.

    Raises `InputError` that lists every file which differs, is missing, or is not in the manifest.
    """
    with open_bundle(path) as folder:
        return verified_manifest(folder, str(path))


def verified_manifest(folder: Path, where: str, key: Path | str | None = None) -> Manifest:
    """`verify_hashes` of a bundle that is opened already and was named `where` by the user.

    With `key`, the public half of an Ed25519 key, the manifest's signature comes first, and what file managers leave
    behind is refused as well: nothing is in the folder that was not signed for.
    """
    content = manifest_bytes(folder)
    if key is not None:
        check_signature(folder, content, key, where)
    manifest = Manifest.from_bytes(content, str(folder / MANIFEST_NAME))
    problems = list(_differences(folder, manifest, frozenset() if key is not None else _DESKTOP_LITTER))
    if problems:
        lines = "\n  ".join(problems)
        raise InputError(f"{where}: the bundle is damaged or was changed; export or copy it again:\n  {lines}")
    return manifest


def is_signed(folder: Path) -> bool:
    """Whether there is a signature, valid or not."""
    return (folder / SIGNATURE_NAME).exists()


@contextlib.contextmanager
def open_bundle(path: Path | str) -> Iterator[Path]:
    """The folder of a bundle: the path itself, or for the length of the block what a `.zip` unpacks to."""
    path = Path(path)
    if path.is_dir():
        yield path
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="kind-edge-") as temporary:
            extract_zip(path, Path(temporary))
            yield Path(temporary)
    else:
        raise InputError(f"{path}: no such bundle; want a folder with a {MANIFEST_NAME}, or a .zip of one")


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `manifest.json`; the same values give the same bytes. NaN and infinities are refused."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8", newline="\n")


@contextlib.contextmanager
def writing_bundle(destination: Path | str, keep_failed: bool = False, key: SigningKey | None = None) -> Iterator[Path]:
    """A temporary folder beside `destination` that becomes it when the block ends well, and vanishes when it does not.

    The block writes its files and a `manifest.json` without `files`; that section is added here, the whole manifest is
    validated, and only then does the folder get its name. An empty folder or an earlier bundle of ours is replaced, the
    earlier one staying in place until the new one is complete. With a `key` the manifest is signed. With `keep_failed`
    an unfinished folder is kept as `<destination>.failed` and named on stderr. Raises `UsageError` if something else is
    at the destination.
    """
    destination = Path(os.path.realpath(destination))
    check_replaceable(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.new-", dir=destination.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; a bundle is an ordinary one
        yield temporary
        _complete(temporary, key)
        check_replaceable(destination)  # somebody else may have written there meanwhile
        _replace(temporary, destination)
    except BaseException:
        _discard(temporary, destination, keep_failed)
        raise


def zip_bundle(path: Path | str, destination: Path | str | None = None) -> Path:
    """Pack a bundle folder into one `.zip` (default: beside it, same name) and return its path.

    The same bundle gives the same bytes: members sorted and stored, with fixed dates and rights. The file appears
    whole or not at all. Raises `InputError` if the bundle does not match its own hashes.
    """
    folder = Path(path)
    verify_hashes(folder)
    target = Path(f"{os.path.realpath(folder)}.zip") if destination is None else Path(destination)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.new-", dir=target.parent)
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            write_zip(folder, [name for name in _file_names(folder) if Path(name).name not in _DESKTOP_LITTER], file)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def _file_names(folder: Path) -> list[str]:
    """Every file below `folder`, as relative paths with forward slashes, sorted by their text."""
    names = []
    for parent, folders, files in os.walk(folder):
        for name in (*files, *folders):
            entry = Path(parent, name)
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise InputError(f"{entry}: a bundle holds plain files only, not links or devices")
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def _differences(folder: Path, manifest: Manifest, tolerated: frozenset[str]) -> Iterator[str]:
    found = hash_files(folder)
    for name, expected in manifest.files.items():
        got = found.get(name)
        if got is None:
            yield f"{name}: missing"
        elif got.size_bytes != expected.size_bytes:
            yield f"{name}: {got.size_bytes} bytes, the manifest says {expected.size_bytes}"
        elif got.sha256 != expected.sha256:
            yield f"{name}: sha256 is {got.sha256}, the manifest says {expected.sha256}"
    for name in found:
        if name not in manifest.files and Path(name).name not in tolerated:
            yield f"{name}: not in the manifest"


def check_replaceable(destination: Path) -> None:
    """Refuse to overwrite what we did not write: other people's folders, files, and additions to an old bundle."""
    if not os.path.lexists(destination):
        return
    if Path.cwd().is_relative_to(destination):
        raise UsageError(f"{destination} is the folder you are in, so it cannot be replaced; choose another -o")
    if destination.is_dir() and not any(destination.iterdir()):
        return
    values = _own_manifest(destination)
    if values is None:
        raise UsageError(f"{destination} exists and is not a kind-edge bundle; choose another -o or remove it")
    added = [name for name in _file_names(destination) if name not in {*values["files"], *_UNLISTED, *_DESKTOP_LITTER}]
    if added:
        listed = ", ".join(added[:5]) + (", ..." if len(added) > 5 else "")
        raise UsageError(
            f"{destination} holds files that are not part of its bundle ({listed}); choose another -o or move them away"
        )


def _own_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier bundle, of any schema version and with any damage to its files; None if not ours."""
    try:
        values = parse_json(manifest_bytes(folder), MANIFEST_NAME)
    except InputError:
        return None
    if not isinstance(values, dict) or "schema_version" not in values or not isinstance(values.get("files"), dict):
        return None
    tools = values.get("tools")
    return values if isinstance(tools, dict) and "kind_edge" in tools else None


def _complete(folder: Path, key: SigningKey | None) -> None:
    """Add the `files` section, prove that the manifest can be read back, sign it, and push everything to the disk."""
    try:
        values = parse_json((folder / MANIFEST_NAME).read_bytes(), MANIFEST_NAME)
        entries = hash_files(folder)
        values["files"] = {name: {"bytes": entry.size_bytes, "sha256": entry.sha256} for name, entry in entries.items()}
        Manifest.from_dict(values)
    except (OSError, TypeError, InputError) as error:
        raise KindEdgeError(f"the bundle was written without a valid {MANIFEST_NAME}: {error}") from error
    write_manifest(folder, values)
    if key is not None:
        (folder / SIGNATURE_NAME).write_bytes(key.sign((folder / MANIFEST_NAME).read_bytes()))
    for name in _file_names(folder):
        # Without this a power cut after the rename could leave a bundle of empty files.
        # Windows syncs only what is open for writing; elsewhere a read-only file must do as well.
        with open(folder / name, "rb" if os.name == "posix" else "rb+") as file:
            os.fsync(file.fileno())


def _replace(new: Path, destination: Path) -> None:
    """Rename `new` to `destination`; what was there steps aside first, and comes back if that fails."""
    if not destination.exists():
        new.rename(destination)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
    old = aside / destination.name
    try:
        destination.rename(old)
        new.rename(destination)
        _remove_folder(aside)
    except BaseException:
        if new.exists() and old.exists():
            old.rename(destination)
        if not old.exists() or not new.exists():
            _remove_folder(aside)
        raise


def _remove_folder(folder: Path) -> None:
    """Remove a folder of ours to the end, even if an interrupt arrives half-way."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _discard(temporary: Path, destination: Path, keep_failed: bool) -> None:
    if not temporary.exists():
        return
    if not keep_failed:
        _remove_folder(temporary)
        return
    kept = Path(f"{destination}.failed")
    for number in range(2, 1000):
        if not os.path.lexists(kept):
            break
        kept = Path(f"{destination}.failed-{number}")
    temporary.rename(kept)
    print(f"kind-edge: the unfinished bundle is kept at {kept}", file=sys.stderr)


def _umask() -> int:
    """The process's file mask; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
