"""What README.md and docs say of the shipped model is of the shipped model, and is what was measured of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint, save_checkpoint
from kind_edge.model.shipped import DEFAULT_MODEL
from kind_edge.training.data import CLASS_NAMES, find_fashion_mnist

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "make them anew with: scripts/results publish"


def check(root: Path) -> None:
    from studies.__main__ import BLOCKS
    from studies.documents import check
    from studies.store import subject_of

    check(root, subject_of(DEFAULT_MODEL), BLOCKS)


def test_every_figure_in_the_documents_is_of_the_shipped_model() -> None:
    check(ROOT)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """README.md and docs, to be spoiled; they have to be fresh, or nothing could be told of what the spoiling does."""
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    try:
        check(tmp_path)
    except InputError:
        pytest.skip("the documents are stale: the first test says what is")
    return tmp_path


def joined(text: str) -> str:
    return " ".join(text.split())


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def only(block: str) -> str:
    """The hash in a block's first mark, as the documents have it."""
    from studies.store import subject_of

    return f"<!-- {block}: begin, model {subject_of(DEFAULT_MODEL).sha256[:12]} -->"


def another_model(root: Path) -> None:
    """The shipped one is replaced: every block, run and picture is stale at once."""
    from studies.documents import stamp

    rewrite(root / "README.md", only("export"), "<!-- export: begin, model 0123456789ab -->")
    run = root / "docs" / "results" / "anysize" / "full-100-seed0.json"
    record = json.loads(run.read_text())
    record["checkpoint"]["sha256"] = "f" * 64
    run.write_text(json.dumps(record))
    stamp(root / "docs" / "images" / "classes.png", "e" * 64)


def another_guidance(root: Path) -> None:
    run = root / "docs" / "results" / "export" / "listing.json"
    record = json.loads(run.read_text())
    record["conditions"]["guidance"] += 1
    run.write_text(json.dumps(record))


def no_picture(root: Path) -> None:
    (root / "docs" / "images" / "swap-matrix.png").unlink()


def unstamped(root: Path) -> None:
    Image.new("L", (4, 4)).save(root / "docs" / "images" / "anysize.png")


def cut_off(root: Path) -> None:
    path = root / "docs" / "results" / "decomposition" / "real.json"
    path.write_bytes(path.read_bytes()[:100])


