"""Healing: a cut model comes nearer to the full one, whatever its form; stopped it goes on, and only for its cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kind_edge.training.healing as healing
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import Checkpoint, check_tensors
from kind_edge.model.sampling import denoiser, sample
from kind_edge.model.spec import Ranks
from kind_edge.training.healing import Both, Healed, HealingProgress, Lesson, Pool, Rows, heal, rescaled, walk_deviation

MakeCheckpoint = Callable[..., Checkpoint]
KINDS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "distilled": {"step_counts": (1, 2, 4), "inside_guidance": 1.75, "nested": True},
    "label": {"label_embedding": True, "learned_sigma": True, "objective": "epsilon"},
}
STEPS = 4


def euler_rows() -> Rows:
    """Four Euler steps from noise to an image."""
    zero, one = torch.zeros(STEPS), torch.ones(STEPS)
    return Rows(1000 * (1 - torch.arange(STEPS) / STEPS), zero, one, one, torch.full((STEPS,), -1 / STEPS), zero)


def lesson_of(full: Checkpoint, form: str) -> Lesson:
    """Two classes of four at half their ranks, one branch gone; folded forms have all in their learngene."""
    spec = full.spec.without_branches(["blocks.1.attn"])
    kept, tensors = (2, 0) if form != "single" else (2,), dict(full.float_tensors())
    tensors["blocks.1.adaln.weight"] = tensors["blocks.1.adaln.weight"][3 * spec.width :]
    tensors["blocks.1.adaln.bias"] = tensors["blocks.1.adaln.bias"][3 * spec.width :]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.attn")}
    ranks = {}
    for shape in spec.matrices():
        parts = {
            part: (tensors[f"{shape.name}.learngene.{part}"], tensors[f"{shape.name}.tailors.{part}"]) for part in "UsV"
        }
        for part, (own, tails) in parts.items():
            tails = tails[list(kept)]
            if form != "switch":
                own, tails = torch.cat([own, *tails.unbind()], -1), tails[..., :0]
            tensors[f"{shape.name}.learngene.{part}"], tensors[f"{shape.name}.tailors.{part}"] = (
                own[..., :3],
                tails[..., :1],
            )
        ranks[shape.name] = Ranks(3, 1 if form == "switch" else 0)
    if spec.label_embedding:
        labels = tensors["y_embed.weight"]
        last = labels[-1:] if form == "switch" else labels[list(kept)].mean(0, keepdim=True)
        tensors["y_embed.weight"] = torch.cat([labels[list(kept)], last])
    cut_spec = dataclasses.replace(spec, num_classes=len(kept), matrix_ranks=ranks)
    check_tensors(cut_spec, {name: tuple(t.shape) for name, t in tensors.items()}, form)
    cut = Checkpoint(cut_spec, tuple(full.class_names[c] for c in kept), tensors)
    null = form == "switch" and not spec.distilled
    return Lesson(full, cut, kept, form, euler_rows(), 1.5 if null else 1.0, null)


class Ticks:
    """A clock that stands still but for a second per step."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def healed_for(lesson: Lesson, steps: float, state: Path, key: str = "", **more: Any) -> Healed:
    return heal(lesson, steps, state, key, clock=Ticks(), **more)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "POOL", 12)
    monkeypatch.setattr(healing, "JUDGED_WALKS", 24)
    monkeypatch.setattr(healing, "RATE", 3e-3)


