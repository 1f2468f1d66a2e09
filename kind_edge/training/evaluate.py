"""The judge of Fashion-MNIST pictures: how real, how varied and how much of their class generated images are.

    python -m kind_edge.training.evaluate -o DIR        # after `python -m kind_edge.training.classifier -o DIR`

writes `reference.safetensors` (statistics of the training images as the classifier sees them) and `reference.json`
(what the real test images score). A Frechet distance means something only with the judge that measured it: every
report carries the judge's hash, over classifier and reference.

Legend: n images; F = 64 features; K = 10 classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import write_file
from kind_edge.training.classifier import Classifier, embed, load_classifier, shipped_judge_folder
from kind_edge.training.data import CLASS_NAMES, DATA_SHA256, IMAGE_SIDE, find_fashion_mnist, load_fashion_mnist
from kind_edge.training.inception import Inception, RealFeatures
from kind_edge.training.metrics import (
    ClassAccuracy,
    Float64s,
    class_accuracy,
    entropy_nats,
    frechet_distance,
    gaussian_of,
    neighbour_radii_squared,
    precision_recall,
    precision_recall_with_radii,
)
from kind_edge.training.reference import REFERENCE_RECORD, Reference, load_reference, record_bytes, save_reference

__all__ = [
    "Judge",
    "QualityReport",
    "class_accuracy",
    "entropy_nats",
    "frechet_distance",
    "gaussian_of",
    "precision_recall",
]

REAL_IMAGES = 10_000
"""How many training images recall and precision are measured against, where so many are of the classes asked for."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class QualityReport:
    """What the judge says about a set of images. Every figure depends on `images`; compare equal numbers only.

    Fréchet distance, precision and recall are measured with `features`; accuracy and entropy always are the
    classifier's, and None where it does not know the classes.
    """

    images: int
    frechet: float | None  # squared distance to the training images of `reference_classes`; None for a single image
    precision: float | None  # None where no data set is installed, or for three images or fewer
    recall: float | None  # likewise
    class_accuracy: float | None  # None without labels, too
    per_class_accuracy: dict[str, float]  # by class name, for the labels that occur
    entropy_nats: float | None  # mean entropy of the prediction for one image: 0 certain .. 2.303 no idea
    marginal_entropy_nats: float | None  # of the mean prediction: 2.303 where all classes occur equally
    reference_classes: tuple[str, ...]
    real_images: int  # that precision and recall were measured against; 0 where they were not
    judge_sha256: str | None  # None where the classifier does not know the classes
    features: str  # "classifier", or "inception", whose Fréchet distance too is to `real_images` real images
    features_sha256: str  # the judge's, or that of Inception's weights
    data_sha256: str  # of the data set that the real images are from


