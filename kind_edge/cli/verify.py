"""`kind-edge verify`: is a bundle whole, and does it compute the same function?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import terminal_of
from kind_edge.errors import GateError


def verify(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle: a folder, or a .zip of one.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="C",
            help="Compute the reference anew from this checkpoint (or shipped model); else the stored one is used.",
        ),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            "--autoencoder", metavar="DIR", help="With --checkpoint, of a bundle with a decoder: where it is from."
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="PUBLIC.pem",
            help="Check the signature first: of the manifest, which names every file, by this Ed25519 key.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check hashes, and every model file against the gated model.

    The worst signal-to-noise ratio over classes and timesteps must reach 100 dB in fp32, 25 dB in int8; the images of
    a sampler or a decoder 80 dB and 25 dB (PSNR). A parity that is missed exits with 1, a file that was changed with 4.
    """
    terminal = terminal_of(context)
    with terminal.stages() as begin:
        begin("verifying")
        from kind_edge.deploy import pipeline

        try:
            report = pipeline.verify(bundle, checkpoint, autoencoder, key)
        except GateError as error:
            if as_json and error.report is not None:
                terminal.json(dict(error.report))
            raise
    if as_json:
        terminal.json(report.to_dict())
        return
    terminal.out.print(tables.heading("Parity", f"worst over classes and timesteps, against {report.reference}"))
    rows = [
        (
            parity.file,
            f"{parity.worst_db:.1f} dB" if parity.worst_db is not None else "none",
            f"{parity.gate_db:.0f} dB",
            tables.check(not parity.failures),
            f"{len(parity.points)} points",
        )
        for parity in report.files
    ]
    terminal.out.print(tables.figures(("", "parity", "gate", "", ""), rows))
    terminal.out.print()
    signed = f"signed by the owner of {key}, " if key is not None else ""
    terminal.line(f"  {signed}every hash matches, every gate is kept")
