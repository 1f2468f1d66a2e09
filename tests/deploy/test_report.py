"""The report of a bundle: true to the manifest, whole in one file, safe with any name, and the same written again."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kind_edge.deploy.report import write_report
from kind_edge.errors import InputError

CLASSES = ["shirt", "bag"]


class Page(HTMLParser):
    """The text of a page, what it refers to, and its pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.references, self.tags = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def bundle(packaged: Path) -> Path:
    return packaged


@pytest.fixture
def values(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


@pytest.mark.slow
def test_says_what_was_asked_decided_and_proved(bundle: Path, values: dict[str, Any]) -> None:
    page = Page((bundle / "report.html").read_text())
    for file, worst_db in values["verification"]["parity"].items():
        assert file in page.text
        assert f"{worst_db:.1f} dB" in page.text
    for name in values["plan"]["binding"]:
        assert "this limit binds" in page.text, name
    for each in (*CLASSES, "raspberry-pi-5", values["source"]["checkpoint_sha256"], "Where the bytes are"):
        assert each in page.text
    assert "FAILED" not in page.text
    assert page.tags.count("img") == 2
    assert all(reference.startswith("data:") for reference in page.references), "nothing is fetched"
    assert not {"script", "iframe", "object"} & set(page.tags)


@pytest.mark.slow
def test_parts_add_up(values: dict[str, Any]) -> None:
    facts, plan = values["report"], values["plan"]
    assert sum(facts["bytes"].values()) == values["files"][values["default_model"]]["bytes"]
    assert sum(facts["seconds"].values()) == pytest.approx(plan["sustained_image_latency_s"], rel=1e-6)
    losses = [point["predicted_loss_increase"] for point in facts["front"]]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_written_again_it_is_the_same(bundle: Path, values: dict[str, Any], tmp_path: Path) -> None:
    write_report(bundle, values, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (bundle / "report.html").read_bytes()


@pytest.mark.slow
def test_shows_a_failure_and_escapes_names(bundle: Path, values: dict[str, Any], tmp_path: Path) -> None:
    told = copy.deepcopy(values)
    file = told["default_model"]
    told["verification"]["parity"][file] = told["verification"]["gates"][file] - 1
    told["classes"] = ["<script>alert(1)</script>", "a & b"]
    write_report(bundle, told, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "FAILED" in page.text
    assert "script" not in page.tags
    assert "a & b" in page.text


@pytest.mark.slow
def test_a_manifest_that_says_too_little_is_refused(bundle: Path, values: dict[str, Any], tmp_path: Path) -> None:
    del values["plan"]
    with pytest.raises(InputError, match="'plan'"):
        write_report(bundle, values, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
