"""What the verbs print: people's tables, and with --json one object that a program can rely on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kind_edge.budget.plan import read_plan
from kind_edge.budget.profile import packaged_text
from kind_edge.cli import quality_view
from kind_edge.cli.generate import columns_for
from kind_edge.cli.run import split_verbosity

VERBS = (
    "train",
    "adapt",
    "distill",
    "pack",
    "plan",
    "export",
    "verify",
    "bench",
    "generate",
    "eval",
    "inspect",
    "profiles",
)
PLAN_KEYS = {
    "params", "flops", "weight_bytes", "peak_memory_bytes", "steps", "evaluations_per_step", "image_latency_s",
    "sustained_image_latency_s", "form", "classes", "binding", "unit", "optimality_gap", "matrices",
}  # fmt: skip


def test_help_and_version(call: Callable[..., Any]) -> None:
    answer = call("--help")
    assert answer.code == 0
    assert all(verb in answer.out for verb in VERBS)
    for verb in VERBS:
        assert call(verb, "-h").out.lstrip().startswith(f"Usage: kind-edge {verb}")
    assert call("--version").out.startswith("kind-edge 0.")


def test_verbosity_may_stand_anywhere() -> None:
    assert split_verbosity(["plan", "-v", "x"]) == (["-v"], ["plan", "x"])
    assert split_verbosity(["a", "--quiet", "--", "-v"]) == (["--quiet"], ["a", "--", "-v"])


@pytest.mark.parametrize(
    ("profile", "rank", "row"),
    [
        ("apple-a18", 154, ("70.2", "13.22", "280.8", "3.47")),
        ("kirin-9020", 154, ("70.2", "13.22", "280.8", "3.84")),
        ("snapdragon8g3", None, ("129.7", "43.62", "518.8", "7.86")),
    ],
)
def test_plan_prints_the_papers_table(
    call: Callable[..., Any], profile: str, rank: int | None, row: tuple[str, ...]
) -> None:
    command = ["plan", "--arch", "DiT-B/2", "--num-classes", 150, "--convention", "paper", "--profile", profile]
    answer = call(*command, *([] if rank is None else ["--rank", rank]))
    name = "dense" if rank is None else f"rank {rank}"
    line = next(line for line in answer.out.splitlines() if line.strip().startswith(name))
    assert tuple(line.removeprefix(f"  {name}").split()) == row


def test_plan_of_an_architecture_as_json(call: Callable[..., Any], tmp_path: Path) -> None:
    command = ["plan", "--arch", "DiT-B/2", "--num-classes", 150, "--profile", "apple-a18", "--json"]
    exact = call(*command, "--rank", 154, "-o", tmp_path / "new" / "plan.json").json()
    assert exact.keys() >= PLAN_KEYS
    assert json.loads((tmp_path / "new" / "plan.json").read_text()) == exact
    assert exact["evaluations_per_step"] == 2
    assert exact["flops"] > call(*command, "--rank", 154, "--convention", "paper").json()["flops"]
    unguided = call(*command, "--rank", 154, "--guidance", 1).json()
    assert exact["image_latency_s"] / 2 < unguided["image_latency_s"] < exact["image_latency_s"]  # one decoder each


def test_plan_of_a_checkpoint(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    command = ["plan", checkpoint, "--profile", "apple-a18", "--classes", "bag, sneaker", "--steps", 3]
    answer = call(*command, "--max-size", "90%", "--json", "-o", tmp_path / "plan.json")
    assert answer.err.startswith("planning ...\n")
    values = answer.json()
    assert values.keys() >= PLAN_KEYS
    assert values["classes"] == ["bag", "sneaker"]
    plan = read_plan(tmp_path / "plan.json")
    assert plan.to_dict() == values
    shown = call("-q", *command, "--convention", "paper")
    assert (shown.code, shown.err) == (0, "")
    assert {"bag, sneaker", "learngene", "dense fp32", "one image (s)"} <= set(_phrases(shown.out))
    assert quality_view.predicted_warning(dataclasses.replace(plan, predicted_loss_increase=0.2)) is None
    seen = quality_view.predicted_warning(dataclasses.replace(plan, predicted_loss_increase=0.3))
    assert seen is not None
    assert seen.startswith("predicted loss +30 %")
    refused = call("export", checkpoint, "--plan", tmp_path / "plan.json", "--classes", "bag")
    assert (refused.code, refused.out) == (2, "")
    assert "--classes" in refused.err
    other = call("export", checkpoint, "--plan", tmp_path / "plan.json", "--profile", "apple-m4")
    assert (other.code, other.out) == (2, "")


def test_what_plan_tells_to_try_next_can_be_pasted(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    """Spaces in names, and a device that only a file knows."""
    board, wanted = tmp_path / "my board.toml", tmp_path / "my plan.json"
    board.write_text(packaged_text("apple-a18"), encoding="utf-8")
    formats = ["--formats", "coreml", "--coreml-weights", "int8", "--coreml-function", "all=bag,coat"]
    shown = call("plan", checkpoint, "--profile", board, "--steps", 2, "--form", "switch", *formats, "-o", wanted)
    command = shlex.split(shown.out.splitlines()[-1].split("next")[1])
    asked = [str(checkpoint), "--profile", str(board), *formats]
    assert command == ["kind-edge", "export", "--plan", str(wanted), *asked]


def _phrases(text: str) -> list[str]:
    """Every run of words that single spaces join, and every word of them."""
    parts = [part.strip() for line in text.splitlines() for part in line.split("  ") if part.strip()]
    return [*parts, *itertools.chain.from_iterable(part.replace(",", " ").split() for part in parts)]


def test_too_small_a_limit_exits_3(call: Callable[..., Any], checkpoint: Path) -> None:
    answer = call("-q", "plan", checkpoint, "--profile", "apple-a18", "--steps", 2, "--max-size", "1kB")
    assert (answer.code, answer.out) == (3, "")
    assert "--max-size" in answer.err


def test_profiles(call: Callable[..., Any], tmp_path: Path) -> None:
    names = [profile["name"] for profile in call("profiles", "list", "--json").json()["profiles"]]
    assert {"apple-a18", "snapdragon8g3", "host"} <= set(names)
    listed = call("profiles", "list")
    assert all(name in listed.out for name in names)
    figures = call("profiles", "show", "apple-a18", "--json").json()["figures"]
    shown = call("profiles", "show", "apple-a18")
    assert all(name in shown.out for name in figures)
    assert all({"value", "mark", "source"} == figure.keys() for figure in figures.values())
    mine = tmp_path / "mine.toml"
    mine.write_text("title = 3")
    assert call("profiles", "show", mine).code == 4


def test_inspect_a_checkpoint(call: Callable[..., Any], checkpoint: Path) -> None:
    values = call("inspect", checkpoint, "--json").json()
    assert values["kind"] == "checkpoint"
    assert values["ranks"] == {"learngene": [12, 12], "tailor": [2, 2]}
    assert values["provenance"] == {"seed": 0}
    weights = {name: size for name, size in values["parts"].items() if name not in ("sensitivity", "calibration")}
    assert sum(weights.values()) == 4 * values["parameters"]  # float32
    shown = call("inspect", checkpoint).out
    assert "learngene 12, tailor 2" in shown
    assert "(paper)" in shown
    assert "ankle-boot" in shown


def test_inspect_a_bundle_and_a_model(call: Callable[..., Any], bundle: Path) -> None:
    values = call("inspect", bundle, "--json").json()
    assert values["classes"] == ["sneaker", "bag"]
    assert list(values["graphs"]) == ["onnx/denoiser.onnx", "onnx/denoiser.int8.onnx", "onnx/sampler.onnx"]
    model = call("inspect", bundle / "onnx/denoiser.int8.onnx", "--json").json()
    assert model["graphs"]["denoiser.int8.onnx"]["operators"]["DynamicQuantizeLinear"] == 1
    shown = call("inspect", bundle / "onnx/denoiser.onnx").out
    assert "float [batch, 1, 6, 5]" in shown  # not taken for markup


def test_inspect_the_shipped_model_on_one_screen(call: Callable[..., Any]) -> None:
    lines = call("inspect").out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    words = " ".join(" ".join(lines).split())
    for wanted in ("licence Apache-2.0", "Fashion-MNIST (licence MIT", "then kind-edge distill", "a class", "(exact)"):
        assert wanted in words


def test_generate_draws_a_row_per_class(call: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "both.png"
    answer = call("-q", "generate", bundle, "--class", "sneaker,bag", "-n", 3, "-o", path)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"{path}: 6 images of sneaker, bag; seed 0, fp32")
    again = tmp_path / "again.png"
    call("-q", "generate", bundle, "--class", "sneaker,bag", "-n", 3, "-o", again)
    assert path.read_bytes() == again.read_bytes()
    with Image.open(path) as image:
        assert image.width > image.height  # three columns, two rows


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(16, 1, 4), (5, 1, 3), (1, 1, 1), (16, 2, 16), (20, 2, 10), (17, 3, 17)]
)
def test_columns(n: int, rows: int, columns: int) -> None:
    assert columns_for(n, rows) == columns


def test_bench_reports_every_model_and_an_image(call: Callable[..., Any], bundle: Path) -> None:
    values = call("-q", "bench", bundle / "onnx/denoiser.onnx", "--runs", 2, "--threads", 1, "--json").json()
    (report,) = values["measurements"]
    assert (report["name"], report["runs"], report["conditions"]["threads"]) == ("denoiser.onnx", 2, 1)
    assert call("-q", "bench", bundle, "--provider", "cdua").code == 2


@pytest.mark.slow
def test_the_whole_way(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    command = ["export", checkpoint, "--profile", "apple-a18", "--classes", "bag,sneaker", "--steps", 2, "-o", out]
    exported = call(*command, "--json")
    values = exported.json()
    assert "exporting ..." in exported.err
    assert values["bundle"] == str(out)
    assert {"files", "parity", "latency_ms", "plan"} <= values.keys()
    assert call("-q", "verify", out, "--json").json()["parity"] == values["parity"]
    assert call("-q", "verify", out, "--checkpoint", checkpoint).code == 0
    benched = call("bench", out, "--runs", 2)
    assert "one image" in benched.out
    inspected = call("inspect", out, "--json").json()
    assert inspected["flops"]["exact"] == values["plan"]["flops"] > inspected["flops"]["paper"] > 0
    graph = inspected["graphs"][inspected["shape"]["default_model"]]
    assert inspected["class_bytes"] * 2 == graph["part_bytes"]["tailors"]
    assert call("generate", out, "--class", "bag", "-n", 2, "-o", tmp_path / "bag.png").code == 0
    judged = call("-q", "eval", out, "--images", 4, "--json").json()
    assert (judged["kind"], judged["images"], judged["steps"]) == ("bundle", 4, 2)
    assert judged["checkpoint_sha256"] == values["plan"]["checkpoint_sha256"]
    replayed = call(
        "export", checkpoint, "--plan", out / "plan.json", "--profile", "apple-a18", "-o", tmp_path / "again"
    )
    assert replayed.code == 0, replayed.err
    assert f"kind-edge generate {tmp_path / 'again'} --class bag" in replayed.out
    names = ("onnx/denoiser.onnx", "onnx/denoiser.int8.onnx", "plan.json")
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
