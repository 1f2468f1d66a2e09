"""The front, several devices, the other question and refusals, as the command line shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHONE = ("--profile", "apple-a18", "--classes", "bag,coat,shirt", "--steps", 2)


def test_the_front_is_a_table_json_and_a_picture(call: Callable[..., Any], tiny_folder: Path, tmp_path: Path) -> None:
    values = call("-q", "plan", tiny_folder, *PHONE, "--pareto", "--json", "-o", tmp_path / "front.png").json()
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert values["axis"] == "weight_bytes"
    assert [len(curve["classes"]) for curve in values["curves"]] == [1, 2, 3]
    for curve in values["curves"]:
        sizes = [point["weight_bytes"] for point in curve["points"]]
        losses = [point["predicted_loss_increase"] for point in curve["points"]]
        assert sizes == sorted(sizes)
        assert losses == sorted(losses, reverse=True)
    one, _, three = values["curves"]
    assert one["points"][-1]["weight_bytes"] < three["points"][-1]["weight_bytes"]
    shown = call("-q", "plan", tiny_folder, *PHONE, "--pareto", "--minimize", "flops", "-o", tmp_path / "front.json")
    assert "3 classes" in shown.out
    assert json.loads((tmp_path / "front.json").read_text())["axis"] == "flops"


def test_devices_side_by_side(call: Callable[..., Any], tiny_folder: Path) -> None:
    command = ("-q", "plan", tiny_folder, "--classes", "bag", "--steps", 2)
    shown = call(*command, "--profiles", "apple-a18,raspberry-pi-5")
    assert shown.code == 0
    assert {"apple-a18", "raspberry-pi-5"} <= set(shown.out.split())
    plans = call(*command, "--profiles", "apple-a18,raspberry-pi-5", "--json").json()["plans"]
    assert plans["apple-a18"]["sustained_image_latency_s"] < plans["raspberry-pi-5"]["sustained_image_latency_s"]
    tight = call(*command, "--profiles", "apple-a18,raspberry-pi-5", "--max-latency", "1ns", "--json")
    assert tight.code == 3
    assert all("error" in plan for plan in json.loads(tight.out)["plans"].values())
    for wrong in (("--profiles", "apple-a18,aple-a17"), ("--profiles", "apple-a18", "--profile", "apple-a18")):
        assert call(*command, *wrong).code == 2


def test_the_smallest_within_a_loss_can_be_asked(call: Callable[..., Any], tiny_folder: Path) -> None:
    values = call("-q", "plan", tiny_folder, *PHONE, "--max-quality-loss", "1%", "--json").json()
    assert values["predicted_loss_increase"] <= 0.01
    assert (values["minimised"], values["limits"]["max_quality_loss"]) == ("weight_bytes", 0.01)
    shown = call("-q", "plan", tiny_folder, *PHONE, "--max-quality-loss", "1%", "--minimize", "latency")
    assert "of the least latency that any plan has" in " ".join(shown.out.split())
    assert call("-q", "plan", tiny_folder, *PHONE, "--minimize", "latency").code == 2


def test_a_refusal_says_what_is_closest_and_what_would_help(call: Callable[..., Any], tiny_folder: Path) -> None:
    refused = call("-q", "plan", tiny_folder, *PHONE, "--max-size", "3KiB", "--json")
    assert refused.code == 3
    values = json.loads(refused.out)
    assert values["misses"]["max_size"]["needed"] == values["closest"]["weight_bytes"] > 3 * 1024
    assert values["relaxations"][0]["change"] in values["error"]
    limit = next(each["change"] for each in values["relaxations"] if "--max-size" in each["change"])
    enough = limit.rpartition(" at least ")[2].replace(" ", "")
    assert call("-q", "plan", tiny_folder, *PHONE, "--max-size", enough).code == 0
    shown = call("-q", "plan", tiny_folder, *PHONE, "--max-size", "3KiB")
    assert (shown.code, shown.out) == (3, "")
    assert {"What it misses", "What would help"} <= {line.split("  ")[0] for line in shown.err.splitlines()}
