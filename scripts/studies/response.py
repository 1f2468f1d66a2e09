"""The response of pictures to loss: cut plans, drawn from and judged; a curve through some, held to the others.

Random plans from light to deep cuts; every third is kept out of the fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kind_edge.budget.response import Judged, Response
from kind_edge.deploy.sensitivity_file import SENSITIVITY
from kind_edge.errors import UsageError
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import sampling_of
from studies.anysize import Matrices
from studies.prediction import Prediction, cut_model, frechet, random_plans
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject, write_whole

NAME = "response"
IMAGES = 500
SHARES = tuple(float(share) for share in np.linspace(0.62, 0.28, 18).round(3))
"""FLOPs of the plans, as shares of the dense model's."""
HELD_OUT_EVERY = 3


def run(subject: Subject, output: Path) -> list[Record]:
    """Judge the uncut model and every plan."""
    plans = Prediction(subject, output)
    store, judge, sampling = Store(output, NAME, subject), Judge.load(), sampling_of(plans.model.checkpoint)
    conditions = {"images": IMAGES, "seed": 0, **dataclasses.asdict(sampling), "judge_sha256": judge.judge_sha256}

    def judged(matrices: Matrices | None) -> dict[str, Any]:
        whole = plans.model.checkpoint
        network = whole.model() if matrices is None else cut_model(whole, plans.folded, matrices)
        figures = {"frechet": frechet(plans, judge, network, IMAGES)}
        return figures if matrices is None else figures | {"predicted": plans.predicted.increase(matrices)}

    records = [store.run("whole", {"kind": "whole", **conditions}, lambda: judged(None))]
    for number, share in enumerate(SHARES):
        target = share * plans.base.dense["flops"]
        (matrices,) = random_plans(plans.spec, plans.flops, target, 1, 100 + number)
        own = {"kind": "held out" if number % HELD_OUT_EVERY == 1 else "fitted", "share": share, **conditions}
        records.append(store.run(f"plan-{number:02}", own, partial(judged, matrices)))
    return records


def publish(subject: Subject, output: Path) -> list[Record]:
    """Judge, fit, and write the response into the checkpoint's sensitivity table."""
    plans = Prediction(subject, output)
    table, counts = plans.model.sensitivity, plans.model.checkpoint.provenance.get("quality_by_steps")
    if not counts:
        raise UsageError(
            f"{subject.name}: its config.json states no quality_by_steps, which the response would be a multiple of; "
            "that of a distilled model does"
        )
    records = run(subject, output)
    guidance = sampling_of(plans.model.checkpoint).guidance
    judged = tuple(Judged(int(steps), guidance, row["frechet"]) for steps, row in counts.items())
    whole = dataclasses.replace(table, response=fitted(records, judged))
    write_whole(subject.folder / SENSITIVITY, whole.to_json())
    return records


def fitted(records: Sequence[Record], table: tuple[Judged, ...] = ()) -> Response:
    """The curve through the plans that are not held out: least squares in logarithms of the distance."""
    loss, factor = _points(records, "fitted")

    def misfit(parameters: np.ndarray[Any, Any]) -> Any:
        scale, power = np.exp(parameters)
        return np.log1p(scale * loss**power) - np.log(np.maximum(factor, 1.0))

    scale, power = (float(value) for value in np.exp(least_squares(misfit, [3.0, 0.0], loss="soft_l1").x))
    conditions = {key: records[0]["conditions"][key] for key in ("images", "seed", "steps", "guidance", "judge_sha256")}
    return Response(table, float(f"{scale:.5g}"), float(f"{power:.5g}"), {**conditions, "plans": len(loss)})


def _points(records: Sequence[Record], kind: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Predicted loss increases, and by how much the distance grew."""
    (whole,) = (record["figures"]["frechet"] for record in records if record["conditions"]["kind"] == "whole")
    own = [record["figures"] for record in records if record["conditions"]["kind"] == kind]
    return np.array([row["predicted"] for row in own]), np.array([row["frechet"] / whole for row in own])


# --- what is printed --------------------------------------------------------------------------------------------------


def errors(records: Sequence[Record], kind: str) -> np.ndarray[Any, Any]:
    """Of the predicted distance, as shares of the measured one."""
    loss, factor = _points(records, kind)
    curve = fitted(records)
    return np.array([curve.factor(own) for own in loss]) / factor - 1


def text(records: Sequence[Record]) -> str:
    curve, own = fitted(records), records[0]["conditions"]
    header = ("FLOPs", "predicted loss increase", "Fréchet distance", "response", "predicted response")
    (whole,) = (record["figures"]["frechet"] for record in records if record["conditions"]["kind"] == "whole")
    held, misfit = np.abs(errors(records, "held out")), np.abs(errors(records, "fitted"))
    said = (
        f"Distance = that of the uncut model x (1 + {curve.scale:g} x increase ^ {curve.power:g}). Uncut {whole:.2f}. "
        f"Error on the {len(held)} plans that were held out: median {in_percent(float(np.median(held)))}, worst "
        f"{in_percent(float(held.max()))}; on the {len(misfit)} fitted: median {in_percent(float(np.median(misfit)))}. "
        f"{own['images']} images a plan from the same noise, {own['steps']} steps, guidance {own['guidance']:g}; model "
        f"{records[0]['checkpoint']['model']}, weights {records[0]['checkpoint']['weights_sha256'][:12]}; judge "
        f"{own['judge_sha256'][:12]}."
    )
    return "\n\n".join([markdown(header, _plan_rows(records, curve, whole)), paragraph(said)])


def _plan_rows(records: Sequence[Record], curve: Response, whole: float) -> Iterator[tuple[str, ...]]:
    plans = [record for record in records if record["conditions"]["kind"] != "whole"]
    for record in sorted(plans, key=lambda each: -float(each["conditions"]["share"])):
        figures, own = record["figures"], record["conditions"]
        share = in_percent(own["share"], 1) + (", held out" if own["kind"] == "held out" else "")
        response = (f"{figures['frechet'] / whole:.2f} x", f"{curve.factor(figures['predicted']):.2f} x")
        yield share, in_percent(figures["predicted"], 2), f"{figures['frechet']:.2f}", *response
