"""Inception through torch-fidelity, with weights drawn at random: the real network, nothing learned."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kind_edge.errors import InputError, UsageError
from kind_edge.training.data import FashionMNIST, load_fashion_mnist
from kind_edge.training.evaluate import Judge
from kind_edge.training.inception import FEATURES, Inception, _network_class

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("torch-fidelity is not installed", allow_module_level=True)

K = 3


def save_random_weights(folder: Path) -> None:
    class Blank(_network_class()):  # type: ignore[misc]
        def load_state_dict(self, *_: object) -> None:
            """Keeps what the constructor drew."""

    torch.manual_seed(0)
    torch.save({}, folder / "none.pth")
    network = Blank("inception", ["2048"], feature_extractor_weights_path=str(folder / "none.pth"))
    torch.save(network.state_dict(), folder / "weights.pth")


@pytest.fixture(scope="module")
def weights(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("inception", save_random_weights) / "weights.pth"


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    return Inception.load(weights)


@pytest.fixture(scope="module")
def data() -> FashionMNIST:
    try:
        return load_fashion_mnist()
    except InputError as error:
        pytest.skip(str(error))


def test_what_real_images_look_like_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features that cost nothing: pixels times a fixed random matrix."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    projection = np.random.default_rng(1).normal(size=(28 * 28, FEATURES)).astype(np.float32)
    monkeypatch.setattr(Inception, "embed", lambda _, images: images.reshape(len(images), -1) @ projection)
    inception = Inception(torch.nn.Identity(), "some weights")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 1), dtype=np.uint8)
    asked = []

    def images() -> list[np.ndarray]:
        asked.append(1)
        return [pixels[:2], pixels[2:6]]

    real = inception.real_features(images, "six", K)
    itself, other = inception.compare(pixels[:6], real, K), inception.compare(pixels[6:], real, K)
    assert itself.frechet == pytest.approx(0.0, abs=1e-6 * float(np.square(real.root.root).sum()))
    assert (itself.precision, itself.recall) == (1.0, 1.0)
    assert other.frechet is not None
    assert other.frechet > 0
    assert inception.compare(pixels[:3], real, K).recall is None  # three images have no third neighbour

    again = inception.real_features(images, "six", K)
    assert len(asked) == 1
    assert np.array_equal(again.root.root, real.root.root)
    (kept,) = (tmp_path / "kind-edge" / "inception").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])  # cut off by a full disk, say
    assert np.array_equal(inception.real_features(images, "six", K).features, real.features)
    assert len(asked) == 2
    Inception(torch.nn.Identity(), "other weights").real_features(images, "six", K)
    inception.real_features(images, "other images", K)
    assert len(asked) == 4


def test_the_judge_puts_inceptions_figures_in_the_place_of_its_own(
    inception: Inception, data: FashionMNIST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kind_edge.training.evaluate.REAL_IMAGES", 5)
    judge = Judge.load()
    images, labels = data.test_images[:4], data.test_labels[:4]
    own, report = judge.score(images, labels, neighbours=False), judge.score(images, labels, inception=inception)
    assert (report.features, report.features_sha256) == ("inception", inception.weights_sha256)
    assert report.real_images == 5
    assert report.frechet != own.frechet
    assert None not in (report.frechet, report.precision, report.recall)
    assert (report.class_accuracy, report.entropy_nats) == (own.class_accuracy, own.entropy_nats)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.witness),)


def test_what_is_no_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(InputError, match=r"no such file; want weights-inception"):
        Inception.load(path)
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="not the weights of this network"):
        Inception.load(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(InputError, match="holds a list"):
        Inception.load(path)
    path.write_bytes(b"PK\x03\x04 not a file of PyTorch")
    with pytest.raises(InputError, match="tensors alone"):
        Inception.load(path)
    torch.save({"fc.weight": Payload(tmp_path / "witness")}, path)
    with pytest.raises(InputError, match="tensors alone"):
        Inception.load(path)
    assert not (tmp_path / "witness").exists()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"kind-edge\[inception\]"):
        Inception.load(path)
