"""What a matrix is worth: retained energy is what truncation really retains, measured on inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kind_edge.budget.sensitivity import spectra
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.truncation import SortedFactors, fold_matrix

MakeCheckpoint = Callable[..., Checkpoint]


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
def test_spectra_start_at_nothing_rise_and_add_up_to_one(
    form: str, whitened: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint()
    calibration = calibration_of_inputs(checkpoint)[0] if whitened else None
    kept = [1] if form == "single" else [0, 2, 3]
    result = spectra(checkpoint, kept, form, calibration)
    assert set(result) == {shape.name for shape in checkpoint.spec.matrices()}
    for spectrum in result.values():
        length = 7 if form == "switch" else min(16, 6 + 2 * len(kept)) + 1
        assert (len(spectrum.shared), len(spectrum.tailor)) == (length, 3 if form == "switch" else 1)
        for part in (spectrum.shared, spectrum.tailor):
            assert part[0] == 0
            assert (np.diff(part) >= 0).all()
            assert (np.diff(part, 2) <= 1e-12).all()  # the largest components first
    assert sum(s.shared[-1] + s.tailor[-1] for s in result.values()) == pytest.approx(1)


def test_a_spectrum_is_the_output_energy_that_the_cut_retains(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    calibration, inputs = calibration_of_inputs(checkpoint)
    result = spectra(checkpoint, [2, 0], "switch", calibration)

    def energy(name: str, factors: SortedFactors) -> float:
        return float((inputs[name] @ (factors.U * factors.s @ factors.V.T).T).square().sum() / 300)

    scale = None  # every matrix's energy is a share of one total
    for name in ("blocks.0.mlp.fc1", "blocks.1.attn.v"):
        folded, spectrum = fold_matrix(checkpoint, name, [2, 0], "switch", calibration), result[name]
        scale = scale or energy(name, folded.shared) / spectrum.shared[6]
        for rank in range(1, 7):
            assert energy(name, folded.shared.cut(rank)) == pytest.approx(scale * spectrum.shared[rank], rel=1e-4)
        for rank in (1, 2):  # an image sees one tailor: their mean counts
            mean = sum(energy(name, tailor.cut(rank)) for tailor in folded.tailors) / 2
            assert mean == pytest.approx(scale * spectrum.tailor[rank], rel=1e-4)


def test_a_model_without_tailors_or_without_learngene(make_checkpoint: MakeCheckpoint) -> None:
    no_tailors = spectra(make_checkpoint(tailor_rank=0), [0, 1], "switch", None)
    assert all(len(spectrum.tailor) == 1 for spectrum in no_tailors.values())
    no_learngene = spectra(make_checkpoint(learngene_rank=0), [0, 1], "switch", None)
    assert all(spectrum.shared.tolist() == [0.0] for spectrum in no_learngene.values())
    assert sum(spectrum.tailor[-1] for spectrum in no_learngene.values()) == pytest.approx(1)
