"""Input covariances: what they are, how they are kept, and for which model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kind_edge.errors import InputError
from kind_edge.model.calibration import (
    BRANCHES,
    RIDGE,
    Calibration,
    calibrate_on_images,
    calibrate_on_samples,
    covariances,
    keep_calibration,
    load_calibration,
    output_covariances,
    save_calibration,
    trajectory_inputs,
)
from kind_edge.model.checkpoint import CALIBRATION, Checkpoint
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import ClassGate, GatedLinear

MakeCheckpoint = Callable[..., Checkpoint]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(80, 1, 8, 8, generator=GENERATOR) * 2 - 1, torch.arange(80) % 4


@pytest.fixture(scope="module")
def calibration(make_checkpoint: MakeCheckpoint) -> Calibration:
    return calibrate_on_images(make_checkpoint().model(), IMAGES, LABELS)


def test_every_matrix_has_two_symmetric_positive_covariances(
    calibration: Calibration, make_checkpoint: MakeCheckpoint
) -> None:
    for branch in (calibration.pooled, calibration.null):
        assert {name: len(c) for name, c in branch.items()} == {
            shape.name: shape.inputs for shape in make_checkpoint().spec.matrices()
        }
        for covariance in branch.values():
            torch.testing.assert_close(covariance, covariance.T)
            values = torch.linalg.eigvalsh(covariance)
            assert values.min() >= 0.99 * RIDGE * covariance.diagonal().mean() / (1 + RIDGE)
    assert calibration.source == "training images"


def test_a_covariance_is_the_mean_outer_product_of_a_layers_inputs(make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint().model()
    x, timestep, classes = torch.randn(6, 1, 8, 8), torch.rand(6) * 1000, torch.tensor([0, 1, 2, 3, 4, 4])
    seen: list[torch.Tensor] = []

    def record(_: object, inputs: tuple[torch.Tensor, ClassGate]) -> None:
        seen.append(inputs[0])

    layer = model.get_submodule("blocks.1.mlp.fc2")
    hook = layer.register_forward_pre_hook(record)
    model(x, timestep, classes)
    hook.remove()
    rows = seen[0].flatten(0, 1).double()
    wanted = sum(torch.outer(row, row) for row in rows) / len(rows)
    parts = [(x[:2], timestep[:2], classes[:2]), (x[2:], timestep[2:], classes[2:])]
    got = covariances(model, parts)["blocks.1.mlp.fc2"]
    ridge = RIDGE * wanted.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(got, wanted + ridge, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, GatedLinear))


def test_the_null_branch_sees_no_tailor(make_checkpoint: MakeCheckpoint, calibration: Calibration) -> None:
    checkpoint = make_checkpoint()
    tensors = {name: torch.zeros_like(t) if ".tailors." in name else t for name, t in checkpoint.tensors.items()}
    shut = Checkpoint(checkpoint.spec, checkpoint.class_names, tensors)
    without = calibrate_on_images(shut.model(), IMAGES, LABELS)
    for name, covariance in calibration.null.items():
        torch.testing.assert_close(without.null[name], covariance, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(without.null[name], without.pooled[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(calibration.pooled["blocks.1.attn.q"], calibration.null["blocks.1.attn.q"], rtol=1e-2)


def test_the_prediction_sees_of_an_error_what_the_output_covariance_says(make_checkpoint: MakeCheckpoint) -> None:
    """Against finite differences: the same error of every token, in the direction seen most and in one seen less."""
    model, generator = make_checkpoint().model().double(), torch.Generator().manual_seed(1)
    x, classes = torch.randn(32, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(32) % 5
    timestep, name, size = torch.full((32,), 400.0, dtype=torch.float64), "blocks.0.mlp.fc1", 1e-4
    whole = model(x, timestep, classes).detach()
    found = output_covariances(model, [(x, timestep, classes)] * 20)[name]
    layer, tokens = model.get_submodule(name), model.spec.tokens
    values, vectors = torch.linalg.eigh(found)
    for value, direction in zip(values[[-1, 20]], vectors.T[[-1, 20]], strict=True):
        changes = []
        for _ in range(20):
            error = size * torch.randn(32, tokens, 1, generator=generator, dtype=torch.float64) * direction
            hook = layer.register_forward_hook(lambda _, inputs, output, error=error: output + error)
            changes.append(float((model(x, timestep, classes).detach() - whole).square().sum()))
            hook.remove()
        seen = sum(changes) / len(changes) / size**2 / (32 * tokens)
        ridge = RIDGE / (1 + RIDGE) * float(found.diagonal().mean())
        assert seen == pytest.approx(float(value) - ridge, rel=0.15)


def test_outputs_are_weighed_unless_ranks_nest(make_checkpoint: MakeCheckpoint, calibration: Calibration) -> None:
    checkpoint = make_checkpoint()
    assert {name: len(c) for name, c in calibration.outputs.items()} == {
        shape.name: shape.outputs for shape in checkpoint.spec.matrices()
    }
    fresh = initialise(DiT(checkpoint.spec), seed=0)  # its last layer is zero, so the prediction sees nothing
    outputs = calibrate_on_images(fresh, IMAGES[:8], LABELS[:8]).outputs
    assert all(torch.equal(c, torch.eye(len(c), dtype=c.dtype)) for c in outputs.values())
    assert all(parameter.grad is None for parameter in fresh.parameters())
    nested = dataclasses.replace(checkpoint, spec=dataclasses.replace(checkpoint.spec, nested=True))
    assert calibrate_on_images(nested.model(), IMAGES[:8], LABELS[:8]).outputs == {}
    assert calibrate_on_samples(nested.model(), per_class=1, steps=2).outputs == {}


def test_stored_covariances_come_back_within_fp16(
    calibration: Calibration, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    save_calibration(tmp_path / CALIBRATION, calibration)
    stored = load_calibration(tmp_path / CALIBRATION, make_checkpoint().spec)
    for branch in BRANCHES:
        mine, theirs = getattr(calibration, branch), getattr(stored, branch)
        assert mine.keys() == theirs.keys()
        for name, covariance in mine.items():
            got = theirs[name]
            assert torch.equal(got, got.T)
            scale = covariance.diagonal().mean()
            torch.testing.assert_close(got / scale, covariance / scale, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("change", [{"width": 20}, {"depth": 3}, {"mlp_ratio": 3.0}])
def test_covariances_of_another_model_are_refused(
    change: dict[str, float], tiny_folder: Path, make_checkpoint: MakeCheckpoint
) -> None:
    with pytest.raises(InputError, match=r"calibration\.safetensors: blocks\.\d.*file has .*, model wants \d+ values"):
        load_calibration(tiny_folder / CALIBRATION, make_checkpoint(**change).spec)


def test_corrupt_covariances_are_refused(
    calibration: Calibration, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    path = tmp_path / CALIBRATION
    save_calibration(path, calibration)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_calibration(path, make_checkpoint().spec)
    broken = {name: c * float("nan") for name, c in calibration.null.items()}
    save_calibration(path, Calibration(calibration.pooled, broken, "test"))
    with pytest.raises(InputError, match=r"null.*NaN"):
        load_calibration(path, make_checkpoint().spec)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_without_images_the_models_own_samples_do(objective: str, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(objective=objective, learned_sigma=objective == "epsilon", depth=1)
    model = checkpoint.model()
    own = calibrate_on_samples(model, per_class=2, steps=3)
    again = calibrate_on_samples(model, per_class=2, steps=3)
    assert own.source == "own sampling trajectories"
    for name, covariance in own.pooled.items():
        assert torch.linalg.eigvalsh(covariance).min() > 0
        assert torch.equal(covariance, again.pooled[name])
        assert torch.equal(own.null[name], again.null[name])


def test_what_is_kept_is_the_same_whether_or_not_it_can_be(
    calibration: Calibration, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """It is rounded as in the file, so that a plan does not depend on who may write where."""
    kept, held = (
        keep_calibration(calibration, dataclasses.replace(make_checkpoint(), path=path))
        for path in (tmp_path, tmp_path / "gone")
    )
    again = load_calibration(tmp_path / CALIBRATION, make_checkpoint().spec)
    for name, covariance in calibration.pooled.items():
        assert torch.equal(kept.pooled[name], held.pooled[name])
        assert torch.equal(kept.pooled[name], again.pooled[name])
        assert not torch.equal(kept.pooled[name], covariance)


def test_few_walks_are_of_as_many_classes(make_checkpoint: MakeCheckpoint) -> None:
    seen = trajectory_inputs(make_checkpoint(depth=1).model(), steps=1, images=4)
    assert len(torch.cat([classes for _, _, classes in seen]).unique()) == 4
