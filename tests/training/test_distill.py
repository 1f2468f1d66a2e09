"""Distillation: the student starts as its teacher, follows it guided, and stays a checkpoint like any other."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kind_edge.deploy.pipeline import plan
from kind_edge.errors import UsageError
from kind_edge.model.calibration import load_calibration
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, checkpoint_hash, load_checkpoint, save_checkpoint
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.sampling import denoiser, guided, sample
from kind_edge.model.spec import ModelSpec
from kind_edge.training.distill import Request, distill, distill_config, distill_to, student
from kind_edge.training.loop import Progress
from kind_edge.training.losses import Examples
from kind_edge.training.state import STATE
from kind_edge.training.walks import STEP_COUNTS, TEACHER_STEPS, DistillationLoss, step_count

SPEC = ModelSpec(8, 1, 4, 16, 1, 2, 3, learngene_rank=8, tailor_rank=2, nested=True)
GUIDANCE = 2.0
LABELS = torch.arange(3).repeat_interleave(4)
NOISE = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def lively(spec: ModelSpec) -> dict[str, Tensor]:
    """Weights whose prediction depends on everything: a fresh model predicts zero."""
    model, stream = initialise(DiT(spec), 0), torch.Generator().manual_seed(5)
    return {n: t + 0.1 * torch.randn(t.shape, generator=stream) for n, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("distill") / "teacher"
    advice = {"recommended": {"steps": 20, "guidance": GUIDANCE, "sampler": "euler"}}
    save_checkpoint(folder, Checkpoint(SPEC, ("a", "b", "c"), lively(SPEC), advice))
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def distilled(teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    assert teacher.path is not None
    folder = tmp_path_factory.mktemp("distill") / "student"
    request = Request(teacher, GUIDANCE)
    config = dataclasses.replace(distill_config(request, 120 * 12), batch_size=12, learning_rate=1e-2)
    distill_to(request, config, folder)
    return load_checkpoint(folder)


def test_a_student_starts_as_its_teacher_whatever_the_span(teacher: Checkpoint) -> None:
    model = student(teacher, distill_config(Request(teacher, GUIDANCE)))
    timestep, classes = torch.rand(12) * 1000, torch.cat([LABELS[:8], torch.full((4,), 3)])
    with torch.no_grad():
        wanted = teacher.model()(NOISE, timestep, classes)
        for span in (125.0, 1000.0):
            torch.testing.assert_close(model(NOISE, timestep, classes, torch.full((12,), span)), wanted)


@pytest.mark.parametrize("count", STEP_COUNTS)
def test_the_target_is_the_guided_teachers_own_way_and_unguided_where_the_gate_is_closed(
    teacher: Checkpoint, count: int
) -> None:
    model, closed = teacher.model(), torch.arange(12) % 4 == 0
    loss = DistillationLoss(model, GUIDANCE, 0)
    examples = Examples(torch.zeros_like(NOISE), LABELS, NOISE, torch.zeros(12), closed)
    x = NOISE
    for number in range(count):
        time = torch.full((12,), 1 - number / count)
        x = x - loss.walked(x, time, count, examples) / count
    led = sample(guided(model, GUIDANCE, 3), NOISE, LABELS, "flow", TEACHER_STEPS)
    free = sample(model, NOISE, torch.full((12,), 3), "flow", TEACHER_STEPS)
    torch.testing.assert_close(x, torch.where(closed.view(-1, 1, 1, 1), free, led), rtol=1e-4, atol=1e-5)


def test_the_student_comes_closer_to_its_guided_teacher_at_every_step_count(
    teacher: Checkpoint, distilled: Checkpoint
) -> None:
    wanted = sample(guided(teacher.model(), GUIDANCE, 3), NOISE, LABELS, "flow", TEACHER_STEPS)
    for count in STEP_COUNTS:
        got = sample(denoiser(distilled.model(), count, GUIDANCE), NOISE, LABELS, "flow", count)
        unguided = sample(teacher.model(), NOISE, LABELS, "flow", count)
        assert (got - wanted).square().mean() < 0.6 * (unguided - wanted).square().mean(), count


def test_the_result_is_an_ordinary_checkpoint_that_says_what_it_is(teacher: Checkpoint, distilled: Checkpoint) -> None:
    assert teacher.path is not None
    assert distilled.path is not None
    assert distilled.spec == dataclasses.replace(SPEC, step_counts=STEP_COUNTS, inside_guidance=GUIDANCE)
    facts = distilled.provenance["distilled"]
    assert facts["teacher_sha256"] == checkpoint_hash(teacher.path)
    assert (facts["teacher_steps"], facts["teacher_guidance"]) == (20, GUIDANCE)
    assert distilled.provenance["recommended"] == {"steps": 4, "guidance": GUIDANCE, "sampler": "euler"}
    calibration = load_calibration(distilled.path / CALIBRATION, distilled.spec)
    assert set(calibration.pooled) == {m.name for m in SPEC.matrices()}
    assert calibration.null == {}
    planned = plan(distilled.path, profile="apple-a18")
    assert (planned.steps, planned.evaluations_per_step, planned.inside_guidance) == (4, 1, GUIDANCE)
    assert 5 < planned.teacher_time["image_s"] / planned.time["image_s"] < 10.1  # a guided step is one call
    with pytest.raises(UsageError, match="this model is distilled for 1, 2, 4, 8 steps"):
        denoiser(distilled.model(), 3, GUIDANCE)
    with pytest.raises(UsageError, match="this model has guidance 2 inside, and no branch to guide with"):
        denoiser(distilled.model(), 4, 1.5)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(teacher: Checkpoint, tmp_path: Path) -> None:
    request = Request(teacher, GUIDANCE)
    config = dataclasses.replace(distill_config(request, 6 * 12), batch_size=12)

    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    distill_to(request, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distill_to(request, config, tmp_path / "parts", on_progress=interrupt)
    assert (tmp_path / "parts" / STATE).exists()
    with pytest.raises(UsageError, match=r"guidance was 2\.0, now 3\.0"):
        distill_to(Request(teacher, 3.0), config, tmp_path / "parts", resume=True)
    distill_to(request, config, tmp_path / "parts", resume=True)
    wanted, got = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for name, tensor in wanted.tensors.items():
        assert torch.equal(tensor, got.tensors[name]), name


def test_every_step_count_gets_its_share() -> None:
    counts = [step_count(0, step) for step in range(2000)]
    assert {n: counts.count(n) / 2000 for n in STEP_COUNTS} == pytest.approx(
        {1: 0.1, 2: 0.3, 4: 0.45, 8: 0.15}, abs=0.03
    )


def test_what_cannot_be_distilled_is_refused(teacher: Checkpoint, distilled: Checkpoint, tmp_path: Path) -> None:
    assert distilled.path is not None
    with pytest.raises(UsageError, match="is distilled already, for 1, 2, 4, 8 steps; give its teacher"):
        distill(distilled.path, tmp_path / "again")
    with pytest.raises(UsageError, match="has the epsilon objective; only flow models"):
        Request(dataclasses.replace(teacher, spec=dataclasses.replace(SPEC, objective="epsilon")), 2.0)
    with pytest.raises(UsageError, match=r"--guidance: got 0\.5, want at least 1"):
        Request(teacher, 0.5)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("labels", [False, True])
def test_a_later_class_joins_a_distilled_model_that_stays_as_it_is(labels: bool, tmp_path: Path) -> None:
    """What all classes share and the old ones keep their bytes; the new tailor begins as the teacher's, and learns."""
    spec = dataclasses.replace(SPEC, num_classes=2, label_embedding=labels)
    few = dataclasses.replace(spec, step_counts=STEP_COUNTS, inside_guidance=GUIDANCE)
    save_checkpoint(tmp_path / "few", Checkpoint(few, ("a", "b"), lively(few)), torch.float16)
    save_checkpoint(tmp_path / "more", Checkpoint(dataclasses.replace(spec, num_classes=3), ("a", "b", "c"), lively(
        dataclasses.replace(spec, num_classes=3))), torch.float16)  # fmt: skip
    made = load_checkpoint(
        distill(tmp_path / "more", tmp_path / "out", onto=tmp_path / "few", images=120, device="cpu")
    )
    old, teacher = load_checkpoint(tmp_path / "few"), load_checkpoint(tmp_path / "more")
    assert (made.class_names, made.spec) == (("a", "b", "c"), dataclasses.replace(few, num_classes=3))
    for name, tensor in old.tensors.items():
        new = made.tensors[name]
        if ".tailors." not in name and name != "y_embed.weight":
            assert torch.equal(new, tensor), name
            continue
        assert torch.equal(new[:2], tensor[:2]), name
        assert torch.allclose(new[2].float(), teacher.tensors[name][2].float(), atol=0.02), name
    learned = [
        n for n in old.tensors if ".tailors." in n and not torch.equal(made.tensors[n][2], teacher.tensors[n][2])
    ]
    assert learned
    if labels:
        assert torch.equal(made.tensors["y_embed.weight"][-1], old.tensors["y_embed.weight"][-1])
    assert made.provenance["distilled"]["classes"] == ["c"]
    assert load_calibration(tmp_path / "out" / CALIBRATION, made.spec).pooled


def test_what_cannot_join_is_refused(teacher: Checkpoint, distilled: Checkpoint, tmp_path: Path) -> None:
    for onto, message in (
        (teacher.path, "not a distilled model; leave --onto out"),
        (
            distilled.path,
            r"must have its classes \(a, b, c\) and new ones after them; it has a, b, c: adapt the teacher",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            distill(Path(str(teacher.path)), tmp_path / "out", onto=onto, device="cpu")
    assert not (tmp_path / "out").exists()
