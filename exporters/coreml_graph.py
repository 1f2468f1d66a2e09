"""The deployed model as Core ML likes it, in one of two layouts. The same weights, the same function.

*tokens*: [B, N, D] and matrix products, attention as one operator; tailors are gathered by the class index.
*channels*: [B, D, 1, N] and 1x1 convolutions, heads one by one; all kept tailors lie side by side in constant weights,
with a mask of the class between the two factors, so that no weight is computed at run time.

Every weight keeps the name of its matrix ("blocks.0.attn.q.weight"), which is how it is found again in a package.
Symbols: B batch, N tokens, D width, H heads, K kept classes, n outputs, m inputs, r rank, S sampler evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kind_edge.budget.coreml_weights import Layout
from kind_edge.deploy.plain import Dense, ModulationTable, Pick, PlainDiT, PlainLinear, Thin
from kind_edge.deploy.sampler_table import SamplerTable
from kind_edge.model.dit import modulate

Picked = Pick | dict[tuple[int, int], Tensor] | None


class _Linear(nn.Module):
    """`kind`, and the shared part: `weight` [n, m], or `v` [r, m] and `u` [n, r], or nothing; and the bias."""

    weight: Tensor
    v: Tensor
    u: Tensor

    def __init__(self, source: PlainLinear) -> None:
        super().__init__()
        self.kind = "tailors"
        if isinstance(source.shared, Dense):
            self.kind, self.weight = "dense", _parameter(source.shared.weight.T)
        elif isinstance(source.shared, Thin):
            self.kind, self.v, self.u = "factored", _parameter(source.shared.v.T), _parameter(source.shared.u.T)
        self.bias = nn.Parameter(source.bias.clone())


class TokenLinear(_Linear):
    """x [B, N, m] -> [B, N, n]. Weights lie n x m, as Core ML's `linear` wants them; tailors as they are gathered."""

    def __init__(self, source: PlainLinear) -> None:
        super().__init__(source)
        self.switches = source.tailors is not None
        if source.tailors is not None:
            self.tailors_v, self.tailors_u = nn.Parameter(source.tailors.v), nn.Parameter(source.tailors.u)

    def forward(self, x: Tensor, pick: Picked) -> Tensor:
        if self.kind == "dense":
            out = F.linear(x, self.weight, self.bias)
        elif self.kind == "factored":
            out = F.linear(F.linear(x, self.v), self.u, self.bias)
        else:
            out = self.bias
        if self.switches and isinstance(pick, Pick):
            thin = x @ self.tailors_v.index_select(0, pick.index)  # [B, N, r]
            thin = thin if pick.open is None else thin * pick.open
            out = thin @ self.tailors_u.index_select(0, pick.index) + out
        return out if out.ndim > 1 else out.expand(*x.shape[:2], -1)


class ChannelLinear(_Linear):
    """x [B, m, 1, N] -> [B, n, 1, N] by 1x1 convolutions; the shared thin factors and all tailors are one pair.

    `mask_key` says which mask it needs: shared rank in the pair, rank of a tailor.
    """

    def __init__(self, source: PlainLinear) -> None:
        super().__init__(source)
        self.mask_key: tuple[int, int] | None = None
        if source.tailors is not None:
            rank = source.tailors.v.shape[-1]
            v = source.tailors.v.permute(0, 2, 1).flatten(0, 1)  # [K r, m]
            u = source.tailors.u.permute(2, 0, 1).flatten(1)  # [n, K r]
            if self.kind == "factored":
                self.mask_key = (len(self.v), rank)
                self.v, self.u = _parameter(torch.cat([self.v, v])), _parameter(torch.cat([self.u, u], 1))
            else:
                self.mask_key = (0, rank)
                self.tailors_v, self.tailors_u = _parameter(v), _parameter(u)
        for name, value in list(self.named_parameters()):
            if name != "bias":
                setattr(self, name, nn.Parameter(value[:, :, None, None]))

    def forward(self, x: Tensor, pick: Picked) -> Tensor:
        mask = pick[self.mask_key] if isinstance(pick, dict) and self.mask_key is not None else None
        if self.kind == "factored":
            thin = F.conv2d(x, self.v)
            return F.conv2d(thin if mask is None else thin * mask, self.u, self.bias)
        if self.kind == "dense":
            out = F.conv2d(x, self.weight, self.bias)
            return out if mask is None else out + F.conv2d(F.conv2d(x, self.tailors_v) * mask, self.tailors_u)
        if mask is not None:
            return F.conv2d(F.conv2d(x, self.tailors_v) * mask, self.tailors_u, self.bias)
        return self.bias[:, None, None].expand(x.shape[0], -1, 1, x.shape[-1])  # len(x) would fix the batch


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous())


