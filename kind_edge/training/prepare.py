"""Every source is prepared once: decoded, cropped, perhaps encoded, into shards that later runs only map into memory.

A prepared folder is named by a sha256 over all that determines its contents, so a changed source, size, class map or
autoencoder is another folder. It holds per shard `00000.npy` (uint8 pixels or float16 latents, [m, ch, H, W]) and
`00000.json` (labels, digests, failures, checksum), and `index.json`, written last. Until then the folder is called
`*.partial`; a run that was killed goes on after the last whole shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import write_file
from kind_edge.training.pictures import Picture, UnreadablePictureError, decode
from kind_edge.units import format_count

SCHEMA_VERSION = 1
"""Also of how pixels are made and dealt to shards: a change there makes every prepared folder a stranger."""
SHARD_BYTES = 256_000_000
SHARD_PIXELS, SHARD_LATENTS = 4096, 512
"""Items per shard at most: what a kill can cost. Encoding takes far longer than decoding."""
CHUNK = 64
MAX_FAILED_SHARE = 0.1
REPORT_EVERY_S = 10.0
INDEX = "index.json"

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be prepared: items of a source, in order, with the model's labels.

    `key` is the sha256 of everything that determines the result. `encode` takes decoded pixels uint8 [b, channels,
    size, size] to what is kept; None keeps the pixels.
    """

    key: str
    labels: NDArray[np.int64]
    name: Callable[[int], str]
    read: Callable[[int], bytes]
    size: int
    channels: int
    shape: tuple[int, int, int]
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float16]] | None = None
    broken: tuple[tuple[str, str], ...] = ()
    shard_items: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.encode is None else np.float16)

    @property
    def item_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @cached_property
    def ranges(self) -> list[range]:
        """The items of every shard."""
        most = self.shard_items or (SHARD_PIXELS if self.encode is None else SHARD_LATENTS)
        step = max(1, min(most, SHARD_BYTES // self.item_bytes))
        count = len(self.labels)
        return [range(first, min(first + step, count)) for first in range(0, count, step)]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A finished folder. The arrays are mapped, not read."""

    folder: Path
    shards: tuple[NDArray[Any], ...]
    labels: NDArray[np.int64]
    digests: NDArray[np.str_]
    """Of every item's source bytes: equal for copies."""
    failures: tuple[tuple[str, str], ...]
    enlarged: int


class _Item(NamedTuple):
    picture: Picture
    digest: str


def prepare(work: Work, cache: Path, sha256_of: Callable[[Path], str], report: Report) -> Prepared:
    """Open the prepared folder in `cache`, or make it; damaged shards are made anew.

    Raises:
        InputError: more than a tenth of the items cannot be read.
        UsageError: the disk is too small.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder, partial = cache / work.key[:32], cache / f"{work.key[:32]}.partial"
    with _locked(cache / f"{work.key[:32]}.lock", report):
        if folder.exists():
            faults = _faults(folder, work, sha256_of)
            if not faults:
                report(f"prepared before: {folder}")
                return _opened(folder, work)
            report(f"{folder}: {'; '.join(faults[:3])}: preparing that anew")
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)
        _make(work, partial, sha256_of, report)
        partial.rename(folder)
        return _opened(folder, work)


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """One run at a time prepares; another that wants the same waits and finds it done."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another run is preparing the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- reading ----------------------------------------------------------------------------------------------------------


def _faults(folder: Path, work: Work, sha256_of: Callable[[Path], str]) -> list[str]:
    """What is wrong with a finished folder, by file."""
    try:
        key = json.loads((folder / INDEX).read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        key = None
    faults = [] if key == work.key else [f"{INDEX} is damaged"]
    numbers = range(len(work.ranges))
    return faults + [f"shard {number:05d} is damaged" for number in numbers if not _whole(folder, number, sha256_of)]


def _whole(folder: Path, number: int, sha256_of: Callable[[Path], str]) -> bool:
    """Whether a shard and its record are there and belong together."""
    path = folder / f"{number:05d}.npy"
    try:
        record = _record(folder, number)
        return bool(record["sha256"] == sha256_of(path) and record["sealed"] == _seal(record))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _record(folder: Path, number: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"{number:05d}.json").read_text()))


def _seal(record: Mapping[str, Any]) -> str:
    """A checksum of the record itself."""
    content = {key: value for key, value in record.items() if key != "sealed"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _opened(folder: Path, work: Work) -> Prepared:
    records = [_record(folder, number) for number in range(len(work.ranges))]
    # An empty array cannot be mapped.
    shards = [
        np.load(folder / f"{number:05d}.npy", mmap_mode="r" if record["labels"] else None)
        for number, record in enumerate(records)
    ]
    return Prepared(
        folder,
        tuple(shards),
        np.array([label for record in records for label in record["labels"]], dtype=np.int64),
        np.array([digest for record in records for digest in record["digests"]], dtype=np.str_),
        work.broken + tuple((name, why) for record in records for name, why in record["failures"]),
        sum(record["enlarged"] for record in records),
    )


# --- making -----------------------------------------------------------------------------------------------------------


def _make(work: Work, partial: Path, sha256_of: Callable[[Path], str], report: Report) -> None:
    partial.mkdir(exist_ok=True)
    missing = [number for number in range(len(work.ranges)) if not _whole(partial, number, sha256_of)]
    items = sum(len(work.ranges[number]) for number in missing)
    _check_space(partial, items * work.item_bytes)
    if len(missing) < len(work.ranges):
        report(f"prepared already: {len(work.labels) - items} of {format_count(len(work.labels), 'image')}")
    what = "latents" if work.encode is not None else "pixels"
    shape = " x ".join(map(str, work.shape))
    report(f"preparing {format_count(items, 'image')} ({shape} {what}) in {partial.with_suffix('')}")
    whole = [number for number in range(len(work.ranges)) if number not in set(missing)]
    failures = list(work.broken) + [failure for number in whole for failure in _record(partial, number)["failures"]]
    began = reported = time.monotonic()
    done = 0
    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for number in missing:
                for count, failed in _write_shard(work, partial, number, pool):
                    done += count
                    failures += failed
                    _check_failures(work, failures, partial)
                    if time.monotonic() - reported > REPORT_EVERY_S:
                        reported = time.monotonic()
                        report(f"prepared {done} of {items} images, {done / (reported - began):.0f} images/s")
    except KeyboardInterrupt:
        report("what is prepared so far is kept; the same command goes on")
        raise
    _list_failures(failures, partial)
    write_file(partial / INDEX, json.dumps({"schema_version": SCHEMA_VERSION, "key": work.key}).encode())


def _write_shard(work: Work, partial: Path, number: int, pool: Executor) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Make one shard and its record; yields per chunk the items done and those that failed."""
    items = work.ranges[number]
    out = np.empty((len(items), *work.shape), dtype=work.dtype)
    labels: list[int] = []
    digests: list[str] = []
    failures: list[tuple[str, str]] = []
    enlarged = 0
    for first in range(0, len(items), CHUNK):
        chunk = items[first : first + CHUNK]
        contents = [_read(work, item) for item in chunk]
        results = list(pool.map(lambda content: _decoded(work, content), contents))
        good = [(item, result) for item, result in zip(chunk, results, strict=True) if isinstance(result, _Item)]
        failed = [(work.name(item), why) for item, why in zip(chunk, results, strict=True) if isinstance(why, str)]
        if good:
            pixels = np.stack([result.picture.pixels for _, result in good])
            out[len(labels) : len(labels) + len(good)] = pixels if work.encode is None else work.encode(pixels)
        labels += [int(work.labels[item]) for item, _ in good]
        digests += [result.digest for _, result in good]
        enlarged += sum(result.picture.enlarged for _, result in good)
        failures += failed
        yield len(chunk), failed
    path = partial / f"{number:05d}.npy"
    _save_array(path, out[: len(labels)])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"sha256": sha256, "labels": labels, "digests": digests, "failures": failures, "enlarged": enlarged}
    write_file(partial / f"{number:05d}.json", json.dumps({**record, "sealed": _seal(record)}).encode())


def _read(work: Work, item: int) -> bytes | str:
    """An item's bytes, or why there are none."""
    try:
        return work.read(item)
    except OSError as error:
        return str(error)


def _decoded(work: Work, content: bytes | str) -> _Item | str:
    """A picture, or why there is none."""
    if isinstance(content, str):
        return content
    try:
        return _Item(decode(content, work.size, work.channels), hashlib.sha256(content).hexdigest()[:16])
    except UnreadablePictureError as error:
        return str(error)


def _check_failures(work: Work, failures: Sequence[tuple[str, str]], partial: Path) -> None:
    total = len(work.labels) + len(work.broken)
    if len(failures) > MAX_FAILED_SHARE * total:
        listed = _list_failures(failures, partial)
        raise InputError(
            f"{len(failures)} of {total} images cannot be read, more than {MAX_FAILED_SHARE:.0%}: "
            f"{describe(failures)}; mend or remove them; the list: {listed}"
        )


def describe(failures: Sequence[tuple[str, str]]) -> str:
    """The first few, by name and reason."""
    return "; ".join(f"{name} ({why})" for name, why in failures[:3])


def failures_file(folder: Path) -> Path:
    """The list of all that could not be read, beside the prepared folder."""
    return folder.parent / f"{folder.name.removesuffix('.partial')}.failures.txt"


def _list_failures(failures: Sequence[tuple[str, str]], partial: Path) -> Path:
    path = failures_file(partial)
    path.unlink(missing_ok=True)
    if failures:
        write_file(path, "".join(f"{name}\t{why}\n" for name, why in failures).encode("utf-8", "surrogateescape"))
    return path


def _check_space(folder: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes:
        raise UsageError(
            f"{folder.parent}: preparing takes {wanted_bytes / 1e9:.1f} GB, the disk has {free_bytes / 1e9:.1f} GB; "
            "set XDG_CACHE_HOME to a folder on a larger one"
        )


def _save_array(path: Path, array: NDArray[Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
