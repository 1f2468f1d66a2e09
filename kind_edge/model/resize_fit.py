"""Fitted selection: the channels that tell most of the others stay, and every layer is fitted to read from them alone.

The channels of a trained transformer come in no order, and adaLN scales each by itself, so that a rotation of the
residual stream is not free. Which channels are kept is: they are chosen, not interpolated, and the choice follows what
the source's layers see on its own sampling trajectories.

- Kept: of the residual stream, of the hidden units of every MLP and of the timestep network, those that a pivoted QR of
  their covariance takes first: what is left out is as nearly a linear function of them as can be had greedily. Of the
  heads, those whose outputs carry most energy. Of the blocks, every L/L'-th.
- Fitted: where a layer of the source sees a, and the smaller model has a' there, P = E[a a'^T] E[a' a'^T]^-1 (of what
  is left of both without their means) is the best linear guess of a, and what remains of the means goes into the bias.
  The layer becomes W P: V becomes P^T V, for the learngene and for every tailor alike, so components stay components.
  Layers are fitted in the order of the forward pass, each on what the smaller model, as fitted so far, sees there: so a
  later layer makes good what an earlier one lost, and what was left out between two blocks.

Larger: channels, heads and blocks are repeated; the fit lets those that are alike share the weight.

Symbols: B batch, N tokens, D width, L blocks; primes: of the new model.
Source of the selection: Chee, Flynn, Damle, De Sa, "Model Preserving Compression for Neural Networks" (2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import qr
from torch import Tensor, nn
from torch.nn import functional as F

from kind_edge.model.calibration import Inputs
from kind_edge.model.dit import (
    Attention,
    DiT,
    ModulatedBlock,
    TimestepEmbedder,
    modulate,
    patchify,
    timestep_features,
)
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.spec import ModelSpec, Ranks

RIDGE = 1e-3
"""Of the mean diagonal, added to a covariance before it is inverted: what is rarely seen decides nothing."""
TOKENS = 24_000
"""How many tokens are looked at, at most."""


@dataclass(frozen=True)
class _Kept:
    """Which of the source's channels the new model's are. `heads` and `hidden` are per new block."""

    blocks: tuple[int, ...]
    channels: Tensor  # [D']
    condition: Tensor  # [D'], what adaLN reads
    timestep: Tensor  # [D'], the hidden units of the timestep network
    span: Tensor | None  # [D'], of that of the span, which a distilled model has
    heads: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


class _Reading:
    """a ~ P a' + p: how what a layer read is guessed from what there is now."""

    def __init__(self, wanted: Tensor, given: Tensor, kept: Tensor) -> None:
        """wanted [..., m], given [..., m'], whose channels are those of `kept` [m'] as far as they are the same still.

        The ridge pulls towards reading what was kept as it was: nothing is changed where nothing was lost.
        """
        wanted, given = wanted.flatten(0, -2), given.flatten(0, -2)
        share = 1 / torch.bincount(kept, minlength=wanted.shape[1])[kept].double()
        same = torch.zeros(wanted.shape[1], len(kept), dtype=torch.float64)
        same[kept, torch.arange(len(kept))] = share
        missing = wanted - given @ same.T.float()
        middle, given_middle = missing.mean(0), given.mean(0)
        missing -= middle
        centred = given - given_middle
        covariance = (centred.T @ centred).double()
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-12)
        change = torch.linalg.solve(covariance, (centred.T @ missing).double()).T
        self.P = same + change  # [m, m'], float64
        self.p = middle.double() - change @ given_middle.double()


@torch.no_grad()
def fitted(source: DiT, target: ModelSpec, seen: Sequence[Inputs]) -> DiT:
    """A model of the target's sizes, with the ranks of the source, from what the source is asked in `seen`."""
    x, timestep, classes, *span = inputs = _some(source.spec, seen)
    kept = _choose(source, target, inputs)
    ranks = {
        shape.name: _ranks_of(source.spec, shape.name, kept.blocks) for shape in target.matrices() if target.factored
    }
    new = DiT(dataclasses.replace(target, matrix_ranks=ranks)).eval().requires_grad_(False)
    gate = ClassGate.of(classes, source.spec.num_classes)
    condition = _fit_embedders(source, new, kept, timestep, classes, *span)
    at, old = 0, patchify(source.patch_embed, source.pos_embed, x)
    now = patchify(new.patch_embed, new.pos_embed, x)
    for place, number in enumerate(kept.blocks):
        for passed in source.blocks[at:number]:
            old = passed(old, condition[0], gate)
        at = number
        now = _fit_block(source.blocks[number], new.blocks[place], kept, place, old, now, condition, gate)
    for passed in source.blocks[at:]:
        old = passed(old, condition[0], gate)
    _fit_final(source, new, kept, old, now, condition)
    return new


