"""Merge: checkpoint + plan -> a truncated checkpoint, and the plain model folded from it.

Two steps, each a pure function. `truncate` changes the function and is judged as quality; its result is an ordinary
checkpoint, whose gated forward is the reference of every artefact. `fold` must not change the function at all.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.plain import (
    CommonThin,
    Dense,
    ModulationNetwork,
    ModulationTable,
    Origin,
    PlainDiT,
    PlainLinear,
    ScaledThin,
    Tailors,
    Thin,
)
from kind_edge.errors import InputError, unknown
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.dit import DiT
from kind_edge.model.names import SHARED, is_factor, weight_type
from kind_edge.model.one_thread import one_thread
from kind_edge.model.provenance import lineage
from kind_edge.model.sampling import step_span
from kind_edge.model.spec import ModelSpec, Ranks, branch_of
from kind_edge.model.truncation import SortedFactors, fold_matrix


def class_indices(checkpoint: Checkpoint, classes: tuple[str, ...]) -> list[int]:
    """Positions of class names in the checkpoint; an unknown name is refused with the nearest known ones."""
    for name in classes:
        if name not in checkpoint.class_names:
            raise unknown("class", name, checkpoint.class_names)
    return [checkpoint.class_names.index(name) for name in classes]


@one_thread()
def truncate(checkpoint: Checkpoint, plan: Plan, calibration: Calibration | None) -> Checkpoint:
    """The checkpoint with the plan's classes and ranks. `checkpoint` is not changed.

    Ensures: an ordinary checkpoint of K classes in the plan's order. In *single* and *union* the folded product is its
    learngene and its tailors are empty; with a label embedding its null label is that of the class (in *union* the mean
    of the classes' labels). A matrix that keeps its full rank keeps its factors, bit for bit.
    A branch that the plan drops is gone from the spec, with all its tensors and its rows of the block's adaLN layer.
    """
    kept = class_indices(checkpoint, plan.classes)
    left = checkpoint.spec.without_branches(plan.dropped_branches)
    tensors = {name: t for name, t in _without_branches(checkpoint, left).items() if not is_factor(name)}
    if checkpoint.spec.label_embedding:
        labels = checkpoint.tensors["y_embed.weight"].float()
        last = labels[-1:] if plan.form == "switch" else labels[kept].mean(0, keepdim=True)
        tensors["y_embed.weight"] = torch.cat([labels[kept], last])
    ranks: dict[str, Ranks] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for shape in checkpoint.spec.matrices():
        if shape.name not in plan.matrices:
            raise InputError(f"the plan has no matrix {shape.name}; it was made for another model: solve again")
        chosen = plan.matrices[shape.name]
        if branch_of(shape.name) in left.dropped_branches:
            continue
        own, tails = _factors(checkpoint, shape.name, kept, plan, chosen, calibration)
        factors[shape.name] = own
        tensors |= {f"{shape.name}.tailors.{part}": tails[part] for part in "UsV"}
        ranks[shape.name] = Ranks(own["s"].shape[-1], tails["s"].shape[-1])
    nested, shared = (each and plan.form == "switch" for each in (left.nested, left.shared_factors))
    spec = dataclasses.replace(left, num_classes=len(kept), nested=nested, shared_factors=shared, matrix_ranks=ranks)
    tensors |= {spec.factor_name(name, part): own[part] for name, own in factors.items() for part in "UsV"}
    float_tensors = {name: t.float() for name, t in tensors.items()}
    told = lineage(plan.model, plan.checkpoint_sha256, checkpoint.provenance)
    provenance = {"truncated_from": plan.checkpoint_sha256, "lineage": told}
    return Checkpoint(spec, plan.classes, float_tensors, provenance)


def _without_branches(checkpoint: Checkpoint, left: ModelSpec) -> dict[str, Tensor]:
    """All tensors but those of branches that are not in `left`."""
    whole, tensors = checkpoint.spec, checkpoint.float_tensors()
    gone = tuple(f"{name}." for name in left.dropped_branches)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    for block in range(whole.depth):
        had, has = whole.block_branches(block), left.block_branches(block)
        for name in (f"blocks.{block}.adaln.weight", f"blocks.{block}.adaln.bias"):
            if had and had != has:
                rows = zip(had, tensors.pop(name).chunk(len(had)), strict=True)
                if own := [part for kind, part in rows if kind in has]:
                    tensors[name] = torch.cat(own)
    return tensors


def _factors(
    checkpoint: Checkpoint, name: str, kept: list[int], plan: Plan, chosen: MatrixPlan, calibration: Calibration | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """U, s and V of learngene and tailors of one matrix after truncation."""
    full = checkpoint.spec.ranks(name)
    own = {part: checkpoint.tensors[checkpoint.spec.factor_name(name, part)].double() for part in "UsV"}
    tails = {part: checkpoint.tensors[f"{name}.tailors.{part}"].double()[kept] for part in "UsV"}
    if plan.form != "switch":  # the kept tailors move into the shared part, side by side
        own = {part: torch.cat([own[part], *tails[part].unbind()], -1) for part in "UsV"}
        tails = {part: t[..., :0] for part, t in tails.items()}
        full = Ranks(full.learngene + len(kept) * full.tailor, 0)
    wanted = Ranks(chosen.shared_rank, chosen.tailor_rank or 0)
    if wanted.learngene > full.learngene or wanted.tailor > full.tailor:
        raise InputError(f"{name}: the plan wants ranks {tuple(wanted)}, the checkpoint has {tuple(full)}; solve again")
    if wanted != full:
        folded = fold_matrix(checkpoint, name, kept, plan.form, calibration)
        if wanted.learngene < full.learngene:
            own = _parts(folded.shared.cut(wanted.learngene))
        if wanted.tailor < full.tailor:
            cut = [_parts(tailor.cut(wanted.tailor)) for tailor in folded.tailors]
            tails = {part: torch.stack([c[part] for c in cut]) for part in "UsV"}
    return own, tails


def _parts(factors: SortedFactors) -> dict[str, Tensor]:
    return {"U": factors.U, "s": factors.s, "V": factors.V}


@one_thread()
def fold(truncated: Checkpoint, plan: Plan, timesteps: Tensor) -> PlainDiT:
    """The plain model of a truncated checkpoint, storage as planned; `timesteps` [S] are baked if the plan says so.

    Requires: `truncated` comes from `truncate` with the same plan. Ensures: the same function, up to rounding.
    """
    spec, t = truncated.spec, truncated.tensors
    source = truncated.model()
    linears: dict[str, nn.Module] = {}
    common: dict[str, CommonThin] = {}
    for shape in spec.matrices():
        name, chosen = shape.name, plan.matrices[shape.name]
        u, s, v = (t[spec.factor_name(name, part)].double() for part in "UsV")
        tu, ts, tv = (t[f"{name}.tailors.{part}"].double() for part in "UsV")
        shared: Thin | Dense | None = None
        if chosen.storage == "dense":
            shared = Dense((v * s @ u.T).float())
        elif chosen.shared_rank and spec.shared_factors:
            kind = f"{SHARED}.{weight_type(name)}"
            if kind not in common:
                common[kind] = CommonThin(kind, v.float(), u.T.float().contiguous())
            shared = ScaledThin(common[kind], s.float())
        elif chosen.shared_rank:
            shared = Thin((v * s).float(), u.T.float().contiguous())
        tailors = None
        if ts.shape[-1]:
            tailors = Tailors((tv * ts.unsqueeze(1)).float(), tu.mT.float().contiguous())
        linears[name] = PlainLinear(shared, tailors, t[f"{name}.bias"].float())
    span = step_span(spec, plan.steps, timesteps.float() if plan.baked else torch.zeros(1))
    if source.y_embed is not None and plan.form == "switch" and not plan.null_branch:
        source.y_embed = nn.Embedding.from_pretrained(source.y_embed.weight[:-1])
    if plan.baked:
        half = plan.modulation == "baked-fp16"
        modulation: nn.Module = bake(source, timesteps, span, plan.form == "switch", half)
    else:
        modulation = ModulationNetwork(source, span)
    plain = PlainDiT(spec, source, linears, modulation, plan.form == "switch", Origin(truncated, plan, timesteps))
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def bake(
    model: DiT, timesteps: Tensor, span: Tensor | None = None, switches: bool = True, half: bool = False
) -> ModulationTable:
    """One row of modulation values per timestep [S]: the adaLN and timestep networks are then not needed any more.

    `span` [S] is what a distilled model takes. With a label embedding there are such rows for each of its labels; where
    nothing `switches`, for its last alone, which a folded model has in the place of the null label.
    """
    labels = torch.arange(model.y_embed.num_embeddings if model.y_embed is not None else 1)
    per_label = [model.condition(timesteps.float(), label.expand(len(timesteps)), span) for label in labels]
    tables = torch.stack([torch.cat([layer(c) for layer in model.modulators()], -1) for c in per_label])
    table = tables if model.y_embed is not None and switches else tables[-1]
    return ModulationTable(table.half() if half else table)
