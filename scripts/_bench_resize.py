"""Is another depth or width better than ranks and precision alone? Plans of equal latency, healed alike, measured.

On `host`, all classes in *switch*; steps are a choice in both. For every limit of latency there are two plans, with
other sizes among the choices and without. At the loosest and at the tightest limit where they differ, both are healed
for the same time, exported, measured, and drawn from.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

HEAL = "3m"
SHARES = (0.8, 0.6, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)
"""Limits of latency, as shares of that of the plan without one."""
IMAGES = 1000


def resize(model: str = "fashion-mnist", heal: str = HEAL, images: int = IMAGES) -> dict[str, Any]:
    """Measures the sizes first, where that was not done (three times the healing)."""
    from kind_edge.deploy.pipeline import plan

    opened = _opened(model)
    asked: dict[str, Any] = {"profile": "host", "form": "switch"}
    whole = plan(opened, **asked)
    pairs = {}
    for share in SHARES:
        limit = f"{1e3 * share * whole.sustained_image_latency_s:.4f}ms"
        pairs[limit] = tuple(_plan_or_none(opened, asked, limit, allowed) for allowed in (None, heal))
    differ = [limit for limit, (_, sized) in pairs.items() if sized is not None and sized.resize]
    rows: list[dict[str, Any]] = []
    for limit, pair in pairs.items():
        for name, each in zip(("ranks and precision", "sizes, too"), pair, strict=True):
            rows.append({"limit": limit, "choices": name, **_planned(each), **_NOTHING})
            if each is not None and limit in {*differ[:1], *differ[-1:]}:
                rows[-1] |= _measured(opened, each, heal, images)
            print(rows[-1], file=sys.stderr, flush=True)
    return {"plans": rows, "other sizes": [_verdict(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]}


def _plan_or_none(opened: Any, asked: dict[str, Any], limit: str, allowed: str | None) -> Any:
    from kind_edge.deploy.pipeline import plan
    from kind_edge.errors import NoPlanError

    try:
        return plan(opened, **asked, max_latency=limit, allow_resize=allowed)
    except NoPlanError:
        return None


def _opened(model: str) -> Any:
    from kind_edge.deploy.request import open_model

    return open_model(model)


def _planned(plan: Any) -> dict[str, Any]:
    if plan is None:
        return {"size": "none", "steps": 0, "precision": "", "predicted_ms": None, "predicted_frechet": None}
    size = f"depth {plan.resize['depth']}, width {plan.resize['width']}" if plan.resize else "its own"
    predicted_ms = 1e3 * plan.sustained_image_latency_s
    return {
        "size": size, "steps": plan.steps, "precision": plan.precision, "predicted_ms": predicted_ms,
        "predicted_frechet": plan.predicted_frechet,
    }  # fmt: skip


_NOTHING: dict[str, Any] = {"measured_ms": None, "frechet": None, "class_accuracy": None}


def _measured(opened: Any, plan: Any, heal: str, images: int) -> dict[str, Any]:
    """The bundle's own latency of an image (median), and what its gated model draws."""
    from kind_edge.deploy.cut import make_cut
    from kind_edge.deploy.making import HEALED
    from kind_edge.deploy.pipeline import export
    from kind_edge.model.checkpoint import load_checkpoint
    from kind_edge.training.sampled import sample_checkpoint, score

    with tempfile.TemporaryDirectory() as folder:
        free = dataclasses.replace(plan, limits={})  # what is measured is no gate here
        bundle = export(opened, plan=free, heal=heal, output=Path(folder, "b"))
        kept = bundle.healing is not None and bundle.healing.kept
        drawn_from = load_checkpoint(bundle.path / HEALED) if kept else make_cut(opened, plan).truncated
        report = score(sample_checkpoint(drawn_from, images, 0, plan.steps, plan.strength, sampler=plan.sampler))
    found = {"measured_ms": bundle.image_latency.p50_ms, "frechet": report.frechet}
    return {**found, "class_accuracy": report.class_accuracy}


def _verdict(alone: dict[str, Any], sized: dict[str, Any]) -> dict[str, Any]:
    """Whether the other size is faster and no worse in Fréchet distance, as measured."""
    both = alone["measured_ms"] is not None and sized["measured_ms"] is not None
    if both:
        better = sized["measured_ms"] <= alone["measured_ms"] and sized["frechet"] <= alone["frechet"]
        return {"limit": alone["limit"], "verdict": "better" if better else "not better in both"}
    chosen = sized["size"] not in ("none", "its own")
    return {"limit": alone["limit"], "verdict": "chosen, not measured" if chosen else "not chosen"}