class Attention(nn.Module):
    def __init__(self, source: nn.Module, layout: Layout) -> None:
        super().__init__()
        linear = ChannelLinear if layout == "channels" else TokenLinear
        self.heads, self.layout = source.heads, layout
        self.q, self.k, self.v, self.o = (linear(getattr(source, name)) for name in "qkvo")

    def forward(self, x: Tensor, pick: Picked) -> Tensor:
        q, k, v = self.q(x, pick), self.k(x, pick), self.v(x, pick)
        return self.o(_split_heads(q, k, v, self.heads) if self.layout == "channels" else self._together(q, k, v), pick)

    def _together(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, D] each. One reshape of all three, not three: with a flexible batch the converter would otherwise not
        know that their batches are the same, and tile them."""
        tokens = q.shape[1]
        qkv = torch.cat([q, k, v], 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, 3N, D/H]
        return F.scaled_dot_product_attention(*qkv.split(tokens, 2)).transpose(1, 2).flatten(2)


def _split_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, D, 1, N] each, head by head: small products that fit the Neural Engine's cache, and no transposition.

    Scaled after the squeeze: right behind its convolution the factor would be fused into the weights, which then are no
    longer the model's, nor found by their name when they are compressed.
    """
    width = q.shape[1] // heads
    flat = [part.squeeze(2) for part in (q, k, v)]
    split = [part.split(width, 1) for part in (flat[0] * width**-0.5, *flat[1:])]  # H of [B, D/H, N]
    out = [vh @ (kh.transpose(1, 2) @ qh).softmax(1) for qh, kh, vh in zip(*split, strict=True)]
    return torch.cat(out, 1).unsqueeze(2)


class Mlp(nn.Module):
    def __init__(self, source: nn.Module, layout: Layout) -> None:
        super().__init__()
        linear = ChannelLinear if layout == "channels" else TokenLinear
        self.fc1, self.fc2 = linear(source.fc1), linear(source.fc2)

    def forward(self, x: Tensor, pick: Picked) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, pick), approximate="tanh"), pick)


