"""The deployed model: plain dense linear algebra. No gate, no s, nothing of training is left in it.

Symbols: B batch, N tokens, D width, L blocks, K kept classes, S sampler evaluations, n outputs, m inputs, r rank.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kind_edge.model.dit import Block, DiT, Nothing, assemble, patchify, unpatchify
from kind_edge.model.provenance import NOT_STATED, card_licence, lineage
from kind_edge.model.spec import ModelSpec

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan
    from kind_edge.model.autoencoder import Autoencoder
    from kind_edge.model.checkpoint import Checkpoint


class Pick(NamedTuple):
    """Which tailor each image uses: `index` [B] in 0..K-1, and `open` [B, 1, 1], 0 for the null class (None: there is
    no such class)."""

    index: Tensor
    open: Tensor | None = None

    @classmethod
    def of(cls, class_index: Tensor, kept: int) -> Pick:
        """Of indices in 0..K, where K is the null class."""
        return cls(class_index.clamp(0, kept - 1), (class_index < kept).to(torch.float32).reshape(-1, 1, 1))


class Thin(nn.Module):
    """A low-rank layer stored as two thin weights: x [.., m] -> (x V) U, V m x r, U r x n."""

    def __init__(self, v: Tensor, u: Tensor) -> None:
        super().__init__()
        self.v, self.u = nn.Parameter(v), nn.Parameter(u)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.v @ self.u


class CommonThin(nn.Module):
    """Two thin weights that layers of several blocks multiply by, V m x r and U r x n, and what a file calls them."""

    def __init__(self, name: str, v: Tensor, u: Tensor) -> None:
        super().__init__()
        self.name, self.v, self.u = name, nn.Parameter(v), nn.Parameter(u)


class ScaledThin(Thin):
    """A low-rank layer on weights that other layers have, too: x [.., m] -> (x V * s) U, s [r] its own.

    Whoever takes its `v` and `u` gets thin weights of its own, the scale in them.
    """

    def __init__(self, common: CommonThin, scale: Tensor) -> None:
        nn.Module.__init__(self)
        self.common, self.scale = common, nn.Parameter(scale)

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        return self.common.v * self.scale

    @property
    def u(self) -> Tensor:  # type: ignore[override]
        return self.common.u

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.common.v * self.scale @ self.common.u


class Dense(nn.Module):
    """One weight, stored m x n as it is multiplied."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Tailors(nn.Module):
    """Thin factors of every kept class, picked by the class index: V K x m x r, U K x r x n."""

    def __init__(self, v: Tensor, u: Tensor) -> None:
        super().__init__()
        self.v, self.u = nn.Parameter(v), nn.Parameter(u)

    def forward(self, x: Tensor, pick: Pick) -> Tensor:
        v, u = self.v.index_select(0, pick.index), self.u.index_select(0, pick.index)  # [B, m, r], [B, r, n]
        thin = x @ v  # [B, N, r]
        return (thin if pick.open is None else thin * pick.open) @ u


class PlainLinear(nn.Module):
    """x [B, N, m] -> [B, N, n]: bias, the shared weight if any rank is left, the picked tailor if there are any."""

    def __init__(self, shared: Thin | Dense | None, tailors: Tailors | None, bias: Tensor) -> None:
        super().__init__()
        self.shared, self.tailors, self.bias = shared, tailors, nn.Parameter(bias)

    def forward(self, x: Tensor, pick: Pick | None) -> Tensor:
        parts = [self.shared(x)] if self.shared is not None else []
        if self.tailors is not None and pick is not None:
            parts.append(self.tailors(x, pick))
        return sum(parts[1:], parts[0]) + self.bias if parts else self.bias.expand(*x.shape[:2], -1)


