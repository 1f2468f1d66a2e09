"""The response of pictures to loss: cut plans, drawn from and judged; a curve through some, held to the others.

Random plans from light to deep cuts; every third is kept out of the fit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kind_edge.budget.response import Judged, Response
from kind_edge.deploy.sensitivity_file import SENSITIVITY
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import Sampling, sampling_of
from studies.anysize import Matrices
from studies.prediction import Prediction, cut_model, family, frechet, random_plans
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject, write_whole

NAME = "response"
IMAGES = 500
SHARES = tuple(float(share) for share in np.linspace(0.62, 0.28, 18).round(3))
"""FLOPs of the plans, as shares of the dense model's."""
HELD_OUT_EVERY = 3
STEPS = 10
"""Of pictures of plans with a guided branch: what is compared is a growth, and twice as many take twice as long."""

SWEEP_STEPS, SWEEP_GUIDANCE = (5, 10, 20), (1.0, 1.25, 1.5, 1.75, 2.0)
"""At which a model with a guided branch is judged whole: what its planner then chooses from."""


def run(subject: Subject, output: Path) -> list[Record]:
    """Judge the uncut model and every plan; of a distilled model, its teacher likewise."""
    return [record for each in family(subject) for record in _run(Prediction(each, output))]


def _run(plans: Prediction) -> list[Record]:
    store, judge = Store(plans.store.folder.parent, NAME, plans.subject), Judge.load()
    own = {"images": IMAGES, "seed": 0, "judge_sha256": judge.judge_sha256}

    def judged(name: str, kind: str, sampling: Sampling, matrices: Matrices | None, **more: Any) -> Record:
        def figures() -> dict[str, Any]:
            whole = plans.model.checkpoint
            network = whole.model() if matrices is None else cut_model(whole, plans.folded, matrices)
            found = {"frechet": frechet(plans, judge, network, IMAGES, sampling)}
            return found if matrices is None else found | {"predicted": plans.predicted.increase(matrices)}

        conditions = {"kind": kind, **dataclasses.asdict(sampling), **own, **more}
        return store.run(f"{plans.subject.name}-{name}", conditions, figures)

    sampling = plans_sampling(plans.model.checkpoint)
    records = [judged("whole", "whole", sampling, None)]
    for number, share in enumerate(SHARES):
        target = share * plans.base.dense["flops"]
        (matrices,) = random_plans(plans.spec, plans.flops, target, 1, 100 + number)
        kind = "held out" if number % HELD_OUT_EVERY == 1 else "fitted"
        records.append(judged(f"plan-{number:02}", kind, sampling, matrices, share=share))
    for each in choices(plans.model.checkpoint):
        name = f"{each.steps}-steps-guidance-{each.guidance:g}"
        records.append(judged(name, "choice", each, None))
    return records


def plans_sampling(checkpoint: Checkpoint) -> Sampling:
    """How pictures of cut plans are drawn: as recommended, with a guided branch in STEPS steps."""
    sampling = sampling_of(checkpoint)
    return sampling if checkpoint.spec.distilled else dataclasses.replace(sampling, steps=STEPS)


def choices(checkpoint: Checkpoint) -> Iterator[Sampling]:
    """What else the uncut model is judged at. How good a distilled one is at its step counts, its config.json says."""
    own = plans_sampling(checkpoint)
    if not checkpoint.spec.distilled:
        pairs = itertools.product(SWEEP_STEPS, SWEEP_GUIDANCE)
        every = (dataclasses.replace(own, steps=steps, guidance=guidance) for steps, guidance in pairs)
        yield from (each for each in every if each != own)


def publish(subject: Subject, output: Path) -> list[Record]:
    """Judge, fit, and write the response into the sensitivity tables of the model and, if it is distilled, its teacher.

    Raises `UsageError` for a distilled model that does not state its quality.
    """
    found = []
    for each in family(subject):
        plans = Prediction(each, output)
        records = _run(plans)
        whole = dataclasses.replace(plans.model.sensitivity, response=fitted(records, table_of(plans, records)))
        write_whole(each.folder / SENSITIVITY, whole.to_json())
        found += records
    return found


def table_of(plans: Prediction, records: Sequence[Record]) -> tuple[Judged, ...]:
    """Distances of the uncut model at everything that a user can choose."""
    checkpoint = plans.model.checkpoint
    if not checkpoint.spec.distilled:
        own = [record for record in records if record["conditions"]["kind"] in ("whole", "choice")]
        rows = ((record["conditions"], record["figures"]["frechet"]) for record in own)
        judged = (Judged(chosen["steps"], chosen["guidance"], distance) for chosen, distance in rows)
        return tuple(sorted(judged, key=lambda row: (row.steps, row.guidance)))
    counts = checkpoint.provenance.get("quality_by_steps")
    if not counts:
        raise UsageError(
            f"{plans.subject.name}: its config.json states no quality_by_steps, which the response would be a multiple "
            "of; kind-edge distill writes it"
        )
    guidance = sampling_of(checkpoint).guidance
    return tuple(Judged(int(steps), guidance, row["frechet"]) for steps, row in counts.items())


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
    """Of every model: its plans, what was fitted, and how good it is whole at what can be chosen."""
    models = sorted({record["checkpoint"]["model"] for record in records})
    own = ([record for record in records if record["checkpoint"]["model"] == model] for model in models)
    return "\n\n".join(map(_text_of_one, own))


def _text_of_one(records: Sequence[Record]) -> str:
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
    parts = [markdown(header, _plan_rows(records, curve, whole)), paragraph(said)]
    return "\n\n".join([*parts, *_choices_text(records)])


def _choices_text(records: Sequence[Record]) -> Iterator[str]:
    """Distances of the uncut model by steps and guidance, where both can be chosen."""
    found = {
        (record["conditions"]["steps"], record["conditions"]["guidance"]): record["figures"]["frechet"]
        for record in records
        if record["conditions"]["kind"] in ("whole", "choice")
    }
    steps, strengths = (sorted(set(values)) for values in zip(*found, strict=True))
    if len(found) > 1:
        header = ("uncut, steps", *(f"guidance {strength:g}" for strength in strengths))
        cells = ([f"{found[each, w]:.2f}" if (each, w) in found else "" for w in strengths] for each in steps)
        yield markdown(header, ((str(each), *row) for each, row in zip(steps, cells, strict=True)))


def _plan_rows(records: Sequence[Record], curve: Response, whole: float) -> Iterator[tuple[str, ...]]:
    plans = [record for record in records if record["conditions"]["kind"] in ("fitted", "held out")]
    for record in sorted(plans, key=lambda each: -float(each["conditions"]["share"])):
        figures, own = record["figures"], record["conditions"]
        share = in_percent(own["share"], 1) + (", held out" if own["kind"] == "held out" else "")
        response = (f"{figures['frechet'] / whole:.2f} x", f"{curve.factor(figures['predicted']):.2f} x")
        yield share, in_percent(figures["predicted"], 2), f"{figures['frechet']:.2f}", *response
