"""The studies: runs that are kept, figures that mean what their names say, and claims that are what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.budget.plan import MatrixPlan
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint, save_checkpoint
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.sampling import denoiser
from kind_edge.training.config import preset
from kind_edge.training.data import CLASS_NAMES, find_fashion_mnist

DISTILLED: dict[str, Any] = {"step_counts": (2, 4), "inside_guidance": 1.5}


def smoke_folder(folder: Path, **changes: Any) -> Path:
    """An untrained model of the smallest preset whose outputs are not all zero, with the configuration it would have
    been trained by."""
    config = preset("smoke")
    config = dataclasses.replace(config, spec=dataclasses.replace(config.spec, depth=1, **changes))
    model = initialise(DiT(config.spec), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    advice = {"recommended": {"steps": 2, "guidance": 1.5}, "config": config.to_dict()}
    save_checkpoint(folder, Checkpoint(config.spec, CLASS_NAMES, model.state_dict(), advice))
    return folder


def test_a_finished_run_is_never_computed_again(tmp_path: Path) -> None:
    from studies.store import Store, subject_of

    subject = subject_of("fashion-mnist")
    store = Store(tmp_path, "study", subject)
    first = store.run("one", {"images": 5, "guidance": 1.5}, lambda: {"frechet": 3.0})
    assert store.run("one", {"images": 5, "guidance": 1.5}, lambda: 1 / 0) == first  # type: ignore[arg-type, return-value]
    assert first["checkpoint"]["weights_sha256"] == subject.weights_sha256
    with pytest.raises(ZeroDivisionError):
        store.run("two", {}, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert [path.name for path in store.folder.iterdir()] == ["one.json"]
    with pytest.raises(UsageError, match="images 5, now asked is 6"):
        store.run("one", {"images": 6, "guidance": 1.5}, dict)
    other = dataclasses.replace(subject, weights_sha256="0" * 64)
    with pytest.raises(UsageError, match="weights_sha256"):
        Store(tmp_path, "study", other).run("one", {"images": 5, "guidance": 1.5}, dict)
    (store.folder / "one.json").write_text("{}")
    with pytest.raises(InputError, match="remove it to measure anew"):
        store.run("one", {"images": 5, "guidance": 1.5}, dict)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_a_spread_holds_its_values(values: list[float]) -> None:
    from studies.statistics import spread_of

    spread = spread_of(values)
    assert (spread.low, spread.high, spread.count) == (min(values), max(values), len(values))
    assert spread.low - 1e-6 <= spread.mean <= spread.high + 1e-6
    assert spread_of([0.25]).text(1, 100, " %") == "25.0 %"


def test_variance_is_shared_out_between_tailor_and_noise() -> None:
    from studies.decomposition import variance_shares

    generator = np.random.default_rng(0)
    tailor, noise = generator.normal(size=(10, 1, 6)), generator.normal(size=(1, 40, 6))
    ones = np.ones((10, 40, 6))
    assert variance_shares(tailor * ones)["tailor_share"] == pytest.approx(1)
    assert variance_shares(noise * ones)["noise_share"] == pytest.approx(1)
    both = variance_shares(tailor + noise)
    assert both["tailor_share"] + both["noise_share"] == pytest.approx(1)
    assert both["noise_share_of_rest"] == pytest.approx(1)
    neither = variance_shares(generator.normal(size=(10, 400, 6)))
    assert neither["noise_share_of_rest"] == pytest.approx(neither["chance_share"], abs=0.02)


def test_confusion_is_by_row() -> None:
    from studies.decomposition import all_pairs, confusion, crossed_figures

    matrix = confusion(np.array([0, 0, 3]), np.array([0, 9, 3]), [0, 3])
    assert (matrix[0][0], matrix[0][9], matrix[1][3]) == (0.5, 0.5, 1.0)
    assert [sum(row) for row in matrix] == [1.0, 1.0]
    pairs = all_pairs(10, 200)
    assert len({tuple(pair) for pair in pairs.tolist()}) == 100
    obeys = crossed_figures(pairs, pairs[:, 1])
    assert (obeys["pairs"], obeys["follows_tailor"], obeys["follows_label"]) == (180, 1.0, 0.0)


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("label_embedding", [True, False])
def test_a_label_crossed_with_its_own_tailor_is_the_ordinary_model(
    label_embedding: bool, distilled: bool, tmp_path: Path
) -> None:
    from studies.decomposition import crossed

    from kind_edge.model.checkpoint import load_checkpoint

    inside = DISTILLED if distilled else {}
    model = load_checkpoint(smoke_folder(tmp_path, label_embedding=label_embedding, **inside)).model()
    x, timestep = torch.randn(3, 1, 28, 28), torch.full((3,), 400.0)
    classes = torch.tensor([4, 0, 4])
    own = torch.stack([classes, classes], 1)
    other = torch.stack([torch.tensor([1, 2, 3]), classes], 1)
    ordinary = denoiser(model, 2, 1.5)(x, timestep, classes)
    denoise = crossed(model, 2, 1.5)
    torch.testing.assert_close(denoise(x, timestep, own), ordinary, atol=1e-5, rtol=1e-4)
    label_matters = not torch.allclose(denoise(x, timestep, other), ordinary, atol=1e-5, rtol=1e-4)
    assert label_matters == label_embedding


def needs_data() -> None:
    try:
        find_fashion_mnist()
    except InputError as error:
        pytest.skip(str(error))


def test_decomposition_of_a_model_with_a_label_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies.__main__ import main

    needs_data()
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 200)
    document = tmp_path / "claims.md"
    document.write_text("above\n<!-- decomposition: begin -->\nold\n<!-- decomposition: end -->\nbelow\n")
    folder = smoke_folder(tmp_path / "model", label_embedding=True)
    command = ["-o", str(tmp_path / "out"), "--checkpoint", str(folder), "--images", "100", "--seeds", "1"]
    assert main(["decomposition", *command, "--json"]) == 0
    records = {record["run"]: record["figures"] for record in json.loads(capsys.readouterr().out)["rows"]}
    assert records.keys() == {
        "noise", "real", "full-seed0", "unguided-seed0", "learngene-seed0", "crossed-seed0", "swap-seed0"
    }  # fmt: skip
    assert records["crossed-seed0"]["pairs"] == 90
    assert records["swap-seed0"]["noises"] == 10
    (tmp_path / "out" / "decomposition" / "swap-seed0.json").unlink()
    assert main(["decomposition", *command, "--into", str(document)]) == 0
    captured = capsys.readouterr()
    assert "| learngene alone |" in captured.out
    assert document.read_text().startswith("above\n<!-- decomposition: begin, model ")
    assert document.read_text().endswith("<!-- decomposition: end -->\nbelow\n")
    assert "old" not in document.read_text()
    assert (tmp_path / "images" / "decomposition.png").stat().st_size < 150_000
    assert "swap-seed0 took" in captured.err
    assert "full-seed0 took" not in captured.err


def test_decomposition_of_a_model_with_guidance_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.claims import decomposition_text
    from studies.decomposition import Decomposition
    from studies.store import subject_of

    needs_data()
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 100)
    study = Decomposition(subject_of(smoke_folder(tmp_path / "model", **DISTILLED)), tmp_path / "out", 20, (0,))
    records = study.run()
    assert {record["run"] for record in records} == {"noise", "real", "full-seed0", "learngene-seed0", "swap-seed0"}
    assert {record["conditions"].get("guidance") for record in records} == {None, 1.5}
    assert "without guidance" not in decomposition_text(records)


def test_sizes_keep_their_promise(tmp_path: Path) -> None:
    from studies.anysize import PERCENTS, AnySize, dense_flops, deployed_flops, uniform
    from studies.store import subject_of

    study = AnySize(subject_of("fashion-mnist"), tmp_path, 10, (0,))
    spec = study.model.checkpoint.spec
    assert uniform(spec, 100)["blocks.0.attn.q"] == MatrixPlan("factored", "fp32", 48, 8)
    for percent in PERCENTS:
        target = deployed_flops(spec, uniform(spec, percent), study.base)
        assert dense_flops(study.dense_spec(percent), study.base) == pytest.approx(target, rel=0.05)
    assert study.at_size("full", 100) is study.model.checkpoint
    cut, plain = study.at_size("whitened", 40), study.at_size("plain", 40)
    assert set(cut.spec.matrix_ranks.values()) == set(plain.spec.matrix_ranks.values()) == {(19, 3)}
    name = "blocks.0.mlp.fc1.learngene.V"
    assert not torch.allclose(cut.tensors[name], plain.tensors[name])


def test_healing_starts_from_the_truncated_weights(tmp_path: Path) -> None:
    from studies.anysize import AnySize
    from studies.store import subject_of

    from kind_edge.model.checkpoint import load_checkpoint
    from kind_edge.training.heal import heal_config, train_from

    needs_data()
    study = AnySize(subject_of(smoke_folder(tmp_path / "model")), tmp_path / "out", 10, (0,))
    provenance = study.model.checkpoint.provenance
    cut = dataclasses.replace(study.at_size("whitened", 55), provenance=provenance)
    config = heal_config(cut, steps=2)
    assert (config.steps, config.spec) == (2, cut.spec)
    still = dataclasses.replace(config, learning_rate=1e-12, weight_decay=0.0)
    healed = load_checkpoint(train_from(cut, still, tmp_path / "healed", device="cpu"))
    assert healed.spec == cut.spec
    for key, tensor in cut.tensors.items():
        torch.testing.assert_close(healed.tensors[key].float(), tensor, atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="another shape"):
        train_from(cut, preset("smoke"), tmp_path / "other", device="cpu")


def test_every_training_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from studies import trainings

    from kind_edge.training.heal import heal_config

    needs_data()
    small = dataclasses.replace(preset("smoke"), images=40, spec=dataclasses.replace(preset("smoke").spec, depth=1))
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 50)
    monkeypatch.setattr("kind_edge.training.nested.CALIBRATION_IMAGES", 10)
    monkeypatch.setattr(trainings, "PRESETS", ("smoke",))
    monkeypatch.setattr(trainings, "SIZED", ("smoke",))
    monkeypatch.setattr("studies.anysize.PERCENTS", (55,))
    monkeypatch.setattr("studies.anysize.heal_config", partial(heal_config, steps=2))
    monkeypatch.setattr(trainings, "preset", lambda _: small)
    first = trainings.run(tmp_path, 20, (0, 1))
    monkeypatch.setattr(trainings, "train", None)
    assert trainings.run(tmp_path, 20, (0, 1)) == first
    assert len({record["checkpoint"]["weights_sha256"] for record in first["smoke"]}) == 2
    assert " to " in trainings.table(first)
    assert {record["conditions"].get("method") for record in first["smoke"]} >= {"whitened", "healed", "dense"}
    trainings.draw(first, tmp_path)
    assert (tmp_path / "smoke-sizes.png").stat().st_size > 5_000


def test_files_are_compared_where_their_curves_have_the_same_distance() -> None:
    from studies import fine

    curve = [(1000.0, 16.0), (4000.0, 4.0)]  # halving the distance doubles the file
    assert fine.size_at(curve, 8.0) == pytest.approx(2000)
    assert fine.size_at(curve, 4.0) == pytest.approx(4000)
    assert fine.size_at(curve, 3.9) is None
    assert fine.size_at(curve, 17.0) is None

    def record(model: str, size: int, frechet: float, classes: str = "10") -> dict[str, Any]:
        loss = f"{frechet:g}%"
        conditions = {"model": model, "classes": classes, "max_quality_loss": loss, "seed": 0, "images": 5}
        conditions |= {"sampler": "euler", "steps": 2, "guidance": 1.5, "judge_sha256": "ab"}
        figures = {"file_bytes": size, "frechet": frechet}
        return {"conditions": conditions, "figures": figures, "checkpoint": {"model": model, "weights_sha256": "cd"}}

    ordinary = [record("study", size, distance) for size, distance in ((2000, 16.0), (3000, 20.0), (4000, 8.0))]
    ours = [record("fine-48", size, distance) for size, distance in ((1000, 16.0), (4000, 4.0))]
    told = fine._compared([*ordinary, *ours], "10", "fine-48")
    # At 16 half the bytes, at 8 half: 2000 of 4000; the ordinary file that a smaller one is better than is no point.
    assert told is not None
    assert "0.50 times the bytes of the ordinary one (2 comparisons)" in told
    apart = fine._compared([*ordinary, record("fine-48", 1000, 30.0)], "10", "fine-48")
    assert apart == "fine-48, 10 classes: no equal Fréchet distance; at its best it has 30.00, the ordinary model 8.00."
    assert fine._compared(ordinary, "10", "fine-48") is None
    assert fine.text([]) == ""