@pytest.mark.parametrize(
    ("kind", "form"), [("ordinary", "switch"), ("distilled", "switch"), ("label", "single"), ("ordinary", "union")]
)
def test_healing_brings_a_cut_model_nearer(
    kind: str, form: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    lesson = lesson_of(make_checkpoint(**KINDS[kind]), form)
    before = {name: tensor.clone() for name, tensor in lesson.cut.tensors.items()}
    done = healed_for(lesson, 40, tmp_path / "state")
    assert done.steps == 40
    assert walk_deviation(lesson, done.checkpoint) < 0.8 * walk_deviation(lesson, lesson.cut)
    assert done.checkpoint.spec == lesson.cut.spec
    assert all(torch.equal(tensor, before[name]) for name, tensor in lesson.cut.tensors.items())  # it is not changed
    for name, tensor in done.checkpoint.tensors.items():
        matrix = name.removesuffix(".bias").split(".learngene")[0].split(".tailors")[0]
        learned = matrix in {shape.name for shape in lesson.cut.spec.matrices()}
        assert learned or torch.equal(tensor, before[name]), name


def test_rescaling_does_not_change_the_function(make_checkpoint: MakeCheckpoint) -> None:
    lesson = lesson_of(make_checkpoint(), "switch")
    pool = Pool.of(lesson, 6, 0)
    wanted, got = (
        healing.predict(lesson, each.model(), pool, full=False) for each in (lesson.cut, rescaled(lesson.cut))
    )
    torch.testing.assert_close(got.guided, wanted.guided)
    lengths = rescaled(lesson.cut).tensors["blocks.0.attn.q.tailors.V"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("kind", ["ordinary", "distilled"])
def test_a_pool_draws_the_images_of_the_sampler(kind: str, make_checkpoint: MakeCheckpoint) -> None:
    """From the same noise it comes through the same states, guidance included."""
    lesson = lesson_of(make_checkpoint(**KINDS[kind]), "switch")
    model, pool = lesson.full.model(), Pool.of(lesson, 6, 3)
    denoise = denoiser(model, STEPS, 1.5 if kind == "ordinary" else 1.75)
    with torch.no_grad():
        wanted = sample(denoise, pool.x.clone(), lesson.labels(pool.kept_index)[1], "flow", STEPS)
        for _ in range(STEPS - 1):
            pool.advance(lesson.rows, healing.predict(lesson, model, pool, full=True).guided)
        last = healing.predict(lesson, model, pool, full=True).guided
    torch.testing.assert_close(pool.x - last / STEPS, wanted, atol=1e-5, rtol=1e-4)
    pool.advance(lesson.rows, last)
    assert pool.row.tolist() == [0] * 6
    assert not torch.allclose(pool.x, wanted, atol=0.1)  # other noise


def test_a_pool_stands_at_all_rows(make_checkpoint: MakeCheckpoint) -> None:
    lesson = lesson_of(make_checkpoint(), "switch")
    pool = healing._pool(lesson, lesson.full.model(), 0)
    assert pool.row.bincount().tolist() == [healing.POOL // STEPS] * STEPS
    assert set(pool.kept_index.tolist()) == {0, 1}


def test_every_class_has_its_turn_however_small_the_pool(make_checkpoint: MakeCheckpoint) -> None:
    lesson = dataclasses.replace(lesson_of(make_checkpoint(), "single"), kept=tuple(range(4)) * 5)
    pool, seen = Pool.of(lesson, 3, 0), set()
    for _ in range(60 * STEPS):
        seen |= set(pool.kept_index.tolist())
        pool.advance(lesson.rows, torch.zeros_like(pool.x))
    assert seen == set(range(20))


def test_a_stopped_run_goes_on_and_ends_like_one_that_was_not(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson, seen = lesson_of(make_checkpoint(), "switch"), []

    def stop_at(step: int) -> Callable[[HealingProgress], None]:
        def report(now: HealingProgress) -> None:
            seen.append(now.step)
            if now.step == step:
                raise KeyboardInterrupt  # as a second Ctrl-C, or a kill between two saves

        return report

    monkeypatch.setattr(healing, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(healing, "SAVING_SHARE", math.inf)
    with pytest.raises(KeyboardInterrupt):
        healed_for(lesson, 30, tmp_path / "state", on_progress=stop_at(12))
    done = healed_for(lesson, 30, tmp_path / "state", on_progress=stop_at(100))
    assert seen == [*range(1, 13), *range(12, 31)]  # the step that was under way is done again
    whole = healed_for(lesson, 30, tmp_path / "other")
    ends = [walk_deviation(lesson, each.checkpoint) for each in (done, whole)]
    assert ends[0] == pytest.approx(ends[1], rel=0.1)
    again = healed_for(lesson, 30, tmp_path / "state")  # what is over is over
    assert again.steps == 30
    assert all(torch.equal(t, done.checkpoint.tensors[name]) for name, t in again.checkpoint.tensors.items())
    longer = healed_for(lesson, 40, tmp_path / "state")
    assert longer.steps == 40


def test_an_ordinary_stop_request_saves_first(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    import os
    import signal

    lesson = lesson_of(make_checkpoint(), "single")

    def interrupt(now: HealingProgress) -> None:
        if now.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        healed_for(lesson, 20, tmp_path / "state", on_progress=interrupt)
    assert healed_for(lesson, 5, tmp_path / "state").steps == 5


def test_a_state_of_another_cut_begins_anew_and_a_damaged_one_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    lesson, path = lesson_of(make_checkpoint(), "switch"), tmp_path / "state"
    healed_for(lesson, 3, path, key="one")
    assert healed_for(lesson, 2, path, key="two").steps == 2
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:8] + b"}" + content[9:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="remove it to begin anew"):
            healed_for(lesson, 2, path, key="two")


def test_numbers_that_are_none_end_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson, predict = lesson_of(make_checkpoint(), "switch"), healing.predict

    def broken(*arguments: Any, full: bool) -> Both:
        both = predict(*arguments, full=full)
        return both if full else Both(both.led * math.nan, both.free, both.guided)

    monkeypatch.setattr(healing, "predict", broken)
    done = healed_for(lesson, 10, tmp_path / "state")
    assert done.steps == 0
    assert all(bool(tensor.isfinite().all()) for tensor in done.checkpoint.tensors.values())
