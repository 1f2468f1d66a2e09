"""What the judge knows of real images: statistics of the training images' features, and their file.

Legend: K = 10 classes; F = 64 features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from kind_edge.bounded import read_bytes, read_object
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import write_file
from kind_edge.training.classifier import FEATURES, Classifier, embed, load_classifier
from kind_edge.training.data import CLASS_NAMES, FashionMNIST
from kind_edge.training.metrics import Float64s, Gaussian, gaussian_of

REFERENCE_FILE = "reference.safetensors"
REFERENCE_RECORD = "reference.json"
SCHEMA_VERSION = 1
_TRIANGLE = np.triu_indices(FEATURES)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the training images' features, class by class, so that any subset of classes has its own."""

    counts: npt.NDArray[np.int64]  # [K]
    means: Float64s  # [K, F]
    covariances: Float64s  # [K, F, F], of the population: divided by the count

    def pooled(self, classes: Sequence[int]) -> Gaussian:
        """Mean and unbiased covariance over all training images of these classes."""
        chosen = list(classes)
        total = self.counts[chosen].sum()
        weights = self.counts[chosen] / total
        mean = weights @ self.means[chosen]
        offsets = self.means[chosen] - mean  # [k, F]
        within = np.einsum("k,kfg->fg", weights, self.covariances[chosen])
        between = np.einsum("k,kf,kg->fg", weights, offsets, offsets)
        return Gaussian(mean, (within + between) * total / (total - 1))


def make_reference(network: Classifier, data: FashionMNIST) -> Reference:
    """Statistics of all 60,000 training images, in float64; less than a minute on one core."""
    features, _ = embed(network, data.train_images)
    per_class = [gaussian_of(features.numpy()[data.train_labels == label]) for label in range(len(CLASS_NAMES))]
    counts = np.bincount(data.train_labels, minlength=len(CLASS_NAMES))
    to_population = ((counts - 1) / counts)[:, None, None]
    return Reference(
        counts=counts.astype(np.int64),
        means=np.stack([gaussian.mean for gaussian in per_class]),
        covariances=np.stack([gaussian.covariance for gaussian in per_class]) * to_population,
    )


def save_reference(folder: Path, data: FashionMNIST) -> dict[str, Any]:
    """Compute and write the reference for the classifier in `folder`.

    Returns the record, which is also `reference.json`.
    """
    network, classifier_record = load_classifier(folder)
    reference = make_reference(network, data)
    # Symmetric: the upper triangle says it all. Contiguous, because safetensors stores an array's bytes in the order of
    # memory, whatever its strides, and an index behind a slice leaves the axes transposed there.
    triangles = np.ascontiguousarray(reference.covariances[:, *_TRIANGLE])
    content = safetensors.numpy.save({"counts": reference.counts, "means": reference.means, "covariances": triangles})
    record = {
        "schema_version": SCHEMA_VERSION,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "classifier_sha256": classifier_record["sha256"],
        "data_sha256": data.data_sha256,
        "training_images": len(data.train_labels),
        "command": "python -m kind_edge.training.evaluate -o DIR",
    }
    write_file(folder / REFERENCE_FILE, content)
    write_file(folder / REFERENCE_RECORD, record_bytes(record))
    return record


def load_reference(folder: Path, classifier_sha256: str) -> tuple[Reference, str]:
    """The reference in `folder` and its sha256.

    Raises:
        InputError: a file is missing or corrupt, or was made for another classifier than `classifier_sha256`.
    """
    path, record_path = folder / REFERENCE_FILE, folder / REFERENCE_RECORD
    try:
        content, record = read_bytes(path, 2**30), read_object(record_path)
        wanted, wanted_classifier = record["sha256"], record["classifier_sha256"]
    except (InputError, KeyError, TypeError) as error:
        raise InputError(
            f"no usable reference statistics in {folder} ({error}); wanted {REFERENCE_FILE} and {REFERENCE_RECORD}; "
            f"make them with: python -m kind_edge.training.evaluate -o {folder}"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != wanted:
        raise InputError(
            f"{path} is corrupt: its sha256 is {sha256}, {record_path} says {wanted}; restore both together"
        )
    if classifier_sha256 != wanted_classifier:
        raise InputError(
            f"{path} belongs to the classifier {wanted_classifier}, but {folder} holds {classifier_sha256}; "
            f"make it anew with: python -m kind_edge.training.evaluate -o {folder}"
        )
    tensors = safetensors.numpy.load(content)
    covariances = np.zeros((len(CLASS_NAMES), FEATURES, FEATURES))
    covariances[:, *_TRIANGLE] = tensors["covariances"]
    covariances[:, *_TRIANGLE[::-1]] = tensors["covariances"]
    return Reference(tensors["counts"], tensors["means"], covariances), sha256


def record_bytes(record: dict[str, Any]) -> bytes:
    """A record as its file holds it: indented JSON and a line's end."""
    return (json.dumps(record, indent=2) + "\n").encode()
