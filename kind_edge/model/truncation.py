"""Truncation of folded factors: the best rank-r matrix under the layer's own inputs, for what its output is used for.

With C = E[x x^T] the input covariance, the rank-r W_r that minimises E|W x - W_r x|^2 is the SVD of W C^(1/2), cut to
r and multiplied by C^(-1/2) (whitened SVD); its squared singular values are the output energy each component carries.
With G = E[g g^T] of the gradients g at the output, what minimises E|G^(1/2) (W - W_r) x|^2, the change that the
prediction sees if g and x are independent, is likewise that of G^(1/2) W C^(1/2) (whitened on both sides).
A nested learngene has been trained so that its leading components do without the later ones: it is cut where it stands.
Symbols: W n x m = A B^T with A n x k, B m x k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.names import weight_type
from kind_edge.model.spec import Form

_FLOOR = 1e-6
"""Smallest eigenvalue of a covariance, as a share of their mean: fp16 storage can push small ones below zero."""


@dataclass(frozen=True)
class SortedFactors:
    """U diag(s) V^T, U n x k, s k, V m x k, float64, components in the order in which they are worth keeping.

    `energy` k: the output energy (whitened, if outputs are) that goes with each when it is dropped after all later
    ones; s^2 of an SVD.
    """

    U: Tensor
    s: Tensor
    V: Tensor
    energy: Tensor

    def cut(self, rank: int) -> SortedFactors:
        return SortedFactors(self.U[:, :rank], self.s[:rank], self.V[:, :rank], self.energy[:rank])


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


def sorted_factors(a: Tensor, b: Tensor, inputs: Whitening | None, outputs: Whitening | None = None) -> SortedFactors:
    """The SVD of A B^T, whitened where a side is given, through two thin QRs; signs are fixed so that equal input gives
    equal bytes."""
    a, b = a.double(), b.double()
    k = min(a.shape[1], *a.shape[:1], *b.shape[:1])
    left, left_r = torch.linalg.qr(a if outputs is None else outputs.root @ a)
    right, right_r = torch.linalg.qr(b if inputs is None else inputs.root @ b)
    p, s, qt = torch.linalg.svd(left_r @ right_r.T)
    u, v = left @ p[:, :k], right @ qt[:k].T
    u = u if outputs is None else outputs.inverse_root @ u
    v = v if inputs is None else inputs.inverse_root @ v
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return SortedFactors(u * sign, s[:k], v * sign, s[:k].square())


def as_they_lie(u: Tensor, s: Tensor, v: Tensor, whitening: Whitening | None) -> SortedFactors:
    """Factors in the order that they have. Components need not be orthogonal, so one may seem to carry nothing."""
    u, s, v = u.double(), s.double(), v.double()
    seen = v if whitening is None else whitening.root @ v
    # Energy of the components from i on: the sum over that corner of the matrix of their inner products.
    products = (s.unsqueeze(1) * (u.T @ u) * (seen.T @ seen) * s).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    left = torch.cat([products.clamp_min(0), products.new_zeros(1)]).flip(0).cummax(0).values.flip(0)
    return SortedFactors(u, s, v, left[:-1] - left[1:])


def reordered(checkpoint: Checkpoint, calibration: Calibration) -> Checkpoint:
    """The same function with every learngene's components by falling output energy, over classes and null branch.

    Components that blocks share can be put in another order, but not mixed: it is the same for all of them then, by
    the sum of their energies.
    """
    if checkpoint.spec.shared_factors:
        return _reordered_on_bases(checkpoint, calibration)
    tensors = dict(checkpoint.float_tensors())
    for shape in checkpoint.spec.matrices():
        name = f"{shape.name}.learngene"
        u, s, v = (tensors[f"{name}.{part}"].double() for part in "UsV")
        found = sorted_factors(u * s, v, both_branches(calibration, shape.name))
        tensors |= {f"{name}.{part}": tensor for part, tensor in trainable(found).items()}
    return Checkpoint(checkpoint.spec, checkpoint.class_names, tensors, checkpoint.provenance)


def _reordered_on_bases(checkpoint: Checkpoint, calibration: Calibration) -> Checkpoint:
    spec, tensors = checkpoint.spec, dict(checkpoint.float_tensors())
    for kind in spec.weight_types():
        blocks = [shape.name for shape in spec.matrices() if weight_type(shape.name) == kind]
        u, v = (tensors[spec.factor_name(blocks[0], part)].double() for part in "UV")
        length = v.norm(dim=0).clamp_min(1e-12)
        v = v / length
        scales = [tensors[spec.factor_name(name, "s")].double() * length for name in blocks]
        seen = [(both_branches(calibration, name).root @ v).square().sum(0) for name in blocks]
        energy = sum(s.square() * e for s, e in zip(scales, seen, strict=True)) * u.square().sum(0)
        order = torch.as_tensor(energy).argsort(descending=True, stable=True)
        for part, values in (("U", u), ("V", v)):
            tensors[spec.factor_name(blocks[0], part)] = values[:, order].float()
        for name, s in zip(blocks, scales, strict=True):
            tensors[spec.factor_name(name, "s")] = s[order].float()
    return Checkpoint(spec, checkpoint.class_names, tensors, checkpoint.provenance)


def trainable(factors: SortedFactors) -> dict[str, Tensor]:
    """U, s, V in float32, V's columns of length 1 and their length in s: the size that the optimizer is used to."""
    length = factors.V.norm(dim=0)
    return {"U": factors.U.float(), "s": (factors.s * length).float(), "V": (factors.V / length).float()}


def both_branches(calibration: Calibration, name: str) -> Whitening:
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

    switch: learngene shared (whitened over class and null branches, where there is a null branch; as it lies where it
    is nested, or on factors that other blocks have, too), tailors apart. single and union: learngene and the kept
    tailors as one product. Outputs are whitened, too, where the calibration knows how.
    """
    t, spec = checkpoint.tensors, checkpoint.spec
    u, s, v = (t[spec.factor_name(name, part)].double() for part in "UsV")
    tu, ts, tv = (t[f"{name}.tailors.{part}"].double()[classes] for part in "UsV")
    own = None if calibration is None else Whitening.of(calibration.pooled[name])
    outputs = None if calibration is None or not calibration.outputs else Whitening.of(calibration.outputs[name])
    if form == "switch":
        both = None if calibration is None else both_branches(calibration, name)
        in_order = spec.nested or spec.shared_factors
        shared = as_they_lie(u, s, v, both) if in_order else sorted_factors(u * s, v, both, outputs)
        tailors = (sorted_factors(tu[c] * ts[c], tv[c], own, outputs) for c in range(len(classes)))
        return FoldedMatrix(shared, tuple(tailors))
    a = torch.cat([u * s, *(tu * ts.unsqueeze(1)).unbind()], 1)
    b = torch.cat([v, *tv.unbind()], 1)
    return FoldedMatrix(sorted_factors(a, b, own, outputs), ())
