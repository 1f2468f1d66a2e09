"""What the verbs say of a model that is distilled for few steps, and where they say the time of an image goes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kind_edge.budget.image_time import image_time
from kind_edge.cli import quality_view
from kind_edge.cli.plan_view import time_words
from kind_edge.deploy.quality import HeldoutDeviation, HeldoutLoss

PHONE = ("--profile", "apple-a18")


def words_of(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (image_time(20, 20, 2, 0.0031, 0.0), "20 steps x 2 evaluations x 3.1 ms = 124 ms"),
        (image_time(1, 1, 1, 0.05, 0.2), "1 step x 1 evaluation x 50 ms + decoder 200 ms = 250 ms"),
        (image_time(4, 7, 2, 0.001, 0.0), "7 rows of 4 steps x 2 evaluations x 1 ms = 14 ms"),  # Heun's correctors
    ],
)
def test_the_time_of_an_image_is_explained(time: dict[str, float], words: str) -> None:
    assert time_words(time) == words


def test_plan_explains_the_time_of_any_model(call: Callable[..., Any], tiny_folder: Path) -> None:
    shown = words_of(call("-q", "plan", tiny_folder, *PHONE).out)
    assert "time 4 steps x 2 evaluations x" in shown
    assert "before" not in shown
    values = call("-q", "plan", tiny_folder, *PHONE, "--json").json()
    assert (values["time"]["evaluations"], values["teacher_time"]) == (8, {})
    arch = ("-q", "plan", "--arch", "DiT-B/2", "--num-classes", 9, *PHONE)
    assert "time 20 steps x 2 evaluations x" in words_of(call(*arch).out)
    time = call(*arch, "--json").json()["time"]
    assert time["image_s"] == pytest.approx(40 * time["evaluation_s"] + time["decoder_s"])
    assert time["decoder_s"] > 0


def test_plan_of_a_distilled_model_shows_before_and_after(call: Callable[..., Any], distilled_folder: Path) -> None:
    shown = words_of(call("-q", "plan", distilled_folder, *PHONE).out)
    assert "euler, 4 steps, guidance 1.75 inside the model: 1 evaluation per step" in shown
    assert "time 4 steps x 1 evaluation x" in shown
    assert "before 20 steps x 2 evaluations x" in shown
    times = re.search(r"([\d.]+) x as long", shown)
    assert times is not None
    assert 5 < float(times[1]) < 10.1


def test_what_it_does_not_support_exits_2(call: Callable[..., Any], distilled_folder: Path, tmp_path: Path) -> None:
    for command in (("plan", *PHONE), ("export", *PHONE, "-o", tmp_path / "out"), ("eval",)):
        answer = call("-q", command[0], distilled_folder, *command[1:], "--steps", 3)
        assert (answer.code, answer.out) == (2, "")
        assert "distilled for 1, 2, 4 steps" in answer.err
        assert call("-q", command[0], distilled_folder, *command[1:], "--guidance", 3).code == 2
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_it_is_distilled_for(
    call: Callable[..., Any], distilled_folder: Path, tiny_folder: Path
) -> None:
    shown = words_of(call("inspect", distilled_folder).out)
    assert "works in 1, 2 or 4 steps, with guidance 1.75 inside" in shown
    assert "quality by steps 4: frechet 5.25, class accuracy 0.985" in shown
    assert "span network" in shown
    values = call("inspect", distilled_folder, "--json").json()
    assert (values["step_counts"], values["inside_guidance"]) == ([1, 2, 4], 1.75)
    ordinary = call("inspect", tiny_folder, "--json").json()
    assert not {"step_counts", "inside_guidance"} & (ordinary.keys() | ordinary["shape"].keys())


def test_quality_is_told_as_what_it_is() -> None:
    printed: list[Any] = []
    console: Any = SimpleNamespace(print=printed.append)

    def told(quality: Any) -> dict[str, Any]:
        return {each.name: each.to_dict() for each in quality}

    losses, off = [HeldoutLoss("bag", 8, 1.0, 1.2)], [HeldoutDeviation("bag", 8, 2.0, 0.2)]
    assert quality_view.warning({}) is quality_view.warning(told(losses)) is None
    assert "the held-out loss of bag rises by 30%" in str(quality_view.warning(told([HeldoutLoss("bag", 8, 1.0, 1.3)])))
    assert "the prediction for bag is off by 10% of its energy" in str(quality_view.warning(told(off)))
    assert quality_view.summary(told(losses)) == "held-out loss bag +20.0%"
    assert quality_view.summary(told(off)) == ("difference from the full model bag 10.00%")
    for quality in ([], losses, off):
        quality_view.print_quality(console, quality)
    headings = [str(printed[i]) for i in (0, 2)]
    assert len(printed) == 4
    assert "diffusion loss" in headings[0]
    assert "from the full model's" in headings[1]
