"""Other depths and widths as choices of a plan: measured once, taken where they win, and carried out with healing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import kind_edge.training.healing as healing
from kind_edge.budget.plan import read_plan
from kind_edge.budget.sizes import Size, SizeTable, full_rank_losses, read_sizes
from kind_edge.cli.plan import _paper_row
from kind_edge.deploy import pipeline, resizing
from kind_edge.deploy.cut import healing_key, make_cut
from kind_edge.deploy.inspection import inspect
from kind_edge.deploy.request import make_source, open_model
from kind_edge.deploy.resizing import method_for, offered, size_spec, sized_sources
from kind_edge.deploy.sizes_file import SIZES, find_sizes, healing_file, keep_sizes
from kind_edge.errors import InputError, NoPlanError, UsageError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.spec import FORMS, ModelSpec

DEVICE = "raspberry-pi-5"
HEAL_S = 0.2
ASKED: dict[str, Any] = {"profile": DEVICE, "classes": ["shirt", "bag"], "precision": "fp32"}
SMALL = {**ASKED, "max_flops": "40%"}
LITTLE = 1e-4
"""Of loss: less than cutting ranks to SMALL costs."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(healing, "POOL", 12)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def names(spec: ModelSpec) -> list[str]:
    return [shape.name for shape in spec.matrices()]


def table_of(folder: Path, increase: float) -> SizeTable:
    """What measuring would have left: every offered size loses so much, and nothing by int8."""
    model = open_model(folder)
    sizes = tuple(
        Size(each.depth, each.width, method_for(each), HEAL_S, increase, dict.fromkeys(names(each), 0.0), 9, "a CPU")
        for each in offered(model.checkpoint.spec)
    )
    return SizeTable(model.sha256, sizes)


@pytest.fixture
def measured(distilled_folder: Path, tmp_path: Path) -> Path:
    """The distilled model with sizes that lose next to nothing."""
    folder = tmp_path / "model"
    shutil.copytree(distilled_folder, folder)
    keep_sizes(table_of(folder, LITTLE), folder)
    return folder


def test_the_sizes_offered_are_smaller_and_whole(measured: Path) -> None:
    spec = open_model(measured).checkpoint.spec
    found = list(offered(spec))
    assert [(each.depth, each.width) for each in found] == [(1, 16), (2, 8)]
    assert all(each.head_width == spec.head_width for each in found)
    assert size_spec(spec, {}) is spec


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_loses_what_was_measured_and_nothing_else_is_known(form: Any, measured: Path) -> None:
    spec = next(offered(open_model(measured).checkpoint.spec))
    size = dataclasses.replace(table_of(measured, 0.03).sizes[0], int8=dict.fromkeys(names(spec), 0.001))
    losses = full_rank_losses(spec, size, form, 2)
    assert sum(own.shared[-1] + own.tailor[-1] for own in losses.matrices.values()) == pytest.approx(0.03)
    assert all(not any(own.shared[:-1] < 1e9) and not any(own.tailor[:-1] < 1e9) for own in losses.matrices.values())


def test_the_best_of_all_sizes_wins_under_the_limits_of_the_whole_one(measured: Path) -> None:
    whole = pipeline.plan(measured, **SMALL)
    small = pipeline.plan(measured, **SMALL, allow_resize="0.2s")
    assert set(small.resize) == {"depth", "width", "method", "heal_s"}
    assert small.flops <= 0.4 * small.dense["flops"]
    assert small.dense["flops"] == whole.dense["flops"]  # the percentage is of the same model
    own, less = (_paper_row(str(measured), each, "snapdragon8g3") for each in (whole, small))
    assert less.params < own.params  # --convention paper counts the size that is taken
    assert small.predicted_loss_increase == pytest.approx(LITTLE)
    assert (whole.predicted_loss_increase or 0) > LITTLE
    assert small.steps == whole.steps
    assert not pipeline.plan(measured, **ASKED, allow_resize="0.2s").resize  # nothing is limited: nothing is given up
    keep_sizes(table_of(measured, 1e3), measured)
    assert pipeline.plan(measured, **SMALL, allow_resize="0.2s") == whole
    with pytest.raises(NoPlanError):
        pipeline.plan(measured, **{**ASKED, "max_flops": "0.1%"}, allow_resize="0.2s")


