"""What healing buys: the plan at a share of the dense FLOPs, as it is cut and after five minutes on one core.

The minutes are the process's own CPU time on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kind_edge.deploy.cut import Cut, make_cut
from kind_edge.deploy.pipeline import heal_cut
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.quality import overall
from kind_edge.deploy.request import OpenedModel, open_model
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import judged_labels, sample_checkpoint, sampling_of
from studies.anysize import PROFILE
from studies.decomposition import labelled_figures
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject

NAME = "heal"
SHARE = "20%"
SECONDS = 300.0


def run(subject: Subject, output: Path, images: int, share: str = SHARE) -> list[Record]:
    """The whole model, then the cut one before and after healing."""
    model, store = open_model(subject.folder), Store(output, NAME, subject)
    sampling = dataclasses.asdict(sampling_of(model.checkpoint))
    own = {"images": images, "seed": 0, **sampling, "judge_sha256": Judge.load().judge_sha256}
    whole = {"kind": "whole", **own}
    store.run("whole", whole, lambda: _judged(model, model.checkpoint, images))
    cut = {"kind": "cut", "max_flops": share, "cpu_seconds": SECONDS, "threads": 1, **own}
    state = store.folder / "state.safetensors"
    store.run(f"cut-{share.rstrip('%')}", cut, lambda: _healed(model, share, images, state))
    state.unlink(missing_ok=True)
    return store.finished()


def _healed(model: OpenedModel, share: str, images: int, state: Path) -> dict[str, Any]:
    assert model.checkpoint.path is not None
    plan = make_plan(model.checkpoint.path, profile=PROFILE, precision="fp32", form="switch", max_flops=share)
    before, threads = make_cut(model, plan), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        after = heal_cut(model, plan, before, SECONDS, state, clock=time.process_time)
    finally:
        torch.set_num_threads(threads)
    if after.healing is None or not before.quality:
        raise UsageError(f"{model.name}: has no held-out images to measure healing on; train it with some left out")
    parts: dict[str, Cut] = {"before": before, "after": after}
    figures = {
        name: {**_judged(model, each.truncated, images), "heldout_change": overall(each.quality)}
        for name, each in parts.items()
    }
    share_found = plan.flops / plan.dense["flops"]
    return {**figures, "flops_share": share_found, "steps": after.healing.steps, "kept": after.healing.kept}


def _judged(model: OpenedModel, checkpoint: Checkpoint, images: int) -> dict[str, Any]:
    drawn = Checkpoint(checkpoint.spec, checkpoint.class_names, checkpoint.tensors, model.checkpoint.provenance)
    return labelled_figures(Judge.load(), sample_checkpoint(drawn, images, 0), judged_labels(drawn.class_names))


def text(records: Sequence[Record]) -> str:
    """One row for the whole model, and two for every cut of it."""
    whole = [_row("the whole model", "", record["figures"], None) for record in records if _kind(record) == "whole"]
    rows, cuts = [], [record for record in records if _kind(record) == "cut"]
    for record in cuts:
        figures, own = record["figures"], record["conditions"]
        share = in_percent(figures["flops_share"])
        minutes = f"{own['cpu_seconds'] / 60:g} min ({figures['steps']:,} steps)"
        rows.append(_row(f"cut to {share} of the dense FLOPs", "", figures["before"], figures["before"]))
        rows.append(_row("the same, healed", minutes, figures["after"], figures["after"]))
    if not cuts:
        return ""
    own = cuts[0]["conditions"]
    header = ("", "time on one core", "Fréchet", "accuracy", "worst class", "held-out change")
    told = paragraph(
        f"{own['images']:,} images each through the gated model, seed {own['seed']}, {own['steps']} {own['sampler']} "
        f"steps; all classes in *switch*; CPU time of one thread on {cuts[0]['hardware']}. Held-out change: of a "
        "distilled model the energy of what changed in its prediction, as a share; else the increase of the diffusion "
        "loss."
    )
    return f"{markdown(header, [*whole, *rows])}\n\n{told}"


def _kind(record: Record) -> str:
    return str(record["conditions"]["kind"])


def _row(name: str, spent: str, figures: dict[str, Any], cut: dict[str, Any] | None) -> tuple[str, ...]:
    change = f"{100 * cut['heldout_change']:.2f} %" if cut else "–"
    return (
        name, spent or "–", f"{figures['frechet']:.2f}", in_percent(figures["class_accuracy"], 1),
        in_percent(figures["worst_class_accuracy"], 1), change,
    )  # fmt: skip
