"""`optimum-cli export kind-edge ...`: the same as `kind-edge export ...`, from where users of Optimum look for it.

Optimum imports every module of the namespace `optimum.commands.register`, where this one is installed; there must be no
`__init__.py` above it. Nothing of kind-edge is loaded until the command runs.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class KindEdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # Optimum has no types
    """Hands everything behind its name to kind-edge, which knows its own options and its own --help."""

    COMMAND = CommandInfo(
        name="kind-edge", help="Cut a KIND diffusion transformer to a device and classes, prove it, and bundle it."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # no argument starts like that: none is an option of this parser, -h neither
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        from kind_edge.cli import main

        sys.exit(main(["export", *self.args.arguments]))


REGISTER_COMMANDS = [(KindEdgeExportCommand, ExportCommand)]
