"""Named sets of classes, from a file: what several bundles are made for. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kind_edge.bounded import read_bytes
from kind_edge.errors import InputError, UsageError

EXAMPLE = """shoes: [sneaker, sandal, ankle-boot]
bags: [bag]"""
LARGEST_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a set: it becomes a folder."""


def read_class_sets(path: Path) -> dict[str, tuple[str, ...]]:
    """Class names by the name of their set, in the file's order. Whether a model has the classes is not known here.

    Raises `InputError` for what cannot be read or is no such file, `UsageError` for a name that cannot be a folder's.
    """
    try:
        content = read_bytes(path, LARGEST_BYTES, "the sets of classes")
        values = yaml.load(content.decode("utf-8"), Loader=_Strict)
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: want a list of classes for each set, such as\n{_indented()}")
    sets = {check_set_name(name, str(path)): _classes(name, listed, path) for name, listed in values.items()}
    if len({name.lower() for name in sets}) < len(sets):
        raise UsageError(f"{path}: two sets differ in capitals alone; many disks take these for the same folder")
    return sets


def check_set_name(name: object, where: str) -> str:
    """The name, if it can be a folder's everywhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}: a set is called {name!r}; its folder is called so too: want letters, digits, '-', '_' and '.', "
            "a letter or a digit first, 64 at most"
        )
    return name


def _classes(name: str, listed: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: {name}: got {listed!r:.60}, want a list of classes, such as\n{_indented()}")
    for each in listed:
        if not isinstance(each, str):
            raise InputError(
                f"{path}: {name}: got {each!r:.60}, want the name of a class; put quotation marks round a name that "
                "YAML takes for something else (no, on, 1)"
            )
    if len(set(listed)) < len(listed):
        raise InputError(f"{path}: {name}: lists a class twice")
    return tuple(listed)


def _indented() -> str:
    return "\n".join(f"    {line}" for line in EXAMPLE.splitlines())


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # its types are not known
    """Of two keys that are the same PyYAML would take the last one, without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
