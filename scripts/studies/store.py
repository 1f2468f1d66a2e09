"""Runs that are never computed twice: the figures of every finished run lie in one JSON file."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.errors import InputError, UsageError

SCHEMA_VERSION = 1
TWIN = Path(__file__).resolve().parents[1] / "peers" / "fashion-mnist-dense"
"""The dense model of the shipped one's shape, data, objective and number of images seen."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """The model a study is about. `weights_sha256` is over the weights alone, `sha256` also over what they mean.

    `teacher_sha256`: of the model that it was distilled from, if it was; a study may compare the two. `twin_sha256`: of
    the dense model that stands beside it, trained likewise.
    """

    name: str
    folder: Path
    sha256: str
    weights_sha256: str
    teacher_sha256: str | None = None
    twin_sha256: str | None = None

    @property
    def family(self) -> set[str]:
        """Hashes of the models that its figures may be of."""
        return {sha256 for sha256 in (self.sha256, self.teacher_sha256, self.twin_sha256) if sha256}


def subject_of(model: str | Path) -> Subject:
    from kind_edge.model.checkpoint import checkpoint_hash, read_config
    from kind_edge.model.shipped import find_model

    folder = find_model(model)
    distilled = read_config(folder)["provenance"].get("distilled", {})
    hashes = checkpoint_hash(folder), weights_hash(folder), distilled.get("teacher_sha256"), checkpoint_hash(TWIN)
    return Subject(folder.resolve().name, folder, *hashes)


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files; of one file, that of `model.safetensors` as sha256sum prints it."""
    from kind_edge.model.checkpoint import weight_files

    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Store:
    """The finished runs of one study: `folder/study/run.json`."""

    def __init__(self, folder: Path, study: str, subject: Subject) -> None:
        self.folder = folder / study
        self.study = study
        self.subject = subject

    def run(self, name: str, conditions: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Record:
        """The record of a run: read where it is finished, else `compute()`d and stored.

        `conditions` hold everything that the figures depend on beside the model. Raises `UsageError` if the stored
        run is of another model or of other conditions.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            return self._checked(read_record(path), conditions, path)
        began = time.monotonic()
        figures = dict(compute())
        record: Record = {
            "schema_version": SCHEMA_VERSION,
            "study": self.study,
            "run": name,
            "checkpoint": self._checkpoint(),
            "conditions": dict(conditions),
            "figures": figures,
            "seconds": round(time.monotonic() - began, 1),
            "hardware": _hardware(),
            "tools": _tools(),
        }
        write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
        print(f"{self.study}: {name} took {record['seconds']:.0f} s", file=sys.stderr, flush=True)
        return record

    def finished(self) -> list[Record]:
        """Every stored run of this study and model, by name."""
        records = [read_record(path) for path in sorted(self.folder.glob("*.json"))]
        return [record for record in records if record["checkpoint"] == self._checkpoint()]

    def forget(self, keep: Callable[[Record], bool]) -> None:
        """Remove the stored runs of other models, and those that are not to be kept."""
        for path in sorted(self.folder.glob("*.json")):
            record = read_record(path)
            if record["checkpoint"]["sha256"] not in self.subject.family or not keep(record):
                print(f"{path}: out of date, removed", file=sys.stderr)
                path.unlink()

    def _checkpoint(self) -> dict[str, str]:
        subject = self.subject
        return {"model": subject.name, "sha256": subject.sha256, "weights_sha256": subject.weights_sha256}

    def _checked(self, record: Record, conditions: Mapping[str, Any], path: Path) -> Record:
        stored = {"weights_sha256": record["checkpoint"]["weights_sha256"], **record["conditions"]}
        wanted = {"weights_sha256": self.subject.weights_sha256, **json.loads(json.dumps(conditions))}
        for key in wanted.keys() | stored.keys():
            if stored.get(key) != wanted.get(key):
                raise UsageError(
                    f"{path} was measured with {key} {stored.get(key)}, now asked is {wanted.get(key)}; "
                    "choose another -o, or remove the file to measure anew"
                )
        return record


def read_record(path: Path) -> Record:
    """One stored run; `InputError` if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the stored run: {error}; remove it to measure anew") from error
    wanted = ("study", "run", "checkpoint", "conditions", "figures")
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or not set(wanted) <= set(record):
        raise InputError(f"{path}: not a stored run of schema version {SCHEMA_VERSION}; remove it to measure anew")
    return record


def records_in(folder: Path, study: str) -> list[Record]:
    """All finished runs of a study, whatever model they are of."""
    return [read_record(path) for path in sorted((folder / study).glob("*.json"))]


def having(records: Iterable[Record], **conditions: Any) -> list[Record]:
    """Those that were made under all of these conditions."""
    return [record for record in records if conditions.items() <= record["conditions"].items()]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _hardware() -> str:
    import torch

    from kind_edge.training.train import hardware

    return hardware(torch.device("cpu"))


def _tools() -> dict[str, str]:
    import torch

    from kind_edge import __version__

    return {"kind_edge": __version__, "torch": torch.__version__, "python": platform.python_version()}
