"""Decomposable weights: W(g) = U_G diag(s_G) V_G^T + sum_c g_c U_c diag(s_c) V_c^T, and the class gate g.

Symbols: B batch, N tokens, n outputs, m inputs, C classes, N_G learngene rank, N_T tailor rank per class.
Source: Xie et al., "KIND: Knowledge Integration and Diversion for Training Decomposable Models" (ICML 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kind_edge.model.spec import MatrixShape, Ranks


@dataclass(frozen=True)
class ClassGate:
    """Which tailors each image of a batch sees, arranged by class so that tailors run as batched products.

    The batch is laid out in G groups of M slots; group g sees the tailor at `classes[g]` (None: at g, so that the
    layer's tailors are taken as they lie). `slots` [G*M] says which image fills each slot (None: slot i is image i),
    and `weight` [G*M] opens (1) or closes (0) it (None: all open). An image without a slot sees the learngene alone.
    `learngene_share`: only this leading share of every layer's learngene components is used (nested ranks).
    """

    class_index: Tensor  # [B] in 0..C, where C is the null class
    classes: Tensor | None  # [G]
    slots: Tensor | None
    weight: Tensor | None
    learngene_share: float = 1.0

    @classmethod
    def of(cls, class_index: Tensor, num_classes: int) -> ClassGate:
        """One open gate per image; `class_index` [B] in 0..C, where C closes every gate."""
        open_gates = F.one_hot(class_index, num_classes + 1)[:, :num_classes]
        return cls.opening(open_gates, class_index)

    @classmethod
    def opening(cls, open_gates: Tensor, class_index: Tensor) -> ClassGate:
        """Any gates at once: `open_gates` [B, C] of zeros and ones (several ones in a row mix classes)."""
        class_of_pair, image_of_pair = open_gates.T.nonzero(as_tuple=True)  # sorted by class, then by image
        classes, counts = class_of_pair.unique_consecutive(return_counts=True)
        groups, most = len(classes), int(counts.max()) if len(counts) else 0
        start = counts.cumsum(0) - counts
        group_of_pair = torch.repeat_interleave(torch.arange(groups, device=counts.device), counts)
        position = torch.arange(len(class_of_pair), device=counts.device) - start[group_of_pair]
        slot = group_of_pair * most + position
        slots = class_index.new_zeros(groups * most)
        weight = torch.zeros(groups * most, device=class_index.device)
        slots[slot], weight[slot] = image_of_pair, 1.0
        in_order = len(slots) == len(class_index) and bool((slots == torch.arange(len(slots)).to(slots)).all())
        weight_or_open = None if bool((weight == 1).all()) else weight
        everyone = groups == open_gates.shape[1]
        return cls(class_index, None if everyone else classes, None if in_order else slots, weight_or_open)

    @classmethod
    def grouped(cls, classes: Tensor, closed: Tensor, num_classes: int) -> ClassGate:
        """A batch sorted into equal groups already: `classes` [G] ascending; `closed` [G*M]: gate shut."""
        labels = classes.repeat_interleave(len(closed) // len(classes))
        return cls(torch.where(closed, num_classes, labels), classes, None, (~closed).float())

    @classmethod
    def gathered(cls, labels: Tensor, closed: Tensor, num_classes: int, learngene_share: float = 1.0) -> ClassGate:
        """A batch in equal groups, for layers that hold one tailor per group, in this order (as in training).

        `labels` [B] in 0..C-1; `closed` [B]: gate shut.
        """
        return cls(torch.where(closed, num_classes, labels), None, None, (~closed).float(), learngene_share)


class Factors(nn.Module):
    """U diag(s) V^T, with an optional leading class axis: U [(C,) n, r], s [(C,) r], V [(C,) m, r]."""

    def __init__(self, shape: MatrixShape, rank: int, num_classes: int | None = None) -> None:
        super().__init__()
        lead = () if num_classes is None else (num_classes,)
        self.U = nn.Parameter(torch.zeros(*lead, shape.outputs, rank))
        self.s = nn.Parameter(torch.zeros(*lead, rank))
        self.V = nn.Parameter(torch.zeros(*lead, shape.inputs, rank))

    def leading(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """U, s, V of the first `share` (0..1) of the components, rounded up."""
        rank = math.ceil(share * self.s.shape[-1])
        return (self.U, self.s, self.V) if share == 1 else (self.U[..., :rank], self.s[..., :rank], self.V[..., :rank])

    def product(self) -> Tensor:
        """The dense matrix [(C,) n, m]."""
        return (self.U * self.s.unsqueeze(-2)) @ self.V.mT


class Basis(nn.Module):
    """U n x r and V m x r of a weight type, which the learngenes of all blocks have in common.

    Blocks have no further learngene of their own, as that did not pay: with the preset `study` and 18,000 images (one
    run each) held-out loss was 0.352 ordinary at rank 24; in common 0.371 at 24, 0.358 at 48 and 64; and 0.358 with 36
    in common and 4 of each block's own, which are as many values as 48 in common.
    """

    def __init__(self, shape: MatrixShape, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(shape.outputs, rank))
        self.V = nn.Parameter(torch.zeros(shape.inputs, rank))


class OnBasis(Factors):
    """U diag(s) V^T of one block with U and V of a `Basis`: only s is this layer's own.

    The basis is asked for U and V in every pass, as sharding and compilation put other tensors in their place.
    """

    def __init__(self, basis: Basis) -> None:
        nn.Module.__init__(self)
        self.s = nn.Parameter(torch.zeros(basis.U.shape[1]))
        self._basis = (basis,)  # in a tuple, so that it does not become a part of this layer, too

    @property
    def U(self) -> Tensor:  # type: ignore[override]
        return self._basis[0].U

    @property
    def V(self) -> Tensor:  # type: ignore[override]
        return self._basis[0].V


class GatedLinear(nn.Module):
    """A linear layer m -> n made of a learngene and one tailor per class; with a `basis` its learngene is on that."""

    def __init__(self, shape: MatrixShape, ranks: Ranks, num_classes: int, basis: Basis | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.learngene = Factors(shape, ranks.learngene) if basis is None else OnBasis(basis)
        self.tailors = Factors(shape, ranks.tailor, num_classes)
        self.bias = nn.Parameter(torch.zeros(shape.outputs))

    def forward(self, x: Tensor, gate: ClassGate) -> Tensor:
        """x [B, N, m] -> [B, N, n]."""
        shared_u, shared_s, shared_v = self.learngene.leading(gate.learngene_share)
        u, s, v = (
            p if gate.classes is None else p[gate.classes] for p in (self.tailors.U, self.tailors.s, self.tailors.V)
        )
        shared_u, u = shared_u * shared_s, u * s.unsqueeze(1)  # smaller than the activations that s would scale
        groups, tokens = len(s), x.shape[1]
        is_open = None
        if gate.weight is not None and groups:
            is_open = gate.weight.reshape(groups, -1, 1).repeat_interleave(tokens, 1)  # [G, M*N, 1]
        if s.numel() and gate.slots is None:
            slots = x.reshape(groups, -1, self.shape.inputs)
            y = _GatedProduct.apply(*_autocast(slots, shared_u, shared_v, u, v, self.bias), is_open)
            return y.reshape(-1, tokens, self.shape.outputs)
        y = F.linear(x @ shared_v, shared_u, self.bias)  # [B, N, n]
        if s.numel() == 0:
            return y
        assert gate.slots is not None
        z = x[gate.slots].reshape(groups, -1, self.shape.inputs) @ v  # [G, M*N, N_T]
        z = z if is_open is None else z * is_open
        return y.index_add(0, gate.slots, (z @ u.mT).reshape(-1, tokens, self.shape.outputs))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Deal the components of random matrices out to learngene and tailors.

        Each part gets its share of an ordinary (Xavier) matrix's energy, r / R of |W|_F^2, so that learngene plus one
        tailor starts with E|W x|^2 of an ordinary layer. A basis keeps what the last layer on it drew; signs of s at
        random make the matrices of these layers as different as independent ones are (that made no difference in a
        short trial of four blocks).
        """
        n, m = self.shape.outputs, self.shape.inputs
        num_classes, tailor_rank = self.tailors.s.shape
        learngene_rank = len(self.learngene.s)
        energy = n * m * (2.0 / (n + m))  # E|W|_F^2 under Xavier
        deck = _Deck(n, m, generator)
        parts = [(self.learngene.U, self.learngene.s, self.learngene.V)]
        parts += [(self.tailors.U[c], self.tailors.s[c], self.tailors.V[c]) for c in range(num_classes)]
        for u, s, v in parts:
            rank = len(s)
            if rank == 0:
                continue
            left, values, right = deck.deal(rank)
            share = energy * rank / (learngene_rank + tailor_rank)
            order = values.argsort(descending=True, stable=True)  # the leading share of a learngene: its largest part
            values = values[order] * (share / values.square().sum()).sqrt()
            if s is self.learngene.s and isinstance(self.learngene, OnBasis):
                values = values * (torch.randint(2, (rank,), generator=generator) * 2 - 1)
            u.copy_(left[:, order]), v.copy_(right[:, order]), s.copy_(values)


class _GatedProduct(torch.autograd.Function):
    """y_g = x_g V_G U_G^T + (x_g V_g * open) U_g^T + bias for every group g: one product for the learngene of all
    groups, and a thin one per group that adds to it in place, forwards and backwards.

    Autograd on its own would write the tailors' part of y, and that of x's gradient, to memory before adding them. In
    a thin product rows of N_T values are slow: its factors are laid out with the long side last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared_u: Tensor,
        shared_v: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor,
        is_open: Tensor | None,
    ) -> Tensor:
        """x [G, T, m], U_G [n, N_G], V_G [m, N_G], U [G, n, N_T], V [G, m, N_T], open [G, T, 1] -> [G, T, n]."""
        shared_z = x.flatten(0, 1) @ shared_v  # [G*T, N_G]
        z = x @ _long_side_last(v)  # [G, T, N_T]
        if is_open is not None:
            z *= is_open
        y = torch.addmm(bias, shared_z, shared_u.T).unflatten(0, x.shape[:2])
        ctx.save_for_backward(x, shared_u, shared_v, u, v, is_open, shared_z, z)
        return y.baddbmm_(z, u.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shared_u, shared_v, u, v, is_open, shared_z, z = ctx.saved_tensors
        dy = dy.contiguous()
        rows, dy_rows = x.flatten(0, 1), dy.flatten(0, 1)
        need_x, need_shared_u, need_shared_v, need_u, need_v, need_bias, _ = ctx.needs_input_grad
        dx = dshared_u = dshared_v = du = dv = dbias = None
        dshared_z = dy_rows @ shared_u if need_x or need_shared_v else None
        dz = dy @ _long_side_last(u)
        if is_open is not None:
            dz *= is_open
        if need_x:
            dx = (dshared_z @ shared_v.T).unflatten(0, x.shape[:2]).baddbmm_(dz, v.mT)
        if need_shared_u:
            dshared_u = dy_rows.T @ shared_z
        if need_shared_v:
            dshared_v = rows.T @ dshared_z
        if need_u:
            du = (z.mT @ dy).mT
        if need_v:
            dv = (dz.mT @ x).mT
        if need_bias:
            dbias = dy_rows.sum(0)
        return dx, dshared_u, dshared_v, du, dv, dbias, None


def _long_side_last(thin: Tensor) -> Tensor:
    return thin.mT.contiguous().mT


def _autocast(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the arguments of a product, where it is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *weights)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(tensor.to(dtype) for tensor in (x, *weights))


class _Deck:
    """Shuffled rank-1 components of Xavier-random n x m matrices; a new matrix is drawn when one is used up."""

    def __init__(self, n: int, m: int, generator: torch.Generator) -> None:
        self.n, self.m, self.generator = n, m, generator
        self._draw()

    def _draw(self) -> None:
        w = torch.randn(self.n, self.m, generator=self.generator) * (2.0 / (self.n + self.m)) ** 0.5
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        order = torch.randperm(len(s), generator=self.generator)
        self.u, self.s, self.v = u[:, order], s[order], vt[order].T

    def deal(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """`rank` components; a part larger than one matrix takes from several (then not all orthogonal)."""
        dealt = []
        while rank:
            if len(self.s) == 0 or (rank > len(self.s) and len(self.s) < min(self.n, self.m)):
                self._draw()
            take = min(rank, len(self.s))
            dealt.append((self.u[:, :take], self.s[:take], self.v[:, :take]))
            self.u, self.s, self.v = self.u[:, take:], self.s[take:], self.v[:, take:]
            rank -= take
        us, ss, vs = zip(*dealt, strict=True)
        return torch.cat(us, 1), torch.cat(ss), torch.cat(vs, 1)
