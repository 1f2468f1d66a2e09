"""A checkpoint of one size as the start of a model of another: any depth, any width, nothing trained.

Every type of weight is a stack over the blocks, [layers, outputs, inputs], and a method is a pure function from such a
stack and a target shape to a stack (`METHODS`; one file each). Which axes are resized, and which stay, is said in
`resize_axes`.

A KIND model is resized as matrices: components of different blocks have nothing to do with one another, but the folded
learngenes are a stack, and so are the tailors of one class. Each result is split again to the new ranks by an SVD,
whitened by what the resized model sees at its layers when it is shown the states of the source's own sampling
trajectories: so the components that matter most come first, as in a nested learngene.

Factors that blocks have in common (`ModelSpec.shared_factors`) are no stack of matrices: U and V are resized as they
are, so at another depth alone they stay to the last bit, and s goes the way of its component through the depth.

One method is no function of stacks, as it looks at activations: `resize_fit`.

Symbols: L blocks, D width, n outputs, m inputs, C classes.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kind_edge.errors import InputError, UsageError, unknown
from kind_edge.model.calibration import Inputs, calibrate_on_inputs, trajectory_inputs
from kind_edge.model.checkpoint import HELDOUT, Checkpoint, checkpoint_hash, load_checkpoint, stored_dtype
from kind_edge.model.convert import check_absent, save_whole
from kind_edge.model.names import is_factor
from kind_edge.model.resize_axes import Method, Stack, kinds, resize_kind
from kind_edge.model.resize_bot import bot
from kind_edge.model.resize_fit import fitted
from kind_edge.model.resize_front import front
from kind_edge.model.resize_selection import selection
from kind_edge.model.resize_split import OnPart, folded, split
from kind_edge.model.spec import BRANCHES, ModelSpec

METHODS: Mapping[str, Method] = {"front": front, "bot": bot, "selection": selection}

FIT = "fit"
METHOD_NAMES = (*METHODS, FIT)
"""Those of stacks, and the one that looks at activations (`resize_fit`)."""

WHITENED = "whitened, on sampling trajectories of the source"
TRAJECTORIES = 64
"""Images that the source draws for that, and for a fit, at most."""

Tensors = dict[str, Tensor]

FURTHEST = 4
"""Times as large or as small, at most, in depth and in width."""

TWIN_NOISE = 0.02
"""Of a matrix's root mean square, where width grows. Channels that are copies would have equal gradients for ever."""

_OF_THE_OLD_SIZE = ("quality", "quality_by_steps", "final_loss", "resized")


def target_spec(
    spec: ModelSpec,
    depth: int | None = None,
    width: int | None = None,
    learngene_rank: int | None = None,
    tailor_rank: int | None = None,
) -> ModelSpec:
    """The shape of the same model at another depth or width (default: its own).

    The head width stays, so the number of heads goes with the width; so do the ranks, unless they are given.

    Raises:
        InputError: there is no such model; the message has the nearest sizes that there are.
    """
    depth, width = spec.depth if depth is None else depth, spec.width if width is None else width
    _check_size("depth", depth, spec.depth, 1)
    _check_size("width", width, spec.width, math.lcm(spec.head_width, 4))
    scale = width / spec.width
    given = (("learngene_rank", learngene_rank), ("tailor_rank", tailor_rank))
    ranks = {name: _scaled(getattr(spec, name), scale) if rank is None else rank for name, rank in given}
    most = dict.fromkeys(ranks, width)
    if spec.shared_factors:  # such components are cut, but none are made
        most["learngene_rank"] = min(width, spec.learngene_rank)
        if learngene_rank is None:
            ranks["learngene_rank"] = min(ranks["learngene_rank"], spec.learngene_rank)
    for name, rank in ranks.items() if spec.factored else ():
        lowest = 1 if name == "learngene_rank" and spec.learngene_rank else 0
        if not lowest <= rank <= most[name]:
            near = min(max(rank, lowest), most[name])
            limit = "the width" if most[name] == width else "the components there are"
            raise InputError(f"{name}: got {rank}, want {lowest} to {most[name]} ({limit}); the nearest is {near}")
    if not spec.factored and (learngene_rank is not None or tailor_rank is not None):
        raise InputError("learngene_rank, tailor_rank: the model is dense, it has no ranks; leave them out")
    heads = width // spec.head_width
    sizes: dict[str, Any] = {"depth": depth, "width": width, "heads": heads, **ranks}
    return dataclasses.replace(spec, matrix_ranks={}, **sizes)


def _scaled(rank: int, scale: float) -> int:
    return max(1, int(rank * scale + 0.5)) if rank else 0


