"""How good a set of generated images is: pure functions over features and predictions, numpy alone.

Legend: n, m numbers of images; F features per image; K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kind_edge.errors import UsageError

Floats = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]

_BLOCK_ROWS = 512  # rows of a distance matrix held at once: 512 x 10,000 float64 are 41 MB


class Gaussian(NamedTuple):
    """Mean [F] and covariance [F, F] of a set of features, float64."""

    mean: Float64s
    covariance: Float64s


class Root(NamedTuple):
    """Mean [F] and a factor [F, r] of the covariance, root root^T, float64."""

    mean: Floats
    root: Float64s


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


class ClassAccuracy(NamedTuple):
    """The share of images that are taken for what they should show, overall and for each label that occurs."""

    overall: float
    per_class: dict[int, float]


def gaussian_of(features: Floats) -> Gaussian:
    """Mean and unbiased covariance, in float64, of features [n, F]; n at least 2."""
    if len(features) < 2:
        raise UsageError(f"a covariance needs at least 2 images, got {len(features)}; generate more")
    exact = np.asarray(features, dtype=np.float64)
    return Gaussian(exact.mean(axis=0), np.cov(exact, rowvar=False).reshape(exact.shape[1], exact.shape[1]))


def frechet_distance(mu1: Floats, cov1: Floats, mu2: Floats, cov2: Floats) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)): the squared Frechet distance of two Gaussians.

    Dowson and Landau 1982; over image features Heusel et al. 2017. `mu` [F], `cov` [F, F], symmetric and positive
    semi-definite, singular allowed. The trace of the root is the sum of the singular values of
    cov1^(1/2) cov2^(1/2): no matrix root, no complex numbers, and no square root of a rounding error where a
    covariance is singular.
    """
    return frechet_distance_of_roots(Root(mu1, _root_factor(cov1)), Root(mu2, _root_factor(cov2)))


def root_of(features: Floats) -> Root:
    """Mean and root of the unbiased covariance of features [n, F], n at least 2, through a QR: r = min(n, F).

    Where F is large this is faster than the covariance and its eigenvectors, by far where n < F, and loses no digits to
    a square.
    """
    if len(features) < 2:
        raise UsageError(f"a covariance needs at least 2 images, got {len(features)}; generate more")
    exact = np.asarray(features, dtype=np.float64)
    mean = exact.mean(axis=0)
    triangle: Float64s = np.linalg.qr((exact - mean) / np.sqrt(len(exact) - 1), mode="r")  # type: ignore[assignment]
    return Root(mean, triangle.T)


def frechet_distance_of_roots(one: Root, other: Root) -> float:
    """`frechet_distance` of two Gaussians by their roots: any factors of the covariances will do."""
    trace_of_root = np.linalg.svd(one.root.T @ other.root, compute_uv=False).sum()
    offset = np.asarray(one.mean, dtype=np.float64) - np.asarray(other.mean, dtype=np.float64)
    # |root|^2 is the trace of the covariance after clipping: it cancels exactly what the product holds.
    distance = offset @ offset + (one.root**2).sum() + (other.root**2).sum() - 2.0 * trace_of_root
    return max(float(distance), 0.0)


def _root_factor(covariance: Floats) -> Float64s:
    """A with A A^T = covariance, from its eigenvectors; rounding below zero is clipped."""
    exact = np.asarray(covariance, dtype=np.float64)
    values, vectors = np.linalg.eigh((exact + exact.T) / 2.0)
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def precision_recall(real_features: Floats, fake_features: Floats, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of Kynkaanniemi et al. 2019, by k nearest neighbours.

    A set's support is the union of balls, one round each member, that reach to its k-th nearest neighbour in the set.
    Precision is the share of fakes [m, F] within the support of the reals [n, F]; recall the share of reals within the
    support of the fakes. Both depend on n and m: compare only figures of equally large sets. Time and memory: n x m
    distances in blocks; about five seconds on one core for 10,000 x 10,000 x 64.

    Raises:
        UsageError: a set has no k-th neighbour.
    """
    return precision_recall_with_radii(real_features, neighbour_radii_squared(real_features, k), fake_features, k)


def precision_recall_with_radii(
    real_features: Floats, real_radii_squared: Float64s, fake_features: Floats, k: int = 3
) -> PrecisionRecall:
    """`precision_recall` where the reals' `neighbour_radii_squared` are known: they serve many sets of fakes."""
    fake_radii_squared = neighbour_radii_squared(fake_features, k)
    fake_is_covered = np.zeros(len(fake_features), dtype=bool)
    covered_reals = 0
    for start, squared in _squared_distances(real_features, fake_features):  # [rows, m]
        radii = real_radii_squared[start : start + len(squared), None]
        fake_is_covered |= (squared <= radii).any(axis=0)
        covered_reals += int((squared <= fake_radii_squared).any(axis=1).sum())
    return PrecisionRecall(float(fake_is_covered.mean()), covered_reals / len(real_features))


def neighbour_radii_squared(features: Floats, k: int = 3) -> Float64s:
    """The squared distance from each row of [n, F] to its k-th nearest other row: [n].

    Raises:
        UsageError: there are not more than k rows, or k is not positive.
    """
    if not 1 <= k < len(features):
        raise UsageError(f"a k-th neighbour with k = {k} needs k >= 1 and at least {k + 1} images, got {len(features)}")
    radii = np.empty(len(features))
    for start, squared in _squared_distances(features, features):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf  # nobody is their own neighbour
        radii[start : start + len(squared)] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(left: Floats, right: Floats) -> Iterator[tuple[int, Float64s]]:
    """Blocks of rows of the matrix |left_i - right_j|^2, each with its first row's index."""
    # Moved to a common origin first, as |a|^2 + |b|^2 - 2ab cancels badly for points far from zero.
    origin = np.asarray(right, dtype=np.float64).mean(axis=0)
    rows, columns = np.asarray(left, dtype=np.float64) - origin, np.asarray(right, dtype=np.float64) - origin
    column_norms = (columns**2).sum(axis=1)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        squared = block @ (-2.0 * columns.T)
        squared += column_norms
        squared += (block**2).sum(axis=1)[:, None]
        yield start, np.maximum(squared, 0.0, out=squared)


def class_accuracy(predictions: npt.NDArray[np.integer], labels: npt.NDArray[np.integer]) -> ClassAccuracy:
    """The share of `predictions` [n] that equal `labels` [n], over all images and for each label that occurs.

    Raises:
        UsageError: no images, or not one label per prediction.
    """
    if len(predictions) == 0 or np.shape(predictions) != np.shape(labels):
        raise UsageError(
            f"class accuracy needs one label per prediction and at least one image: got predictions "
            f"{np.shape(predictions)} and labels {np.shape(labels)}"
        )
    correct = np.asarray(predictions) == np.asarray(labels)
    present = np.unique(labels)
    return ClassAccuracy(
        float(correct.mean()), {int(label): float(correct[labels == label].mean()) for label in present}
    )


def entropy_nats(probabilities: Floats) -> float:
    """The mean entropy of the rows of [n, K], in nats: 0 (each prediction is certain) .. ln K (no idea).

    For one distribution [K], its own entropy.
    """
    exact = np.atleast_2d(np.asarray(probabilities, dtype=np.float64))
    logarithms = np.log(np.where(exact > 0.0, exact, 1.0))  # 0 log 0 = 0
    return float(-(exact * logarithms).sum(axis=1).mean()) + 0.0  # + 0.0 turns -0.0 into 0.0
