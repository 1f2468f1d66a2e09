"""Measuring sensitivity: every entry is what cutting that part alone does to the whole model's output."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kind_edge.budget.influence import Sensitivity
from kind_edge.budget.sensitivity import loss_model
from kind_edge.deploy import request, sensitivity_file
from kind_edge.deploy.probe import measure_sensitivity, own_inputs
from kind_edge.deploy.request import OpenedModel, open_model
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.truncation import fold_matrix

MakeFolder = Callable[..., Path]
NAME = "blocks.1.mlp.fc1"
DISTILLED: dict[str, Any] = {"step_counts": (1, 2, 4), "inside_guidance": 1.75}


@pytest.fixture(scope="module", params=["ordinary", "distilled"])
def opened(request: Any, tmp_path_factory: pytest.TempPathFactory, make_checkpoint_folder: MakeFolder) -> OpenedModel:
    changes = DISTILLED if request.param == "distilled" else {}
    return open_model(make_checkpoint_folder(tmp_path_factory.mktemp(request.param), **changes))


@pytest.fixture(scope="module")
def measured(opened: OpenedModel) -> Sensitivity:
    return measure_sensitivity(opened.checkpoint, opened.sha256, opened.calibration, images=40)


def changed(opened: OpenedModel, tensors: dict[str, torch.Tensor]) -> float:
    """Of the output, where these tensors stand in the place of the model's own."""
    checkpoint = opened.checkpoint
    model = checkpoint.model()
    (own,) = own_inputs(checkpoint, model, 40, 0)
    ranks = dict(checkpoint.spec.matrix_ranks) | {NAME: checkpoint.spec.ranks(NAME)._replace(learngene=3)}
    spec = dataclasses.replace(checkpoint.spec, matrix_ranks=ranks if f"{NAME}.learngene.s" in tensors else {})
    cut = Checkpoint(spec, checkpoint.class_names, checkpoint.float_tensors() | tensors).model()
    with torch.no_grad():
        whole, got = (each(own.x, own.timestep, own.gate, own.span) for each in (model, cut))
    base = whole if own.target is None else whole - own.target
    return float((got - whole).double().square().mean() / base.double().square().mean())


def test_an_entry_is_what_the_cut_alone_changes(opened: OpenedModel, measured: Sensitivity) -> None:
    folded = fold_matrix(opened.checkpoint, NAME, [0, 1, 2, 3], "switch", opened.calibration)
    cut = folded.shared.cut(3)
    wanted = changed(opened, {f"{NAME}.learngene.{part}": getattr(cut, part).float() for part in "UsV"})
    losses = loss_model(opened.checkpoint, [0, 1, 2, 3], "switch", opened.calibration, measured)
    assert losses.matrices[NAME].shared[3] == pytest.approx(wanted, rel=1e-3)
    dropped = {f"blocks.1.attn.o.{part}.U": torch.zeros_like(opened.checkpoint.tensors[f"blocks.1.attn.o.{part}.U"])
               for part in ("learngene", "tailors")}  # fmt: skip
    dropped["blocks.1.attn.o.bias"] = torch.zeros(16)
    assert measured.branches["blocks.1.attn"] == pytest.approx(changed(opened, dropped), rel=1e-4)


@pytest.mark.parametrize("form", ["switch", "single", "union"])
def test_more_rank_never_loses_more(form: str, opened: OpenedModel, measured: Sensitivity) -> None:
    kept = [2] if form == "single" else [0, 2]
    losses = loss_model(opened.checkpoint, kept, form, opened.calibration, measured)  # type: ignore[arg-type]
    assert set(losses.matrices) == {shape.name for shape in opened.checkpoint.spec.matrices()}
    assert len(losses.branches) == 4
    for own in losses.matrices.values():
        assert len(own.shared) == (7 if form == "switch" else 7 + 2 * len(kept))
        assert len(own.tailor) == (3 if form == "switch" else 1)
        for part in (own.shared, own.tailor):
            assert part[-1] == 0
            assert (np.diff(part) <= 0).all()
        assert own.shared[0] > 0
        assert 0 < own.int8 < own.shared[0] / 10