class Judge:
    """Classifier and reference statistics, loaded and checked; `score` does the rest.

    The data set is wanted only for precision and recall. Where it is not installed, both are None.
    """

    def __init__(self, network: Classifier, reference: Reference, judge_sha256: str, data_root: Path | None) -> None:
        self._network = network
        self._reference = reference
        self._data_root = data_root
        self._real: dict[tuple[int, ...], tuple[Float64s, Float64s]] = {}
        self._real_to_inception: dict[tuple[str, tuple[int, ...]], RealFeatures] = {}
        self.judge_sha256 = judge_sha256

    @classmethod
    def load(cls, folder: Path | None = None, data_root: Path | None = None) -> Judge:
        """The judge in `folder`; without one, the judge that is shipped.

        `data_root` names the data set's folder; without it the usual places are tried, and doing without is fine.

        Raises:
            InputError: a file is missing or corrupt, or the reference belongs to another classifier; or `data_root`
                was given and lacks a file.
        """
        home = shipped_judge_folder() if folder is None else Path(folder)
        network, record = load_classifier(home)
        reference, reference_sha256 = load_reference(home, record["sha256"])
        try:
            found: Path | None = find_fashion_mnist(data_root)
        except InputError:
            if data_root is not None:
                raise
            found = None
        return cls(network, reference, _judge_sha256(record["sha256"], reference_sha256), found)

    def prepare(self, classes: Sequence[int], inception: Inception | None = None) -> None:
        """Look at the real images of these classes now, so that `score` wants for nothing.

        Raises:
            InputError: the data set is corrupt; or `inception` is given, and the data set is not installed.
        """
        chosen = _reference_classes(None, classes)
        if inception is not None:
            self._inception_features(chosen, inception)
        elif self._data_root is not None:
            self._real_features(chosen)

    def look(self, images: npt.ArrayLike) -> tuple[Float64s, Float64s]:
        """Features [n, 64] and class probabilities [n, 10] of images as `score` takes them, float64."""
        features, logits = embed(self._network, to_pixels(images))
        return features.double().numpy(), logits.double().softmax(dim=1).numpy()

    def score(
        self,
        images: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[int] | None = None,
        neighbours: bool = True,
        inception: Inception | None = None,
    ) -> QualityReport:
        """Judge images: uint8 [n, 28, 28, 1], or floats in [-1, 1] (the axis of channels may lead, or be absent).

        Args:
            images: floats are rounded to 8 bits first, so that a picture and its PNG score alike.
            labels: [n], what each image should show, as an index into CLASS_NAMES; None for unconditional images.
            classes: the classes whose training images are the reference; default: the labels that occur, else all.
            neighbours: False leaves out precision and recall, which take most of the time.
            inception: measures Fréchet distance, precision and recall in the classifier's place; needs the data set.

        Raises:
            UsageError: shapes, values, labels or classes are not as described.
            InputError: `inception` is given, and the data set is not installed.
        """
        features, probabilities = self.look(images)
        wanted = None if labels is None else _checked_classes(labels, "labels")
        reference_classes = _reference_classes(wanted, classes)
        accuracy = None if wanted is None else class_accuracy(probabilities.argmax(axis=1), wanted)
        report = self._report(features, probabilities, accuracy, reference_classes, neighbours and inception is None)
        return report if inception is None else self._by_inception(report, inception, to_pixels(images))

    def _report(
        self,
        features: Float64s,
        probabilities: Float64s,
        accuracy: ClassAccuracy | None,
        reference_classes: tuple[int, ...],
        neighbours: bool,
    ) -> QualityReport:
        compared = None
        if neighbours and self._data_root is not None and len(features) > NEIGHBOURS:
            real, radii_squared = self._real_features(reference_classes)
            compared = precision_recall_with_radii(real, radii_squared, features, NEIGHBOURS)
        return QualityReport(
            images=len(features),
            frechet=self._frechet(features, reference_classes),
            precision=compared.precision if compared else None,
            recall=compared.recall if compared else None,
            class_accuracy=accuracy.overall if accuracy else None,
            per_class_accuracy={CLASS_NAMES[k]: share for k, share in accuracy.per_class.items()} if accuracy else {},
            entropy_nats=entropy_nats(probabilities),
            marginal_entropy_nats=entropy_nats(probabilities.mean(axis=0)),
            reference_classes=tuple(CLASS_NAMES[k] for k in reference_classes),
            real_images=len(real) if compared else 0,
            judge_sha256=self.judge_sha256,
            features="classifier",
            features_sha256=self.judge_sha256,
            data_sha256=DATA_SHA256,
        )

    def _by_inception(
        self, report: QualityReport, inception: Inception, pixels: npt.NDArray[np.uint8]
    ) -> QualityReport:
        """The report with Inception's figures; what real images look like to it is computed once and cached."""
        classes = tuple(CLASS_NAMES.index(name) for name in report.reference_classes)
        return with_inception(report, inception, pixels[..., None], self._inception_features(classes, inception))

    def _inception_features(self, classes: tuple[int, ...], inception: Inception) -> RealFeatures:
        known = inception.weights_sha256, classes
        if known not in self._real_to_inception:
            key = f"{DATA_SHA256} train {REAL_IMAGES} of {classes}"
            self._real_to_inception[known] = inception.real_features(
                lambda: [self._real_images(classes)[..., None]], key, NEIGHBOURS
            )
        return self._real_to_inception[known]

    def _frechet(self, features: Float64s, classes: tuple[int, ...]) -> float | None:
        if len(features) < 2:
            return None
        return frechet_distance(*self._reference.pooled(classes), *gaussian_of(features))

    def _real_features(self, classes: tuple[int, ...]) -> tuple[Float64s, Float64s]:
        """Features and squared radii of the real images of these classes."""
        if classes not in self._real:
            features = embed(self._network, self._real_images(classes))[0].double().numpy()
            self._real[classes] = features, neighbour_radii_squared(features, NEIGHBOURS)
        return self._real[classes]

    def _real_images(self, classes: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """REAL_IMAGES training images [n, 28, 28] of these classes, the same ones every time."""
        data = load_fashion_mnist(self._data_root)
        return data.train_images[reference_rows(data.train_labels, classes)]


def reference_rows(labels: npt.NDArray[np.int64], classes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where REAL_IMAGES images of these classes lie, or all if there are fewer: the same ones every time."""
    order = np.random.default_rng(0).permutation(len(labels))
    return order[np.isin(labels[order], classes)][:REAL_IMAGES]


def with_inception(
    report: QualityReport, inception: Inception, images: npt.NDArray[np.uint8], real: RealFeatures
) -> QualityReport:
    """The report with what Inception says of images uint8 [n, H, W, ch] beside `real` ones."""
    figures = inception.compare(images, real, NEIGHBOURS)
    return dataclasses.replace(
        report,
        frechet=figures.frechet,
        precision=figures.precision,
        recall=figures.recall,
        real_images=len(real.features),
        features="inception",
        features_sha256=figures.weights_sha256,
    )


def to_pixels(images: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Images as `Judge.score` takes them, as uint8 [n, 28, 28].

    Raises:
        UsageError: another shape or type, no image at all, or values that are not finite.
    """
    array = np.asarray(images)
    side = IMAGE_SIDE
    if array.ndim == 0 or array.shape[1:] not in {(side, side, 1), (1, side, side), (side, side)} or len(array) == 0:
        raise UsageError(f"the judge wants images [n, {side}, {side}, 1] with n >= 1, got {list(array.shape)}")
    array = array.reshape(len(array), side, side)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UsageError(f"the judge wants uint8 images, or floats in [-1, 1]; got {array.dtype}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=(1, 2)).sum())
        raise UsageError(
            f"{bad} of {len(array)} images hold values that are not finite; the sampler that drew them diverged"
        )
    return np.rint((np.clip(array.astype(np.float64), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def _checked_classes(values: npt.ArrayLike, what: str) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"{what} must be a list of at least one class index, got {array.dtype} {list(array.shape)}")
    if array.min() < 0 or array.max() >= len(CLASS_NAMES):
        raise UsageError(
            f"{what} must be 0..{len(CLASS_NAMES) - 1} (indices into CLASS_NAMES), got {array.min()}..{array.max()}"
        )
    return array.astype(np.int64)


def _reference_classes(labels: npt.NDArray[np.int64] | None, classes: Sequence[int] | None) -> tuple[int, ...]:
    if classes is not None:
        return tuple(sorted({int(k) for k in _checked_classes(classes, "classes")}))
    return tuple(range(len(CLASS_NAMES))) if labels is None else tuple(int(k) for k in np.unique(labels))


def _judge_sha256(classifier_sha256: str, reference_sha256: str) -> str:
    return hashlib.sha256((classifier_sha256 + reference_sha256).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Compute the reference statistics for a classifier and score the real test images with it."""
    parser = argparse.ArgumentParser(prog="python -m kind_edge.training.evaluate", description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder that holds the classifier")
    parser.add_argument("--data", type=Path, help="folder with the four Fashion-MNIST files")
    chosen = parser.parse_args(arguments)
    data = load_fashion_mnist(chosen.data)
    record = save_reference(chosen.output, data)
    report = Judge.load(chosen.output, chosen.data).score(data.test_images, data.test_labels)
    record |= {"real_test_images": dataclasses.asdict(report)}
    write_file(chosen.output / REFERENCE_RECORD, record_bytes(record))
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
