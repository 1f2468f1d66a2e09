"""Serving a bundle's page on this machine, with the headers that browsers ask for. Standard library only."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kind_edge.deploy.web import FOLDER
from kind_edge.errors import InputError, UsageError

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # these two give the page shared memory, and so threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",  # the page may be exported again
}
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


def page_folder(bundle: Path) -> Path:
    """The `web` folder of a bundle, or `bundle` where it is that folder; `InputError` if there is no page."""
    for folder in (bundle / FOLDER, bundle):
        if (folder / "index.html").is_file() and (folder / "offline.js").is_file():
            return folder
    what = "no page in it; export with --formats web" if bundle.is_dir() else "no such folder"
    raise InputError(f"{bundle}: {what}")


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server on loopback alone; port 0 takes a free one. `UsageError` if the port is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise UsageError(
            f"--port {port}: cannot listen there ({error.strerror}); take another, or 0 for any"
        ) from error


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **_TYPES}  # noqa: RUF012

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence: nobody asked for a log."""
