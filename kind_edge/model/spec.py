"""What a model is, before any weight exists: shapes, ranks and objective. Needs no torch.

Symbols: B batch, N tokens, D width, L blocks, C classes, N_G learngene rank, N_T tailor rank per class.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kind_edge.errors import InputError, UsageError, nearest, unknown
from kind_edge.model.names import SHARED, weight_type

Objective = Literal["epsilon", "flow"]
OBJECTIVES: tuple[Objective, ...] = ("epsilon", "flow")

Form = Literal["switch", "single", "union"]
"""How a deployed model holds its classes: learngene and a tailor per class; one class folded in; all folded in."""
FORMS: tuple[Form, ...] = ("switch", "single", "union")

SAMPLERS: dict[str, tuple[str, ...]] = {"flow": ("euler", "heun"), "epsilon": ("dpmsolver++", "ddim")}
"""Samplers of each objective; the first is the default."""

DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 1.5
"""Where a checkpoint recommends nothing."""

FREQUENCY_WIDTH = 256
"""Width of the sinusoidal timestep features (DiT, `TimestepEmbedder`)."""

Branch = Literal["attn", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attn", "mlp")
"""The two residual branches of a block, in the order of the forward pass; "blocks.3.attn" is one by name."""

_DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class Ranks(NamedTuple):
    """Ranks of one factored matrix; what one image sees is their sum."""

    learngene: int
    tailor: int

    @property
    def active(self) -> int:
        return self.learngene + self.tailor


class MatrixShape(NamedTuple):
    """One of the six matrices of a block: W is `outputs` x `inputs` (n x m in the formulas)."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class ModelSpec:
    """A diffusion transformer whose six block matrices are factored (or dense, for baselines).

    `image_size` and `channels` are those of the network's own input: pixels, or latents of an autoencoder, each of
    which stands for `pixels_per_latent` pixels along a side (1: pixels).
    `matrix_ranks` overrides the two ranks matrix by matrix, as truncation leaves them; `dropped_branches` are those it
    took out whole ("blocks.3.attn"): their blocks pass on what comes in, and the model holds no tensor of theirs.
    `nested`: the components of every learngene lie in the order of their importance, and a cut keeps the leading ones.
    `shared_factors`: U and V of the learngene are one pair per weight type ("attn.q"), which all blocks have in common;
    s, tailors and biases are each block's own (FINE, Xie et al., arXiv 2409.19289). A cut keeps leading components, as
    many in every block.
    `step_counts` is empty for an ordinary model. A distilled one predicts, for each of these numbers of Euler steps,
    the mean velocity over a step (whose span is an input of the network), with guidance of strength
    `inside_guidance` in it.

    Two details differ between DiTs: the timestep frequencies are 10000^(-i / (128 - `timestep_frequency_shift`)), 0 in
    DiT and 1 in diffusers; the LayerNorm before the MLP has `mlp_norm_eps`, 1e-6 in DiT and usually 1e-5 in diffusers.
    """

    image_size: int
    channels: int
    patch_size: int
    width: int
    depth: int
    heads: int
    num_classes: int
    learngene_rank: int = 0
    tailor_rank: int = 0
    mlp_ratio: float = 4.0
    label_embedding: bool = False
    learned_sigma: bool = False
    objective: Objective = "flow"
    factored: bool = True
    pixels_per_latent: int = 1
    timestep_frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6
    nested: bool = False
    shared_factors: bool = False
    step_counts: tuple[int, ...] = ()
    inside_guidance: float | None = None
    matrix_ranks: Mapping[str, Ranks] = field(default_factory=dict)
    dropped_branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "channels",
            "patch_size",
            "width",
            "depth",
            "heads",
            "num_classes",
            "pixels_per_latent",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"ModelSpec.{name}: got {value!r}, want an integer of at least 1")
        for name in ("learngene_rank", "tailor_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"ModelSpec.{name}: got {value!r}, want an integer of at least 0")
        for name in ("label_embedding", "learned_sigma", "factored", "nested", "shared_factors"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"ModelSpec.{name}: got {getattr(self, name)!r}, want true or false")
        ratio: Any = self.mlp_ratio
        if not isinstance(ratio, int | float) or not 1 <= ratio * self.width < 2**31:
            raise InputError(f"ModelSpec.mlp_ratio: got {ratio!r}, want a number that leaves a hidden layer")
        if self.image_size % self.patch_size:
            raise InputError(f"ModelSpec.patch_size: {self.patch_size} does not divide image_size {self.image_size}")
        if self.width % self.heads or self.width % 4:
            raise InputError(f"ModelSpec.width: {self.width} must be a multiple of heads ({self.heads}) and of 4")
        if self.pixels_per_latent not in (1, 8):
            raise InputError(
                f"ModelSpec.pixels_per_latent: got {self.pixels_per_latent}, want 1 (pixels) or 8 (SD latents)"
            )
        if self.timestep_frequency_shift not in (0, 1) or isinstance(self.timestep_frequency_shift, bool):
            got = repr(self.timestep_frequency_shift)
            raise InputError(f"ModelSpec.timestep_frequency_shift: got {got}, want 0 (DiT) or 1 (diffusers)")
        eps: Any = self.mlp_norm_eps
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise InputError(f"ModelSpec.mlp_norm_eps: got {eps!r}, want a number between 0 and 1")
        if self.objective not in OBJECTIVES:
            raise InputError(f"ModelSpec.objective: got {self.objective!r}, want one of {', '.join(OBJECTIVES)}")
        if self.learned_sigma and self.objective != "epsilon":
            raise InputError("ModelSpec.learned_sigma: only the epsilon objective learns a variance")
        self._check_distilled()
        self._check_dropped()
        known = {matrix.name for matrix in self.matrices()}
        for name in self.matrix_ranks:
            if name not in known:
                raise InputError(f"ModelSpec.matrix_ranks: unknown matrix {name!r}; nearest: {nearest(name, known)}")
        self._check_shared()

    def check_trainable_ranks(self) -> None:
        """Refuse a learngene or a tailor of more components than its matrix has to give.

        Such a model can be folded and shipped, but what is beyond the matrix's rank is wasted, and has no order.
        """
        for matrix in self.matrices() if self.factored else ():
            most = min(matrix.outputs, matrix.inputs)
            for part, rank in zip(("learngene_rank", "tailor_rank"), self.ranks(matrix.name), strict=True):
                if rank > most:
                    what = f"matrix_ranks[{matrix.name!r}], {part}" if matrix.name in self.matrix_ranks else part
                    shape = f"{matrix.name} is {matrix.outputs} x {matrix.inputs}"
                    raise InputError(f"ModelSpec.{what}: got {rank}, want at most {most}: {shape}, which has no more")

    def _check_distilled(self) -> None:
        counts: Any = self.step_counts
        whole = isinstance(counts, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
        if not whole or list(counts) != sorted(set(counts)) or any(not 1 <= n <= 1000 for n in counts):
            raise InputError(f"ModelSpec.step_counts: got {counts!r}, want rising integers of 1 to 1000")
        inside: Any = self.inside_guidance
        if inside is not None and (not isinstance(inside, int | float) or not 0 <= inside < 1000):
            raise InputError(f"ModelSpec.inside_guidance: got {inside!r}, want a number of 0 to 1000")
        if bool(counts) != (inside is not None):
            raise InputError("ModelSpec: step_counts and inside_guidance belong together; give both or neither")
        if counts and self.objective != "flow":
            raise InputError("ModelSpec.step_counts: only models of the flow objective take steps of a given span")

    def _check_dropped(self) -> None:
        dropped: Any = self.dropped_branches
        known = self._branch_names()
        if not isinstance(dropped, tuple) or not all(isinstance(name, str) for name in dropped):
            raise InputError(f"ModelSpec.dropped_branches: got {dropped!r:.60}, want names such as {known[0]!r}")
        for name in dropped:
            if name not in known:
                raise InputError(
                    f"ModelSpec.dropped_branches: unknown branch {name!r}; nearest: {nearest(name, known)}"
                )
        if list(dropped) != [name for name in known if name in dropped]:
            raise InputError("ModelSpec.dropped_branches: want each branch once, in the order of the forward pass")

    def _check_shared(self) -> None:
        if not self.shared_factors:
            return
        if not self.factored:
            raise InputError("ModelSpec.shared_factors: a dense model has no factors to share; want factored = true")
        found: dict[str, tuple[str, int]] = {}
        for matrix in self.matrices():
            rank = self.ranks(matrix.name).learngene
            first, wanted = found.setdefault(weight_type(matrix.name), (matrix.name, rank))
            if rank != wanted:
                raise InputError(
                    f"ModelSpec.matrix_ranks: {matrix.name} has learngene rank {rank}, {first} has {wanted}; "
                    "blocks that share their factors have one rank per weight type"
                )

    @property
    def distilled(self) -> bool:
        """Few steps, and no guidance branch: see `step_counts`."""
        return bool(self.step_counts)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def output_channels(self) -> int:
        return self.channels * (2 if self.learned_sigma else 1)

    @property
    def patch_values(self) -> int:
        """Values that the final layer predicts per token."""
        return self.patch_size**2 * self.output_channels

    def ranks(self, matrix: str) -> Ranks:
        return self.matrix_ranks.get(matrix, Ranks(self.learngene_rank, self.tailor_rank))

    def branches(self, kind: Branch | None = None) -> tuple[str, ...]:
        """Names of the branches that are left, of one kind or of both, in the order of the forward pass."""
        kinds = BRANCHES if kind is None else (kind,)
        return tuple(name for name in self._branch_names(kinds) if name not in self.dropped_branches)

    def _branch_names(self, kinds: tuple[Branch, ...] = BRANCHES) -> list[str]:
        return [f"blocks.{block}.{kind}" for block in range(self.depth) for kind in kinds]

    def block_branches(self, block: int) -> tuple[Branch, ...]:
        """The branches that are left of one block."""
        return tuple(kind for kind in BRANCHES if f"blocks.{block}.{kind}" not in self.dropped_branches)

    def modulation_width(self, block: int) -> int:
        """Values that modulate one block: shift, scale and gate of every branch, D each."""
        return 3 * self.width * len(self.block_branches(block))

    def without_branches(self, names: Collection[str]) -> ModelSpec:
        """The same model without these branches, and without ranks of their matrices."""
        dropped = {*self.dropped_branches, *names}
        ranks = {name: ranks for name, ranks in self.matrix_ranks.items() if branch_of(name) not in dropped}
        known = self._branch_names()
        order = [name for name in known if name in dropped] + sorted(dropped - set(known))  # refused below
        return dataclasses.replace(self, matrix_ranks=ranks, dropped_branches=tuple(order))

    def matrices(self) -> Iterator[MatrixShape]:
        """The factored matrices of the branches that are left, in the order of the forward pass."""
        width, hidden = self.width, self.hidden_width
        for block in range(self.depth):
            left = self.block_branches(block)
            if "attn" in left:
                for part in ("q", "k", "v", "o"):
                    yield MatrixShape(f"blocks.{block}.attn.{part}", width, width)
            if "mlp" in left:
                yield MatrixShape(f"blocks.{block}.mlp.fc1", hidden, width)
                yield MatrixShape(f"blocks.{block}.mlp.fc2", width, hidden)

    def weight_types(self) -> dict[str, MatrixShape]:
        """The first matrix of every weight type ("attn.q"), by type: the shape of what blocks may share."""
        found: dict[str, MatrixShape] = {}
        for matrix in self.matrices():
            found.setdefault(weight_type(matrix.name), matrix)
        return found

    def factor_name(self, matrix: str, part: str) -> str:
        """The tensor of a checkpoint that holds U, s or V of a matrix's learngene."""
        shared = self.shared_factors and part != "s"
        return f"{SHARED}.{weight_type(matrix)}.{part}" if shared else f"{matrix}.learngene.{part}"

    def dense(self) -> ModelSpec:
        """The ordinary DiT of the same shape: what percentages of a budget refer to."""
        ordinary: dict[str, Any] = {"nested": False, "shared_factors": False}
        ordinary |= {"matrix_ranks": {}, "dropped_branches": (), "step_counts": (), "inside_guidance": None}
        return dataclasses.replace(self, factored=False, learngene_rank=0, tailor_rank=0, **ordinary)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["matrix_ranks"] = {name: list(ranks) for name, ranks in self.matrix_ranks.items()}
        values["step_counts"] = list(self.step_counts)
        values["dropped_branches"] = list(self.dropped_branches)
        for name in ("dropped_branches", "shared_factors"):
            if not values[name]:  # as in files of before there were any
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "ModelSpec") -> ModelSpec:
        """Parse strictly: an unknown or missing key is an `InputError` that names the nearest known one."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"{where}: unknown key {key!r}; nearest known: {nearest(key, known)}")
        required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n != "matrix_ranks"]
        missing = [name for name in required if name not in values]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}")
        parsed = dict(values)
        parsed["matrix_ranks"] = _parse_ranks(values.get("matrix_ranks", {}), where)
        for name in ("step_counts", "dropped_branches"):
            if isinstance(given := values.get(name), list):
                parsed[name] = tuple(given)
        try:
            return cls(**parsed)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def branch_of(matrix: str) -> str:
    """The branch that a matrix belongs to: "blocks.3.attn" of "blocks.3.attn.q"."""
    return matrix.rpartition(".")[0]


def _parse_ranks(values: Any, where: str) -> dict[str, Ranks]:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: matrix_ranks: got {values!r}, want a pair of ranks per matrix")
    for name, ranks in values.items():
        pair = isinstance(ranks, list | tuple) and len(ranks) == 2
        if not pair or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in ranks):
            raise InputError(f"{where}: matrix_ranks[{name!r}]: got {ranks!r}, want [learngene rank, tailor rank]")
    return {name: Ranks(*ranks) for name, ranks in values.items()}


def named_spec(arch: str, num_classes: int, **overrides: Any) -> ModelSpec:
    """A standard DiT shape by name ("DiT-B/2"): 32 x 32 x 4 latents, learned sigma, label embedding, dense.

    Sizes from Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), table 1.
    """
    names = [f"DiT-{size}/{patch}" for size in _DIT_SIZES for patch in (2, 4, 8)]
    match = re.fullmatch(r"DiT-(S|B|L|XL)/([248])", arch)
    if match is None:
        raise unknown("architecture", arch, names)
    if num_classes < 1:
        raise UsageError(f"--num-classes: got {num_classes}, want at least 1")
    width, depth, heads = _DIT_SIZES[match[1]]
    base: dict[str, Any] = {
        "image_size": 32, "channels": 4, "patch_size": int(match[2]), "width": width, "depth": depth, "heads": heads,
        "num_classes": num_classes, "label_embedding": True, "learned_sigma": True, "objective": "epsilon",
        "factored": False, "pixels_per_latent": 8,
    }  # fmt: skip
    return ModelSpec(**(base | overrides))


def standard_heads(width: int) -> int | None:
    """Attention heads of the standard DiT of that width; None if there is none."""
    return {size[0]: size[2] for size in _DIT_SIZES.values()}.get(width)


def default_sampler(objective: str) -> str:
    return SAMPLERS[objective][0]


class Advice(NamedTuple):
    """How a model wants to be sampled where nobody says otherwise."""

    steps: int
    guidance: float
    sampler: str


def recommended(spec: ModelSpec, provenance: Mapping[str, Any]) -> Advice:
    """What a checkpoint's provenance recommends; of a distilled model, at most what it was distilled for."""
    advice = provenance.get("recommended", {})
    steps = int(advice.get("steps", spec.step_counts[-1] if spec.distilled else DEFAULT_STEPS))
    guidance = advice.get("guidance", DEFAULT_GUIDANCE) if spec.inside_guidance is None else spec.inside_guidance
    return Advice(steps, float(guidance), str(advice.get("sampler", default_sampler(spec.objective))))


def check_sampling(spec: ModelSpec, steps: int, guidance: float, sampler: str | None = None) -> None:
    """Refuse what a distilled model was not distilled for, with a `UsageError` that says what it supports."""
    if not spec.distilled:
        return
    if sampler not in (None, default_sampler(spec.objective)):
        raise UsageError(
            f"--sampler {sampler}: this model is distilled for the steps of {default_sampler(spec.objective)}; "
            "leave --sampler out"
        )
    if steps not in spec.step_counts:
        counts = ", ".join(map(str, spec.step_counts))
        raise UsageError(f"--steps {steps}: this model is distilled for {counts} steps; take one of these")
    if guidance != spec.inside_guidance:
        raise UsageError(
            f"--guidance {guidance:g}: this model has guidance {spec.inside_guidance:g} inside, and no branch to guide "
            "with; leave --guidance out, or take the model that it was distilled from"
        )
