"""What a whole model costs, part by part, under two named conventions. Integers, from shapes alone.

`paper`: the KIND authors' own estimate (Xie et al., ICML 2025, mobile table): 2 FLOPs per MAC of every linear and
convolution, 4 per LayerNorm element, 1 per GELU, SiLU and convolution-bias element; no attention products; the
position table is not a parameter; factored matrices have no bias.
`exact`: what really runs, for decisions: also attention products, softmax, every bias, modulation, gated residuals, the
position table. Elementwise work is counted like the authors count it: 1 FLOP per element and arithmetic step.
Branches that a spec has dropped cost nothing in either.

Symbols: N tokens, D width, L blocks, H hidden width of the MLP, C classes, R active rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kind_edge.budget.formulas import Storage, attention_macs, linear_macs, matrix_weights
from kind_edge.budget.profile import DeviceProfile
from kind_edge.errors import UsageError
from kind_edge.model.spec import FREQUENCY_WIDTH, MatrixShape, ModelSpec

Convention = Literal["paper", "exact"]
CONVENTIONS: tuple[Convention, ...] = ("paper", "exact")

LAYER_NORM_FLOPS = 4
"""Per element, as the authors count it."""
SOFTMAX_FLOPS = 5
"""Per score: scale, subtract the maximum, exponentiate, sum, divide."""
MODULATE_FLOPS = 2
"""Per element: multiply by (1 + scale), add shift."""
RESIDUAL_FLOPS = 2
"""Per element: multiply by the gate, add."""
ONE_THREAD_FLOPS = 3e8
"""Of the dense model's block matrices. Below so much work in an evaluation one thread is quicker than several: handing
operators of microseconds over takes as long as computing them, where idle threads sleep."""
PAPER_EVALUATIONS = 250 * 2
"""The authors' image: 250 steps, each with a class and a null evaluation."""


@dataclass(frozen=True)
class PartCost:
    """One kind of work, summed over all blocks: stored parameters, and FLOPs of one evaluation at batch 1."""

    name: str
    params: int
    flops: int


