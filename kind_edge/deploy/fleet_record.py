"""`fleet.json`: which bundles of a fleet are complete and what each was made from, so that a stopped export goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kind_edge.bounded import read_object
from kind_edge.deploy.bundle import MANIFEST_NAME, hash_file, is_signed, read_manifest
from kind_edge.deploy.fleet_tasks import Job
from kind_edge.errors import InputError

RECORD = "fleet.json"
SCHEMA_VERSION = 1


@dataclass
class Record:
    """`entries`: by the name of a job what its bundle was made from, and the hash of its manifest."""

    path: Path
    entries: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        """An empty one where there is none; `InputError` for what is no such file."""
        if not path.exists():
            return cls(path)
        values = read_object(path, "which bundles are complete")
        entries = values.get("bundles")
        if (
            values.get("schema_version") != SCHEMA_VERSION
            or not isinstance(entries, dict)
            or not all(_is_entry(each) for each in entries.values())
        ):
            raise InputError(
                f"{path}: not what this kind-edge writes there; remove it and every bundle is made anew, "
                "or choose another -o"
            )
        return cls(path, entries)

    def add(self, job: Job, asked: Mapping[str, Any]) -> None:
        """A bundle is complete. The file is the old one or the whole new one, whatever happens."""
        manifest = hash_file(job.destination / MANIFEST_NAME)
        self.entries[job.name] = {"asked": _plain(asked), "manifest_sha256": manifest}
        values = {"schema_version": SCHEMA_VERSION, "bundles": dict(sorted(self.entries.items()))}
        temporary = self.path.with_name(f".{self.path.name}.new")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def changes(self, job: Job, asked: Mapping[str, Any]) -> list[str] | None:
        """What is asked otherwise than when the bundle was made; [] for nothing, None where none was made."""
        entry = self.entries.get(job.name)
        if entry is None:
            return None
        before, now = entry["asked"], _plain(asked)
        return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    def is_whole(self, job: Job) -> bool:
        """Whether a complete bundle is still there: its very manifest, and every file that it names unchanged."""
        entry = self.entries[job.name]
        try:
            same = hash_file(job.destination / MANIFEST_NAME) == entry["manifest_sha256"]
            if not same or is_signed(job.destination) != (entry["asked"].get("sign") is not None):
                return False
            files = read_manifest(job.destination).files
            return all(hash_file(job.destination / name) == each.sha256 for name, each in files.items())
        except (OSError, InputError):
            return False


def digest(value: object) -> str:
    """Of anything whose repr says all of it."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("asked"), dict)
        and isinstance(value.get("manifest_sha256"), str)
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
