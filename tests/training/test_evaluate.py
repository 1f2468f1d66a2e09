"""The shipped judge: it is what its records say, sees what it should, and refuses damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kind_edge.errors import InputError, UsageError
from kind_edge.training.classifier import Classifier, _shifted, load_classifier, save_classifier, shipped_judge_folder
from kind_edge.training.data import CLASS_NAMES, DATA_SHA256, FashionMNIST, load_fashion_mnist
from kind_edge.training.evaluate import Judge, to_pixels
from kind_edge.training.metrics import frechet_distance, gaussian_of
from kind_edge.training.reference import load_reference, make_reference, save_reference

FILES = ("classifier.safetensors", "classifier.json", "reference.safetensors", "reference.json")


@pytest.fixture(scope="module")
def data() -> FashionMNIST:
    try:
        return load_fashion_mnist()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def without_data(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.setattr(judge, "_data_root", None)
    return judge


def test_the_shipped_files_are_what_their_records_say(judge: Judge) -> None:
    folder = shipped_judge_folder()
    classifier, reference = (json.loads((folder / name).read_text()) for name in FILES[1::2])
    for record, file in ((classifier, FILES[0]), (reference, FILES[2])):
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == record["sha256"]
        assert (folder / file).stat().st_size == record["bytes"] < 1_000_000
        assert record["data_sha256"] == DATA_SHA256
    assert reference["classifier_sha256"] == classifier["sha256"]
    assert reference["real_test_images"]["judge_sha256"] == judge.judge_sha256
    assert reference["real_test_images"]["class_accuracy"] == classifier["test_accuracy"] >= 0.92


def test_real_images_score_like_real_images(judge: Judge, data: FashionMNIST) -> None:
    report = judge.score(data.test_images[:2_000], data.test_labels[:2_000], neighbours=False)
    assert report.class_accuracy is not None
    assert report.class_accuracy >= 0.91
    assert set(report.per_class_accuracy) == set(report.reference_classes) == set(CLASS_NAMES)
    assert report.frechet is not None
    assert report.frechet < 1.5  # 0.16 with all 10,000; fewer images score higher
    assert report.entropy_nats < 0.3
    assert report.marginal_entropy_nats == pytest.approx(np.log(10), abs=0.01)


def test_a_subset_of_classes_is_measured_against_its_own_training_images(judge: Judge, data: FashionMNIST) -> None:
    chosen = np.flatnonzero(np.isin(data.test_labels, (7, 8)))[:600]
    images, labels = data.test_images[chosen, :, :, None], data.test_labels[chosen]
    own = judge.score(images, labels, neighbours=False)
    everything = judge.score(images, labels, classes=range(10), neighbours=False)
    assert own.reference_classes == ("sneaker", "bag")
    assert own.frechet is not None
    assert everything.frechet is not None
    assert own.frechet < 3.0 < everything.frechet / 20


def test_recall_falls_when_one_picture_is_drawn_again_and_again(
    judge: Judge, data: FashionMNIST, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 1_000)
    bags = data.test_images[data.test_labels == 8][:400]
    varied = judge.score(bags, np.full(400, 8))
    collapsed = judge.score(np.repeat(bags[:1], 400, axis=0), np.full(400, 8))
    assert (varied.real_images, varied.reference_classes) == (1_000, ("bag",))
    assert varied.recall is not None
    assert collapsed.recall is not None
    assert varied.recall > 0.5 > 0.02 > collapsed.recall
    monkeypatch.setattr(judge, "_real", {})


def test_a_float_picture_scores_as_its_pixels_do(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert np.array_equal(to_pixels(floats), pixels[..., 0])
    blind = without_data(judge, monkeypatch)
    report = blind.score(floats * 1.0, [1, 2, 3, 4, 5])
    assert report == blind.score(pixels, [1, 2, 3, 4, 5])
    assert (report.recall, report.precision, report.real_images) == (None, None, 0)
    unlabelled = blind.score(pixels[:1])
    assert (unlabelled.frechet, unlabelled.class_accuracy, len(unlabelled.reference_classes)) == (None, None, 10)


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (np.zeros((2, 32, 32, 1), np.uint8), None, r"\[n, 28, 28, 1\] with n >= 1, got \[2, 32, 32, 1\]"),
        (np.zeros((0, 28, 28, 1), np.uint8), None, "n >= 1"),
        (np.zeros((2, 28, 28), np.int64), None, "floats in .* got int64"),
        (np.full((2, 28, 28), np.nan, np.float32), None, "2 of 2 images .* not finite"),
        (np.zeros((2, 28, 28), np.uint8), [3, 10], r"0\.\.9 .* got 3\.\.10"),
        (np.zeros((2, 28, 28), np.uint8), [3], "one label per prediction"),
    ],
)
def test_what_cannot_be_judged_is_refused(judge: Judge, images: np.ndarray, labels: object, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        judge.score(images, labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("victim", FILES)
def test_damage_is_refused(tmp_path: Path, victim: str) -> None:
    for name in FILES:
        shutil.copy(shipped_judge_folder() / name, tmp_path / name)
    content = bytearray((tmp_path / victim).read_bytes())
    content[len(content) // 3] ^= 0xFF
    (tmp_path / victim).write_bytes(content)
    with pytest.raises(InputError, match=victim.split(".")[0]):
        Judge.load(tmp_path)
    (tmp_path / victim).unlink()
    with pytest.raises(InputError, match="make them with: python -m"):
        Judge.load(tmp_path)


def test_saving_then_loading_keeps_classifier_and_reference(tmp_path: Path, data: FashionMNIST) -> None:
    torch.manual_seed(0)
    few = FashionMNIST(data.test_images[:600], data.test_labels[:600], data.test_images[:50], data.test_labels[:50], "")
    record = save_classifier(Classifier().eval(), tmp_path, {"seed": 0}, few)
    network, stored = load_classifier(tmp_path)
    assert stored == record
    save_reference(tmp_path, few)
    reference, _ = load_reference(tmp_path, record["sha256"])
    expected = make_reference(network, few)
    assert np.array_equal(reference.covariances, expected.covariances)

    with torch.inference_mode():
        features = network.features(torch.from_numpy(to_pixels(few.train_images)).unsqueeze(1) / 127.5 - 1).numpy()
    pooled, direct = reference.pooled(range(10)), gaussian_of(features)
    assert frechet_distance(*pooled, *direct) < 1e-9 * np.trace(direct.covariance)
    np.testing.assert_allclose(pooled.covariance, direct.covariance, atol=1e-9 * np.trace(direct.covariance))

    shutil.copy(shipped_judge_folder() / FILES[0], tmp_path / FILES[0])
    shutil.copy(shipped_judge_folder() / FILES[1], tmp_path / FILES[1])
    with pytest.raises(InputError, match="belongs to the classifier"):
        Judge.load(tmp_path)


def test_random_shifts_move_the_picture_and_lose_nothing_inside() -> None:
    torch.manual_seed(1)
    pixels = torch.zeros(64, 28, 28, dtype=torch.uint8)
    pixels[:, 10, 12] = 200
    places = _shifted(pixels).nonzero()
    assert len(places) == 64
    assert set((places[:, 1] - 10).tolist()) == set((places[:, 2] - 12).tolist()) == {-2, -1, 0, 1, 2}