class ModulationTable(nn.Module):
    """adaLN and timestep networks, evaluated once at the sampler's steps: table [S, L*6D + 2D], fp32 or fp16.

    Where modulation depends on the label of a class that is switched, [labels, S, L*6D + 2D]: kept classes, then the
    null class where there is one. A dropped branch has no columns in it.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, step_index: Tensor, class_index: Tensor | None) -> Tensor:
        if self.table.ndim == 3:
            return self.table[class_index, step_index.long()].float()
        return self.table.index_select(0, step_index).float()


class ModulationNetwork(nn.Module):
    """The same networks kept as they are: smaller than a table of many steps and classes.

    A plan has one number of steps, so the span of a distilled model's steps is a constant: it lies in a bias.
    """

    def __init__(self, source: DiT, span: Tensor | None = None) -> None:
        """`span` [1] is what a distilled model takes."""
        super().__init__()
        self.t_embed, self.y_embed = source.t_embed, source.y_embed
        self.adaln = nn.ModuleList(source.modulators())
        if source.span_embed is not None and span is not None:
            self.t_embed = copy.deepcopy(source.t_embed)
            with torch.no_grad():
                self.t_embed.fc2.bias += source.span_embed(span)[0]

    def forward(self, timestep: Tensor, class_index: Tensor | None) -> Tensor:
        c = self.t_embed(timestep)
        if self.y_embed is not None:  # a folded model has one label for all, kept where the null label was
            c = c + (self.y_embed.weight[-1] if class_index is None else self.y_embed(class_index))
        c = F.silu(c)
        return torch.cat([layer(c) for layer in self.adaln], -1)


@dataclass(frozen=True)
class Origin:
    """What a plain model was folded from: for formats that need more than its graph. `timesteps` [S] are the plan's.

    `autoencoder`: what makes pictures of its latents, where one was given. `wide`: the matrices or operators that stay
    in higher precision, where that is not to be found by measuring: as it was measured for a core.
    """

    truncated: Checkpoint
    plan: Plan
    timesteps: Tensor
    autoencoder: Autoencoder | None = None
    wide: tuple[str, ...] | None = None

    def lineage(self) -> dict[str, Any]:
        """What its files say of where they come from."""
        noted = self.truncated.provenance
        told = dict(noted.get("lineage") or lineage(self.plan.model, self.plan.checkpoint_sha256, noted))
        if self.autoencoder is None:
            return told
        licence = card_licence(self.autoencoder.folder) or NOT_STATED
        own = {"name": self.autoencoder.kind, "sha256": self.autoencoder.sha256, "licence": licence}
        return {**told, "autoencoder": own}


class PlainDiT(nn.Module):
    """What is exported. `step` is `step_index` int32 [B] with a table, `timestep` float32 [B] with the network."""

    def __init__(
        self,
        spec: ModelSpec,
        source: DiT,
        linears: dict[str, nn.Module],
        modulation: nn.Module,
        switches: bool,
        origin: Origin,
    ) -> None:
        super().__init__()
        self.spec, self.switches, self.modulation, self.origin = spec, switches, modulation, origin
        self.patch_embed, self.final = source.patch_embed, source.final.linear
        self.pos_embed = nn.Parameter(source.pos_embed.clone())
        self.blocks = nn.ModuleList(
            Block(*assemble(linears, i, spec), spec.mlp_norm_eps) if width else Nothing()
            for i, width in enumerate(self._widths())
        )

    def _widths(self) -> list[int]:
        """Modulation values of every block."""
        return [self.spec.modulation_width(block) for block in range(self.spec.depth)]

    @property
    def input_names(self) -> tuple[str, ...]:
        step = "step_index" if isinstance(self.modulation, ModulationTable) else "timestep"
        return ("sample", step, "class_index") if self.switches else ("sample", step)

    def forward(self, sample: Tensor, step: Tensor, class_index: Tensor | None = None) -> Tensor:
        """sample [B, ch, H, W], step [B], class_index [B] in 0..K -> prediction [B, ch_out, H, W].

        K is the null class; a distilled model, with guidance inside, has none.
        """
        pick = None
        if class_index is not None:
            pick = Pick(class_index) if self.spec.distilled else Pick.of(class_index, self.spec.num_classes)
        modulation = self.modulation(step, class_index)  # [B, L*6D + 2D]
        x = patchify(self.patch_embed, self.pos_embed, sample)  # [B, N, D]
        start = 0
        for block, width in zip(self.blocks, self._widths(), strict=True):
            x = block(x, modulation[:, start : start + width], pick)
            start += width
        return unpatchify(x, modulation[:, start:], self.final, self.spec)
