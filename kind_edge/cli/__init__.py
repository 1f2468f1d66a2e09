"""The command line: parses, calls, prints. One file per verb; `app` names them, `terminal` says what goes where.

Nothing here is imported that a verb does not need: `kind-edge --help` loads neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (of the process, unless `arguments` are given) and return its exit code."""
    from kind_edge.cli.run import run
    from kind_edge.deploy.session import return_freed_blocks

    if arguments is None:  # the process is ours alone: it takes the memory that is predicted for an app
        return_freed_blocks()
    return run(arguments)