def test_no_part_of_the_measured_model_stays_cut(opened: OpenedModel, measured: Sensitivity) -> None:
    again = measure_sensitivity(opened.checkpoint, opened.sha256, opened.calibration, images=40)
    assert again.to_json() == measured.to_json()


def test_a_model_without_tailors(make_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = make_checkpoint(tailor_rank=0)
    found = measure_sensitivity(checkpoint, "", None, images=40)
    losses = loss_model(checkpoint, [0, 1], "switch", None, found)
    assert losses.matrices[NAME].tailor.tolist() == [0]
    assert losses.matrices[NAME].shared[0] > 0


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-teacher"])
def test_shipped_models_come_with_their_own_table(name: str) -> None:
    assert open_model(name).stored_sensitivity is not None


# --- where it lies ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made() -> list[str]:
    """The models that were measured."""
    return []


@pytest.fixture
def folder(opened: OpenedModel, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model without a table, an empty cache, and a measurement that takes no time."""
    assert opened.checkpoint.path is not None
    shutil.copytree(opened.checkpoint.path, tmp_path / "model")
    (tmp_path / "model" / sensitivity_file.SENSITIVITY).unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def measure(checkpoint: Checkpoint, sha256: str, *_: object, **__: object) -> Sensitivity:
        made.append(sha256)
        return dataclasses.replace(empty(checkpoint), checkpoint_sha256=sha256)

    monkeypatch.setattr(request, "measure_sensitivity", measure)
    return tmp_path / "model"


def empty(checkpoint: Checkpoint) -> Sensitivity:
    no_cost: dict[str, Any] = {"shared": [], "tailor": [], "int8": 0}
    matrices = {shape.name: no_cost for shape in checkpoint.spec.matrices()}
    values = {"schema_version": 1, "checkpoint_sha256": "", "conditions": {}, "matrices": matrices, "branches": {}}
    return Sensitivity.from_dict(values, "test")


def test_a_table_is_measured_once_and_kept_beside_the_model(folder: Path, made: list[str]) -> None:
    first = open_model(folder).sensitivity
    assert open_model(folder).sensitivity.to_json() == first.to_json()
    assert len(made) == 1
    assert open_model(folder).sha256 == first.checkpoint_sha256
    assert not list(folder.glob("*.partial"))


def test_where_the_folder_cannot_be_written_to_the_cache_keeps_it(
    folder: Path, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sensitivity_file.write_text

    def refuse(path: Path, text: str) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, text)

    monkeypatch.setattr(sensitivity_file, "write_text", refuse)
    _ = open_model(folder).sensitivity
    _ = open_model(folder).sensitivity
    assert len(made) == 1
    (cached,) = (tmp_path / "cache" / "kind-edge").iterdir()
    cached.write_text("{")  # damaged, it mends itself
    _ = open_model(folder).sensitivity
    assert len(made) == 2


def test_a_table_of_other_weights_is_measured_anew_and_a_damaged_one_refused(folder: Path) -> None:
    path = folder / sensitivity_file.SENSITIVITY
    opened = open_model(folder)
    table = empty(opened.checkpoint)
    path.write_text(dataclasses.replace(table, checkpoint_sha256="00" * 32).to_json())
    assert open_model(folder).sensitivity.checkpoint_sha256 == opened.sha256
    assert json.loads(path.read_text())["checkpoint_sha256"] == opened.sha256
    lacking = dataclasses.replace(table, checkpoint_sha256=opened.sha256, matrices={})
    path.write_text(lacking.to_json())
    with pytest.raises(InputError, match=r"lacks blocks\.0"):
        open_model(folder)
    path.write_text("{")
    with pytest.raises(InputError, match=r"sensitivity\.json: cannot be read"):
        open_model(folder)
