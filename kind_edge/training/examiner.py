"""Whom a model's images are judged by, and beside which real ones: opened and checked before any image is drawn.

Of Fashion-MNIST that is the shipped judge. Of other classes its classifier knows nothing, so there Inception compares
with the images that the model was trained on, prepared as for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError
from kind_edge.model.spec import ModelSpec
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import CLASS_NAMES, IMAGE_SIDE, TrainingData
from kind_edge.training.evaluate import NEIGHBOURS, Judge, QualityReport, reference_rows, with_inception
from kind_edge.training.inception import Inception, RealFeatures
from kind_edge.training.open import dataset_at, open_data
from kind_edge.training.sources import WANTED

BLOCK = 500
"""Real images in memory at a time: 98 MB at 256 x 256."""

_INCEPTION = "--features inception --weights FILE"


@dataclass(frozen=True)
class Subject:
    """What a model or a bundle draws: square images of these classes. A bundle does not say its `pixels_per_latent`."""

    class_names: tuple[str, ...]
    channels: int
    size: int
    pixels_per_latent: int = 1

    @property
    def latent(self) -> bool:
        return self.pixels_per_latent > 1 or self.channels not in (1, 3)

    @property
    def judged(self) -> bool:
        """Whether the shipped judge knows classes and shape."""
        return set(self.class_names) <= set(CLASS_NAMES) and (self.channels, self.size) == (1, IMAGE_SIDE)


@dataclass(frozen=True)
class Own:
    """Real images of the user's, as Inception sees them."""

    inception: Inception
    features: RealFeatures
    data_sha256: str


@dataclass(frozen=True)
class Examiner:
    """Judges images of one subject. `judge` is None where it does not know them; then there is `own`."""

    subject: Subject
    judge: Judge | None
    own: Own | None = None
    inception: Inception | None = None
    """In the place of the judge's features, where the real images are Fashion-MNIST's."""

    def score(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> QualityReport:
        """Of images uint8 [n, H, W, ch] that should show the subject's classes `labels` [n]."""
        judged = None
        if self.judge is not None:
            wanted = np.array([CLASS_NAMES.index(name) for name in self.subject.class_names])[labels]
            judged = self.judge.score(images, wanted, neighbours=self.own is None, inception=self.inception)
        if self.own is None:
            assert judged is not None
            return judged
        report = _own_report(self.subject, self.own, len(images), judged)
        return with_inception(report, self.own.inception, images, self.own.features)


def open_examiner(
    subject: Subject,
    data: Path | None = None,
    class_map: Path | None = None,
    weights: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Examiner:
    """The shipped judge, Inception with the `weights` of a file, or both, with the real images to compare with.

    `data` and `class_map` are as in `open_data`; without `data` the real images are Fashion-MNIST's.

    Raises:
        UsageError: nobody could judge this, or the choices contradict each other.
        InputError: weights or data cannot be read, or are not what they should be.
    """
    if subject.latent:
        raise UsageError(
            f"the model draws latents ({subject.channels} channels), and what is judged are pictures: those need the "
            "decoder of its autoencoder, which no checkpoint holds. Make a bundle with kind-edge export "
            "--autoencoder DIR, and evaluate that"
        )
    own = class_map is not None or (data is not None and dataset_at(data) == "files")
    if own and data is None:
        raise UsageError("--class-map says how the classes of --data are called; give that too, or leave it out")
    if class_map is not None and data is not None and dataset_at(data) == "fashion-mnist":
        raise UsageError(f"--class-map is for images of your own, and {data} holds Fashion-MNIST's files; leave it out")
    if data is not None and not data.exists() and "{" not in str(data):
        raise InputError(
            f"--data {data}: no such file or folder; want the images that the model was trained on: the folder of "
            f"Fashion-MNIST's files, or {WANTED}"
        )
    if not subject.judged or own:
        _check_choices(subject, data, weights)
    inception = None if weights is None else Inception.load(weights)
    judge = None
    if subject.judged:
        judge = Judge.load(data_root=None if own else data)
        if not own:
            judge.prepare([CLASS_NAMES.index(name) for name in subject.class_names], inception)
            return Examiner(subject, judge, inception=inception)
    assert data is not None
    assert inception is not None
    return Examiner(subject, judge, _open_own(subject, data, class_map, inception, report))


def _check_choices(subject: Subject, data: Path | None, weights: Path | None) -> None:
    """Where the shipped judge cannot compare, Inception must, and it needs real images."""
    missing = [] if data is not None else ["--data DIR|SHARDS (the images that it was trained on)"]
    missing += [] if weights is not None else [_INCEPTION]
    if not missing:
        return
    unknown = [name for name in subject.class_names if name not in CLASS_NAMES]
    drawn = f"images of {subject.size} x {subject.size} pixels in {subject.channels} channels"
    if unknown:
        drawn = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    what = f"the model draws {drawn}" if not subject.judged else "--data names images of your own"
    raise UsageError(
        f"the shipped feature network knows Fashion-MNIST only ({IMAGE_SIDE} x {IMAGE_SIDE} grey images of its ten "
        f"classes), and {what}; give {' and '.join(missing)}"
    )


def _open_own(
    subject: Subject, data: Path, class_map: Path | None, inception: Inception, report: Callable[[str], None]
) -> Own:
    names = subject.class_names
    # Of a spec `open_data` reads what the images are like; the network that this one describes is never made.
    spec = ModelSpec(
        subject.size, subject.channels, patch_size=1, width=4, depth=1, heads=1, num_classes=len(names), factored=False
    )
    config = TrainConfig(spec, dataset_at(data))
    cpu = torch.device("cpu")
    training = open_data(config, data, only=names, class_map=class_map, device=cpu, report=report).training
    rows = np.sort(reference_rows(training.labels.numpy(), range(len(names))))
    if len(rows) <= NEIGHBOURS:
        raise InputError(f"--data {data}: {len(rows)} images to compare with; want at least {NEIGHBOURS + 1}")

    def blocks() -> Iterator[NDArray[np.uint8]]:
        report(f"what {len(rows)} real images look like to Inception (later runs remember)")
        yield from _pixels(training, rows)

    key = f"{training.sha256} train {len(rows)}"
    return Own(inception, inception.real_features(blocks, key, NEIGHBOURS), training.sha256)


def _pixels(data: TrainingData, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Blocks uint8 [m, H, W, ch]."""
    for start in range(0, len(rows), BLOCK):
        yield data.stored(torch.from_numpy(rows[start : start + BLOCK])).permute(0, 2, 3, 1).numpy()


def _own_report(subject: Subject, own: Own, images: int, judged: QualityReport | None) -> QualityReport:
    """What the judge says of classes, where it knows them; of figures beside real images none yet."""
    return QualityReport(
        images=images,
        frechet=None,
        precision=None,
        recall=None,
        class_accuracy=judged.class_accuracy if judged else None,
        per_class_accuracy=judged.per_class_accuracy if judged else {},
        entropy_nats=judged.entropy_nats if judged else None,
        marginal_entropy_nats=judged.marginal_entropy_nats if judged else None,
        reference_classes=subject.class_names,
        real_images=0,
        judge_sha256=judged.judge_sha256 if judged else None,
        features="inception",
        features_sha256=own.inception.weights_sha256,
        data_sha256=own.data_sha256,
    )