def _some(spec: ModelSpec, seen: Sequence[Inputs]) -> Inputs:
    """At most `TOKENS` tokens' worth of inputs, evenly from all; every other one without its class."""
    x, timestep, classes, *span = (torch.cat(parts) for parts in zip(*seen, strict=True))
    count = min(len(x), max(2, TOKENS // spec.tokens))
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    classes = torch.where(torch.arange(count) % 2 == 0, classes[some], spec.num_classes)
    return x[some], timestep[some], classes, *(each[some] for each in span)


def _ranks_of(spec: ModelSpec, name: str, blocks: Sequence[int]) -> Ranks:
    _, block, rest = name.split(".", 2)
    return spec.ranks(f"blocks.{blocks[int(block)]}.{rest}")


def _choose(source: DiT, target: ModelSpec, inputs: Inputs) -> _Kept:
    spec = source.spec
    blocks = tuple(place * spec.depth // target.depth for place in range(target.depth))
    covariance = _covariances(source, inputs)
    stream = sum(c / c.diagonal().mean() for name, c in covariance.items() if name.endswith((".q", ".fc1", "linear")))
    heads, hidden = [], []
    for number in blocks:
        block = source.blocks[number]
        o, fc2 = _matrix(block.attn.o), _matrix(block.mlp.fc2)
        of_head = [_energy(o, covariance[f"blocks.{number}.attn.o"], i, spec.head_width) for i in range(spec.heads)]
        order = torch.tensor(of_head).argsort(descending=True, stable=True)
        heads.append(_first(order, target.heads))
        size = fc2.norm(dim=0).double()
        hidden.append(_telling(covariance[f"blocks.{number}.mlp.fc2"] * size * size[:, None], target.hidden_width))
    return _Kept(
        blocks,
        _telling(stream, target.width),
        _telling(covariance["condition"], target.width),
        _telling(covariance["timestep"], target.width),
        _telling(covariance["span"], target.width) if "span" in covariance else None,
        tuple(heads),
        tuple(hidden),
    )


def _covariances(source: DiT, inputs: Inputs) -> dict[str, Tensor]:
    """E[a a^T] of what every layer of the blocks and the final one sees, and of what adaLN and the timestep's do."""
    found: dict[str, Tensor] = {}
    hooks = []
    alias = {
        "final.adaln": "condition",
        "t_embed.fc2": "timestep",
        "span_embed.fc2": "span",
        "final.linear": "final.linear",
    }
    for name, module in source.named_modules():
        if name not in alias and not (name.startswith("blocks.") and name.endswith((".q", ".o", ".fc1", ".fc2"))):
            continue

        def look(_: object, arguments: tuple[Tensor, ...], name: str = name) -> None:
            a = arguments[0].flatten(0, -2).double()
            found[alias.get(name, name)] = a.T @ a / len(a)

        hooks.append(module.register_forward_pre_hook(look))
    try:
        source(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _telling(covariance: Tensor, count: int) -> Tensor:
    """Those of m channels that tell most of the others, in their order; all, again and again, where more are asked."""
    if count >= len(covariance):
        return torch.arange(count) % len(covariance)
    ridge = RIDGE * covariance.diagonal().mean() + 1e-12
    root = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
    _, order = qr(root.T.numpy(), mode="r", pivoting=True)
    return _first(torch.from_numpy(order).long(), count)


def _first(order: Tensor, count: int) -> Tensor:
    if count >= len(order):
        return torch.arange(count) % len(order)
    return order[:count].sort().values


def _matrix(layer: nn.Module) -> Tensor:
    """[n, m] of a dense layer, or of a factored one's learngene and the mean of its tailors."""
    if isinstance(layer, GatedLinear):
        return layer.learngene.product() + layer.tailors.product().mean(0)
    return layer.weight


def _energy(o: Tensor, covariance: Tensor, head: int, width: int) -> float:
    """E|o a|^2 of one head alone."""
    part = slice(head * width, (head + 1) * width)
    mine = o[:, part].double()
    return float(((mine @ covariance[part, part]) * mine).sum())


def _set(old: nn.Module, new: nn.Module, outputs: Tensor, reading: _Reading | None) -> None:
    """The rows `outputs` of a layer, which now reads otherwise (None: as it did)."""
    if isinstance(old, GatedLinear):
        assert reading is not None
        read = reading.P.float().T
        for part in ("learngene", "tailors"):
            was, now = getattr(old, part), getattr(new, part)
            now.U.copy_(was.U[..., outputs, :]), now.s.copy_(was.s), now.V.copy_(read @ was.V)
        new.bias.copy_(old.bias[outputs] + (old.learngene.product() @ reading.p.float())[outputs])
        return
    weight, bias = old.weight[outputs], old.bias[outputs]
    if reading is not None:
        weight, bias = weight.double() @ reading.P, bias + weight.double() @ reading.p
    new.weight.copy_(weight), new.bias.copy_(bias)


def _fit_embedders(
    source: DiT, new: DiT, kept: _Kept, timestep: Tensor, classes: Tensor, span: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All before the blocks; the condition [B, D] of old and new."""
    new.patch_embed.weight.copy_(source.patch_embed.weight[kept.channels])
    new.patch_embed.bias.copy_(source.patch_embed.bias[kept.channels])
    new.pos_embed.copy_(source.pos_embed[:, kept.channels])
    _fit_embedder(source.t_embed, new.t_embed, kept.timestep, kept.condition, timestep)
    if source.span_embed is not None and new.span_embed is not None and span is not None and kept.span is not None:
        _fit_embedder(source.span_embed, new.span_embed, kept.span, kept.condition, span)
    if source.y_embed is not None and new.y_embed is not None:
        new.y_embed.weight.copy_(source.y_embed.weight[:, kept.condition])
    return source.condition(timestep, classes, span), new.condition(timestep, classes, span)


def _fit_embedder(old: TimestepEmbedder, new: TimestepEmbedder, hidden: Tensor, outputs: Tensor, time: Tensor) -> None:
    """`time` [B]: timesteps or spans."""
    _set(old.fc1, new.fc1, hidden, None)
    features = timestep_features(time, old.frequencies)
    was, now = F.silu(old.fc1(features)), F.silu(new.fc1(features))
    _set(old.fc2, new.fc2, outputs, _Reading(was, now, hidden))


def _chunks(channels: Tensor, count: int, width: int) -> Tensor:
    """The rows of an adaLN layer, `count` chunks of D, that belong to the channels."""
    return (torch.arange(count)[:, None] * width + channels).flatten()


def _fit_block(
    old: ModulatedBlock,
    new: ModulatedBlock,
    kept: _Kept,
    place: int,
    x: Tensor,
    new_x: Tensor,
    condition: tuple[Tensor, Tensor],
    gate: ClassGate,
) -> Tensor:
    """One block; `x` [B, N, D] and `new_x` [B, N, D'] come in, what leaves the new one is returned."""
    assert old.attn is not None
    assert old.mlp is not None
    assert new.attn is not None
    assert new.mlp is not None
    width = x.shape[-1]
    _set(old.adaln, new.adaln, _chunks(kept.channels, 6, width), _Reading(*condition, kept.condition))
    parts = old.adaln(condition[0]).unsqueeze(1).chunk(6, -1)
    new_parts = new.adaln(condition[1]).unsqueeze(1).chunk(6, -1)
    head_width = width // old.attn.heads
    rows = (kept.heads[place][:, None] * head_width + torch.arange(head_width)).flatten()
    a, new_a = _normed(x, parts[0], parts[1]), _normed(new_x, new_parts[0], new_parts[1])
    reading = _Reading(a, new_a, kept.channels)
    for name in "qkv":
        _set(getattr(old.attn, name), getattr(new.attn, name), rows, reading)
    y, new_y = _attended(old.attn, a, gate), _attended(new.attn, new_a, gate)
    _set(old.attn.o, new.attn.o, kept.channels, _Reading(y, new_y, rows))
    x, new_x = x + parts[2] * old.attn.o(y, gate), new_x + new_parts[2] * new.attn.o(new_y, gate)
    a = _normed(x, parts[3], parts[4], old.mlp_norm_eps)
    new_a = _normed(new_x, new_parts[3], new_parts[4], old.mlp_norm_eps)
    _set(old.mlp.fc1, new.mlp.fc1, kept.hidden[place], _Reading(a, new_a, kept.channels))
    hidden, new_hidden = (F.gelu(mlp.fc1(b, gate), approximate="tanh") for mlp, b in ((old.mlp, a), (new.mlp, new_a)))
    _set(old.mlp.fc2, new.mlp.fc2, kept.channels, _Reading(hidden, new_hidden, kept.hidden[place]))
    return new_x + new_parts[5] * new.mlp.fc2(new_hidden, gate)


def _normed(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)


def _attended(attention: Attention, a: Tensor, gate: ClassGate) -> Tensor:
    """What the output matrix of an attention reads, [B, N, D]."""
    seen: list[Tensor] = []
    hook = attention.o.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        attention(a, gate)
    finally:
        hook.remove()
    return seen[0]


def _fit_final(source: DiT, new: DiT, kept: _Kept, x: Tensor, new_x: Tensor, condition: tuple[Tensor, Tensor]) -> None:
    width = x.shape[-1]
    _set(source.final.adaln, new.final.adaln, _chunks(kept.channels, 2, width), _Reading(*condition, kept.condition))
    shift, scale = source.final.adaln(condition[0]).unsqueeze(1).chunk(2, -1)
    new_shift, new_scale = new.final.adaln(condition[1]).unsqueeze(1).chunk(2, -1)
    reading = _Reading(_normed(x, shift, scale), _normed(new_x, new_shift, new_scale), kept.channels)
    _set(source.final.linear, new.final.linear, torch.arange(source.spec.patch_values), reading)
