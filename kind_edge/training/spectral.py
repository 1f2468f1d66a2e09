"""A penalty on high frequencies of the weights over the stack of blocks, outputs and inputs, as FRONT's refinement.

A model that is to be resized later does well to keep little where resizing cuts. The DCT-II diagonalises the difference
operator of a line without wrap-around: the sum of squared differences between neighbours is the spectrum's energy, each
frequency k of n weighted by 4 sin^2(pi k / 2n), 0 for the mean and 4 at most. So no transform is needed. Per axis,

    r = mean (W_{i+1} - W_i)^2 / (2 mean W^2)        0 for constant, 1 for white weights

which does not change with the size of the weights. The penalty is the mean of r over layers, outputs and inputs (those
that there are at least two of) and over the types of matrices; heads are neighbours, not the places inside them.

A factored matrix is never multiplied out: with A = U diag(s), |A V^T|^2 = sum (A^T A) * (V^T V), and so on for the
differences of A and of V. That costs O(L (n + m) R^2) per type and step, a share of about R / (B N) of the forward
pass (R rank, B images, N tokens): the learngene once, every tailor of the batch by itself.

Source: FRONT (2026) names a spectral regularisation; this form is chosen here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import Factors, GatedLinear
from kind_edge.model.spec import ModelSpec


def spectral_penalty(model: DiT) -> Tensor:
    """0 for weights that are alike over layers, outputs and inputs, about 1 for random ones; a scalar.

    The tailors are those that the model's layers hold at the moment.
    """
    ratios = [ratio for heads, layers in _types(model) for ratio in _type_ratios(model.spec, heads, layers)]
    return torch.stack(ratios).mean()


def _types(model: DiT) -> Iterator[tuple[tuple[bool, bool], list[torch.nn.Module]]]:
    """Whether outputs and inputs are heads, and the layers of one type over the blocks."""
    for part in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2"):
        layers = [model.get_submodule(f"blocks.{block}.{part}") for block in range(model.spec.depth)]
        yield (part in ("attn.q", "attn.k", "attn.v"), part == "attn.o"), layers


def _type_ratios(spec: ModelSpec, heads: tuple[bool, bool], layers: list[torch.nn.Module]) -> Iterator[Tensor]:
    out_inside, in_inside = (spec.head_width if is_heads else 1 for is_heads in heads)
    if not isinstance(layers[0], GatedLinear):
        yield _dense_ratio(torch.stack([layer.weight for layer in layers]), out_inside, in_inside)
        return
    for part in ("learngene", "tailors"):
        factors: list[Factors] = [getattr(layer, part) for layer in layers]
        if factors[0].s.numel():
            a = torch.stack([f.U * f.s.unsqueeze(-2) for f in factors])  # [L, (G,) n, R]
            yield _factored_ratio(a, torch.stack([f.V for f in factors]), out_inside, in_inside)


def _dense_ratio(w: Tensor, out_inside: int, in_inside: int) -> Tensor:
    """Of a stack [L, n, m]."""
    energy = w.square().mean()
    differences = (w.diff(dim=0), _neighbours(w, 1, out_inside), _neighbours(w, 2, in_inside))
    return torch.stack([d.square().mean() / (2 * energy) for d in differences if d.numel()]).mean()


def _factored_ratio(a: Tensor, v: Tensor, out_inside: int, in_inside: int) -> Tensor:
    """Of a stack A V^T, A [L, (G,) n, R], V [L, (G,) m, R]; the mean over G."""
    energy = _energy(a, v).mean(0)  # [(G,)]
    ratios = []
    if len(a) > 1:
        cross = ((a[1:].mT @ a[:-1]) * (v[1:].mT @ v[:-1])).sum((-2, -1))
        ratios.append((_energy(a[1:], v[1:]) + _energy(a[:-1], v[:-1]) - 2 * cross).mean(0) / (2 * energy))
    for changed, other, inside in ((a, v, out_inside), (v, a, in_inside)):
        size = changed.shape[-2]
        difference = _neighbours(changed, changed.ndim - 2, inside)
        if count := difference.shape[-2]:
            ratios.append(_energy(difference, other).mean(0) * (size / count) / (2 * energy))
    return torch.stack(ratios).mean()


def _energy(a: Tensor, v: Tensor) -> Tensor:
    """|A V^T|^2 of every layer (and group): [..., n, R], [..., m, R] -> [...]."""
    return ((a.mT @ a) * (v.mT @ v)).sum((-2, -1))


def _neighbours(w: Tensor, axis: int, inside: int) -> Tensor:
    """Differences along an axis between what is `inside` places apart."""
    return w.narrow(axis, inside, w.shape[axis] - inside) - w.narrow(axis, 0, w.shape[axis] - inside)
