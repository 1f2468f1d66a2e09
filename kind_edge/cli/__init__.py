"""The command line: parses, calls, prints. One file per verb; `app` names them, `terminal` says what goes where.

Nothing here is imported that a verb does not need: `kind-edge --help` loads neither torch nor onnx.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

TRAINING = {"train", "adapt", "distill", "--heal"}
"""They take and free large blocks all the time: to give each back to the system takes half as long again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (of the process, unless `arguments` are given) and return its exit code."""
    from kind_edge.cli.run import run
    from kind_edge.deploy.session import return_freed_blocks

    # A process of our own takes the memory that is predicted for an app.
    if arguments is None and not TRAINING & set(sys.argv[1:]):
        return_freed_blocks()
    return run(arguments)
