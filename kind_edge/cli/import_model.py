"""`kind-edge import`: a DiT that somebody else trained, as a KIND checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kind_edge.bounded import read_text
from kind_edge.cli import options, tables
from kind_edge.cli.terminal import Terminal, terminal_of

if TYPE_CHECKING:
    from kind_edge.model.convert import Imported


def import_model(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A facebookresearch DiT (.pt), or a diffusers DiT or DiTPipeline folder."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The checkpoint.")],
    learngene_rank: Annotated[
        int, typer.Option("--learngene-rank", metavar="R", help="Components that every class shares.")
    ],
    tailor_rank: Annotated[
        int, typer.Option("--tailor-rank", metavar="T", help="Components of every class's own; 0 for none.")
    ],
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE|A,B", help="Names in order, one a line.", show_default="the source's"),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", min=1, metavar="N", help="Attention heads, where a .pt file of odd width needs them."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Split a DiT's matrices into a learngene and tailors.

    The result is an ordinary checkpoint. With R the model's width it computes what the source computes.
    """
    terminal = terminal_of(context)
    names = _names(classes)
    options.check_writable(output)
    with terminal.counting("matrices") as on_matrix:
        from kind_edge.model.convert import import_model as run

        done = run(source, output, learngene_rank, tailor_rank, names, heads, on_matrix)
    if as_json:
        terminal.json(_values(done))
    else:
        _print(terminal, done)


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names from the file of that name, one a line, or from the text itself."""
    if text is None:
        return None
    if not Path(text).is_file():
        return tuple(options.split_names(text) or ())
    lines = read_text(text, "the class names, one a line").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _values(done: Imported) -> dict[str, object]:
    return {
        "checkpoint": str(done.folder),
        "layout": done.layout,
        "model": done.spec.to_dict(),
        "classes": list(done.class_names),
        "learngene_energy": done.learngene_energy,
        "active_energy": done.active_energy,
    }


def _print(terminal: Terminal, done: Imported) -> None:
    spec = done.spec
    shape = f"{spec.image_size} x {spec.image_size} x {spec.channels}, patch {spec.patch_size}, width {spec.width}"
    terminal.out.print(tables.heading("Checkpoint", str(done.folder)))
    rows = [
        ("from", done.layout),
        ("model", f"{shape}, {tables.count(spec.depth, 'block')}, classes: {len(done.class_names)}"),
        (
            "learngene",
            f"rank {spec.learngene_rank} of {spec.width}: {done.learngene_energy:.1%} of the weights' energy",
        ),
        ("with a tailor", f"rank {spec.learngene_rank + spec.tailor_rank}: {done.active_energy:.1%}"),
    ]
    terminal.out.print(tables.facts(rows))
    terminal.out.print()
    terminal.next("inspect", str(done.folder), column=12)
