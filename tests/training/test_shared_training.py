"""Factors that blocks have in common learn as any other weight does: once a step, resumed bit for bit, and healed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from kind_edge.model.checkpoint import Checkpoint, load_checkpoint
from kind_edge.model.dit import DiT
from kind_edge.model.resize import resized, target_spec
from kind_edge.model.spec import ModelSpec
from kind_edge.training.batches import ClassBatches
from kind_edge.training.beginning import begin_with
from kind_edge.training.config import TrainConfig, read_config
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.healing import learned, rescaled
from kind_edge.training.loop import train_step
from kind_edge.training.state import load_state, save_state, start, start_from
from kind_edge.training.train import train_stages

SPEC = ModelSpec(8, 1, 4, 16, 3, 2, 3, learngene_rank=6, tailor_rank=2, shared_factors=True)
CONFIG = TrainConfig(SPEC, images=12 * 8, batch_size=12, learning_rate=1e-2, warmup_steps=2, nested_share=0.5)
LABELS = torch.arange(36) % 3
DATA = in_memory(torch.arange(36 * 64).reshape(36, 1, 8, 8).to(torch.uint8).numpy(), LABELS, ("a", "b", "c"), "0")


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    batches = ClassBatches(DATA.labels, 3, CONFIG.batch_size, 0)
    whole, half = start(CONFIG), start(CONFIG)
    for state, steps in ((whole, 6), (half, 3)):
        for _ in range(steps):
            train_step(CONFIG, state, DATA, batches)
    (tmp_path / "half").mkdir()
    save_state(tmp_path / "half", CONFIG, half)
    resumed = load_state(tmp_path / "half", CONFIG)
    for _ in range(3):
        train_step(CONFIG, resumed, DATA, batches)
    assert "shared.attn.q.U" in whole.parameters()
    assert whole.step == resumed.step
    for name, parameter in whole.parameters().items():
        assert torch.equal(parameter, resumed.parameters()[name]), name
        assert torch.equal(whole.average[name], resumed.average[name]), name


def test_a_step_moves_factors_once_whatever_the_number_of_blocks() -> None:
    state = start(CONFIG)
    names = [name for name, _ in state.model.named_parameters()]
    assert len(names) == len(set(names))
    assert sum(name.startswith("shared.") for name in names) == 12
    batches = ClassBatches(DATA.labels, 3, CONFIG.batch_size, 0)
    for _ in range(3):  # the gates of adaLN are zero at first, and nothing before them learns
        before = {name: p.detach().clone() for name, p in state.parameters().items()}
        train_step(CONFIG, state, DATA, batches)
    rate = state.optimizer.param_groups[0]["lr"]
    moved = (state.parameters()["shared.mlp.fc1.V"] - before["shared.mlp.fc1.V"]).abs().max()
    assert 0 < moved < 1.5 * rate  # Adam's step is about the rate; one per block would be three


def test_both_stages_leave_a_nested_checkpoint_that_heals(tmp_path: Path) -> None:
    folder = train_stages(CONFIG, DataSplit(DATA, DATA.of_classes(())), tmp_path)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.spec == dataclasses.replace(SPEC, nested=True)
    scaled = rescaled(checkpoint)
    x, timestep = torch.randn(12, 1, 8, 8), torch.rand(12) * 1000
    wanted, got = (each.model()(x, timestep, torch.arange(12) % 4) for each in (checkpoint, scaled))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    lengths = scaled.tensors["shared.attn.k.V"].norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    student = scaled.model()
    assert {name for name in learned(student, whole=False) if name.startswith("shared.")} == {
        name for name in checkpoint.tensors if name.startswith("shared.")
    }


def test_a_model_of_another_depth_trains_on(make_checkpoint: Callable[..., Checkpoint]) -> None:
    shape = {name: getattr(SPEC, name) for name in ("patch_size", "depth", "num_classes", "learngene_rank")}
    source = make_checkpoint(shared_factors=True, **shape)
    deeper = resized(source, target_spec(source.spec, depth=5), "front")
    config = dataclasses.replace(CONFIG, spec=deeper.spec)
    state = start_from(config, begin_with(deeper, config))
    batches = ClassBatches(DATA.labels, 3, config.batch_size, 0)
    losses = [train_step(config, state, DATA, batches) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not torch.equal(state.parameters()["shared.attn.q.U"], source.tensors["shared.attn.q.U"])


def test_a_configuration_may_ask_for_it(tmp_path: Path) -> None:
    text = "[model]\nshared_factors = true\n" + "".join(
        f"{key} = {value}\n"
        for key, value in SPEC.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool)
    )
    (tmp_path / "fine.toml").write_text(text)
    assert read_config(tmp_path / "fine.toml").spec.shared_factors


def test_compiled_blocks_are_the_same(make_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = make_checkpoint(shared_factors=True)
    model: DiT = checkpoint.model()
    x, timestep, classes = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000, torch.tensor([0, 1, 3, 4])
    wanted = model(x, timestep, classes)
    for block in model.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(model(x, timestep, classes), wanted)