def no_blocks(root: Path) -> None:
    from studies.documents import _BLOCK

    for path in (root / "README.md", *(root / "docs").glob("*.md")):
        path.write_text(_BLOCK.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")


FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another model": (another_model, (
        "README.md: block export is of model 0123456789ab",
        "docs/claims.md: block anysize rests on docs/results/anysize/full-100-seed0.json, of model ffffffffffff",
        "docs/images/classes.png: of model eeeeeeeeeeee",
        f"{REMEDY} export anysize",
    )),
    "another guidance": (
        another_guidance,
        ("block export rests on docs/results/export/listing.json, which is not drawn as", f"{REMEDY} export"),
    ),
    "no hash": (
        lambda root: rewrite(root / "docs" / "results.md", only("shipped"), "<!-- shipped: begin -->"),
        ("docs/results.md: block shipped does not say of which model it is", f"{REMEDY} shipped"),
    ),
    "no blocks": (no_blocks, ("block classes is not there", "block anysize is not there", "no block shows it")),
    "no end": (
        lambda root: rewrite(root / "README.md", "<!-- export: end -->", ""),
        ("README.md: a mark lacks its other end", "block export is not there"),
    ),
    "unknown block": (
        lambda root: rewrite(root / "docs" / "data.md", "# ", "<!-- speed: begin -->\n<!-- speed: end -->\n# "),
        ("docs/data.md: block speed is no study's",),
    ),
    "figure by hand": (
        lambda root: rewrite(root / "docs" / "claims.md", "| learngene alone | ", "| learngene alone | 9"),
        ("block decomposition is not what the runs in docs/results/decomposition say",),
    ),
    "figure by hand in what rests on another's runs": (
        lambda root: rewrite(root / "README.md", "| dense, LiteRT int8 | 10 | ", "| dense, LiteRT int8 | 10 | 1"),
        ("README.md: block measured is not what the runs in docs/results/peers say", f"{REMEDY} measured"),
    ),
    "stray run": (
        lambda root: shutil.copytree(root / "docs" / "results" / "anysize", root / "docs" / "results" / "sizes"),
        ("docs/results/sizes/full-100-seed0.json: no block rests on it",),
    ),
    "run cut off": (cut_off, ("block decomposition rests on", "real.json: cannot read the stored run")),
    "no picture": (no_picture, ("docs/images/swap-matrix.png: not there, but a block shows it",)),
    "unstamped picture": (unstamped, ("docs/images/anysize.png: of model unknown",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_document_that_is_stale_is_found(name: str, copied: Path) -> None:
    spoil, wanted = FAULTS[name]
    spoil(copied)
    with pytest.raises(InputError) as caught:
        check(copied)
    for words in (*wanted, REMEDY):
        assert words in str(caught.value)


def test_runs_that_are_not_there_are_missed(copied: Path) -> None:
    shutil.rmtree(copied / "docs" / "results")
    with pytest.raises(InputError, match="block decomposition has no runs in docs/results/decomposition"):
        check(copied)


def test_a_block_is_put_in_the_place_of_the_last_one(tmp_path: Path) -> None:
    from studies.documents import insert

    document = tmp_path / "a.md"
    document.write_text("above\n<!-- cost: begin -->\nold\n<!-- cost: end -->\nbelow\n")
    for text in ("one", "two \\1"):
        insert(document, "cost", "a" * 64, text)
        assert document.read_text() == (
            f"above\n<!-- cost: begin, model {'a' * 12} -->\n\n{text}\n\n<!-- cost: end -->\nbelow\n"
        )
    with pytest.raises(UsageError, match="no lines <!-- shipped: begin -->"):
        insert(document, "shipped", "a" * 64, "text")


def test_publishing_drops_the_runs_of_another_model(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies import __main__ as studies
    from studies.documents import runs_of
    from studies.store import Record, Store, read_record

    def finished(name: str, job: studies.Job) -> list[Record]:
        block = studies.block_of(name)
        if not block.of_shipped:
            return [read_record(path) for path in runs_of(copied, block)]
        return Store(job.output, name, job.subject).finished()

    another_model(copied)
    monkeypatch.setattr(studies, "ROOT", copied)
    monkeypatch.setattr(studies, "measure", finished)
    with pytest.raises(UsageError, match="did you mean: export"):
        studies.publish(["exports"])
    studies.publish(["export", "anysize"])
    assert not (copied / "docs" / "results" / "anysize" / "full-100-seed0.json").exists()
    assert only("export") in (copied / "README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError) as caught:
        studies.publish([])
    assert "docs/images/classes.png: of model eeeeeeeeeeee" in str(caught.value)
    assert "anysize" not in str(caught.value)


def test_costs_are_told_with_what_was_refused() -> None:
    from studies.exported import cost_text, cutting_text

    row = {
        "precision": "int8", "max_size": "24%", "predicted_ms": 0.5, "measured_ms": 1.0, "predicted_bytes": 1_500_000,
        "file_bytes": 1_480_000, "parity_db": 26.84,
    }  # fmt: skip
    errors = {"latency_error_median": 0.5, "latency_error_worst": 0.612, "size_error_worst": 0.0135}
    refused = [{"precision": "int8", "max_size": "16%", "reason": "24.7 dB, want 25 dB"}]
    figures = {"plans": [row], "refused": refused, **errors, "peak_memory_error_worst": 0.13}
    told = joined(cost_text([{"conditions": {"classes": ["bag"]}, "hardware": "a machine", "figures": figures}]))
    assert "| int8 | 24% | 0.50 ms | 1.00 ms | 1,500,000 B | 1,480,000 B | 26.8 dB |" in told
    assert "by 50 % in the median and 61 % at worst, sizes by 1.4 % at worst" in told
    assert "Refused: int8 within 16%: 24.7 dB, want 25 dB." in told
    cut = {"file_bytes": 1, "limit_bytes": 2, "heldout_change": {"coat": 0.0151, "null": 0.01}, "class_accuracy": 0.93}
    own = {"classes": ["shirt", "coat"], "images": 400, "sampler": "euler", "steps": 4, "guidance": 1.75}
    told = joined(cutting_text([{"conditions": own, "figures": cut}]))
    assert "eval --images 400`; euler, 4 steps, guidance 1.75:" in told
    assert "| shirt, coat | 1 B | 2 B | coat +1.5 %, null +1.0 % | 93.0 % |" in told


CHOICES: dict[str, tuple[dict[str, Any], list[tuple[int, float]]]] = {
    "ordinary": ({}, [(2, 1.0), (2, 1.5), (2, 2.0)]),
    "distilled": ({"step_counts": (1, 2), "inside_guidance": 1.5}, [(1, 1.5), (2, 1.5)]),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_a_model_is_judged_over_what_its_user_can_choose(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    from studies import shipped
    from studies.store import subject_of

    try:
        find_fashion_mnist()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 60)
    for name, value in {"GUIDANCE": (1.0, 1.5, 2.0), "SWEEP_IMAGES": 20, "FINAL_IMAGES": 30}.items():
        monkeypatch.setattr(shipped, name, value)
    spec, wanted = CHOICES[kind]
    checkpoint = make_checkpoint(image_size=28, patch_size=7, num_classes=10, **spec)
    advice = {"steps": 2, "guidance": 1.5, "sampler": "euler"}
    checkpoint = dataclasses.replace(checkpoint, class_names=CLASS_NAMES, provenance={"recommended": advice})
    folder = tmp_path / "model"
    save_checkpoint(folder, checkpoint)
    subject = subject_of(folder)
    records = shipped.run(subject, tmp_path / "runs")
    rows = [each["conditions"] for each in records if each["conditions"]["kind"] == "judged"]
    assert [(row["steps"], row["guidance"]) for row in rows if row["images"] == 20] == wanted
    assert [(row["steps"], row["guidance"]) for row in rows if row["images"] == 30] == [(2, 1.5)]
    text = joined(shipped.text(records))
    assert ("distilled for 1, 2 steps with guidance 1.5 inside" in text) == (kind == "distilled")
    assert ("Guidance 1 is the model without guidance" in text) == (kind == "ordinary")
    monkeypatch.setattr(shipped, "fit_to_ship", lambda figures: figures["guidance"] == 2)
    shipped.recommend(subject, tmp_path / "runs")
    provenance = json.loads((folder / "config.json").read_text())["provenance"]
    assert provenance["recommended"] == advice | {"guidance": 2.0 if kind == "ordinary" else 1.5}
    assert provenance["quality"]["guidance"] == provenance["recommended"]["guidance"]
    assert subject_of(folder) == subject