def _check_size(name: str, wanted: int, now: int, unit: int) -> None:
    """Refuse what is no multiple of `unit`, or too far from what is, with the nearest sizes that are possible."""
    possible = [size for size in range(unit, FURTHEST * now + 1, unit) if FURTHEST * size >= now]
    if wanted in possible:
        return
    below = [size for size in possible if size < wanted][-1:]
    above = [size for size in possible if size > wanted][:1]
    rule = f"{possible[0]} to {possible[-1]} ({FURTHEST} times smaller or larger than {now})"
    rule += f" in steps of {unit} (whole heads of that width)" if unit > 1 else ""
    raise InputError(f"{name}: got {wanted}, want {rule}; the nearest: {', '.join(map(str, below + above))}")


def resized(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    method: str,
    on_part: OnPart = lambda done, total: None,
    *,
    to_heal: bool = False,
) -> Checkpoint:
    """The checkpoint at the shape of `spec`, which `target_spec` made, by the method of that name; float32.

    `to_heal`: also a distilled one, which no training on images would bring back its steps; healing does.

    Raises:
        UsageError: an unknown method, or a checkpoint that cannot be resized.
        InputError: `spec` differs in more than its sizes.
    """
    if method not in METHOD_NAMES:
        raise unknown("method", method, METHOD_NAMES)
    _check_source(checkpoint, spec, method, to_heal)
    if method == FIT:
        tensors, how = _fitted(checkpoint, spec, on_part)
    else:
        tensors, how = _by_stacks(checkpoint, spec, METHODS[method], on_part)
    return Checkpoint(spec, checkpoint.class_names, tensors, _provenance(checkpoint, spec, method, how))


def _by_stacks(checkpoint: Checkpoint, spec: ModelSpec, method: Method, on_part: OnPart) -> tuple[Tensors, str]:
    """The tensors, and how matrices were split."""
    resizing = _Resizing(checkpoint.spec, spec, method)
    source = {name: t.double().numpy() for name, t in checkpoint.float_tensors().items() if _stays(name, spec)}
    tensors = {name: _leading(name, array, spec) for name, array in resizing(source).items()}
    if not spec.factored:
        return tensors, "not factored"

    def matrices_of(part: int) -> dict[str, Stack]:
        return resizing(folded(checkpoint, part))

    plain = Checkpoint(spec, checkpoint.class_names, tensors | split(spec, matrices_of, None, lambda *_: None))
    calibration = calibrate_on_inputs(plain.model(), _asked(checkpoint))
    return tensors | split(spec, matrices_of, calibration, on_part), WHITENED


def _fitted(checkpoint: Checkpoint, spec: ModelSpec, on_part: OnPart) -> tuple[Tensors, str]:
    """The same by `fitted`."""
    seen = _asked(checkpoint)
    wide = fitted(checkpoint.model(), spec, seen)
    tensors = {name: tensor.detach() for name, tensor in wide.state_dict().items()}
    whole = Checkpoint(wide.spec, checkpoint.class_names, tensors)
    grows = spec.width > checkpoint.spec.width
    if not spec.factored:
        apart = {name: told_apart(name, t.double().numpy()) for name, t in tensors.items() if grows and is_matrix(name)}
        return tensors | {name: torch.from_numpy(array).float() for name, array in apart.items()}, "not factored"

    def matrices_of(part: int) -> dict[str, Stack]:
        return {name: told_apart(name, matrix) if grows else matrix for name, matrix in folded(whole, part).items()}

    kept = {name: tensor for name, tensor in tensors.items() if not is_factor(name)}
    return kept | split(spec, matrices_of, calibrate_on_inputs(wide, seen), on_part), WHITENED


def _asked(checkpoint: Checkpoint) -> list[Inputs]:
    """What the source is asked on its own sampling trajectories."""
    return trajectory_inputs(checkpoint.model(), images=TRAJECTORIES)


@dataclass(frozen=True)
class Sizes:
    """What is asked for; None: as it is, or (ranks) scaled with the width."""

    depth: int | None
    width: int | None
    learngene_rank: int | None = None
    tailor_rank: int | None = None


def resize_model(
    source: Path, output: Path, sizes: Sizes, method: str, on_part: OnPart = lambda done, total: None
) -> Checkpoint:
    """Write the resized checkpoint, and the source's held-out images, to `output`, which appears whole or not at all.

    Raises:
        UsageError: no size is asked for, `output` holds something, or as `resized`.
        InputError: a size that there cannot be, or a source that cannot be read.
    """
    if sizes.depth is None and sizes.width is None:
        raise UsageError("give --depth or --width, or both; what is not given stays")
    check_absent(output)
    checkpoint = load_checkpoint(source)
    done = resized(checkpoint, target_spec(checkpoint.spec, *dataclasses.astuple(sizes)), method, on_part)
    heldout = source / HELDOUT
    save_whole(output, done, stored_dtype(checkpoint), [heldout] if heldout.is_file() else [])
    return done


