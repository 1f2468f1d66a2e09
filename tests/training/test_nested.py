"""Nested ranks: a second stage teaches every cut of the learngene, and the whole loses nothing for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kind_edge.errors import InputError
from kind_edge.model.calibration import load_calibration
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint, load_checkpoint
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.spec import MatrixShape, ModelSpec, Ranks
from kind_edge.model.truncation import as_they_lie, fold_matrix, reordered
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.loop import run
from kind_edge.training.losses import NESTED_LOWEST, Examples, NestedLoss, nested_share
from kind_edge.training.nested import calibrated, nested_config, start_nested
from kind_edge.training.state import TrainState, averaged_tensors, start
from kind_edge.training.train import train_stages

SPEC = ModelSpec(8, 1, 4, 16, 2, 2, 3, learngene_rank=8, tailor_rank=2)
CONFIG = TrainConfig(SPEC, images=12 * 60, batch_size=12, learning_rate=1e-2, warmup_steps=2, nested_share=1.0)
NESTED = nested_config(CONFIG)
LABELS = torch.arange(36) % 3
DATA = in_memory(torch.arange(36 * 64).reshape(36, 1, 8, 8).to(torch.uint8).numpy(), LABELS, ("a", "b", "c"), "0")


def trained(config: TrainConfig, state: TrainState, nested: bool) -> Checkpoint:
    loss = NestedLoss("flow", config.seed) if nested else None
    run(config, state, DATA, lambda _: None, lambda _: None, loss)
    return Checkpoint(config.spec, DATA.class_names, averaged_tensors(config, state), {})


@pytest.fixture(scope="module")
def first() -> Checkpoint:
    """A trained model whose second stage is to come."""
    return trained(CONFIG, start(CONFIG), nested=False)


def cut(checkpoint: Checkpoint, rank: int) -> Checkpoint:
    """Only the leading components of every learngene."""
    tensors = {n: t[..., :rank] if ".learngene." in n else t for n, t in checkpoint.tensors.items()}
    return Checkpoint(dataclasses.replace(checkpoint.spec, learngene_rank=rank), checkpoint.class_names, tensors, {})


@torch.no_grad()
def distance(one: Checkpoint, other: Checkpoint) -> float:
    stream = torch.Generator().manual_seed(1)
    x, timestep = torch.randn(36, 1, 8, 8, generator=stream), torch.rand(36, generator=stream) * 1000
    return float((one.model()(x, timestep, LABELS) - other.model()(x, timestep, LABELS)).square().mean())


def test_reordering_changes_the_order_alone(first: Checkpoint) -> None:
    ordered = reordered(first, calibrated(first, DATA))
    assert distance(first, ordered) < 1e-10
    assert distance(ordered, cut(ordered, 4)) < distance(first, cut(first, 4))
    for shape in SPEC.matrices():
        v = ordered.tensors[f"{shape.name}.learngene.V"]
        torch.testing.assert_close(v.norm(dim=0), torch.ones(8))


def test_the_second_stage_mends_the_cuts(first: Checkpoint) -> None:
    assert NESTED is not None
    stage = dataclasses.replace(NESTED, learning_rate=CONFIG.learning_rate)
    taught, plain = (trained(stage, start_nested(stage, first, DATA), nested) for nested in (True, False))
    for rank in (4, 6):
        assert distance(taught, cut(taught, rank)) < 0.85 * distance(plain, cut(plain, rank)), rank


def test_the_whole_learns_nothing_from_its_cuts() -> None:
    """Cuts of a model whose target is its own prediction teach the leading components, and leave the rest alone."""
    weight = torch.tensor([1.0, 2.0], requires_grad=True)

    def predict(sample: torch.Tensor, timestep: torch.Tensor, *, share: float = 1.0, span: object = None):
        return sample * (weight.sum() if share == 1 else weight[0])

    images, noise = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    timestep, labels = torch.full((4,), 500.0), torch.zeros(4, dtype=torch.long)
    NestedLoss("flow", 0)(predict, Examples(images, labels, noise, timestep, labels > 0), 0).backward()
    # the sample is 0.5, the target 1: whole 1.5, cut 0.5
    assert weight.grad.tolist() == pytest.approx([2 * 0.5 * 0.5 + 2 * (0.5 - 1.5) * 0.5, 2 * 0.5 * 0.5])


def test_a_training_ends_with_a_nested_checkpoint_that_is_cut_where_it_stands(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, images=12 * 4, nested_share=0.5)
    train_stages(config, DataSplit(DATA, DATA.of_classes(())), tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.spec == dataclasses.replace(SPEC, nested=True)
    assert checkpoint.provenance["images_seen"] == 12 * 6
    assert TrainConfig.from_dict(checkpoint.provenance["config"], "provenance") == config
    calibration = load_calibration(tmp_path / CALIBRATION, checkpoint.spec)
    name = "blocks.1.mlp.fc1"
    shared = fold_matrix(checkpoint, name, [0, 2], "switch", calibration).shared.cut(5)
    for part in "UsV":
        wanted = checkpoint.tensors[f"{name}.learngene.{part}"][..., :5].double()
        assert torch.equal(getattr(shared, part), wanted), part


def test_energies_of_components_as_they_lie_add_up_to_what_a_cut_loses() -> None:
    stream = torch.Generator().manual_seed(3)
    u, s, v = (torch.randn(*shape, generator=stream).double() for shape in ((7, 5), (5,), (6, 5)))
    energy = as_they_lie(u, s, v, None).energy
    lost = [float((u[:, r:] * s[r:] @ v[:, r:].T).square().sum()) for r in range(6)]
    for rank in range(6):  # never less than what a deeper cut loses: cancelling components are no gain
        assert float(energy[rank:].sum()) == pytest.approx(max(lost[rank:])), rank


def test_what_has_no_learngene_has_one_stage() -> None:
    assert nested_config(dataclasses.replace(CONFIG, spec=SPEC.dense())) is None
    assert nested_config(dataclasses.replace(CONFIG, nested_share=0.0)) is None


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


def test_shares_are_spread_and_repeatable() -> None:
    shares = [nested_share(0, step) for step in range(1000)]
    assert min(shares) == pytest.approx(NESTED_LOWEST, abs=0.02)
    assert sum(shares) / len(shares) == pytest.approx((1 + NESTED_LOWEST) / 2, abs=0.03)
    assert shares == [nested_share(0, step) for step in range(1000)]


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(InputError, match=r"nested_share: got 1\.5, want 0 to 1"):
        dataclasses.replace(CONFIG, nested_share=1.5)
