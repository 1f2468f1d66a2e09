"""`kind-edge serve`: a bundle's page in the browser, from this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from kind_edge.cli.terminal import terminal_of


def serve(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle that was exported with --formats web.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
) -> None:
    """Serve the bundle's page on this machine, with the headers that give it threads. Ctrl-C ends it.

    Any other server of static files does as well.
    """
    from kind_edge.deploy.serve import make_server, page_folder

    with make_server(page_folder(bundle), port) as server:
        terminal_of(context).line(f"http://127.0.0.1:{server.server_address[1]}/   Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
