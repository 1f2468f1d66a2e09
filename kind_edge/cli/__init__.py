"""The command line: parses, calls, prints. One file per verb; `app` names them, `terminal` says what goes where.

Nothing here is imported that a verb does not need: `kind-edge --help` loads neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (of the process, unless `arguments` are given) and return its exit code."""
    from kind_edge.cli.run import run

    return run(arguments)
