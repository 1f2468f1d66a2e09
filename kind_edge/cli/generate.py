"""`kind-edge generate`: images from a bundle, through ONNX Runtime alone."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import terminal_of
from kind_edge.errors import UsageError
from kind_edge.units import format_seconds

if TYPE_CHECKING:
    from kind_edge.deploy.runtime import LoadedBundle

MAX_COLUMNS = 16


def generate(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle: a folder, or a .zip of one.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.png", help="The picture.")],
    class_names: Annotated[
        str | None,
        typer.Option(
            "--class", metavar="NAME[,NAME]", help="The class, or several: a row of the picture for each."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, metavar="N", help="Images of each class.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="The same seed gives the same images.")] = 0,
) -> None:  # fmt: skip
    """Draw images with a bundle and write them as one PNG.

    Needs numpy and onnxruntime alone. The class may be left out where the bundle has nothing to choose.
    """
    terminal = terminal_of(context)
    if output.suffix.lower() != ".png":
        raise UsageError(f"-o {output}: pictures are written as PNG; name a file that ends in .png")
    if output.is_dir():
        raise UsageError(f"-o {output}: that is a folder; name a file in it")
    options.check_writable(output)
    with terminal.counting("sampling steps") as count:
        from kind_edge.deploy.grid import save_grid
        from kind_edge.deploy.runtime import load_bundle

        loaded = load_bundle(bundle)
        names = wanted_classes(loaded, options.split_names(class_names))
        began = time.monotonic()
        images = loaded.generate(names, n, seed, count)
        took_s = time.monotonic() - began
    rows = names or [" + ".join(loaded.classes)]
    columns = columns_for(n, len(rows))
    labels = [name if row == 0 else "" for name in rows for row in range(n // columns)] if len(rows) > 1 else None
    save_grid(images, output, columns, labels=labels)
    what = f"{tables.count(len(images), 'image')} of {', '.join(rows)}"
    terminal.line(f"{output}: {what}; seed {seed}, {loaded.model.precision}, {format_seconds(took_s)}")


def wanted_classes(loaded: LoadedBundle, names: list[str] | None) -> list[str] | None:
    """The classes to draw; None where the model has none to choose from."""
    switches = "class_index" in loaded.model.input_names()
    if names is not None:
        return names  # the bundle refuses what it does not know
    if not switches:
        return None
    if len(loaded.classes) == 1:
        return list(loaded.classes)
    raise UsageError(f"--class is missing; this bundle makes: {', '.join(loaded.classes)}")


def columns_for(n: int, rows: int) -> int:
    """How many images stand in a row: nearly a square for one class; for several, rows that each class fills."""
    if rows == 1:
        return min(MAX_COLUMNS, math.ceil(math.sqrt(n)))
    fitting = [columns for columns in range(1, MAX_COLUMNS + 1) if n % columns == 0]
    return max(fitting) if max(fitting) >= min(n, 4) else n
