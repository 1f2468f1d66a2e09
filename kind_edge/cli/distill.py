"""`kind-edge distill`: a model of few steps and no guidance branch, from one that needs both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import terminal_of
from kind_edge.cli.train import following
from kind_edge.units import format_seconds


def distill(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The distilled checkpoint.")],
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            min=1.0,
            metavar="W",
            help="What goes inside; 1 is none.",
            show_default="as the checkpoint recommends",
        ),
    ] = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto",
            metavar="CHECKPOINT",
            help="A model that was distilled before: it stays as it is, and learns those classes that it has not.",
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images", min=1, metavar="N", help="Images drawn in training.", show_default="48000 for all classes"
        ),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to train.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in DIR, if it has begun.")
    ] = False,
) -> None:
    """Teach a model to draw in few steps, without guidance.

    Learngene and tailors are trained with the class gate, so the result is an ordinary checkpoint: plan it, cut it and
    export it for any classes. No data is needed; the model is its own teacher. With --onto only the tailors of new
    classes are trained, so that packs of them fit what was exported before.
    """
    terminal = terminal_of(context)
    options.check_writable(output)
    with following(terminal, output) as on_progress:
        from kind_edge.model.shipped import find_model
        from kind_edge.training.distill import distill as run

        folder = run(
            find_model(checkpoint),
            output,
            guidance=guidance,
            onto=None if onto is None else find_model(onto),
            images=images,
            device=device,
            resume=resume,
            on_progress=on_progress,
            on_note=terminal.note,
        )
        from kind_edge.training.distributed import first_process

        if not first_process():
            return
    terminal.out.print(tables.heading("Checkpoint", str(folder)))
    terminal.out.print(tables.facts(_result(folder)))
    terminal.out.print()
    terminal.next("export", str(folder), "--profile", "host", column=12)


def _result(folder: Path) -> Iterator[tuple[str, str]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    done, quality = config["provenance"]["distilled"], config["provenance"].get("quality_by_steps", {})
    yield "steps", ", ".join(map(str, config["model"]["step_counts"]))
    yield "guidance", f"{done['guidance']:g} inside, no branch of its own"
    for count, report in quality.items():
        accuracy = f"{100 * report['class_accuracy']:.1f} % of {report['images']:,} images recognised"
        yield f"{count} step" + "s" * (count != "1"), f"Fréchet distance {report['frechet']:.2f}, {accuracy}"
    yield "time", format_seconds(done["seconds"])
    yield "loss", f"{done['final_loss']:.4f}"