@dataclass(frozen=True)
class CostBreakdown:
    """The parts of a model in the order of the forward pass, and their sums."""

    convention: Convention
    parts: tuple[PartCost, ...]

    @property
    def params(self) -> int:
        return sum(part.params for part in self.parts)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    def part(self, name: str) -> PartCost:
        """The part of that name; a KeyError names the parts there are."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"no part {name!r}; parts: {', '.join(part.name for part in self.parts)}")


def model_cost(spec: ModelSpec, convention: Convention, rank: int | None = None) -> CostBreakdown:
    """Parameters and FLOPs of what one image sees.

    With `rank` None: the dense model, or for a factored spec every matrix at its own active rank (learngene and one
    tailor). With `rank` R: all six matrices of every block at total active rank R. Raises `UsageError` for a rank
    outside 1..D.
    """
    if rank is not None and not 1 <= rank <= spec.width:
        raise UsageError(f"--rank: got {rank}, want 1 to {spec.width}, the width of the model; leave it out for dense")
    return CostBreakdown(convention, tuple(_parts(spec, convention == "exact", rank)))


def model_params(spec: ModelSpec, rank: int | None = None, convention: Convention = "paper") -> int:
    """Parameters of `model_cost`."""
    return model_cost(spec, convention, rank).params


def model_flops(spec: ModelSpec, convention: Convention, rank: int | None = None) -> int:
    """FLOPs of one evaluation at batch 1, of `model_cost`."""
    return model_cost(spec, convention, rank).flops


def runs_on_one_thread(spec: ModelSpec) -> bool:
    """Whether every plan of that model is deployed to run on a single thread; latents have a decoder that wants all.

    It depends on the shape alone, so that a planner knows it before it chooses ranks.
    """
    weights = spec.depth * (4 * spec.width**2 + 2 * spec.width * spec.hidden_width)
    return spec.pixels_per_latent == 1 and 2 * spec.tokens * weights < ONE_THREAD_FLOPS


def _storage(spec: ModelSpec, matrix: MatrixShape, rank: int | None) -> tuple[Storage, int]:
    if rank is not None:
        return "factored", rank
    return ("factored", spec.ranks(matrix.name).active) if spec.factored else ("dense", 0)


def _weights(spec: ModelSpec, rank: int | None, group: str) -> int:
    """Weights of all matrices of a group ("attn" or "mlp"), as often as they are multiplied by."""
    matrices = [matrix for matrix in spec.matrices() if matrix.name.split(".")[2] == group]
    return sum(matrix_weights(m.outputs, m.inputs, *_storage(spec, m, rank)) for m in matrices)


def _stored(spec: ModelSpec, rank: int | None, group: str) -> int:
    """The same, but what blocks have in common once, with the scale that each block has of it."""
    stored = _weights(spec, rank, group)
    if rank is None and spec.shared_factors:
        first = {matrix.name for matrix in spec.weight_types().values()}
        for matrix in spec.matrices():
            if matrix.name.split(".")[2] == group:
                shared = spec.ranks(matrix.name).learngene
                common = matrix_weights(matrix.outputs, matrix.inputs, "factored", shared)
                stored += shared - (0 if matrix.name in first else common)
    return stored


def _parts(spec: ModelSpec, exact: bool, rank: int | None) -> Iterator[PartCost]:
    factored = spec.factored or rank is not None
    attention, mlp = _weights(spec, rank, "attn"), _weights(spec, rank, "mlp")
    tokens, width = spec.tokens, spec.width
    attentions, mlps = len(spec.branches("attn")), len(spec.branches("mlp"))
    branches = attentions + mlps
    elements = tokens * width
    yield from embedding_parts(spec, exact)
    yield PartCost("norms", 0, LAYER_NORM_FLOPS * (branches + 1) * elements)
    yield PartCost("modulation", 0, exact * MODULATE_FLOPS * (branches + 1) * elements)
    yield PartCost("projections", _stored(spec, rank, "attn"), 2 * tokens * attention)
    yield PartCost("products", 0, exact * 2 * attentions * attention_macs(tokens, width))
    yield PartCost("softmax", 0, exact * SOFTMAX_FLOPS * attentions * spec.heads * tokens**2)
    yield PartCost("mlp", _stored(spec, rank, "mlp"), 2 * tokens * mlp)
    yield PartCost("activation", 0, mlps * tokens * spec.hidden_width)
    biases = sum(matrix.outputs for matrix in spec.matrices())
    yield PartCost("biases", biases if exact or not factored else 0, exact * tokens * biases)
    yield PartCost("residuals", 0, exact * RESIDUAL_FLOPS * branches * elements)
    values = spec.patch_values
    yield PartCost("final", (width + 1) * values, 2 * linear_macs(tokens, values, width) + exact * tokens * values)


def embedding_parts(spec: ModelSpec, exact: bool) -> Iterator[PartCost]:
    """Everything that depends on sample, timestep, span and label alone: patches, position, embedders, adaLN."""
    width = spec.width
    elements = spec.tokens * width
    patch_inputs = spec.channels * spec.patch_size**2
    yield PartCost("patch", (patch_inputs + 1) * width, 2 * elements * patch_inputs + elements)
    yield PartCost("position", exact * elements, exact * elements)
    timestep_macs = linear_macs(1, width, FREQUENCY_WIDTH) + linear_macs(1, width, width)
    # Features: one product per frequency, one sine or cosine per feature. SiLU: between the layers, once after.
    timestep_extra = (FREQUENCY_WIDTH // 2 + FREQUENCY_WIDTH + 3 * width) if exact else 0
    yield PartCost("timestep", timestep_macs + 2 * width, 2 * timestep_macs + width + timestep_extra)
    if spec.distilled:  # a network like the timestep's, whose output is added to that one's before the SiLU of both
        yield PartCost("span", timestep_macs + 2 * width, 2 * timestep_macs + width + timestep_extra)
    label = (spec.num_classes + 1) * width if spec.label_embedding else 0
    yield PartCost("label", label, width if exact and label else 0)
    blocks = [size for block in range(spec.depth) if (size := spec.modulation_width(block))]
    for name, sizes in (("adaln", blocks), ("final_adaln", [2 * width])):
        outputs = sum(sizes)
        # The authors count one SiLU in front of every adaLN layer; the model computes it once.
        extra = outputs if exact else width * len(sizes)
        yield PartCost(name, (width + 1) * outputs, 2 * linear_macs(1, outputs, width) + extra)


@dataclass(frozen=True)
class PaperRow:
    """One row of the authors' mobile table for one device.

    `flops` is one evaluation; `memory_bytes` four bytes per parameter; `latency_s` one image of 250 guided steps.
    """

    params: int
    flops: int
    memory_bytes: int
    latency_s: float

    def printed(self) -> tuple[str, str, str, str]:
        """(params in M, FLOPs in G, memory in MB, latency in s) with the table's digits.

        The authors' memory is their *rounded* parameter count times 4, so it is rounded twice here as well.
        """
        params = f"{self.params / 1e6:.1f}"
        return params, f"{self.flops / 1e9:.2f}", f"{float(params) * 4:.1f}", f"{self.latency_s:.2f}"


def paper_table(spec: ModelSpec, rank: int | None, profile: DeviceProfile) -> PaperRow:
    """The authors' estimate: FLOPs x 500 evaluations over the chip's nominal fp32 GPU peak.

    Raises `UsageError` for a profile without a GPU: the convention knows no other unit.
    """
    cost = model_cost(spec, "paper", rank)
    latency_s = cost.flops * PAPER_EVALUATIONS / profile.unit("gpu").peak("fp32").value
    return PaperRow(cost.params, cost.flops, 4 * cost.params, latency_s)
