"""Whitened truncation is the optimum it claims to be, and gives the same factors every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kind_edge.model.calibration import calibrate_on_images
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.truncation import SortedFactors, Whitening, fold_matrix, sorted_factors


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(seed: int, m: int, count: int = 500) -> Tensor:
    """Correlated inputs [count, m] with a spread of scales, as layers see them."""
    return random(seed, count, m) * torch.logspace(0, -2, m, dtype=torch.float64) @ random(seed + 1, m, m)


def product(factors: SortedFactors) -> Tensor:
    return factors.U * factors.s @ factors.V.T


def output_error(x: Tensor, wanted: Tensor, got: Tensor) -> float:
    return float((x @ (wanted - got).T).square().sum() / len(x))


def reduced_rank_regression(x: Tensor, w: Tensor, rank: int) -> Tensor:
    """The best rank-r map from x to x W^T in least squares, by another way: project the outputs on their own
    leading directions (Izenman, 1975)."""
    outputs = x @ w.T
    directions = torch.linalg.eigh(outputs.T @ outputs).eigenvectors[:, -rank:]
    return directions @ directions.T @ w


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10), st.booleans(), st.integers(0, 5))
def test_full_rank_is_the_product_and_components_fall(n: int, m: int, k: int, whitened: bool, seed: int) -> None:
    a, b = random(seed, n, k), random(seed + 9, m, k)
    whitening = Whitening.of(inputs_of(seed, m).T @ inputs_of(seed, m)) if whitened else None
    factors = sorted_factors(a, b, whitening)
    rank = min(n, m, k)
    assert (factors.U.shape, factors.s.shape, factors.V.shape) == ((n, rank), (rank,), (m, rank))
    torch.testing.assert_close(product(factors), a @ b.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(factors.U.T @ factors.U, torch.eye(rank, dtype=torch.float64))
    assert (factors.s.diff() <= 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_whitened_truncation_is_optimal_at_every_rank(seed: int) -> None:
    n, m, k = 12, 16, 10
    a, b, x = random(seed, n, k), random(seed + 5, m, k), inputs_of(seed, m)
    w, covariance = a @ b.T, x.T @ x / len(x)
    plain, whitened = sorted_factors(a, b, None), sorted_factors(a, b, Whitening.of(covariance))
    for rank in range(1, k):
        ours = output_error(x, w, product(whitened.cut(rank)))
        assert ours < output_error(x, w, product(plain.cut(rank)))
        # Eckart-Young: what is lost is the energy of the components left out.
        assert ours == pytest.approx(float(whitened.s[rank:].square().sum()), rel=1e-4)
        assert ours == pytest.approx(output_error(x, w, reduced_rank_regression(x, w, rank)), rel=1e-4)
    assert output_error(x, w, product(whitened.cut(k))) < 1e-15 * float(whitened.s.square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_whitened_on_both_sides_it_is_optimal_for_what_the_outputs_are_used_for(seed: int) -> None:
    n, m, k = 12, 16, 10
    a, b, x, readout = random(seed, n, k), random(seed + 5, m, k), inputs_of(seed, m), random(seed + 7, 30, n)
    w, sides = a @ b.T, (Whitening.of(x.T @ x / len(x)), Whitening.of(readout.T @ readout))
    one, both = sorted_factors(a, b, sides[0]), sorted_factors(a, b, *sides)
    torch.testing.assert_close(product(both), w, rtol=1e-6, atol=1e-8)
    for rank in range(1, k):
        ours, inputs_alone = (output_error(x, readout @ w, readout @ product(each.cut(rank))) for each in (both, one))
        assert ours < inputs_alone
        assert ours == pytest.approx(float(both.energy[rank:].sum()), rel=1e-3)
        best = output_error(x, readout @ w, reduced_rank_regression(x, readout @ w, rank))  # knows nothing of W
        assert ours == pytest.approx(best, rel=1e-3)


def test_whitening_and_its_inverse_undo_each_other_though_fp16_lost_some() -> None:
    x = inputs_of(0, 24, count=40)
    covariance = x.T @ x / 40
    covariance = (covariance / covariance.diagonal().mean()).half().double()
    assert torch.linalg.eigvalsh(covariance).min() < 1e-6
    whitening = Whitening.of(covariance)
    assert torch.isfinite(whitening.inverse_root).all()
    torch.testing.assert_close(
        whitening.root @ whitening.inverse_root, torch.eye(24, dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(whitening.root @ whitening.root, covariance, atol=1e-4, rtol=0)


def test_signs_are_fixed_so_equal_products_give_equal_factors() -> None:
    a, b = random(0, 6, 3), random(1, 5, 3)
    first, again = sorted_factors(a, b, None), sorted_factors(a, b, None)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.V, again.V)
    flipped = sorted_factors(-a.flip(1), -b.flip(1), None)  # the same matrix from other factors
    torch.testing.assert_close(flipped.U, first.U)
    torch.testing.assert_close(flipped.V, first.V)
    assert (first.U.gather(0, first.U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("form", ["switch", "single", "union"])
def test_folding_keeps_every_function(form: str, make_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = make_checkpoint(learngene_rank=12, tailor_rank=5)
    images, labels = torch.rand(40, 1, 8, 8) * 2 - 1, torch.arange(40) % 4
    calibration = calibrate_on_images(checkpoint.model(), images, labels)
    kept = [2] if form == "single" else [3, 1]
    for shape in checkpoint.spec.matrices():
        layer = checkpoint.model().get_submodule(shape.name)
        learngene, tailors = layer.learngene.product().double(), layer.tailors.product().double()
        for chosen in (calibration, None):
            folded = fold_matrix(checkpoint, shape.name, kept, form, chosen)
            if form == "switch":
                torch.testing.assert_close(product(folded.shared), learngene, rtol=1e-4, atol=1e-6)
                for c, tailor in zip(kept, folded.tailors, strict=True):
                    torch.testing.assert_close(product(tailor), tailors[c], rtol=1e-4, atol=1e-6)
            else:
                assert folded.tailors == ()
                torch.testing.assert_close(
                    product(folded.shared), learngene + tailors[kept].sum(0), rtol=1e-4, atol=1e-6
                )
