"""Against the authors' way of cutting, made as strong as it can be: one active rank for every matrix.

At equal exact FLOPs: the solver's plan (fp32, nothing limited but FLOPs), and uniform ranks with the same factors, the
same calibration and the model's own learngene-tailor split; and uniform ranks by the plain SVD. Measured over the same
held-out images, noises and times; pictures from the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.budget.plan import MatrixPlan
from kind_edge.deploy.merge import truncate
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.model.dit import DiT
from kind_edge.model.spec import ModelSpec
from kind_edge.training.evaluate import Judge
from studies.anysize import Matrices
from studies.prediction import PROFILE, FixedHeldout, Prediction, cut_model, folded_matrices, frechet
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject

NAME = "uniform"
SHARES = (0.15, 0.20, 0.30, 0.40)
"""Of the FLOPs of the dense model."""
TOLERANCE = 0.01
IMAGES = 1000
RESAMPLES = 2000
COUNTED_FROM = 0.02
"""A share at which the uniform cut loses less is shown, and not counted."""
TARGET_RATIO = 1 / 0.75

FloatArray = NDArray[np.float64]


def run(subject: Subject, output: Path) -> list[Record]:
    study = Prediction(subject, output)
    store, judge = Store(output, NAME, subject), Judge.load()
    conditions = {"images": IMAGES, "seed": 0, "resamples": RESAMPLES, "judge_sha256": judge.judge_sha256}
    records = []
    for share in SHARES:
        name = f"{subject.name}-{100 * share:.0f}"
        records.append(store.run(name, {"share": share, **conditions}, _measured(study, judge, share)))
    return records


def _measured(study: Prediction, judge: Judge, share: float) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        whole, budget = study.model.checkpoint, share * study.base.dense["flops"]
        ours = make_plan(
            study.model,
            profile=PROFILE,
            precision="fp32",
            form="switch",
            steps=study.base.steps,
            max_flops=f"{budget}FLOPs",
        )
        flat = dataclasses.replace(whole, spec=dataclasses.replace(whole.spec, nested=False))
        same = uniform_of(whole.spec, study.flops, ours.flops)
        networks = {
            "ours": truncate(whole, ours, study.model.calibration).model(),
            "uniform": cut_model(whole, study.folded, same),
            "plain": cut_model(flat, folded_matrices(flat, None), same),
        }
        gains = {way: gained(study.heldout, network) for way, network in networks.items()}
        return {
            "flops": {"ours": ours.flops, "uniform": study.flops(same)},
            "predicted": ours.predicted_loss_increase,
            "dropped_branches": list(ours.dropped_branches),
            "increase": {way: _increase(study.heldout, own) for way, own in gains.items()},
            "ratio": ratio(gains["uniform"], gains["ours"]),
            "interval": interval(gains["uniform"], gains["ours"]),
            "frechet": {way: frechet(study, judge, network, IMAGES) for way, network in networks.items()},
        }

    return compute


def uniform_of(spec: ModelSpec, flops: Callable[[Matrices], int], target: int) -> Matrices:
    """One active rank for every matrix; where a whole rank is too much, the first matrices alone have it."""
    shapes = list(spec.matrices())

    def ranks(total: int) -> Matrices:
        low, more = divmod(total, len(shapes))
        found = {}
        for number, shape in enumerate(shapes):
            full, active = spec.ranks(shape.name), low + (number < more)
            tailor = max(1, round(active * full.tailor / full.active))
            found[shape.name] = MatrixPlan("factored", "fp32", max(0, active - tailor), tailor)
        return found

    most = min(spec.ranks(shape.name).active for shape in shapes) * len(shapes)
    total = min(range(len(shapes), most + 1), key=lambda total: abs(flops(ranks(total)) - target))
    found = ranks(total)
    if abs(flops(found) / target - 1) > TOLERANCE:
        raise ValueError(f"no uniform ranks within {TOLERANCE:.0%} of {target} FLOPs")
    return found


def gained(heldout: FixedHeldout, network: DiT) -> list[FloatArray]:
    """What every image adds to the loss [images], by class, weighted by the class's share."""
    found = []
    for (x, timestep, gate, span, target, share), whole in zip(heldout.parts, heldout.whole, strict=True):
        with torch.no_grad():
            got = network(x, timestep, gate, span)
        wanted = whole if heldout.distilled else target
        more = (got - wanted).double().square() - (whole - wanted).double().square()
        found.append(share * more.flatten(1).mean(1).numpy())
    return found


def _increase(heldout: FixedHeldout, gains: Sequence[FloatArray]) -> float:
    base = 0.0
    for (*_, target, share), whole in zip(heldout.parts, heldout.whole, strict=True):
        base += share * float((whole if heldout.distilled else whole - target).double().square().mean())
    return float(sum(own.mean() for own in gains)) / base


def ratio(uniform: Sequence[FloatArray], ours: Sequence[FloatArray]) -> float:
    return float(sum(own.mean() for own in uniform) / sum(own.mean() for own in ours))


def interval(uniform: Sequence[FloatArray], ours: Sequence[FloatArray]) -> list[float]:
    """95 %, by drawing images again: of every class, and the same ones for both."""
    generator, ratios = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        again = [generator.integers(0, len(own), len(own)) for own in ours]
        pairs = ([own[i] for own, i in zip(gains, again, strict=True)] for gains in (uniform, ours))
        ratios.append(ratio(*pairs))
    return [float(bound) for bound in np.quantile(ratios, (0.025, 0.975))]


# --- what is printed --------------------------------------------------------------------------------------------------


def summary(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """FLOPs share -> ratio of the loss increases, of the shares that count."""
    counted = [r for r in records if r["figures"]["increase"]["uniform"] >= COUNTED_FROM]
    return {"uniform_over_ours": {in_percent(r["conditions"]["share"]): r["figures"]["ratio"] for r in counted}}


def text(records: Sequence[Record]) -> str:
    header = (
        "FLOPs", "loss increase, ours", "uniform", "plain SVD", "uniform / ours", "95 %", "Fréchet distance, ours",
        "uniform", "plain SVD",
    )  # fmt: skip
    rows = []
    for record in sorted(records, key=lambda each: float(each["conditions"]["share"])):
        own = record["figures"]
        low, high = own["interval"]
        counted = "" if own["increase"]["uniform"] >= COUNTED_FROM else ", not counted"
        rows.append((
            in_percent(record["conditions"]["share"]) + counted,
            *(in_percent(own["increase"][way], 2) for way in ("ours", "uniform", "plain")),
            f"{own['ratio']:.2f}", f"{low:.2f} to {high:.2f}",
            *(f"{own['frechet'][way]:.2f}" for way in ("ours", "uniform", "plain")),
        ))  # fmt: skip
    counted = [r["figures"] for r in records if r["figures"]["increase"]["uniform"] >= COUNTED_FROM]
    better = all(f["ratio"] >= TARGET_RATIO and f["frechet"]["ours"] < f["frechet"]["uniform"] for f in counted)
    first = records[0]
    said = (
        f"Wanted at every counted share: a ratio of at least {TARGET_RATIO:.2f}, and the lower distance: "
        f"{'supported' if better else 'not supported'}. Equal exact FLOPs within {in_percent(TOLERANCE)}; interval by "
        f"{RESAMPLES:,} paired resamples of images; {IMAGES:,} pictures for a distance; model "
        f"{first['checkpoint']['model']}, weights {first['checkpoint']['weights_sha256'][:12]}; judge "
        f"{first['conditions']['judge_sha256'][:12]}."
    )
    return "\n\n".join([markdown(header, rows), paragraph(said)])
