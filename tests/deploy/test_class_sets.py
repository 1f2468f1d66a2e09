"""The file of sets of classes: one form, and every other is refused with an example."""

from __future__ import annotations

from pathlib import Path

import pytest

from kind_edge.deploy.class_sets import EXAMPLE, read_class_sets
from kind_edge.errors import InputError, KindEdgeError, UsageError


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "sets.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_sets_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, EXAMPLE + '\nodd: ["no", "1", t-shirt]\nlong:\n  - coat\n  - dress\n')
    assert read_class_sets(path) == {
        "shoes": ("sneaker", "sandal", "ankle-boot"), "bags": ("bag",), "odd": ("no", "1", "t-shirt"),
        "long": ("coat", "dress"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("", InputError, "shoes: \\["),
        ("- [bag, coat]\n- [bag]", InputError, "shoes: \\["),
        ("shoes: sneaker", InputError, "shoes: \\["),
        ("shoes: []", InputError, "shoes: \\["),
        ("shoes: {a: b}", InputError, "shoes: \\["),
        ("shoes: [[a], b]", InputError, "quotation marks"),
        ("shoes: [no]", InputError, "quotation marks"),
        ("shoes: [a, b, a]", InputError, "twice"),
        ("shoes: [a]\nshoes: [b]", InputError, "twice"),
        ("a: &x [a]\nb: !!python/object/apply:os.system [true]", InputError, "cannot be read"),
        ("shoes: [a", InputError, "cannot be read"),
        (b"\xff\xfe\x00", InputError, "cannot be read"),
        ("a: " + "[" * 1500, InputError, "cannot be read"),
        ("#" * 2**20 + "\na: [b]", InputError, "over"),
        ("Shoes: [a]\nshoes: [b]", UsageError, "capitals"),
        ("../x: [a]", UsageError, "letters"),
        (".x: [a]", UsageError, "letters"),
        ("1: [a]", UsageError, "letters"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str, kind: type[KindEdgeError], told: str) -> None:
    with pytest.raises(kind, match=told):
        read_class_sets(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_class_sets(tmp_path / "none.yaml")
