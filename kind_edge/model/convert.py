"""From a dense DiT to a KIND checkpoint and back.

W = U diag(s) V^T by the SVD. The learngene takes the leading N_G components: the best matrix of its rank. Every
class's tailor starts from the *next* N_T components, the same for all classes. So the active matrix, learngene plus one
tailor, starts as the best approximation of rank N_G + N_T that there is, whatever class is asked for, and from the
first step every factor of a tailor has a gradient (random factors under s = 0 would have one in s alone). Classes part
ways in training, where an image opens its own gate only. Components beyond min(n, m) do not exist: those start as
random directions with s = 0 and change nothing, so at full learngene rank the model equals its source.
Symbols: W n x m, N_G learngene rank, N_T tailor rank, C classes.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint, save_checkpoint
from kind_edge.model.dit_layouts import DenseDiT
from kind_edge.model.foreign_files import read_foreign
from kind_edge.model.names import is_factor
from kind_edge.model.provenance import card_licence
from kind_edge.model.spec import BRANCHES, ModelSpec, branch_of

OnMatrix = Callable[[int, int], None]
"""Told (done, total) matrices."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote. `*_energy` is the share of the matrices' squared singular values that is kept."""

    folder: Path
    layout: str
    spec: ModelSpec
    class_names: tuple[str, ...]
    learngene_energy: float
    active_energy: float


def import_model(
    source: Path,
    output: Path,
    learngene_rank: int,
    tailor_rank: int,
    class_names: tuple[str, ...] | None = None,
    heads: int | None = None,
    on_matrix: OnMatrix | None = None,
) -> Imported:
    """Write the KIND checkpoint of a DiT's `.pt` file or diffusers folder; `output` appears whole or not at all."""
    check_absent(output)
    found = read_foreign(source, heads)
    spec = found.dense.spec
    if heads is not None and spec.heads != heads:
        raise UsageError(f"--heads {heads}: the source says {spec.heads}; leave the option out")
    names = class_names or found.class_names or tuple(f"class-{index}" for index in range(spec.num_classes))
    if len(names) != spec.num_classes or len(set(names)) != len(names):
        raise UsageError(
            f"--classes: got {len(names)} names, {len(set(names))} of them different; {source} has {spec.num_classes} "
            f"classes (the last of its {spec.num_classes + 1} label rows is the null class)"
        )
    checkpoint, energies = split(found.dense, learngene_rank, tailor_rank, on_matrix)
    provenance: dict[str, Any] = {"imported_from": source.resolve().name, "layout": found.layout}
    if licence := card_licence(source):
        provenance["stated"] = {"licence": licence}
    save_whole(output, dataclasses.replace(checkpoint, class_names=names, provenance=provenance))
    return Imported(output, found.layout, checkpoint.spec, names, *energies)


def check_absent(output: Path) -> None:
    """Refuse a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not empty; choose another -o or remove it")


def save_whole(
    output: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None, beside: Iterable[Path] = ()
) -> None:
    """Write beside `output`, with copies of the files in `beside`, and rename when complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.new-", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        save_checkpoint(folder, checkpoint, dtype)
        for path in beside:
            shutil.copyfile(path, folder / path.name)
        folder.rename(output)


def split(
    dense: DenseDiT, learngene_rank: int, tailor_rank: int, on_matrix: OnMatrix | None = None
) -> tuple[Checkpoint, tuple[float, float]]:
    """A checkpoint without names, and the shares of energy in the learngenes and in learngene plus tailor."""
    spec, width = dense.spec, dense.spec.width
    if not 1 <= learngene_rank <= width:
        raise UsageError(f"--learngene-rank: got {learngene_rank}, want 1 to {width} (the width: nothing is lost)")
    if not 0 <= tailor_rank <= width:
        raise UsageError(f"--tailor-rank: got {tailor_rank}, want 0 (no tailors) to {width}")
    tensors = dict(dense.tensors)
    matrices, generator = list(spec.matrices()), torch.Generator().manual_seed(0)
    energies = torch.zeros(3, dtype=torch.float64)
    for done, shape in enumerate(matrices, 1):
        u, s, v = components(tensors.pop(f"{shape.name}.weight"))
        end = learngene_rank + tailor_rank
        energies += torch.stack([s[:learngene_rank].square().sum(), s[:end].square().sum(), s.square().sum()])
        learngene = {"U": u[:, :learngene_rank], "s": s[:learngene_rank], "V": v[:, :learngene_rank]}
        own = {"U": u[:, learngene_rank:end], "s": s[learngene_rank:end], "V": v[:, learngene_rank:end]}
        tailors = _per_class(own, tailor_rank, spec.num_classes, generator)
        tensors |= {f"{shape.name}.learngene.{part}": t.float() for part, t in learngene.items()}
        tensors |= {f"{shape.name}.tailors.{part}": t for part, t in tailors.items()}
        if on_matrix:
            on_matrix(done, len(matrices))
    kind = dataclasses.replace(spec, factored=True, learngene_rank=learngene_rank, tailor_rank=tailor_rank)
    learngene_energy, active_energy = (energies[:2] / energies[2]).tolist()
    return Checkpoint(kind, (), tensors), (learngene_energy, active_energy)


def components(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of n x m in float64: U n x k, s k falling, V m x k; signs are fixed, so equal input gives equal bytes."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * sign, s, vt.T * sign


def _per_class(own: dict[str, Tensor], rank: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One copy of the components for every class; what is missing to `rank` becomes random directions under s = 0."""
    missing = rank - len(own["s"])

    def fill(part: str) -> Tensor:
        same = own[part].float().expand(classes, *own[part].shape)
        if part == "s":
            return torch.cat([same, torch.zeros(classes, missing)], -1)
        random = torch.randn(classes, same.shape[1], missing, generator=generator)
        return torch.cat([same, random / random.norm(dim=1, keepdim=True)], -1)

    return {part: fill(part) for part in "UsV"}


def densify(checkpoint: Checkpoint) -> DenseDiT:
    """The ordinary dense model of a checkpoint whose matrices have a learngene alone, folded in float64.

    An ordinary model has every branch: those that were dropped get weights and gates of zero.
    """
    tensors = {name: t.float() for name, t in checkpoint.tensors.items() if not is_factor(name)}
    for shape in checkpoint.spec.matrices():
        u, s, v = (checkpoint.tensors[checkpoint.spec.factor_name(shape.name, part)].double() for part in "UsV")
        if checkpoint.spec.ranks(shape.name).tailor:
            raise InputError(f"{shape.name} has tailors, which one dense matrix cannot hold for several classes")
        tensors[f"{shape.name}.weight"] = (u * s @ v.T).float()
    return DenseDiT(checkpoint.spec.dense(), tensors | _empty_branches(checkpoint.spec, tensors))


def _empty_branches(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for all that dropped branches have left out, adaLN rows among them."""
    empty: dict[str, Tensor] = {}
    for shape in spec.dense().matrices():
        if branch_of(shape.name) in spec.dropped_branches:
            empty[f"{shape.name}.weight"] = torch.zeros(shape.outputs, shape.inputs)
            empty[f"{shape.name}.bias"] = torch.zeros(shape.outputs)
    for block in range(spec.depth):
        left = spec.block_branches(block)
        for name, size in ((f"blocks.{block}.adaln.weight", (spec.width,)), (f"blocks.{block}.adaln.bias", ())):
            if len(left) < len(BRANCHES):
                none = torch.zeros(3 * spec.width, *size)
                empty[name] = torch.cat([tensors[name] if kind in left else none for kind in BRANCHES])
    return empty
