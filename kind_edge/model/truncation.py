"""Truncation of folded factors: the best rank-r matrix under the layer's own inputs.

With C = E[x x^T] the input covariance, the rank-r W_r that minimises E|W x - W_r x|^2 is the SVD of W C^(1/2), cut to
r and multiplied by C^(-1/2) (whitened SVD); its squared singular values are the output energy each component carries.
Symbols: W n x m = A B^T with A n x k, B m x k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import Form

_FLOOR = 1e-6
"""Smallest eigenvalue of a covariance, as a share of their mean: fp16 storage can push small ones below zero."""


@dataclass(frozen=True)
class SortedFactors:
    """U diag(s) V^T with components by falling output energy s^2: U n x k orthonormal, s k, V m x k; float64."""

    U: Tensor
    s: Tensor
    V: Tensor

    def cut(self, rank: int) -> SortedFactors:
        return SortedFactors(self.U[:, :rank], self.s[:rank], self.V[:, :rank])


@dataclass(frozen=True)
class Whitening:
    """C^(1/2) and C^(-1/2), both m x m symmetric."""

    root: Tensor
    inverse_root: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Whitening:
        values, vectors = torch.linalg.eigh(covariance.double())
        values = values.clamp_min(float(values.mean()) * _FLOOR)
        return cls(vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T)


def sorted_factors(a: Tensor, b: Tensor, whitening: Whitening | None) -> SortedFactors:
    """The (whitened) SVD of A B^T, through two thin QRs; signs are fixed so that equal input gives equal bytes."""
    a, b = a.double(), b.double()
    k = min(a.shape[1], *a.shape[:1], *b.shape[:1])
    left, left_r = torch.linalg.qr(a)
    right, right_r = torch.linalg.qr(b if whitening is None else whitening.root @ b)
    p, s, qt = torch.linalg.svd(left_r @ right_r.T)
    u, v = left @ p[:, :k], right @ qt[:k].T
    if whitening is not None:
        v = whitening.inverse_root @ v
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return SortedFactors(u * sign, s[:k], v * sign)


def _both_branches(calibration: Calibration, name: str) -> Whitening:
    """Of class and null branch; of the classes alone where there is no null branch."""
    pooled, null = calibration.pooled[name], calibration.null.get(name)
    return Whitening.of(pooled if null is None else (pooled + null) / 2)


@dataclass(frozen=True)
class FoldedMatrix:
    """One matrix of a checkpoint for the kept classes: the part every image sees, and one tailor per class (switch)."""

    shared: SortedFactors
    tailors: tuple[SortedFactors, ...]


def fold_matrix(
    checkpoint: Checkpoint, name: str, classes: list[int], form: Form, calibration: Calibration | None
) -> FoldedMatrix:
    """Learngene and tailors of matrix `name`, joined as the form demands and sorted by output energy.

    switch: learngene shared (whitened over class and null branches, where there is a null branch), tailors apart.
    single and union: learngene and the kept tailors as one product.
    """
    t = checkpoint.tensors
    u, s, v = (t[f"{name}.learngene.{part}"].double() for part in "UsV")
    tu, ts, tv = (t[f"{name}.tailors.{part}"].double()[classes] for part in "UsV")
    own = None if calibration is None else Whitening.of(calibration.pooled[name])
    if form == "switch":
        both = None if calibration is None else _both_branches(calibration, name)
        tailors = tuple(sorted_factors(tu[c] * ts[c], tv[c], own) for c in range(len(classes)))
        return FoldedMatrix(sorted_factors(u * s, v, both), tailors)
    a = torch.cat([u * s, *(tu * ts.unsqueeze(1)).unbind()], 1)
    b = torch.cat([v, *tv.unbind()], 1)
    return FoldedMatrix(sorted_factors(a, b, own), ())
