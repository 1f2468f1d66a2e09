"""What a matrix is worth: the energy that a rank is said to lose is what truncation loses, measured on inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kind_edge.budget.sensitivity import loss_model
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.truncation import SortedFactors, fold_matrix

MakeCheckpoint = Callable[..., Checkpoint]


def as_lost(checkpoint: Checkpoint) -> Any:
    """A sensitivity for which the loss rises by just the energy that is lost."""
    curve = SimpleNamespace(at=lambda lost: lost)
    each = SimpleNamespace(shared=curve, tailor=curve, int8=0.0)
    return SimpleNamespace(matrices={shape.name: each for shape in checkpoint.spec.matrices()}, branches={})


def calibration_of_inputs(checkpoint: Checkpoint) -> tuple[Calibration, dict[str, torch.Tensor]]:
    """Made-up correlated inputs of every matrix [300, m], and their covariance for both branches."""
    generator = torch.Generator().manual_seed(0)
    inputs, covariances = {}, {}
    for shape in checkpoint.spec.matrices():
        m = shape.inputs
        x = torch.randn(300, m, generator=generator) * torch.logspace(0, -1, m)
        inputs[shape.name] = (x @ torch.randn(m, m, generator=generator)).double()
        covariances[shape.name] = inputs[shape.name].T @ inputs[shape.name] / 300
    return Calibration(covariances, covariances, "test"), inputs


@pytest.mark.parametrize("form", ["switch", "single", "union"])
@pytest.mark.parametrize("whitened", [True, False])
def test_losses_fall_to_nothing_at_full_rank(form: Any, whitened: bool, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    calibration = calibration_of_inputs(checkpoint)[0] if whitened else None
    kept = [1] if form == "single" else [0, 2, 3]
    model = loss_model(checkpoint, kept, form, calibration, as_lost(checkpoint))
    assert set(model.matrices) == {shape.name for shape in checkpoint.spec.matrices()}
    for own in model.matrices.values():
        length = 7 if form == "switch" else min(16, 6 + 2 * len(kept)) + 1
        assert (len(own.shared), len(own.tailor)) == (length, 3 if form == "switch" else 1)
        for part in (own.shared, own.tailor):
            assert part[-1] == 0
            assert (np.diff(part) <= 0).all()
            assert (np.diff(part, 2) >= -1e-9).all()  # the largest components first


def test_a_loss_is_the_output_energy_that_the_cut_loses(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    calibration, inputs = calibration_of_inputs(checkpoint)
    model = loss_model(checkpoint, [2, 0], "switch", calibration, as_lost(checkpoint))

    def energy(name: str, whole: SortedFactors, rank: int) -> float:
        lost = SortedFactors(whole.U[:, rank:], whole.s[rank:], whole.V[:, rank:], whole.energy[rank:])
        return float((inputs[name] @ (lost.U * lost.s @ lost.V.T).T).square().sum() / 300)

    for name in ("blocks.0.mlp.fc1", "blocks.1.attn.v"):
        folded, own = fold_matrix(checkpoint, name, [2, 0], "switch", calibration), model.matrices[name]
        for rank in range(6):
            assert energy(name, folded.shared, rank) == pytest.approx(own.shared[rank], rel=1e-4)
        for rank in range(2):  # an image sees one tailor: their mean counts
            mean = sum(energy(name, tailor, rank) for tailor in folded.tailors) / 2
            assert mean == pytest.approx(own.tailor[rank], rel=1e-4)


def test_a_model_without_tailors_or_without_learngene(make_checkpoint: MakeCheckpoint) -> None:
    no_tailors, no_learngene = make_checkpoint(tailor_rank=0), make_checkpoint(learngene_rank=0)
    model = loss_model(no_tailors, [0, 1], "switch", None, as_lost(no_tailors))
    assert all(len(own.tailor) == 1 for own in model.matrices.values())
    model = loss_model(no_learngene, [0, 1], "switch", None, as_lost(no_learngene))
    assert all(own.shared.tolist() == [0.0] for own in model.matrices.values())
    assert all(own.tailor[0] > 0 for own in model.matrices.values())
