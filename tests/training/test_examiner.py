"""`kind-edge eval` beside images of one's own: through a feature network that costs nothing, in Inception's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kind_edge.cli import main
from kind_edge.errors import InputError, UsageError
from kind_edge.training.evaluate import Judge
from kind_edge.training.examiner import Subject, open_examiner
from kind_edge.training.inception import FEATURES, Inception
from kind_edge.training.open import open_data

CPU = torch.device("cpu")
PETS = ("cat", "dog")
WEIGHTS = Path("weights.pth")


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the network is shown: pixels times a fixed random matrix stand for its features."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shown: list[tuple[int, ...]] = []

    def embed(_: Inception, images: np.ndarray) -> np.ndarray:
        shown.append(images.shape)
        flat = images.reshape(len(images), -1).astype(np.float32)
        projection = np.random.default_rng(flat.shape[1]).normal(size=(flat.shape[1], FEATURES))
        return flat @ projection.astype(np.float32)

    monkeypatch.setattr(Inception, "embed", embed)
    monkeypatch.setattr(Inception, "load", lambda path: Inception(torch.nn.Identity(), str(path)))
    return shown


@pytest.mark.parametrize("channels", [1, 3])
def test_real_images_are_those_that_train_sees(
    channels: int, looks: list[tuple[int, ...]], make_folder: Callable[..., Path], make_config: Callable[..., Any]
) -> None:
    root = make_folder(cat=12, dog=20, eel=9)
    subject = Subject(PETS[::-1], channels, 16)
    examiner = open_examiner(subject, root, weights=WEIGHTS)
    training = open_data(make_config(2, channels=channels), root, only=PETS[::-1], device=CPU).training
    assert looks == [(len(training.labels), 16, 16, channels)]
    seen = training.stored(torch.arange(len(training.labels))).permute(0, 2, 3, 1).numpy()
    same = examiner.score(seen, training.labels.numpy())
    assert same.frechet == pytest.approx(0, abs=1e-3)
    assert (same.precision, same.recall, same.real_images) == (1, 1, len(seen))
    assert (same.reference_classes, same.data_sha256) == (PETS[::-1], training.sha256)
    assert (same.judge_sha256, same.class_accuracy, same.entropy_nats) == (None, None, None)
    other = examiner.score(255 - seen, training.labels.numpy())
    assert other.frechet is not None
    assert other.frechet > 1e3
    assert (other.precision, other.recall) == (0, 0)


def test_what_they_look_like_is_kept_until_they_change(
    looks: list[tuple[int, ...]], make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_folder(cat=12, dog=20, eel=9)
    (tmp_path / "map.toml").write_text('pet = ["dog", "cat"]\nfish = ["eel"]\n')
    for subject, class_map in ((Subject(PETS, 3, 16), None), (Subject(("fish", "pet"), 3, 16), tmp_path / "map.toml")):
        looks.clear()
        first, second = (open_examiner(subject, root, class_map, WEIGHTS) for _ in range(2))
        assert len(looks) == 1
        assert first.own is not None
        assert second.own is not None
        assert np.array_equal(first.own.features.features, second.own.features.features)
    open_examiner(Subject(PETS, 3, 16), root, weights=Path("others.pth"))
    (root / "cat" / "000.png").write_bytes((root / "eel" / "000.png").read_bytes())
    open_examiner(Subject(PETS, 3, 16), root, weights=WEIGHTS)
    assert len(looks) == 3


def test_the_judge_speaks_of_classes_where_it_knows_them(
    looks: list[tuple[int, ...]], make_folder: Callable[..., Path]
) -> None:
    root = make_folder(bag=9, sneaker=9)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1), dtype=np.uint8)
    labels = np.array([0, 0, 0, 1, 1, 1])
    report = open_examiner(Subject(("sneaker", "bag"), 1, 28), root, weights=WEIGHTS).score(images, labels)
    alone = Judge.load().score(images, np.array([7, 7, 7, 8, 8, 8]), neighbours=False)
    assert looks[0] == (18, 28, 28, 1)
    assert (report.features, report.judge_sha256) == ("inception", alone.judge_sha256)
    assert (report.entropy_nats, report.per_class_accuracy) == (alone.entropy_nats, alone.per_class_accuracy)
    assert report.frechet != alone.frechet


def test_nobody_to_judge_is_refused_with_what_to_give(
    looks: list[tuple[int, ...]], make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_folder(cat=2, dog=2, bag=9)
    pets, bag = Subject(PETS, 3, 16), Subject(("bag",), 1, 28)
    known = "the shipped feature network knows Fashion-MNIST only"
    for given, kind, complaint in (
        ((pets,), UsageError, rf"{known} .*cat, dog; give --data .* and --features inception --weights FILE"),
        ((pets, root), UsageError, rf"{known} .*cat, dog; give --features inception --weights FILE"),
        ((pets, None, None, WEIGHTS), UsageError, rf"{known} .*cat, dog; give --data"),
        ((Subject(("bag",), 1, 32), root), UsageError, r"draws images of 32 x 32 pixels in 1 channels"),
        ((bag, root), UsageError, rf"{known} .*images of your own; give --features inception"),
        ((bag, None, tmp_path / "map.toml"), UsageError, r"--class-map .*give that too"),
        ((bag, tmp_path / "nope"), InputError, r"nope: no such file or folder"),
        ((pets, tmp_path / "nope", None, WEIGHTS), InputError, r"nope: no such file or folder"),
        ((Subject(PETS, 4, 32), root, None, WEIGHTS), UsageError, r"draws latents \(4 channels\).*decoder"),
        ((Subject(PETS, 3, 32, 8), root, None, WEIGHTS), UsageError, r"draws latents"),
        ((Subject(("cat", "cow"), 3, 16), root, None, WEIGHTS), UsageError, r"unknown class of the data 'cow'"),
        ((Subject(("cat",), 3, 16), root, None, WEIGHTS), InputError, r"2 images to compare with; want at least 4"),
    ):
        with pytest.raises(kind, match=complaint):
            open_examiner(*given)  # type: ignore[arg-type]
    assert looks == []
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--class-map is for images of your own"):
        open_examiner(bag, tmp_path / "part", tmp_path / "map.toml", WEIGHTS)
    with pytest.raises(InputError, match=r"lacks train-images.*apt install dataset-fashion-mnist\)$"):
        open_examiner(bag, tmp_path / "part")


def test_from_the_command_line(
    looks: list[tuple[int, ...]], make_folder: Callable[..., Path], make_config: Callable[..., Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from kind_edge.model.checkpoint import Checkpoint, save_checkpoint
    from kind_edge.model.dit import DiT, initialise

    root, spec = make_folder(cat=12, dog=20), make_config(2).spec
    save_checkpoint(tmp_path / "pets", Checkpoint(spec, PETS, initialise(DiT(spec), 0).state_dict(), {}))
    command = ["-q", "eval", str(tmp_path / "pets"), "--images", "6", "--steps", "1"]
    with_inception = [*command, "--data", str(root), "--features", "inception", "--weights", str(WEIGHTS)]
    assert main([*with_inception, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["features"], values["images"], values["real_images"]) == ("inception", 6, 29)
    assert (values["entropy_nats"], values["class_accuracy"], values["judge_sha256"]) == (None, None, None)
    assert values["frechet"] > 0
    assert looks == [(29, 16, 16, 3), (6, 16, 16, 3)]
    assert main(with_inception) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "to 29 training images of 2 classes" in shown
    assert "accuracy and entropy are left out: the judge knows Fashion-MNIST only" in shown

    monkeypatch.setattr("kind_edge.training.sampled.draw", lambda *_: pytest.fail("drawn before the data was opened"))
    for wrong, code in ((["--data", str(tmp_path / "nope")], 4), ([], 2)):
        assert main([*command, *wrong]) == code
    assert "--config" not in capsys.readouterr().err
