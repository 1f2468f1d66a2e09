"""`kind-edge resize`: a checkpoint of one size as the start of a model of another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import Terminal, terminal_of

if TYPE_CHECKING:
    from kind_edge.model.checkpoint import Checkpoint

MethodChoice = Literal["fit", "front", "bot", "selection"]


def resize(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The resized checkpoint.")],
    depth: Annotated[
        int | None, typer.Option("--depth", metavar="N", help="Blocks.", show_default="as many as there are")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            "--width", metavar="N", help="Channels; heads keep their width.", show_default="as many as there are"
        ),
    ] = None,
    method: Annotated[
        MethodChoice,
        typer.Option(
            "--method",
            help="Channels chosen and layers fitted; frequencies; wavelets; every k-th layer and the leading channels.",
        ),
    ] = "fit",
    learngene_rank: Annotated[
        int | None,
        typer.Option("--learngene-rank", metavar="R", help="Of the result.", show_default="scaled with the width"),
    ] = None,
    tailor_rank: Annotated[
        int | None,
        typer.Option("--tailor-rank", metavar="T", help="Of the result.", show_default="scaled with the width"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Make a start for a model of another depth or width.

    Nothing is trained: the result draws little until it is trained on, with kind-edge train --from. A KIND model is
    resized with its tailors, a dense one as it is. docs/resize.md says which method fits when.
    """
    terminal = terminal_of(context)
    options.check_writable(output)
    with terminal.counting("learngene and tailors") as on_part:
        from kind_edge.model.resize import Sizes, resize_model
        from kind_edge.model.shipped import find_model

        sizes = Sizes(depth, width, learngene_rank, tailor_rank)
        done = resize_model(find_model(checkpoint), output, sizes, method, on_part)
    if as_json:
        said = {"checkpoint": str(output), "model": done.spec.to_dict(), "classes": list(done.class_names)}
        terminal.json({**said, "resized": done.provenance["resized"]})
    else:
        _print(terminal, done, output)


def _print(terminal: Terminal, done: Checkpoint, output: Path) -> None:
    was, now = done.provenance["resized"]["from"], done.provenance["resized"]["to"]
    rows = [(name, f"{was[name]} -> {now[name]}") for name in ("depth", "width", "heads")]
    if done.spec.factored:
        rows += [("learngene", f"rank {was['learngene_rank']} -> {now['learngene_rank']}")]
        rows += [("tailors", f"rank {was['tailor_rank']} -> {now['tailor_rank']}, of {len(done.class_names)} classes")]
    terminal.out.print(tables.heading("Checkpoint", str(output)))
    terminal.out.print(tables.facts([*rows, ("method", done.provenance["resized"]["method"])]))
    terminal.out.print()
    terminal.next("train", "--from", str(output), "-o", f"{output}-trained", column=12)
