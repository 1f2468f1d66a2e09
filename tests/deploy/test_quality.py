"""The held-out loss says what truncation costs, on the same noise for both models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kind_edge.deploy.quality import heldout_losses
from kind_edge.deploy.reference import Heldout, load_heldout, make_reference
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import HELDOUT, Checkpoint, load_checkpoint, write_tensors

MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def full(tiny_folder: Path) -> Checkpoint:
    return load_checkpoint(tiny_folder)


@pytest.fixture(scope="module")
def heldout(tiny_folder: Path, full: Checkpoint) -> Heldout:
    heldout = load_heldout(tiny_folder, full.spec)
    assert heldout is not None
    return heldout


def damaged(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The same model with nothing left of one class's tailors, or of the learngene."""
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if part == "learngene" and name.endswith("learngene.s"):
            tensor.zero_()
        elif part != "learngene" and name.endswith("tailors.s"):
            tensor[int(part)] = 0
    return Checkpoint(checkpoint.spec, checkpoint.class_names, tensors)


def test_a_model_is_as_good_as_itself(full: Checkpoint, heldout: Heldout) -> None:
    losses = heldout_losses(full, full, "switch", [0, 1, 2, 3], heldout)
    assert [loss.name for loss in losses] == [*full.class_names, "null"]
    assert [loss.images for loss in losses] == [8, 8, 8, 8, 32]
    assert all(loss.change == 0 and loss.full > 0 for loss in losses)
    assert losses[0].to_dict().keys() == {"images", "full", "plan", "increase"}


def test_a_lost_tailor_changes_its_class_alone(full: Checkpoint, heldout: Heldout) -> None:
    losses = {loss.name: loss for loss in heldout_losses(full, damaged(full, "2"), "switch", [0, 1, 2, 3], heldout)}
    assert losses["coat"].plan != losses["coat"].full
    assert all(loss.change == 0 for name, loss in losses.items() if name != "coat")


def test_a_lost_learngene_changes_everything(full: Checkpoint, heldout: Heldout) -> None:
    losses = heldout_losses(full, damaged(full, "learngene"), "switch", [0, 1, 2, 3], heldout)
    # Without training the loss moves either way, and of one class it happens to stay where it was.
    assert sum(abs(loss.change) > 1e-4 for loss in losses) >= len(losses) - 1
    assert losses[0].change == pytest.approx(losses[0].plan / losses[0].full - 1)


def test_the_same_model_with_fewer_classes_is_as_good(full: Checkpoint, heldout: Heldout) -> None:
    """Classes have other numbers there, and must be shown the same images and noise all the same."""
    tensors = {name: t[[3, 1]] if ".tailors." in name else t for name, t in full.tensors.items()}
    fewer = Checkpoint(dataclasses.replace(full.spec, num_classes=2), ("shirt", "bag"), tensors)
    losses = heldout_losses(full, fewer, "switch", [3, 1], heldout)
    assert [loss.name for loss in losses] == ["shirt", "bag", "null"]
    assert all(loss.change == pytest.approx(0, abs=1e-6) for loss in losses)


def test_kept_classes_are_numbered_anew(full: Checkpoint, heldout: Heldout) -> None:
    own = heldout.of_classes([3, 1])
    assert own.labels.tolist() == [0] * 8 + [1] * 8
    assert torch.equal(
        own.images, torch.cat([heldout.images[heldout.labels == 3], heldout.images[heldout.labels == 1]])
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)},
        {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "labels": torch.zeros(3, dtype=torch.uint8)},
        {"images": torch.zeros(2, 1, 9, 8, dtype=torch.uint8), "labels": torch.zeros(2, dtype=torch.uint8)},
        {"images": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2, dtype=torch.uint8)},
        {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "labels": torch.full((2,), 77, dtype=torch.uint8)},
        {"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.uint8)},
    ],
)
def test_strange_heldout_files_are_refused(tensors: dict[str, torch.Tensor], full: Checkpoint, tmp_path: Path) -> None:
    assert load_heldout(tmp_path, full.spec) is None
    write_tensors(tmp_path / HELDOUT, tensors)
    with pytest.raises(InputError, match=r"heldout\.safetensors: (want tensors images|images are|labels must be)"):
        load_heldout(tmp_path, full.spec)


@pytest.mark.parametrize("form", ["switch", "union"])
def test_the_reference_covers_classes_null_and_five_steps(form: str, full: Checkpoint, heldout: Heldout) -> None:
    timesteps = torch.linspace(1000, 50, 20)
    reference = make_reference(full, form, timesteps, heldout)
    points = set(zip(reference["class_index"].tolist(), reference["step_index"].tolist(), strict=True))
    assert points == {(c, s) for c in (range(5) if form == "switch" else range(1)) for s in (0, 5, 10, 14, 19)}
    assert len(reference["sample"]) == 2 * len(points)
    assert {name: str(array.dtype) for name, array in reference.items()} == {
        "sample": "float32", "step_index": "int32", "timestep": "float32", "class_index": "int64",
        "prediction": "float32",
    }  # fmt: skip
    classes = torch.from_numpy(reference["class_index"]) if form == "switch" else torch.full((10,), 4)
    model = full.model()
    for i in (0, -1):
        x, t = torch.from_numpy(reference["sample"][[i]]), torch.from_numpy(reference["timestep"][[i]])
        got = torch.from_numpy(reference["prediction"][[i]])
        torch.testing.assert_close(got, model(x, t, classes[[i]]), rtol=1e-5, atol=1e-5)
    again, other = make_reference(full, form, timesteps, heldout), make_reference(full, form, timesteps, None, seed=1)
    assert (again["sample"] == reference["sample"]).all()
    assert (other["sample"] != reference["sample"]).any()
    assert len(make_reference(full, form, timesteps[:1], None)["sample"]) == 2 * (5 if form == "switch" else 1)
