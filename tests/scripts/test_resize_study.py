"""The study of resizing: what is run once, what "times fewer" means, and that the text is of the runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.training.config import preset
from kind_edge.training.data import find_fashion_mnist


def record(method: str, seen: int, loss: float, seed: int = 0, size: str = "half-width") -> dict[str, Any]:
    share = 1.0 if method == "whole" else 4.0
    conditions = {
        "size": size, "method": method, "seen": seen, "seed": seed, "images": 500, "steps": 20, "guidance": 1.5,
        "sampler": "euler", "heldout_images": 500, "draws": 2, "rate_share": share,
    }  # fmt: skip
    figures = {"heldout_losses": [0.9 * loss, 1.1 * loss], "frechet": 100 * loss}
    return {"conditions": conditions, "figures": figures, "checkpoint": {"weights_sha256": "ab" * 32, "model": "m"}}


def test_images_for_a_loss_follow_a_power_law_between_lengths() -> None:
    from studies.resize_text import Times, images_for

    law = [(0, 30.0), *((n, 100 * n**-0.5) for n in (1_000, 4_000, 16_000))]
    for images in (1_000, 1_700, 4_000, 9_000):
        found = images_for(100 * images**-0.5, law)
        assert found is not None
        assert (found.bound, found.value) == ("", pytest.approx(images))
    assert images_for(0.1, law) == Times(16_000.0, "≥")
    assert images_for(30.0, law) == Times(0.0)
    assert images_for(100.0, law[1:]) == Times(1_000.0, "≤")
    assert images_for(1.0, [(0, 2.0)]) is None


def test_the_text_says_how_many_times_fewer_and_whether_that_is_enough() -> None:
    from studies.resize_text import text

    scratch = [record("scratch", n, 100 * n**-0.5, s) for n in (6_000, 24_000, 96_000) for s in (0, 1)]
    front = [record("front", n, 100 * (8 * n) ** -0.5, s) for n in (6_000, 24_000) for s in (0, 1)]
    whole = [record("whole", 240_000, 100 * 96_000**-0.5, s) for s in (0, 1)]
    said = text([*scratch, *front, *whole])
    assert "| front, times fewer than scratch | 8.0 |" in said
    flat = " ".join(said.split())
    assert "half-width, front: the loss of the whole training after 12,000 images, 20.0 times fewer" in flat
    assert "(wanted: at least 5): met." in flat
    assert "half-width, scratch: the loss of the whole training after 96,000 images, 2.5 times fewer" in flat
    assert flat.count("not met.") == 1
    assert "standard error of one loss is 10.0 %, of two models' ratio 0.0 %" in flat
    short = text([*scratch, front[0], *whole])
    assert "so at most 40.0 times fewer (wanted: at least 5): longer runs are still to come." in " ".join(short.split())
    never = text([*scratch, record("front", 48_000, 9.0), *whole])
    assert "so at most 5.0 times fewer (wanted: at least 5): not met." in " ".join(never.split())


def test_every_point_is_run_once_and_never_mixed_with_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies import resize
    from studies.resize_text import draw, text

    try:
        find_fashion_mnist()
    except InputError as error:
        pytest.skip(str(error))
    small = dataclasses.replace(preset("smoke"), images=80)
    monkeypatch.setattr(resize, "preset", lambda _: small)
    monkeypatch.setattr(resize, "SIZES", {"half-depth": (32, 1)})
    monkeypatch.setattr(resize, "HEALS", (80,))
    monkeypatch.setattr(resize, "LONGER", (120,))
    monkeypatch.setattr(resize, "LONGEST", 160)
    monkeypatch.setattr(resize, "DRAWS", 2)
    monkeypatch.setattr(resize, "METHOD_NAMES", ("front",))
    monkeypatch.setattr(resize, "FIRST", ("front", "scratch"))
    monkeypatch.setattr("kind_edge.training.nested.CALIBRATION_IMAGES", 10)
    records = resize.run_study(tmp_path, 10, (0,))
    assert {record["run"].removesuffix("-seed0") for record in records} == {
        "source-source-120", "half-depth-whole-80", "half-depth-front-0", "half-depth-front-80",
        *(f"half-depth-scratch-{seen}" for seen in (0, 80, 120, 160)),
    }  # fmt: skip
    resized = resize.resized
    monkeypatch.setattr(resize, "resized", None)
    assert resize.run_study(tmp_path, 10, (0,)) == records
    assert "half-depth, front" in text(records)
    draw(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000

    def another(*asked: Any) -> Checkpoint:
        start = resized(*asked)
        moved = {"final.linear.bias": start.tensors["final.linear.bias"] + 1}
        return dataclasses.replace(start, tensors={**start.tensors, **moved})

    monkeypatch.setattr(resize, "resized", another)
    (tmp_path / "resize" / "half-depth-front-80-seed0.json").unlink()
    with pytest.raises(UsageError, match="began from other weights; remove the runs of half-depth, front"):
        resize.run_study(tmp_path, 10, (0,))
