"""ONNX Runtime for browsers: the pinned npm package, fetched once into the user's cache and checked.

The package carries no licence file; the Python package of the same project does, and its texts are copied along.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

from kind_edge.deploy.ort import DISTRIBUTIONS
from kind_edge.errors import InputError, UsageError
from kind_edge.model.cache import cache_base

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="

CPU_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GPU_FILES = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")

RUNTIME_NOTICE = f"{PACKAGE} {VERSION}, licence MIT: LICENSE and ThirdPartyNotices.txt beside it"
_LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
_FETCH_TIMEOUT_S = 600


def copy_runtime(folder: Path, files: Collection[str]) -> None:
    """Put those files of the package into `folder`, with the licences.

    Raises `UsageError` if the package is not in the cache and cannot be fetched, `InputError` if it is damaged.
    """
    archive = fetch_runtime()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        for name in files:
            member = package.extractfile(f"package/dist/{name}")
            if member is None:
                raise InputError(f"{archive}: holds no {name}")
            with member, open(folder / name, "wb") as target:
                shutil.copyfileobj(member, target)
    for name in _LICENCES:
        shutil.copyfile(_licence(name), folder / name)


def cached_package() -> Path:
    """Where the package is kept: $XDG_CACHE_HOME (or ~/.cache) /kind-edge/onnxruntime-web-VERSION.tgz."""
    return cache_base() / f"{PACKAGE}-{VERSION}.tgz"


def fetch_runtime() -> Path:
    """The package in the cache; fetched if it is not there, or damaged. Raises as `copy_runtime` does."""
    path = cached_package()
    if path.is_file() and _intact(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as scratch:
        fetched = _fetch(Path(scratch))
        if not _intact(fetched):
            raise InputError(f"{PACKAGE} {VERSION} from npm is not the file that is known: its hash differs; try again")
        os.replace(fetched, path)
    return path


def _fetch(folder: Path) -> Path:
    """`npm pack`, which knows the user's registry and proxy."""
    elsewhere = f"or run `npm pack {PACKAGE}@{VERSION}` elsewhere and put the file at {cached_package()}"
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            f"--formats web takes ONNX Runtime for browsers from npm, which is not here: install it, {elsewhere}"
        )
    command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_FETCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{' '.join(command)} took over {_FETCH_TIMEOUT_S} s; try again, {elsewhere}") from error
    found = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or len(found) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise UsageError(f"npm cannot fetch {PACKAGE} {VERSION} ({reason}); is there a network? Try again, {elsewhere}")
    return found[0]


def _intact(path: Path) -> bool:
    with open(path, "rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode() == SHA512


def _licence(name: str) -> Path:
    for distribution in DISTRIBUTIONS:
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.parent.name == "onnxruntime" and file.name == name:
                return Path(str(file.locate()))
    raise UsageError(f"the installed onnxruntime has no {name}, and the page must not go without it; install it again")
