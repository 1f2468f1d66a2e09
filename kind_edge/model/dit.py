"""The diffusion transformer. Symbols: B batch, N tokens, D width, L blocks, C classes, P patch side.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero variant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kind_edge.model.gated_linear import Basis, ClassGate, GatedLinear
from kind_edge.model.names import weight_type
from kind_edge.model.spec import FREQUENCY_WIDTH, MatrixShape, ModelSpec


def sincos_position_table(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine table [side*side, width] (MAE / DiT): half the channels for rows, half for columns."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # [side, D/4]
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [side, D/2]
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()


def timestep_frequencies(shift: int) -> Tensor:
    """[128], float32; the `shift` is `ModelSpec.timestep_frequency_shift`."""
    half = FREQUENCY_WIDTH // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half) / (half - shift))


def timestep_features(timestep: Tensor, frequencies: Tensor) -> Tensor:
    """timestep [B] -> cosines, then sines, of 128 frequencies, [B, 256]."""
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP."""

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        # A constant, also of what is exported: another runtime's exp, times a timestep of 1000, would not be the same.
        self.register_buffer("frequencies", timestep_frequencies(frequency_shift), persistent=False)
        self.fc1 = nn.Linear(FREQUENCY_WIDTH, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> [B, D]."""
        return self.fc2(F.silu(self.fc1(timestep_features(timestep, self.frequencies))))


class DenseLinear(nn.Linear):
    """An ordinary layer in the place of a `GatedLinear`; the gate changes nothing."""

    def forward(self, x: Tensor, gate: ClassGate | None = None) -> Tensor:
        return super().forward(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, heads: int, q: nn.Module, k: nn.Module, v: nn.Module, o: nn.Module) -> None:
        super().__init__()
        self.heads, self.q, self.k, self.v, self.o = heads, q, k, v, o

    def forward(self, x: Tensor, gate: object) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        q, k, v = (part(x, gate).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), gate)  # [B, H, N, D/H] each


class Mlp(nn.Module):
    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor, gate: object) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, gate), approximate="tanh"), gate)


class Block(nn.Module):
    """One transformer block. `modulation` [B, 6D]: shift, scale, gate of attention, then of the MLP.

    A block may lack either branch (None), and then has no modulation for it.
    """

    def __init__(self, attn: Attention | None, mlp: Mlp | None, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attn, self.mlp, self.mlp_norm_eps = attn, mlp, mlp_norm_eps

    def forward(self, x: Tensor, modulation: Tensor, gate: object) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        width = x.shape[-1:]
        parts = modulation.unsqueeze(1).chunk(3 * ((self.attn is not None) + (self.mlp is not None)), -1)
        if self.attn is not None:
            shift1, scale1, gate1 = parts[:3]  # [B, 1, D] each
            x = x + gate1 * self.attn(modulate(F.layer_norm(x, width, eps=1e-6), shift1, scale1), gate)
        if self.mlp is not None:
            shift2, scale2, gate2 = parts[-3:]
            x = x + gate2 * self.mlp(modulate(F.layer_norm(x, width, eps=self.mlp_norm_eps), shift2, scale2), gate)
        return x


class ModulatedBlock(Block):
    """A block with its own adaLN network, as it is learned. At least one branch is left of it."""

    def __init__(self, attn: Attention | None, mlp: Mlp | None, spec: ModelSpec, modulation_width: int) -> None:
        super().__init__(attn, mlp, spec.mlp_norm_eps)
        self.adaln = nn.Linear(spec.width, modulation_width)

    def forward(self, x: Tensor, condition: Tensor, gate: object) -> Tensor:
        """x [B, N, D], condition [B, D] -> [B, N, D]. All of a block's weights are used in here, so that it can be
        compiled and sharded as one."""
        return super().forward(x, self.adaln(condition), gate)


class FinalLayer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.adaln = nn.Linear(spec.width, 2 * spec.width)
        self.linear = nn.Linear(spec.width, spec.patch_values)


def patchify(patch_embed: nn.Conv2d, pos_embed: Tensor, sample: Tensor) -> Tensor:
    """sample [B, ch, H, W] -> tokens [B, N, D]."""
    return patch_embed(sample).flatten(2).transpose(1, 2) + pos_embed


def unpatchify(tokens: Tensor, modulation: Tensor, linear: nn.Linear, spec: ModelSpec) -> Tensor:
    """tokens [B, N, D], modulation [B, 2D] -> prediction [B, ch_out, H, W]; token values are ordered (ch, P, P)."""
    shift, scale = modulation.unsqueeze(1).chunk(2, -1)
    values = linear(modulate(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), shift, scale))  # [B, N, ch*P*P]
    side = spec.image_size // spec.patch_size
    return F.pixel_shuffle(values.transpose(1, 2).unflatten(2, (side, side)), spec.patch_size)


def make_linear(spec: ModelSpec, shape: MatrixShape, basis: Basis | None = None) -> nn.Module:
    if spec.factored:
        return GatedLinear(shape, spec.ranks(shape.name), spec.num_classes, basis)
    return DenseLinear(shape.inputs, shape.outputs)


def make_bases(spec: ModelSpec) -> dict[str, Basis]:
    """What the blocks of a model with shared factors have in common, by weight type; nothing for other models."""
    if not spec.shared_factors:
        return {}
    return {kind: Basis(shape, spec.ranks(shape.name).learngene) for kind, shape in spec.weight_types().items()}


def as_tree(bases: dict[str, Basis]) -> nn.ModuleDict:
    """`attn.q` and its like as modules in modules, as torch wants names with dots."""
    tree = nn.ModuleDict()
    for kind, basis in bases.items():
        branch, part = kind.split(".")
        if branch not in tree:
            tree[branch] = nn.ModuleDict()
        tree.get_submodule(branch).add_module(part, basis)
    return tree


def assemble(linears: dict[str, nn.Module], block: int, spec: ModelSpec) -> tuple[Attention | None, Mlp | None]:
    """Attention and MLP of one block, as far as they are left, from linear layers by full name ("blocks.0.attn.q")."""
    part, left = f"blocks.{block}.", spec.block_branches(block)
    attention = mlp = None
    if "attn" in left:
        attention = Attention(spec.heads, *(linears[f"{part}attn.{name}"] for name in "qkvo"))
    if "mlp" in left:
        mlp = Mlp(linears[f"{part}mlp.fc1"], linears[f"{part}mlp.fc2"])
    return attention, mlp


class Nothing(nn.Module):
    """A block that lost both branches: it passes on what comes in."""

    def forward(self, x: Tensor, condition: Tensor, gate: object) -> Tensor:
        return x


class DiT(nn.Module):
    """The gated model (or, with `spec.factored` false, the ordinary dense one)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        bases = make_bases(spec)
        linears = {
            shape.name: make_linear(spec, shape, bases.get(weight_type(shape.name))) for shape in spec.matrices()
        }
        self.shared = as_tree(bases) if bases else None
        self.patch_embed = nn.Conv2d(spec.channels, width, spec.patch_size, stride=spec.patch_size)
        self.register_buffer("pos_embed", sincos_position_table(spec.image_size // spec.patch_size, width))
        self.t_embed = TimestepEmbedder(width, spec.timestep_frequency_shift)
        self.span_embed = TimestepEmbedder(width, spec.timestep_frequency_shift) if spec.distilled else None
        self.y_embed = nn.Embedding(spec.num_classes + 1, width) if spec.label_embedding else None
        widths = [spec.modulation_width(block) for block in range(spec.depth)]
        self.blocks = nn.ModuleList(
            ModulatedBlock(*assemble(linears, block, spec), spec, width) if width else Nothing()
            for block, width in enumerate(widths)
        )
        self.final = FinalLayer(spec)

    def condition(self, timestep: Tensor, class_index: Tensor, span: Tensor | None = None) -> Tensor:
        """What the adaLN networks see: timestep [B] (with a label embedding: class [B], too) -> [B, D].

        `span` [B]: by how much the timestep falls in the step that is asked for; distilled models want it.
        """
        c = self.t_embed(timestep)
        if self.span_embed is not None:
            assert span is not None, "a distilled model predicts for a span"
            c = c + self.span_embed(span)
        return F.silu(c if self.y_embed is None else c + self.y_embed(class_index))

    def modulators(self) -> list[nn.Linear]:
        """The adaLN layers: of every block that has one, then of the final layer."""
        return [*(block.adaln for block in self.blocks if isinstance(block, ModulatedBlock)), self.final.adaln]

    def forward(
        self, sample: Tensor, timestep: Tensor, classes: Tensor | ClassGate, span: Tensor | None = None
    ) -> Tensor:
        """sample [B, ch, H, W], timestep [B], classes [B] in 0..C (C: null, all gates closed) -> [B, ch_out, H, W].

        `span` [B] as in `condition`.
        """
        gate = classes if isinstance(classes, ClassGate) else ClassGate.of(classes, self.spec.num_classes)
        c = self.condition(timestep, gate.class_index, span)  # [B, D]
        # As patches leave the convolution, a token's values lie far apart, and would in every block after.
        x = patchify(self.patch_embed, self.pos_embed, sample).contiguous()  # [B, N, D]
        for block in self.blocks:
            x = block(x, c, gate)  # [B, N, D]
        return unpatchify(x, self.final.adaln(c), self.final.linear, self.spec)


def initialise(model: DiT, seed: int) -> DiT:
    """Weights of a fresh model: DiT's initialisation, with factored matrices dealt from random SVDs. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GatedLinear):
                module.initialise(generator)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(model.patch_embed.weight.flatten(1), generator=generator)
        nn.init.zeros_(model.patch_embed.bias)
        for embedder in (model.t_embed, model.span_embed):
            if embedder is not None:
                nn.init.normal_(embedder.fc1.weight, std=0.02, generator=generator)
                nn.init.normal_(embedder.fc2.weight, std=0.02, generator=generator)
        if model.y_embed is not None:
            nn.init.normal_(model.y_embed.weight, std=0.02, generator=generator)
        for layer in [*model.modulators(), model.final.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model
