"""What the solver's promises are worth: each part measures one, stores its runs, and adds its keys."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kind_edge.budget.problem import Source


def solver() -> dict[str, Any]:
    """All parts; runs that are finished are read."""
    from _bench_costs import costs

    return {**prediction(), **uniform_ranks(), **solving(), **costs()}


def prediction() -> dict[str, Any]:
    """How well random plans are foreseen, of the shipped model, and in `models` also of its teacher."""
    from studies import prediction
    from studies.documents import RESULTS, ROOT
    from studies.store import subject_of

    from kind_edge.model.shipped import DEFAULT_MODEL

    records = prediction.run(subject_of(DEFAULT_MODEL), ROOT / RESULTS)
    names = list(dict.fromkeys(record["checkpoint"]["model"] for record in records))
    own = {name: [record for record in records if record["checkpoint"]["model"] == name] for name in names}
    rows = [{"model": name, **prediction.summary(own[name])} for name in names]
    return {**prediction.summary(own[names[0]]), "models": rows}


def uniform_ranks() -> dict[str, Any]:
    """`uniform_over_ours`: by how much more a uniform rank raises the loss than the solver's plan of equal FLOPs."""
    from studies import uniform
    from studies.documents import RESULTS, ROOT
    from studies.store import subject_of

    from kind_edge.model.shipped import DEFAULT_MODEL

    return uniform.summary(uniform.run(subject_of(DEFAULT_MODEL), ROOT / RESULTS))


SOLVED_LIMITS = (
    {"max_flops": "40%", "precision": "fp32"},
    {"max_latency": "40%"},
    {"max_latency": "30%", "max_size": "150%", "max_memory": "200%", "max_flops": "40%"},
)


def solving() -> dict[str, Any]:
    """Seconds of the solver for DiT-XL/2, the slowest of a few sets of limits; and the worst gap that it proves.

    Losses are random but plausible: no such model is at hand, and the search does not care.
    """
    seconds: dict[str, float] = {}
    gaps = []
    for classes in (150, 1000):
        times = []
        for limits in SOLVED_LIMITS:
            took, gap = _solved(classes, dict(limits))
            times.append(took)
            gaps.append(gap)
        seconds[f"{classes} classes"] = max(times)
    return {"solve_s": seconds, "optimality_gap_worst": max(gaps)}


def _solved(classes: int, limits: dict[str, str]) -> tuple[float, float]:
    """One search over all ways to run the model, from the request to the proven choice."""
    from kind_edge.budget.planner import Problems, best_answer
    from kind_edge.budget.problem import Request, Sampling
    from kind_edge.budget.profile import load_profile
    from kind_edge.units import Kind, parse_quantity

    kinds: dict[str, Kind] = {
        "max_flops": "flops", "max_latency": "seconds", "max_size": "bytes", "max_memory": "bytes",
    }  # fmt: skip
    precision = limits.pop("precision", "auto")
    asked = {name: parse_quantity(text, kinds[name]) for name, text in limits.items()}
    names = tuple(f"class {number}" for number in range(classes))
    phone = load_profile("snapdragon8g3")  # with memory for a thousand tailors
    device = dataclasses.replace(
        phone, app_memory_limit_bytes=dataclasses.replace(phone.app_memory_limit_bytes, value=2.0**37)
    )
    request = Request(
        device, names, Sampling("dpmsolver++", 20, 1.5, 20),
        precision=precision, limits=asked,  # type: ignore[arg-type]
    )  # fmt: skip
    began = time.perf_counter()
    answer = best_answer(Problems(_extra_large(classes)), request)
    return time.perf_counter() - began, answer.solution.optimality_gap


def _extra_large(classes: int) -> Source:
    """DiT-XL/2 with learngenes of 0.3 D and tailors of 32, and losses like those of a model that was measured: a tenth
    of the ranks costs a percent or so, the first ones much more, and some matrices ten times what others do."""
    from kind_edge.budget.loss import LossModel, MatrixLoss
    from kind_edge.budget.problem import Source
    from kind_edge.model.spec import named_spec

    spec = named_spec(
        "DiT-XL/2", classes, factored=True, learngene_rank=346, tailor_rank=32, label_embedding=False
    )  # fmt: skip
    generator = np.random.default_rng(classes)

    def curve(rank: int, steepness: float, scale: float) -> np.ndarray[Any, Any]:
        kept = np.linspace(0, 1, rank + 1)
        lost = (np.exp(-4 * steepness * kept) - np.exp(-4 * steepness)) * np.exp(generator.normal(0, 0.05, rank + 1))
        return scale * np.maximum.accumulate(lost[::-1])[::-1]

    matrices = {}
    for shape in spec.matrices():
        scale, steepness = np.exp(generator.normal(-6, 1.2)), generator.uniform(1, 3)
        shared, tailor = curve(346, steepness, 10 * scale), curve(32, steepness, 2 * scale)
        matrices[shape.name] = MatrixLoss(shared, tailor, 0.02 * scale)
    losses = LossModel(matrices, {branch: float(np.exp(generator.normal(-3, 1))) for branch in spec.branches()})
    return Source("DiT-XL/2", "0" * 64, spec, lambda *_: losses, "whitened", "none")