class Block(nn.Module):
    def __init__(self, source: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.attn = Attention(source.attn, layout) if source.attn is not None else None
        self.mlp = Mlp(source.mlp, layout) if source.mlp is not None else None
        self.layout, self.mlp_norm_eps = layout, source.mlp_norm_eps

    def forward(self, x: Tensor, modulation: Tensor, pick: Picked) -> Tensor:
        """modulation [B, 3D] for every branch that is left: shift, scale, gate."""
        parts = _spread(modulation, 3 * ((self.attn is not None) + (self.mlp is not None)), self.layout)
        if self.attn is not None:
            x = x + parts[2] * self.attn(modulate(_norm(x, 1e-6, self.layout), *parts[:2]), pick)
        if self.mlp is not None:
            x = x + parts[-1] * self.mlp(modulate(_norm(x, self.mlp_norm_eps, self.layout), *parts[-3:-1]), pick)
        return x


def _spread(modulation: Tensor, count: int, layout: Layout) -> tuple[Tensor, ...]:
    """[B, count D] -> `count` of [B, 1, D], or of [B, D, 1, 1]."""
    if layout == "channels":
        return modulation[:, :, None, None].chunk(count, 1)
    return modulation.unsqueeze(1).chunk(count, -1)


def _norm(x: Tensor, eps: float, layout: Layout) -> Tensor:
    """Over the width. Along channels it is written out, as the converter finds `layer_norm` in it again."""
    if layout == "tokens":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    centred = x - x.mean(1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps)


class Rows(nn.Module):
    """Baked modulation as one table of rows: [S, W], or of every class its S rows below one another."""

    def __init__(self, source: ModulationTable) -> None:
        super().__init__()
        table = source.table.detach().float()
        self.per_class, self.steps = table.ndim == 3, table.shape[-2]
        self.table = _parameter(table.flatten(0, -2))

    def forward(self, step: Tensor, class_index: Tensor | None) -> Tensor:
        if self.per_class and class_index is not None:
            step = class_index * self.steps + step
        return self.table.index_select(0, step)  # [B or 1, W]


class Denoiser(nn.Module):
    """A `PlainDiT` in a layout. Inputs and output as of the bundle's denoiser; `step` and `class_index` are int32 [B].

    A `step` of length 1 serves every image of the batch. With `mapped` the classes of the inputs are numbered by a
    constant, `class_map`: what a function for some of the classes changes, and nothing else.
    """

    def __init__(self, source: PlainDiT, layout: Layout, mapped: bool = False) -> None:
        super().__init__()
        self.spec, self.layout, self.switches = source.spec, layout, source.switches
        self.input_names, self.patch_embed = source.input_names, source.patch_embed
        modulation = source.modulation
        self.modulation = Rows(modulation) if isinstance(modulation, ModulationTable) else modulation
        pos = source.pos_embed.detach()
        self.pos_embed = _parameter(pos if layout == "tokens" else pos.T[None, :, None])
        self.widths = [source.spec.modulation_width(block) for block in range(source.spec.depth)]
        self.blocks = nn.ModuleList(
            Block(block, layout) if width else nn.Identity()
            for block, width in zip(source.blocks, self.widths, strict=True)
        )
        weight = source.final.weight.detach()
        self.final_weight = _parameter(weight if layout == "tokens" else weight[:, :, None, None])
        self.final_bias = _parameter(source.final.bias)
        masks = self._mask_tables()
        self.mask_keys = tuple(masks)
        for (shared, rank), mask in masks.items():
            self.register_buffer(f"mask_{shared}_{rank}", mask)
        rows = source.spec.num_classes + (not source.spec.distilled)
        self.register_buffer("class_map", torch.arange(rows, dtype=torch.int32) if mapped and self.switches else None)

    def _mask_tables(self) -> dict[tuple[int, int], Tensor]:
        """By key of a `ChannelLinear`: [K + 1, shared + K rank], ones where a class (the last: null) has components."""
        keys = {m.mask_key: m for m in self.modules() if isinstance(m, ChannelLinear) and m.mask_key is not None}
        kept = self.spec.num_classes
        own = torch.cat([torch.eye(kept), torch.zeros(1, kept)])[: kept if self.spec.distilled else None]
        return {
            (shared, rank): torch.cat([torch.ones(len(own), shared), own.repeat_interleave(rank, 1)], 1)
            for shared, rank in sorted(keys)
        }

    def pick(self, class_index: Tensor | None) -> Picked:
        """What the layers need to know of the classes [B]: once for all steps of a sampler."""
        if class_index is None:
            return None
        if self.layout == "tokens":
            return Pick(class_index) if self.spec.distilled else Pick.of(class_index, self.spec.num_classes)
        tables = {key: getattr(self, f"mask_{key[0]}_{key[1]}") for key in self.mask_keys}
        return {key: table.index_select(0, class_index)[:, :, None, None] for key, table in tables.items()}

    def number(self, class_index: Tensor | None) -> Tensor | None:
        """The model's own number of a class [B]."""
        if class_index is None or self.class_map is None:
            return class_index
        return self.class_map.index_select(0, class_index)

    def forward(self, sample: Tensor, step: Tensor, class_index: Tensor | None = None) -> Tensor:
        own = self.number(class_index)
        return self.predict(sample, step, own, self.pick(own))

    def predict(self, sample: Tensor, step: Tensor, class_index: Tensor | None, pick: Picked) -> Tensor:
        """sample [B, ch, H, W] -> prediction [B, ch_out, H, W]."""
        spec, tokens = self.spec, self.layout == "tokens"
        modulation = self.modulation(step, class_index)  # [B or 1, L*6D + 2D]
        x = self.patch_embed(sample).flatten(2)  # [B, D, N]
        x = (x.transpose(1, 2) if tokens else x.unsqueeze(2)) + self.pos_embed
        start = 0
        for block, width in zip(self.blocks, self.widths, strict=True):
            if width:
                x = block(x, modulation[:, start : start + width], pick)
            start += width
        x = modulate(_norm(x, 1e-6, self.layout), *_spread(modulation[:, start:], 2, self.layout))
        side = spec.image_size // spec.patch_size
        if tokens:
            values = F.linear(x, self.final_weight, self.final_bias).transpose(1, 2).unflatten(2, (side, side))
        else:
            values = F.conv2d(x, self.final_weight, self.final_bias).squeeze(2).unflatten(2, (side, side))
        return F.pixel_shuffle(values, spec.patch_size)


class Sampler(nn.Module):
    """All steps in a row, without a guidance branch: noise [B, ch, H, W], class_index [B] -> image in [0, 1]."""

    def __init__(self, denoiser: Denoiser, table: SamplerTable) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.input_names = ("noise", *denoiser.input_names[2:])
        self.rows = [
            {name: float(getattr(table, name)[row]) for name in "pqabc"} | {"timestep": float(table.timestep[row])}
            for row in range(len(table.timestep))
        ]
        baked = denoiser.input_names[1] == "step_index"
        steps = torch.arange(len(self.rows), dtype=torch.int32) if baked else torch.tensor(table.timestep).float()
        self.register_buffer("steps", steps)

    def forward(self, noise: Tensor, class_index: Tensor | None = None) -> Tensor:
        own = self.denoiser.number(class_index)
        pick, x, before = self.denoiser.pick(own), noise, None
        for i, row in enumerate(self.rows):
            prediction = self.denoiser.predict(x, self.steps[i : i + 1], own, pick)
            if prediction.shape[1] > noise.shape[1]:  # a learned variance follows
                prediction = prediction[:, : noise.shape[1]]
            direction = _sum((row["p"], x), (row["q"], prediction))
            x = _sum((row["a"], x), (row["b"], direction), *([(row["c"], before)] if before is not None else []))
            before = direction
        return (x * 0.5 + 0.5).clamp(0, 1)


def _sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Coefficients times values, added up; what is 0 is left out, and 1 is not multiplied by."""
    scaled = [value if factor == 1 else value * factor for factor, value in terms if factor != 0]
    return sum(scaled[1:], scaled[0])
