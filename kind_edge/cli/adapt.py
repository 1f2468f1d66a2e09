"""`kind-edge adapt`: new classes for a trained model, whose learngene and old classes stay as they are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import terminal_of
from kind_edge.cli.train import following
from kind_edge.units import format_seconds


def adapt(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="PATH", help="Images, as for train: a folder per class, for instance; see docs/data.md."
        ),
    ],
    classes: Annotated[
        str, typer.Option("--classes", metavar="A,B", help="The new classes; others in the data are left out.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The checkpoint of old and new.")],
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CLASS|nearest",
            help="Start with the tailor of this old class, or (nearest) each new class with that of the old one that "
            "fits it best.",
            show_default="as nothing, on the learngene alone",
        ),
    ] = None,
    learngene_only: Annotated[
        bool, typer.Option("--learngene-only", help="A new domain: drop the old classes, keep the learngene.")
    ] = False,
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, metavar="N", help="Images seen in training.", show_default="60000"),
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option("--class-map", metavar="FILE", help='Classes of the data by new names: boot = ["ankle-boot"].'),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option("--autoencoder", metavar="DIR", help="For a model of latents: the autoencoder, from diffusers."),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to train.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in DIR.")] = False,
) -> None:
    """Teach a model new classes.

    Only tailors of the new classes are trained. The learngene is frozen, and the old classes keep their bytes: what was
    exported of them stays right. docs/adapt.md says which start fits when.
    """
    terminal = terminal_of(context)
    names = options.split_names(classes) or []
    options.check_writable(output)
    with following(terminal, output) as on_progress:
        from kind_edge.model.shipped import find_model
        from kind_edge.training.adapt import adapt as run

        folder = run(
            find_model(checkpoint),
            data,
            names,
            output,
            start=start,
            learngene_only=learngene_only,
            images=images,
            class_map=class_map,
            autoencoder=autoencoder,
            device=device,
            resume=resume,
            on_progress=on_progress,
            on_note=terminal.note,
        )
    terminal.out.print(tables.heading("Checkpoint", str(folder)))
    terminal.out.print(tables.facts(_result(folder)))
    terminal.out.print()
    terminal.next("export", str(folder), "--classes", ",".join(names), "--profile", "host", column=12)
    terminal.line(f"              kind-edge pack make BUNDLE {shlex.quote(str(folder))}, for apps that are out already")


def _result(folder: Path) -> Iterator[tuple[str, str]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    done = config["provenance"]["adapted"]
    yield "classes", ", ".join(config["class_names"])
    yield "trained", f"{tables.amount(done['trained_values'])} values of the new classes"
    if done["origins"]:
        pairs = zip(done["classes"], done["origins"], strict=True)
        yield "started as", ", ".join(f"{new} as {old}" for new, old in pairs)
    yield "images seen", f"{done['images_seen']:,}"
    yield "time", format_seconds(done["seconds"])
    yield "loss", f"{done['final_loss']:.4f}"
