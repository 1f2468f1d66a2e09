"""What a checkpoint tells of its origin goes along, and nothing that is no business of others does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kind_edge.deploy.notice import notice
from kind_edge.errors import InputError
from kind_edge.model.provenance import Stated, card_licence, lineage, lineage_words

TRAINED: dict[str, Any] = {
    "stated": {
        "author": "A. Nother",
        "licence": "CC-BY-4.0",
        "data_source": "https://a.example",
        "data_licence": "CC0",
    },
    "command": "kind-edge train --config /home/anna/secret/c.toml -o runs/x",
    "config": {"images": 100, "model": {"width": 64}},
    "data": {"kind": "folder of images"},
    "data_sha256": "ab" * 32,
    "tools": {"kind_edge": "0.1.0", "revision": "0123456789ab"},
}


def test_every_training_is_told_in_its_order() -> None:
    first = {"command": "kind-edge adapt a", "data": {"kind": "tar", "licence": "MIT"}, "before": None}
    second = {"command": "kind-edge adapt b", "data": {"kind": "Fashion-MNIST"}, "before": first}
    distilled = {"command": "kind-edge distill b", "teacher_sha256": "cd" * 32}
    told = lineage("m", "ef" * 32, {**TRAINED, "adapted": second, "distilled": distilled})
    assert [each["command"].split()[1] for each in told["trained"]] == ["train", "adapt", "adapt", "distill"]
    assert [each["licence"] for each in told["data"]] == ["CC0", "MIT", "MIT"]
    assert told["data"][2]["source"] == "https://github.com/zalandoresearch/fashion-mnist"
    assert (told["licence"], told["author"], told["teacher_sha256"]) == ("CC-BY-4.0", "A. Nother", "cd" * 32)
    assert told["trained"][0]["config"] == {"images": 100}
    assert "anna" not in str(told)
    words = lineage_words(told)
    assert "revision 0123456789ab" in words["trained by"]
    text = notice({"name": "b", "tools": {"kind_edge": "0.1.0"}, "provenance": told})
    for part in ("CC-BY-4.0", "A. Nother", "CC0", "https://a.example", "ab" * 6):
        assert part in text


def test_what_is_stated_stays_with_its_training() -> None:
    """A run that begins with a checkpoint's weights has images of its own, whose licence is not that of the first."""
    again = {"command": "kind-edge train --from m", "data": {"kind": "tar"}, "stated": {"data_licence": "MIT"}}
    resized = {"method": "fit", "source_sha256": "12" * 32}
    told = lineage("m", "ef" * 32, {**again, "begun_from": {**TRAINED, "resized": resized}})
    assert told["resized"] == "by fit from 121212121212"
    assert [each["licence"] for each in told["data"]] == ["CC0", "MIT"]


def test_what_nobody_stated_is_said_to_be_so() -> None:
    told = lineage("m", "ef" * 32, {"seed": 0})
    assert told["licence"] == "not stated"
    assert "ask them before you pass this on" in notice({"name": "b", "tools": {"kind_edge": "1"}, "provenance": told})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"license": "MIT"}, "unknown key 'license'; nearest known: licence"),
        ({"licence": "MIT\nval x = 1"}, "want one line of text"),  # it goes into comments of source code
        ({"licence": 3}, "want one line of text"),
        (["MIT"], "want a table of author, licence"),
    ],
)
def test_a_statement_is_lines_of_text(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stated.from_dict(values, "c.toml [provenance]")
    with pytest.raises(InputError, match=message):
        lineage("m", "0" * 64, {"stated": values})


def test_a_model_card_tells_the_licence(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    assert card_licence(tmp_path / "vae") == ""
    (tmp_path / "README.md").write_text("---\ntags:\n- license: no\nlicense: cc-by-nc-4.0\n---\nlicense: other\n")
    assert card_licence(tmp_path / "vae") == card_licence(tmp_path) == "cc-by-nc-4.0"
