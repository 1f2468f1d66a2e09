"""docs/cli.md: the reference of the command line, made from the code. `scripts/reference` writes it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from kind_edge.cli.app import app

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
_HEAD = """# The command line

Made from the code by `scripts/reference`; `kind-edge VERB --help` prints the same. Exit codes: 0 done, 1 a check
failed, 2 wrong usage, 3 no plan fits, 4 unreadable input, 70 a bug of ours, 130 interrupted.
"""


def reference() -> str:
    """The whole page."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="kind-edge")
    page = get_docs_for_click(obj=command, ctx=context, name="kind-edge", title="The command line")
    body = page.split("\n", 1)[1].replace("\n# ", "\n## ")
    return _HEAD + re.sub(r"\n{3,}", "\n\n", body).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(TARGET, file=sys.stderr)
