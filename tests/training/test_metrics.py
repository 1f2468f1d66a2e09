"""The metrics against closed forms, brute force and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.errors import UsageError
from kind_edge.training.metrics import (
    class_accuracy,
    entropy_nats,
    frechet_distance,
    frechet_distance_of_roots,
    gaussian_of,
    precision_recall,
    root_of,
)

seeds = st.integers(0, 2**32 - 1)


def correlated(generator: np.random.Generator, count: int, width: int) -> np.ndarray:
    return generator.normal(size=(count, width)) @ generator.normal(size=(width, width)) + generator.normal(size=width)


@given(seed=seeds, width=st.integers(1, 12), rank_deficient=st.booleans())
def test_frechet_distance_is_a_symmetric_distance_that_rotation_leaves_alone(
    seed: int, width: int, rank_deficient: bool
) -> None:
    generator = np.random.default_rng(seed)
    count = max(2, width // 2) if rank_deficient else 60  # fewer images than features: singular covariances
    one, other = correlated(generator, count, width), correlated(generator, count, width)
    rotation = np.linalg.qr(generator.normal(size=(width, width)))[0]

    distance = frechet_distance(*gaussian_of(one), *gaussian_of(other))
    tolerance = 1e-9 * (1 + np.square(one).mean(axis=0).sum() + np.square(other).mean(axis=0).sum())
    assert frechet_distance(*gaussian_of(one), *gaussian_of(one)) <= tolerance
    assert distance > 0
    assert frechet_distance(*gaussian_of(other), *gaussian_of(one)) == pytest.approx(distance, abs=tolerance)
    rotated = frechet_distance(*gaussian_of(one @ rotation), *gaussian_of(other @ rotation))
    assert rotated == pytest.approx(distance, abs=tolerance)


def test_frechet_distance_of_known_gaussians() -> None:
    # Axis-parallel Gaussians: (mean difference)^2 + sum of (difference of standard deviations)^2.
    mean1, mean2 = np.array([1.0, 0.0, -2.0]), np.array([0.0, 2.0, -2.0])
    deviations1, deviations2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.0, 0.5])
    distance = frechet_distance(mean1, np.diag(deviations1**2), mean2, np.diag(deviations2**2))
    assert distance == pytest.approx(5.0 + 4.0 + 0.0 + 0.25)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    generator = np.random.default_rng(1)
    one, other = gaussian_of(correlated(generator, 500, 16)), gaussian_of(correlated(generator, 500, 16))
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
    expected = np.square(one.mean - other.mean).sum() + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(*one, *other) == pytest.approx(expected, rel=1e-9)


@given(seed=seeds, count=st.integers(2, 30))
def test_roots_of_features_give_the_distance_of_their_gaussians(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)  # fewer images than features, and more
    one, other = correlated(generator, count, 12), correlated(generator, 40, 12)
    expected = frechet_distance(*gaussian_of(one), *gaussian_of(other))
    assert frechet_distance_of_roots(root_of(one), root_of(other)) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    with pytest.raises(UsageError, match="at least 2 images"):
        root_of(one[:1])


def by_definition(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall with every distance written out."""

    def within(points: np.ndarray, support: np.ndarray) -> float:
        own = np.linalg.norm(support[:, None] - support[None], axis=2)
        radii = np.sort(own, axis=1)[:, k]  # the nearest of all is the point itself
        return float((np.linalg.norm(points[:, None] - support[None], axis=2) <= radii).any(axis=1).mean())

    return within(fake, real), within(real, fake)


@given(seed=seeds, k=st.integers(1, 4), offset=st.floats(0, 3))
def test_precision_and_recall_are_their_definition(seed: int, k: int, offset: float) -> None:
    generator = np.random.default_rng(seed)
    real, fake = generator.normal(size=(40, 3)), generator.normal(size=(25, 3)) * 0.7 + offset
    assert precision_recall(real, fake, k) == pytest.approx(by_definition(real, fake, k))


def test_recall_tells_variety_and_precision_realism() -> None:
    generator = np.random.default_rng(2)
    real = generator.normal(size=(1_200, 8)).astype(np.float32)  # more rows than one block
    assert precision_recall(real, real) == (1.0, 1.0)
    collapsed = real[:1] + 1e-3 * generator.normal(size=(1_200, 8))
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0
    assert recall < 0.01
    assert precision_recall(real, real + 100.0) == (0.0, 0.0)
    with pytest.raises(UsageError, match="at least 4 images, got 3"):
        precision_recall(real, real[:3])


def test_accuracy_and_entropy() -> None:
    accuracy = class_accuracy(np.array([0, 0, 5, 1]), np.array([0, 0, 0, 1]))
    assert accuracy == (0.75, {0: pytest.approx(2 / 3), 1: 1.0})
    with pytest.raises(UsageError, match="one label per prediction"):
        class_accuracy(np.array([0, 1]), np.array([0]))
    assert entropy_nats(np.eye(10)) == 0.0
    assert entropy_nats(np.full((3, 10), 0.1)) == pytest.approx(np.log(10))
    assert entropy_nats(np.array([0.5, 0.5, 0.0])) == pytest.approx(np.log(2))
