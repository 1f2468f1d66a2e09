"""`kind-edge export --heal` on the command line: what is refused at once, and what is shown while it lasts."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kind_edge.cli.terminal import Terminal
from kind_edge.deploy import pipeline
from kind_edge.errors import UsageError
from kind_edge.training.healing import HealingProgress
from kind_edge.units import parse_duration


def test_a_time_without_a_unit_is_refused_before_anything_is_read(call: Callable[..., Any], tmp_path: Path) -> None:
    answer = call("export", tmp_path / "none", "--profile", "host", "--heal", "5")
    assert answer.code == 2
    assert "--heal '5': a bare number says no unit; write for example 90s, 5m or 1h" in answer.err


def test_only_one_plan_is_resized(call: Callable[..., Any]) -> None:
    answer = call("plan", "--profile", "raspberry-pi-5", "--allow-resize", "10m", "--pareto")
    assert answer.code == 2
    assert "--allow-resize goes with one plan" in answer.err
    assert call("plan", "--profile", "raspberry-pi-5", "--allow-resize", "10").code == 2


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5 m", 90), ("5min", 300), ("1h", 3600)])
def test_times(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["m", "5 months", "1e999m", "5mm", "300MiB"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="--wait"):
        parse_duration(text, "--wait")


def heal_and_stop(*_: Any, heal: str, on_stage: Any, on_healing: Any, **__: Any) -> None:
    on_stage("healing")
    for seconds in range(1, 31):
        on_healing(HealingProgress(float(seconds), 300.0, seconds, 0.0125))
    raise KeyboardInterrupt


def test_progress_in_a_log_and_what_an_interruption_leaves(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "export", heal_and_stop)
    answer = call("export", "--profile", "host", "-o", tmp_path / "b", "--heal", "5m")
    assert answer.code == 130
    assert answer.err.count("healing: 10 %, step 30, loss 0.0125") == 1
    assert "the same command goes on" in answer.err
    assert answer.out == ""


def test_a_terminal_shows_one_moving_thing_at_a_time() -> None:
    terminal, shown = Terminal(), io.StringIO()
    terminal.err, terminal.animated = Console(file=shown, force_terminal=True, width=90), True
    with terminal.stages() as begin:
        begin("planning")
        begin("healing")
        for seconds in (1.0, 150.0, 300.0):
            begin.count(seconds, 300.0, "s", "loss 0.5")
        begin("exporting")
        begin.count(1.0, 2.0, "s", "again")
    text = shown.getvalue()
    assert "healing, s" in text
    assert "150/300" in text or "300/300" in text
    assert [word for word in ("planning", "healing", "exporting") if f"{word} " in text] == [
        "planning", "healing", "exporting",
    ]  # fmt: skip
    assert text.count("✓") == 3
