"""A plan as a screen: what is deployed, what it costs beside the dense model, which limits bind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.words import FORM_WORDS, WRITE_LIMIT, coreml_words, predicted_words, resize_words
from kind_edge.cli import tables
from kind_edge.cli.tables import Cell
from kind_edge.units import format_flops, format_seconds, format_share

_MODULATIONS = {
    "baked": "baked into a table",
    "baked-fp16": "baked into a table of fp16",
    "network": "kept as a network, which costs less here than a table of all steps and classes",
}
_SMALLEST = {
    "flops": "FLOPs", "weight_bytes": "model file", "peak_memory_bytes": "memory", "latency_ns": "latency",
}  # fmt: skip


def print_plan(console: Console, plan: Plan) -> None:
    """The whole plan but its matrices one by one."""
    console.print(tables.heading(f"Plan for {plan.profile}", f"model {plan.model}, {plan.checkpoint_sha256[:12]}"))
    console.print(tables.facts(_choices(plan)))
    console.print()
    console.print(tables.figures(("", "this plan", "dense fp32", "share"), _costs(plan)))


def _choices(plan: Plan) -> Iterator[tuple[str, Cell]]:
    yield "classes", ", ".join(plan.classes)
    yield from resize_words(plan.resize)
    yield "form", FORM_WORDS[plan.form]
    yield "runs on", f"{plan.unit}, {plan.precision}"
    guided = f"guidance {plan.guidance:g}" if plan.evaluations_per_step > 1 else "no guidance"
    if plan.inside_guidance is not None:
        guided = f"guidance {plan.inside_guidance:g} inside the model"
    per_step = tables.count(plan.evaluations_per_step, "evaluation")
    yield "sampler", f"{plan.sampler}, {tables.count(plan.steps, 'step')}, {guided}: {per_step} per step"
    yield "matrices", matrices_summary(plan.matrices)
    yield "modulation", _MODULATIONS[plan.modulation]
    if plan.decoder:
        yield "decoder", _decoder_words(plan.decoder)
    limited = "at first" if plan.burst else "sustained"
    yield "latency", f"{plan.latency_source}; a limit holds for the time {limited}"
    yield "truncation", f"{plan.truncation}; calibration {plan.calibration}"
    if gone := plan.dropped_branches:
        yield "dropped", ", ".join(gone)
    if plan.predicted_loss_increase is not None:
        told = predicted_words(plan.predicted_loss_increase, plan.predicted_frechet)
        yield "predicted", f"{told}; not what several classes at once cost" if plan.form == "union" else told
    yield "limits", _limits(plan) or "none: the most faithful plan, then the fastest"
    if plan.optimality_gap is not None:
        least = "loss" if plan.minimised == "loss" else _SMALLEST[plan.minimised]
        yield "proved", f"within {format_share(round(plan.optimality_gap, 6))} of the least {least} that any plan has"
    for name, price in plan.prices.items():
        yield "price", _price(plan, name, price)
    if plan.time:
        yield "time", time_words(plan.time)
    dense_s = _dense_latency_s(plan)
    if dense_s and "max_latency" not in plan.limits and plan.sustained_image_latency_s > dense_s:
        cause = ", as a matrix with tailors is several products" if plan.form == "switch" else ""
        yield "slower", f"than the dense model{cause}; --max-latency 100% asks for no slower"
    yield from coreml_words(plan.coreml)
    if plan.teacher_time:
        longer = plan.teacher_time["image_s"] / plan.time["image_s"]
        yield "before", f"{time_words(plan.teacher_time)} at its teacher's steps and guidance: {longer:.3g} x as long"


def _decoder_words(decoder: Mapping[str, int | str]) -> str:
    """ "int8-weights, 12.6 MiB; 2 x 2 overlapping tiles, one after the other"."""
    stored = f"{decoder['precision']}, {tables.size(int(decoder['weight_bytes']))}"
    count = decoder["tiles"]
    return stored if count == 1 else f"{stored}; {count} x {count} overlapping tiles, one after the other"


def _price(plan: Plan, name: str, price: Mapping[str, float | None]) -> str:
    """What a tenth more of a limit would buy."""
    limit = price["limit"] or 0.0
    if plan.minimised == "loss":
        bought = predicted_words(price["predicted_loss_increase"], price["predicted_frechet"])
    else:
        key = "sustained_image_latency_s" if plan.minimised == "latency_ns" else plan.minimised
        write = {"flops": format_flops, "sustained_image_latency_s": format_seconds}.get(key, tables.size)
        bought = f"{_SMALLEST[plan.minimised]} {write(price[key] or 0.0)}"
    return f"10 % more, --{name.replace('_', '-')} {WRITE_LIMIT[name](limit)}, would buy {bought}"


def time_words(time: Mapping[str, float]) -> str:
    """ "20 steps x 2 evaluations x 3.1 ms + decoder 310 ms = 434 ms"."""
    per_step, steps = round(time["evaluations_per_step"]), tables.count(round(time["steps"]), "step")
    if (rows := time["evaluations"] / per_step) != time["steps"]:
        steps = f"{rows:.0f} rows of {steps}"
    one, decoder, image = (format_seconds(time[key]) for key in ("evaluation_s", "decoder_s", "image_s"))
    decoder = f" + decoder {decoder}" if time["decoder_s"] else ""
    return f"{steps} x {tables.count(per_step, 'evaluation')} x {one}{decoder} = {image}"


def matrices_summary(matrices: Mapping[str, MatrixPlan]) -> str:
    """ "24 dense, 12 factored; learngene 24-48, tailor 5-8"."""
    storages = [matrix.storage for matrix in matrices.values()]
    kinds = ("dense", "factored", "dropped")
    text = ", ".join(f"{storages.count(kind)} {kind}" for kind in kinds if kind in storages)
    ranks = {
        "rank": [matrix.rank for matrix in matrices.values()],
        "learngene": [matrix.learngene_rank for matrix in matrices.values()],
        "tailor": [matrix.tailor_rank for matrix in matrices.values()],
    }
    spans = [f"{name} {tables.span(known)}" for name, all_ in ranks.items() if (known := _known(all_))]
    return f"{text}; {', '.join(spans)}" if spans else text


def _known(ranks: list[int | None]) -> list[int]:
    return [rank for rank in ranks if rank is not None]


def _limits(plan: Plan) -> str:
    texts = []
    for name, limit in plan.limits.items():
        binds = " (binds)" if name in plan.binding else ""
        texts.append(f"--{name.replace('_', '-')} {WRITE_LIMIT[name](limit)}{binds}")
    return ", ".join(texts)


def _dense_latency_s(plan: Plan) -> float | None:
    """None where a plan from elsewhere does not say."""
    return plan.dense["latency_ns"] / 1e9 if "latency_ns" in plan.dense else None


def _costs(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    dense = plan.dense
    rows = (
        ("parameters", plan.params, dense.get("params"), tables.amount),
        ("FLOPs per evaluation", plan.flops, dense.get("flops"), format_flops),
        ("model file", plan.weight_bytes, dense.get("weight_bytes"), tables.size),
        ("peak memory", plan.peak_memory_bytes, dense.get("peak_memory_bytes"), tables.size),
        ("one image, sustained", plan.sustained_image_latency_s, _dense_latency_s(plan), format_seconds),
        ("one image, at first", plan.image_latency_s, None, format_seconds),
    )
    for name, own, whole, write in rows:
        yield name, write(own), write(whole) if whole else "", tables.share(own, whole)
