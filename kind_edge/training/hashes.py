"""Checksums of large files, each read once: remembered by path, size and time of change, as version control does."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TABLE = "CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, sha256 TEXT)"
_SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again without another time stamp: not remembered."""


@contextmanager
def remembered_hashes(cache: Path) -> Iterator[Callable[[Path], str]]:
    """A function that gives a file's sha256; what it has to compute it keeps in `cache`/hashes.sqlite."""
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_opened(cache / "hashes.sqlite")) as memory:

        def sha256_of(path: Path) -> str:
            place, facts = os.fsencode(path.resolve()), path.stat()
            with contextlib.suppress(sqlite3.Error):  # a memory that fails costs time, nothing else
                row = memory.execute("SELECT bytes, mtime_ns, sha256 FROM hashes WHERE path = ?", (place,)).fetchone()
                if row is not None and row[:2] == (facts.st_size, facts.st_mtime_ns):
                    return str(row[2])
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time_ns() - facts.st_mtime_ns > _SETTLED_NS:
                with contextlib.suppress(sqlite3.Error):
                    new = (place, facts.st_size, facts.st_mtime_ns, sha256)
                    memory.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", new)
            return sha256

        yield sha256_of


def hash_of_files(files: Iterable[tuple[str, Path]], sha256_of: Callable[[Path], str]) -> str:
    """One sha256 over names, sizes and contents, in order. A file that cannot be read counts as that."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            content = f"{path.stat().st_size}\0{sha256_of(path)}"
        except OSError:
            content = "unreadable"
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _opened(path: Path) -> sqlite3.Connection:
    memory = _connected(path)
    try:
        memory.execute("PRAGMA synchronous = OFF")  # thousands of small writes, none of which is worth waiting for
        memory.execute(_TABLE)
        memory.execute("SELECT bytes, mtime_ns, sha256 FROM hashes LIMIT 1").fetchall()
    except sqlite3.OperationalError:  # busy: do without
        pass
    except sqlite3.DatabaseError:  # damaged: begin anew
        memory.close()
        path.unlink(missing_ok=True)
        memory = _connected(path)
        memory.execute(_TABLE)
    return memory


def _connected(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=10, isolation_level=None)
