"""Where a model comes from and what may be done with it: told by its checkpoint, carried into everything made of it.

A checkpoint's config.json notes how it was made under `provenance`; what only people know, they state there under
`stated`: a training configuration's table [provenance], or by hand at any time, as no hash covers it.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kind_edge.bounded import read_text
from kind_edge.errors import InputError, nearest

NOT_STATED = "not stated"
_MAX_CHARACTERS = 300
_REVISION_TIMEOUT_S = 5
_MOST_TRAININGS = 100


@dataclass(frozen=True)
class Stated:
    """Of the weights who made them and their licence (SPDX where it has a name there); the same of the images."""

    author: str = ""
    licence: str = ""
    data_source: str = ""
    data_licence: str = ""

    def to_dict(self) -> dict[str, str]:
        """What is stated, without what is not."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Stated:
        """Lines of text under known keys; they go into comments of source code, so nothing else is taken."""
        known = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: got {values!r:.60}, want a table of {', '.join(known)}")
        for key, value in values.items():
            if key not in known:
                raise InputError(f"{where}: unknown key {key!r:.60}; nearest known: {nearest(str(key), known)}")
            if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_CHARACTERS:
                raise InputError(f"{where}: {key}: got {value!r:.60}, want one line of text")
        return cls(**values)


_KNOWN_DATA = {
    "Fashion-MNIST": Stated(data_source="https://github.com/zalandoresearch/fashion-mnist", data_licence="MIT"),
}
"""Data sets by the name that a training gives them: Fashion-MNIST is Zalando SE's, under the MIT licence."""


def lineage(name: str, sha256: str, provenance: Mapping[str, Any], where: str = "provenance") -> dict[str, Any]:
    """What a bundle says of the checkpoint it was cut from: plain values, without what nobody knows.

    `data` and `trained` are lists, in the order of the trainings (train, adapt, distill, train --from). Paths on the
    machine of the training are left out. Raises `InputError` for provenance that is not what a training writes.
    """
    if isinstance(before := provenance.get("lineage"), Mapping):
        return _passed_on(name, sha256, before, f"{where}: lineage")
    stated = Stated.from_dict(provenance.get("stated", {}), f"{where}: stated")
    noted = _trainings(provenance)
    found: dict[str, Any] = {
        "model": name,
        "checkpoint_sha256": sha256,
        "author": stated.author,
        "licence": stated.licence or NOT_STATED,
        "data": [
            _data(each, Stated.from_dict(each.get("stated", {}), f"{where}: stated"))
            for each in noted
            if isinstance(each.get("data"), Mapping)
        ],
        "trained": [_training(each) for each in noted if isinstance(each.get("command"), str)],
        "teacher_sha256": _text(noted[-1].get("teacher_sha256")),
        "resized": next(filter(None, (_resized(each.get("resized")) for each in reversed(noted))), ""),
        "imported_from": next(filter(None, (_text(each.get("imported_from")) for each in noted)), ""),
    }
    if not found["data"] and (stated.data_source or stated.data_licence):
        found["data"] = [_data({}, stated)]
    return {key: value for key, value in found.items() if value}


