"""Merge judged by itself: at full rank the plain model must equal the original gated checkpoint."""

from __future__ import annotations

import dataclasses

import torch

from kind_edge.budget.plan import Plan, full_rank
from kind_edge.deploy.merge import class_indices, fold, truncate
from kind_edge.deploy.parity import MERGE_GATE_DB, sqnr_db
from kind_edge.errors import GateError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.sampling import step_span


def check_merge(checkpoint: Checkpoint, plan: Plan, timesteps: torch.Tensor) -> float:
    """The worst SQNR in dB over kept classes, null class (*switch*) and five steps; `GateError` below 100 dB.

    A distilled model is deployed without the null class.

    *union* promises nothing for a single class, so it is compared with the gated model with all kept gates open (and,
    where there is a label embedding, the mean of their labels).
    """
    spec = checkpoint.spec
    whole = full_rank(plan, {matrix.name: spec.ranks(matrix.name) for matrix in spec.matrices()})
    if whole.modulation == "baked-fp16":  # its rounding is judged by the gate of the file
        whole = dataclasses.replace(whole, modulation="baked")
    plain = fold(truncate(checkpoint, whole, None), whole, timesteps)
    gated = checkpoint.model()
    kept = class_indices(checkpoint, plan.classes)
    labels = kept if plan.form != "union" else [spec.num_classes]
    if plan.null_branch:
        labels = [*kept, spec.num_classes]
    if plan.form == "union" and gated.y_embed is not None:
        gated.y_embed.weight[-1] = gated.y_embed.weight[kept].mean(0)
    steps = torch.linspace(0, len(timesteps) - 1, 5).round().long()
    generator = torch.Generator().manual_seed(0)
    worst = float("inf")
    for position, label in enumerate(labels):
        x = torch.randn(len(steps), spec.channels, spec.image_size, spec.image_size, generator=generator)
        t = timesteps[steps].float()
        index = torch.full((len(steps),), label)
        open_gates = torch.zeros(len(steps), spec.num_classes, dtype=torch.long)
        open_gates[:, kept if plan.form == "union" else [c for c in (label,) if c < spec.num_classes]] = 1
        step = steps.int() if plan.baked else t
        with torch.no_grad():
            wanted = gated(x, t, ClassGate.opening(open_gates, index), step_span(spec, plan.steps, t))
            got = plain(x, step, torch.full((len(steps),), position)) if plan.form == "switch" else plain(x, step)
        worst = min([worst, *(sqnr_db(a.numpy(), b.numpy()) for a, b in zip(wanted, got, strict=True))])
    if worst < MERGE_GATE_DB:
        raise GateError(
            f"merge: at full rank the merged model differs: {worst:.1f} dB, want at least {MERGE_GATE_DB:.0f} dB"
        )
    return worst
