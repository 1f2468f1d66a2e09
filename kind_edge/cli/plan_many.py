"""More plans than one: the front over the size for several numbers of classes, and one plan for each device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.budget.words import distance_words, predicted_words
from kind_edge.cli import tables
from kind_edge.cli.refusal_view import shown
from kind_edge.cli.terminal import Terminal
from kind_edge.errors import NoPlanError, UsageError
from kind_edge.units import format_flops, format_seconds, format_share

if TYPE_CHECKING:
    from kind_edge.budget.front import Curve
    from kind_edge.budget.plan import Plan

PICTURES = (".png", ".svg", ".pdf")
_AXES = {
    "size": ("weight_bytes", "model file (MiB)", 2.0**-20),
    "latency": ("sustained_image_latency_s", "one image, sustained (ms)", 1e3),
    "flops": ("flops", "FLOPs per evaluation (M)", 1e-6),
    "memory": ("peak_memory_bytes", "peak memory (MiB)", 2.0**-20),
}


def pareto(
    terminal: Terminal, checkpoint: str, profile: str, choices: Mapping[str, Any], output: Path | None, as_json: bool
) -> None:
    """`plan --pareto`: a table, JSON, and a picture or a JSON file where one is asked for."""
    if choices.get("max_quality_loss") is not None:
        raise UsageError("--pareto shows every loss there is, so it does not go with --max-quality-loss")
    pyplot = _pyplot() if output is not None and output.suffix in PICTURES else None
    with shown(terminal, as_json), terminal.stages() as begin, terminal.measuring() as on_measure:
        begin("planning")
        from kind_edge.deploy import pipeline

        curves = pipeline.pareto(checkpoint, profile=profile, on_measure=on_measure, **choices)
    axis = choices.get("minimize") or "size"
    values = {"profile": profile, "axis": _AXES[axis][0], "curves": [curve.to_dict() for curve in curves]}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        if pyplot is None:
            output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        else:
            _draw(pyplot, curves, axis, output)
    if as_json:
        terminal.json(values)
        return
    for curve in curves:
        name = _classes(curve)
        terminal.out.print(tables.heading(name, ", ".join(curve.classes)))
        headers = ("model file", "FLOPs", "one image", "peak memory", "predicted")
        terminal.out.print(tables.figures(headers, [_row(point) for point in curve.points], left=(4,)))
    terminal.out.print()
    if output is not None:
        terminal.line(f"  written  {output}")


def profiles(
    terminal: Terminal,
    checkpoint: str,
    names: Sequence[str],
    choices: Mapping[str, Any],
    output: Path | None,
    as_json: bool,
) -> None:
    """`plan --profiles`: one plan for each device; a device that none fits says so, and all failing is exit code 3."""
    made: dict[str, Plan | NoPlanError] = {}
    with terminal.stages() as begin, terminal.measuring() as on_measure:
        begin("planning")
        from kind_edge.deploy import pipeline
        from kind_edge.deploy.request import open_model

        model = open_model(checkpoint, on_measure, choices.get("autoencoder"))
        asked = {key: value for key, value in choices.items() if key != "autoencoder"}
        for name in names:
            try:
                made[name] = pipeline.plan(model, profile=name, **asked)
            except NoPlanError as error:
                made[name] = error
    values = {name: {"error": str(p)} if isinstance(p, NoPlanError) else p.to_dict() for name, p in made.items()}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"plans": values}, indent=2) + "\n", encoding="utf-8")
    if as_json:
        terminal.json({"plans": values})
    else:
        headers = ("", "runs on", "steps", "one image", "peak memory", "model file", "loss", "distance", "binding")
        terminal.out.print(tables.figures(headers, [_device(*each) for each in made.items()], left=(0, 1, 8)))
        for name, answer in made.items():
            if isinstance(answer, NoPlanError):
                terminal.note(f"{name}: {answer}")
    failures = [answer for answer in made.values() if isinstance(answer, NoPlanError)]
    if len(failures) == len(made):
        raise failures[0]


def _classes(curve: Curve) -> str:
    count = len(curve.classes)
    return f"{count} {'class' if count == 1 else 'classes'}"


def _device(name: str, answer: Plan | NoPlanError) -> tuple[str, ...]:
    if isinstance(answer, NoPlanError):
        return (name, "no plan fits", *[""] * 7)
    return (
        name,
        f"{answer.unit}, {answer.precision}",
        str(answer.steps),
        format_seconds(answer.sustained_image_latency_s),
        tables.size(answer.peak_memory_bytes),
        tables.size(answer.weight_bytes),
        f"+{format_share(answer.predicted_loss_increase or 0.0)}",
        "" if answer.predicted_frechet is None else distance_words(answer.predicted_frechet),
        ", ".join("--" + limit.replace("_", "-") for limit in answer.binding),
    )


def _row(point: Mapping[str, float | None]) -> tuple[str, ...]:
    return (
        tables.size(point["weight_bytes"] or 0.0),
        format_flops(point["flops"] or 0.0),
        format_seconds(point["sustained_image_latency_s"] or 0.0),
        tables.size(point["peak_memory_bytes"] or 0.0),
        predicted_words(point["predicted_loss_increase"], point["predicted_frechet"]),
    )


def _draw(pyplot: Any, curves: Sequence[Curve], axis: str, path: Path) -> None:
    """One line for each number of classes: quality over what it costs."""
    key, title, scale = _AXES[axis]
    known = all(point["predicted_frechet"] is not None for curve in curves for point in curve.points)
    figure, plot = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for curve in curves:
        x = [(point[key] or 0.0) * scale for point in curve.points]
        losses = [100 * (point["predicted_loss_increase"] or 0.0) for point in curve.points]
        y = [point["predicted_frechet"] for point in curve.points] if known else losses
        plot.plot(x, y, marker="o", markersize=3.5, label=_classes(curve))
    if known:  # no distance is 0, and good plans lie close together
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter("{x:,g}")
    plot.set_xlabel(title)
    plot.set_ylabel("predicted Fréchet distance" if known else "predicted increase of the loss (%)")
    plot.grid(alpha=0.3)
    plot.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    """matplotlib without a display; asked for before any work is done."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("-o with a picture needs matplotlib: pip install 'kind-edge[plots]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