def _passed_on(name: str, sha256: str, before: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Of a checkpoint that was cut from another (a healed one in a bundle), which noted that one's lineage."""
    known = {key: before[key] for key in ("author", "licence") if key in before}
    found = {"model": name, "checkpoint_sha256": sha256, **Stated.from_dict(known, where).to_dict()}
    data = [each for each in before.get("data") or [] if isinstance(each, Mapping)]
    lines = [{str(key): _text(value) for key, value in each.items()} for each in data]
    whole = [each for each in lines if {"name", "licence"} <= each.keys()]
    return {"licence": NOT_STATED, **found, **({"data": whole} if whole else {})}


def lineage_words(told: Mapping[str, Any]) -> dict[str, str]:
    """A line for every entry of a lineage, for people."""
    lines = {
        "licence": str(told["licence"]) + (f", {told['author']}" if told.get("author") else ""),
        "data": "; ".join(data_words(each) for each in told.get("data", [])),
        "trained by": "; then ".join(_training_words(each) for each in told.get("trained", [])),
        "teacher": str(told.get("teacher_sha256", "")),
        "resized": str(told.get("resized", "")),
        "imported from": str(told.get("imported_from", "")),
        "autoencoder": _autoencoder_words(told.get("autoencoder")),
        **{f"later class {name}": _later_words(each) for name, each in told.get("later", {}).items()},
    }
    return {name: line for name, line in lines.items() if line}


def file_metadata(told: Mapping[str, Any]) -> dict[str, str]:
    """What a model file or a class pack says of itself: what belongs to the weights, so that it is the same however
    they are exported. The model's name is no part of that: it is whatever the folder is called.

    `model_author` and `model_license` are ONNX's own names for them.
    """
    props = {
        "checkpoint_sha256": told.get("checkpoint_sha256", ""),
        "model_license": told["licence"],
        "model_author": told.get("author", ""),
        "training_data": "; ".join(data_words(each) for each in told.get("data", [])),
    }
    return {key: value for key, value in props.items() if value}


def data_words(data: Mapping[str, Any]) -> str:
    """ "Fashion-MNIST (licence MIT, https://..., sha256 0123456789ab)"."""
    rest = [f"licence {data['licence']}", *([data["source"]] if "source" in data else [])]
    rest += [f"sha256 {data['sha256'][:12]}"] if "sha256" in data else []
    return f"{data['name']} ({', '.join(rest)})"


def card_licence(folder: Path) -> str:
    """The licence in the model card (README.md) of a folder from a hub, or of the pipeline that it is part of; ""."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if card.is_file():
            licence = _front_matter(read_text(card, "the model card")).get("license", "")
            if licence:
                return licence
    return ""


@functools.cache
def code_revision() -> str:
    """The git commit of the source tree that this package runs from, with "+" where files differ; "" if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        say = functools.partial(
            subprocess.run, cwd=root, capture_output=True, text=True, check=True, timeout=_REVISION_TIMEOUT_S
        )
        commit = say(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = say(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")


def _trainings(provenance: Mapping[str, Any], before: int = 0) -> list[Mapping[str, Any]]:
    """The first one first: those of the checkpoint that a run began from, the run, and what came after it."""
    begun = provenance.get("begun_from")
    earlier = _trainings(begun, before + 1) if isinstance(begun, Mapping) and before < _MOST_TRAININGS else []
    own = [provenance, *_adapted(provenance), provenance.get("distilled")]
    return [*earlier, *(each for each in own if isinstance(each, Mapping))]


def _adapted(provenance: Mapping[str, Any]) -> list[Any]:
    """Trainings of further classes, the first one first; each notes the one before it."""
    found: list[Any] = []
    each = provenance.get("adapted")
    while isinstance(each, Mapping) and len(found) < _MOST_TRAININGS:
        found.insert(0, each)
        each = each.get("before")
    return found


def _resized(noted: Any) -> str:
    """By which method, from what; "" for a model of its first size."""
    if not isinstance(noted, Mapping):
        return ""
    return f"by {_text(noted.get('method'))} from {_text(noted.get('source_sha256'))[:12] or 'another size'}"


def _data(noted: Mapping[str, Any], stated: Stated) -> dict[str, str]:
    """Of the images of one training; what people state holds for those that are not known by name."""
    facts = noted.get("data") or {}
    name = _text(facts.get("kind")) or "images"
    own = _KNOWN_DATA.get(name, Stated(data_source=stated.data_source, data_licence=stated.data_licence))
    values = {
        "name": name,
        "licence": _text(facts.get("licence")) or own.data_licence or NOT_STATED,
        "source": own.data_source,
        "sha256": _text(noted.get("data_sha256")),
    }
    return {key: value for key, value in values.items() if value}


def _training(noted: Mapping[str, Any]) -> dict[str, Any]:
    tools, config = noted.get("tools"), noted.get("config")
    versions = {str(key): _text(value) for key, value in tools.items()} if isinstance(tools, Mapping) else {}
    values: dict[str, Any] = {"command": _text(_without_folders(noted["command"])), "tools": versions}
    if isinstance(config, Mapping):
        values["config"] = {str(key): value for key, value in config.items() if isinstance(value, str | int | float)}
    return {key: value for key, value in values.items() if value}


def _training_words(training: Mapping[str, Any]) -> str:
    tools = training.get("tools", {})
    revision = f", revision {tools['revision']}" if "revision" in tools else ""
    return training["command"] + (f" (kind-edge {tools['kind_edge']}{revision})" if "kind_edge" in tools else "")


def _autoencoder_words(told: Any) -> str:
    return f"{told['name']}, licence {told['licence']}" if isinstance(told, Mapping) else ""


def _without_folders(command: str) -> str:
    """The words of a command with the last part alone of every path: where things lay is nobody's business."""
    return " ".join(word.rstrip("/").rpartition("/")[2] if "/" in word else word for word in command.split())


def _later_words(told: Mapping[str, str]) -> str:
    """Of a class that was joined from a pack of another checkpoint; `told` are a file's metadata."""
    words = [f"licence {told['model_license']}", told.get("model_author"), told.get("training_data")]
    return ", ".join([*filter(None, words), f"sha256 {told['checkpoint_sha256'][:12]}"])


def _text(value: Any) -> str:
    """One line of it, or "" where there is no text."""
    return "".join(c if c.isprintable() else " " for c in value[:_MAX_CHARACTERS]) if isinstance(value, str) else ""


def _front_matter(text: str) -> dict[str, str]:
    """`key: value` lines between the two `---` at the top of a card."""
    head = text[4:].partition("\n---")[0] if text.startswith("---\n") else ""
    pairs = [line.partition(":") for line in head.splitlines() if ":" in line and not line.startswith((" ", "-", "#"))]
    return {key.strip(): _text(value.strip().strip("\"'")) for key, _, value in pairs}
