"""Nested ranks: some steps see only the leading part of every learngene, and teach only that part."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kind_edge.errors import InputError
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.spec import MatrixShape, ModelSpec, Ranks
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import in_memory
from kind_edge.training.loop import learngene_share, train_step
from kind_edge.training.state import start

SPEC = ModelSpec(8, 1, 4, 16, 1, 2, 3, learngene_rank=8, tailor_rank=2)
CONFIG = TrainConfig(SPEC, images=12 * 2000, batch_size=12, nested_share=0.6, nested_lowest=0.25, nested_from=0.5)
LABELS = torch.arange(36) % 3
DATA = in_memory(torch.arange(36 * 64).reshape(36, 1, 8, 8).to(torch.uint8).numpy(), LABELS, ("a", "b", "c"), "0")


def test_the_share_of_nested_steps_and_their_sizes() -> None:
    shares = [learngene_share(CONFIG, step) for step in range(CONFIG.steps)]
    assert set(shares[:1000]) == {1.0}
    nested = [share for share in shares[1000:] if share < 1]
    assert len(nested) == pytest.approx(600, abs=60)
    assert min(nested) == pytest.approx(0.25, abs=0.02)
    assert sum(nested) / len(nested) == pytest.approx(0.625, abs=0.03)
    assert shares == [learngene_share(CONFIG, step) for step in range(CONFIG.steps)]
    assert {learngene_share(dataclasses.replace(CONFIG, nested_share=0.0), step) for step in range(2000)} == {1.0}


@pytest.mark.parametrize("images", [1, 6])
def test_a_layer_uses_the_leading_components_alone(images: int) -> None:
    layer = GatedLinear(MatrixShape("w", 5, 7), Ranks(10, 2), 3)
    layer.initialise(torch.Generator().manual_seed(0))
    assert torch.equal(layer.learngene.s, layer.learngene.s.sort(descending=True).values)
    cut = GatedLinear(MatrixShape("w", 5, 7), Ranks(3, 2), 3)
    state = layer.state_dict()
    cut.load_state_dict({n: t[..., :3] if n.startswith("learngene") else t for n, t in state.items()})
    x, labels = torch.randn(3 * images, 4, 7), torch.arange(3).repeat_interleave(images)
    gate = ClassGate.gathered(labels, torch.zeros(3 * images, dtype=torch.bool), 3, learngene_share=0.21)
    y = layer(x, gate)
    torch.testing.assert_close(y, cut(x, ClassGate.of(labels, 3)))
    y.sum().backward()
    assert (layer.learngene.U.grad[:, :3] != 0).all()
    assert (layer.learngene.U.grad[:, 3:] == 0).all()


@pytest.mark.parametrize("teacher", [False, True])
def test_nested_training_is_repeatable_and_learns(teacher: bool) -> None:
    config = dataclasses.replace(CONFIG, images=12 * 40, nested_teacher=teacher, learning_rate=5e-3, warmup_steps=2)
    runs = []
    for _ in range(2):
        state, batches = start(config), ClassBatches(LABELS, 3, 12, config.seed)
        runs.append([train_step(config, state, DATA, batches) for _ in range(40)])
    assert runs[0] == runs[1]
    plain = [loss for step, loss in enumerate(runs[0]) if learngene_share(config, step) == 1]
    assert sum(plain[-5:]) < 0.7 * sum(plain[:5])
    if teacher:  # the distance to the full model, not to the target
        nested = [loss for step, loss in enumerate(runs[0]) if learngene_share(config, step) < 1]
        assert max(nested) < min(plain)


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(InputError, match=r"nested_share: got 1\.5, want 0 to 1"):
        dataclasses.replace(CONFIG, nested_share=1.5)
