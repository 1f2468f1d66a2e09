"""Which of a source's classes a model learns, and under which names: from a file, or all as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kind_edge.bounded import read_object, read_toml
from kind_edge.errors import InputError, nearest

ClassMap = Mapping[str, tuple[str, ...]]
"""New class -> the source's classes that it is made of, in label order."""


def read_class_map(path: Path) -> ClassMap:
    """A TOML or JSON file: `shoe = ["sneaker", "ankle-boot"]`, one line per new class.

    Raises:
        InputError: unreadable, empty, not lists of names, or a source class in two places.
    """
    read = read_object if path.suffix.lower() == ".json" else read_toml
    try:
        values = read(path, "the class map")
    except InputError as error:
        raise InputError(f"{error}; want TOML, or JSON named *.json") from error
    if not values:
        raise InputError(f'{path}: a class map names classes, for instance: shoe = ["sneaker", "ankle-boot"]')
    users: dict[str, str] = {}
    for name, members in values.items():
        if not isinstance(members, list) or not members or not all(isinstance(member, str) for member in members):
            raise InputError(f"{path}: {name}: got {members!r:.60}, want a list of at least one source class")
        for member in members:
            if member in users:
                raise InputError(f"{path}: {member!r} belongs to {users[member]!r} and to {name!r}; choose one")
            users[member] = name
    return {name: tuple(members) for name, members in values.items()}


def choose_classes(class_map: ClassMap | None, known: Sequence[str], where: str) -> ClassMap:
    """The map, checked against the names in the source; without one every class stands for itself.

    Raises:
        InputError: a name that the source does not have, or one that `--classes` could not name later.
    """
    chosen = class_map if class_map is not None else {name: (name,) for name in known}
    names = set(known)
    unknown = [member for members in chosen.values() for member in members if member not in names]
    if unknown:
        faults = "; ".join(f"{name!r} (nearest: {nearest(name, known)[:200]})" for name in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(f"--class-map: {where} has no class {faults}{more}")
    for name in chosen:
        if "," in name or name != name.strip() or not name.isprintable():
            raise InputError(
                f"class {name!r}: --classes a,b could not name it, because of its comma, margin or control character; "
                "rename it with --class-map"
            )
    return chosen