def test_a_size_is_measured_once(distilled_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(distilled_folder, folder)
    model = open_model(folder)
    source, ticks = make_source(model), iter(range(10**6))
    found = sized_sources(model, source, 3.0, clock=lambda: float(next(ticks)))
    table = read_sizes(folder / SIZES)
    assert [(size.depth, size.width, size.heal_s, size.steps > 0) for size in table.sizes] == [
        (1, 16, 3.0, True), (2, 8, 3.0, True),
    ]  # fmt: skip
    assert all(0 < size.increase < 10 and min(size.int8.values()) >= 0 for size in table.sizes)
    assert not healing_file(model.sha256, found[0].spec).exists()
    monkeypatch.setattr(resizing, "resized", None)
    assert [each.resize for each in sized_sources(model, source, 3.0)] == [each.resize for each in found]
    (folder / SIZES).write_text(json.dumps(table.to_json()))
    with pytest.raises(InputError, match="remove it"):
        find_sizes(model)
    (folder / SIZES).write_text(dataclasses.replace(table, checkpoint_sha256="0" * 64).to_json())
    assert find_sizes(model).sizes == ()  # of other weights


def test_a_healing_of_another_length_does_not_go_on(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def stop(lesson: object, seconds: float, state: Path, key: str, *rest: object) -> None:
        keys.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(healing, "heal", stop)
    model = open_model(measured)
    for seconds in (3.0, 5.0, 3.0):
        with pytest.raises(KeyboardInterrupt):
            resizing.measured_size(model, next(offered(model.checkpoint.spec)), seconds)
    assert keys[0] == keys[2] != keys[1]


def test_a_resized_plan_wants_its_healing_and_its_table(measured: Path, tmp_path: Path) -> None:
    plan = pipeline.plan(measured, **SMALL, allow_resize="0.2s")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    for heal in (None, "0.1s"):
        with pytest.raises(UsageError, match=r"--heal: the plan takes the model at depth .*: add --heal"):
            pipeline.export(measured, plan=again, output=tmp_path / "b", heal=heal)
    other = dataclasses.replace(again, resize={**again.resize, "method": "bot"})
    assert healing_key(other) != healing_key(again)
    with pytest.raises(UsageError, match=r"sizes\.json"):
        pipeline.export(measured, plan=other, output=tmp_path / "b", heal="1s")
    name, matrix = next(iter(again.matrices.items()))
    lower = dataclasses.replace(matrix, learngene_rank=1, storage="factored")
    cut = dataclasses.replace(again, matrices={**again.matrices, name: lower})
    with pytest.raises(InputError, match="ranks that were not measured"):
        pipeline.export(measured, plan=cut, output=tmp_path / "b", heal="1s")
    for wrong in (
        {"depth": 1},
        {**plan.resize, "depth": "x"},
        {**plan.resize, "width": 8.5},
        {**plan.resize, "heal_s": ""},
    ):
        (tmp_path / "plan.json").write_text(json.dumps({**plan.to_dict(), "resize": wrong}))
        with pytest.raises(InputError, match="resize: got"):
            read_plan(tmp_path / "plan.json")
    table = find_sizes(open_model(measured))
    keep_sizes(dataclasses.replace(table, sizes=tuple(dataclasses.replace(s, int8={}) for s in table.sizes)), measured)
    with pytest.raises(InputError, match=r"lacks blocks\.0"):
        pipeline.plan(measured, **SMALL, allow_resize="0.2s")


@pytest.mark.parametrize("classes", [["shirt"], ["shirt", "bag"]])
def test_what_is_cut_is_of_that_size(classes: list[str], measured: Path) -> None:
    model = open_model(measured)
    plan = pipeline.plan(measured, **{**SMALL, "classes": classes}, allow_resize="0.2s")
    cut = make_cut(model, plan)
    assert (cut.truncated.spec.depth, cut.truncated.spec.width) == (plan.resize["depth"], plan.resize["width"])
    assert cut.truncated.class_names == tuple(classes)


@pytest.mark.slow
def test_it_is_exported_healed_and_verified(measured: Path, tmp_path: Path) -> None:
    plan = pipeline.plan(measured, **SMALL, allow_resize="0.2s")
    bundle = pipeline.export(measured, plan=plan, output=tmp_path / "b", heal="1s")
    assert bundle.healing is not None
    assert bundle.healing.kept
    healed = load_checkpoint(tmp_path / "b" / "healed")
    assert (healed.spec.depth, healed.spec.width) == (plan.resize["depth"], plan.resize["width"])
    assert (bundle.parity["onnx/denoiser.onnx"] or 0) >= 100
    size = f"depth {plan.resize['depth']}, width {plan.resize['width']}"
    assert size in (tmp_path / "b" / "report.html").read_text()
    assert inspect(tmp_path / "b").shape["width"] == plan.resize["width"]
    assert pipeline.verify(tmp_path / "b", checkpoint=measured).passed
