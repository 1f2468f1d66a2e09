"""`kind-edge pack`: add classes to a bundle, take some out, or make packs for it, without exporting it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from kind_edge.cli import options, quality_view, tables
from kind_edge.cli.terminal import Terminal, terminal_of

if TYPE_CHECKING:
    from kind_edge.deploy.packs_bundle import Changed, Listing
    from kind_edge.deploy.packs_make import MadePacks

app = typer.Typer(
    help="Add classes to a bundle, remove some, list them (no PyTorch needed); make packs of what was learned later.",
    no_args_is_help=True,
)

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle: a folder, or a .zip of one.")]


@app.command("add")
def add(
    context: typer.Context,
    bundle: Bundle,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Class packs, from packs/ of an export.")],
    sign: options.Sign = None,
    as_json: options.Json = False,
) -> None:
    """Add classes to a bundle.

    The model files are joined from what they hold and from the packs, byte for byte as an export of these classes would
    write them, compared with the gated model's outputs in the packs, and take the old ones' place. A pack of another
    core exits with 4, a parity that is missed with 1; then the bundle is what it was. A signature goes with the old
    manifest, unless --sign makes a new one.
    """
    _change(context, bundle, files, [], sign, as_json)


@app.command("remove")
def remove(
    context: typer.Context,
    bundle: Bundle,
    classes: Annotated[list[str], typer.Argument(metavar="CLASS...", help="Names of classes of the bundle.")],
    sign: options.Sign = None,
    as_json: options.Json = False,
) -> None:
    """Take classes out of a bundle: its model files get smaller.

    A signature goes with the old manifest, unless --sign makes a new one.
    """
    _change(context, bundle, [], classes, sign, as_json)


@app.command("make")
def make(
    context: typer.Context,
    bundle: Bundle,
    checkpoint: options.Checkpoint,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", metavar="A,B", help="Classes of the checkpoint.", show_default="all that the bundle lacks"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A folder for the packs, one file for each class.")
    ] = Path("."),
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="CHECKPOINT",
            help="The checkpoint that the bundle was exported from; needed where its learngene was cut and does not "
            "nest.",
        ),
    ] = None,
    autoencoder: options.Autoencoder = None,
    as_json: options.Json = False,
) -> None:
    """Make class packs for a bundle that was exported before.

    CHECKPOINT is the one that BUNDLE was exported from, or what `kind-edge adapt` made of it: what all classes share
    must be the same, bit for bit. Ranks and precision are the bundle's. The packs are proven in the bundle's own files,
    and fit wherever its core is. A checkpoint with other weights exits with 4, a parity that is missed with 1; then
    nothing is written.
    """
    terminal = terminal_of(context)
    options.check_writable(output)
    with terminal.stages() as begin:
        begin("starting")
        from kind_edge.deploy.packs_make import make_packs

        names = options.split_names(classes)
        made = make_packs(
            bundle, checkpoint, names, output, calibration=calibration, autoencoder=autoencoder, on_stage=begin
        )
    if as_json:
        terminal.json(made.to_dict())
        return
    _print_made(terminal, made)
    terminal.next("pack", "add", bundle, *made.files, column=12)


@app.command("list")
def list_packs(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="BUNDLE|FILE", help="A bundle, or a class pack.")],
    as_json: options.Json = False,
) -> None:
    """Show the core and the classes of a bundle, or what a pack is for."""
    terminal = terminal_of(context)
    with terminal.working():
        from kind_edge.deploy.packs_bundle import list_source

        listing = list_source(source)
    if as_json:
        terminal.json(listing.to_dict())
        return
    terminal.out.print(tables.heading("Class pack" if listing.is_pack else "Classes", source))
    terminal.out.print(tables.facts(_facts(listing)))
    if listing.packs:
        terminal.out.print(tables.heading("Packs in it"))
        terminal.out.print(tables.facts((name, tables.size(size)) for name, size in listing.packs.items()))
    terminal.out.print()


def _facts(listing: Listing) -> Iterator[tuple[str, str]]:
    yield "core", listing.core_sha256[:12]
    yield "class" if listing.is_pack else "classes", ", ".join(listing.classes) or "none: the core alone"
    yield "a class", f"{tables.size(listing.row_bytes)} of rows in all model files"
    for file, size in listing.file_row_bytes.items():
        yield "", f"{tables.size(size)} in {file}"
    if listing.is_pack:
        yield "file", tables.size(listing.size_bytes)


def _change(
    context: typer.Context, bundle: str, files: list[Path], classes: list[str], sign: Path | None, as_json: bool
) -> None:
    terminal = terminal_of(context)
    key = options.signing_key(sign)
    with terminal.stages() as begin:
        begin("starting")
        from kind_edge.deploy.packs_bundle import change_bundle

        changed = change_bundle(bundle, files, classes, begin, key)
    if changed.left_out:
        terminal.say_warning(
            f"left out: {', '.join(changed.left_out)}; a changed bundle holds the files of its plan's precision alone"
        )
    if changed.unsigned:
        terminal.say_warning(
            "the bundle was signed; its signature does not hold for the changed one and was removed: pack with --sign"
        )
    if as_json:
        terminal.json(changed.to_dict())
    else:
        _print_changed(terminal, changed)


def _print_made(terminal: Terminal, made: MadePacks) -> None:
    terminal.out.print(tables.heading("Class packs", f"for core {made.core_sha256[:12]}"))
    terminal.out.print(tables.facts((Path(file).name, tables.size(size)) for file, size in made.files.items()))
    terminal.out.print(tables.heading("Proven", "the bundle's model files with these classes alone"))
    rows = [
        (
            parity.file,
            f"{parity.worst_db:.1f} dB" if parity.worst_db is not None else "none",
            f"{parity.gate_db:.0f} dB",
            tables.check(not parity.failures),
        )
        for parity in made.report.files
    ]
    terminal.out.print(tables.figures(("", "parity", "gate", ""), rows))
    quality_view.print_quality(terminal.out, made.quality)
    if warned := quality_view.warning({each.name: each.to_dict() for each in made.quality}):
        terminal.say_warning(warned)
    terminal.out.print()


def _print_changed(terminal: Terminal, changed: Changed) -> None:
    manifest = changed.manifest
    terminal.out.print(tables.heading("Model files", ", ".join(manifest.classes)))
    rows = [
        (
            f"{'*' if parity.file == manifest.default_model else ' '} {parity.file}",
            tables.size(manifest.files[parity.file].size_bytes),
            f"{parity.worst_db:.1f} dB" if parity.worst_db is not None else "none",
            f"{parity.gate_db:.0f} dB",
            tables.check(not parity.failures),
        )
        for parity in changed.report.files
    ]
    terminal.out.print(tables.figures(("", "size", "parity", "gate", ""), rows))
    terminal.out.print()
    terminal.line(Text.assemble(("  written  ", "dim"), str(changed.path)))
