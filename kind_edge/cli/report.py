"""`kind-edge report`: the report of a bundle, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kind_edge.cli import options
from kind_edge.cli.terminal import terminal_of
from kind_edge.errors import UsageError


def report(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: a folder, or a .zip of one.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="By default BUNDLE-report.html here.")
    ] = None,
    mac: Annotated[
        Path | None,
        typer.Option("--mac", metavar="FILE.json", help="Merge in what coreml/verify_on_mac.py wrote on a Mac."),
    ] = None,
) -> None:
    """Write what was asked, decided, measured and proved of a bundle as one HTML file that needs no network.

    Every export leaves the same in the bundle as report.html; the bundle is not changed here.
    """
    from kind_edge.deploy.bundle import open_bundle, verified_manifest
    from kind_edge.deploy.mac_results import read_mac_results
    from kind_edge.deploy.report import write_report

    target = output or Path(f"{bundle.resolve().stem}-report.html")
    if target.suffix.lower() != ".html":
        raise UsageError(f"-o {target}: the report is HTML; name a file that ends in .html")
    options.check_writable(target)
    if bundle.is_dir() and target.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"-o {target}: inside the bundle, whose files have hashes; write it elsewhere")
    with open_bundle(bundle) as folder:
        values = verified_manifest(folder, str(bundle)).raw
        write_report(folder, values, target, read_mac_results(mac, folder) if mac else None)
    terminal_of(context).line(str(target))