def _check_source(checkpoint: Checkpoint, target: ModelSpec, method: str, to_heal: bool) -> None:
    spec, where = checkpoint.spec, checkpoint.path or "the checkpoint"
    if spec.distilled and not to_heal:
        raise UsageError(
            f"{where} is distilled: its steps were learned at its size; resize the model that it was distilled from, "
            "train that on, and distil again"
        )
    if spec.dropped_branches:
        raise UsageError(f"{where} has lost {', '.join(spec.dropped_branches[:3])}: resize the model it was cut from")
    if spec.shared_factors and method == FIT:
        raise UsageError(
            f"{where} has factors that its blocks share; a fit gives every block its own: use front, bot or selection"
        )
    if spec.shared_factors and spec.matrix_ranks:
        raise UsageError(f"{where} was cut: its weight types have ranks of their own; resize the model it was cut from")
    sizes = {name: getattr(target, name) for name in ("depth", "width", "heads", "learngene_rank", "tailor_rank")}
    if dataclasses.replace(spec, **sizes, matrix_ranks={}) != target or spec.head_width != target.head_width:
        raise InputError("the target differs from the checkpoint in more than its sizes; use target_spec")


@dataclass(frozen=True)
class _Resizing:
    """From tensors of one spec to those of another, of all types that are given."""

    spec: ModelSpec
    target: ModelSpec
    method: Method

    def __call__(self, tensors: Mapping[str, Stack]) -> dict[str, Stack]:
        """By name; a type is given whole or not at all."""
        found: dict[str, Stack] = {}
        for kind in kinds(self.spec, self.target):
            if kind.name.format(0) in tensors:
                old = [tensors[name] for name in kind.names(self.spec.depth)]
                names = kind.names(self.target.depth)
                new = resize_kind(self.method, kind, old, len(names))
                found |= {name: self._finished(name, stack) for name, stack in zip(names, new, strict=True)}
        return found

    def _finished(self, name: str, tensor: Stack) -> Stack:
        """With what a stack alone does not tell.

        Where fewer blocks add to the residual stream, each adds more: gates go by L/L'. Where width grows, channels may
        be copies: a little noise, or they would stay so.
        """
        if ".adaln." in name and name.startswith("blocks."):
            chunks = tensor.reshape(len(BRANCHES), 3, self.target.width, -1).copy()  # shift, scale and gate of each
            chunks[:, 2] *= self.spec.depth / self.target.depth
            return chunks.reshape(tensor.shape)
        grows = self.target.width > self.spec.width
        return told_apart(name, tensor) if grows and is_matrix(name) else tensor


def is_matrix(name: str) -> bool:
    """Whether it is one of the six that may be factored."""
    return name.startswith("blocks.") and name.endswith(".weight") and ".adaln." not in name


def told_apart(name: str, matrix: Stack) -> Stack:
    """With a little noise, always the same for a name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(matrix.shape)
    return matrix + TWIN_NOISE * np.sqrt(np.square(matrix).mean()) * noise


def _stays(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor is resized as it is, and not as a part of a folded matrix."""
    return not is_factor(name) or (spec.shared_factors and ".tailors." not in name)


def _leading(name: str, array: Stack, target: ModelSpec) -> Tensor:
    """In float32; of factors in common as many components as the target has."""
    tensor = torch.from_numpy(array).float()
    if not is_factor(name):
        return tensor
    return tensor[..., : target.learngene_rank].contiguous()


def _provenance(checkpoint: Checkpoint, target: ModelSpec, method: str, split: str) -> dict[str, Any]:
    """That of the source without what was measured of it, and how its weights came to this size."""
    old = {key: value for key, value in checkpoint.provenance.items() if key not in _OF_THE_OLD_SIZE}
    sizes = ("depth", "width", "heads", "learngene_rank", "tailor_rank")
    return {
        **old,
        "resized": {
            "source_sha256": None if checkpoint.path is None else checkpoint_hash(checkpoint.path),
            "method": method,
            "from": {name: getattr(checkpoint.spec, name) for name in sizes},
            "to": {name: getattr(target, name) for name in sizes},
            "split": split,
            "before": checkpoint.provenance.get("resized"),
        },
    }
