"""What is shown when no plan fits: the plan that comes closest, what it misses, and what would help, each tried out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kind_edge.budget.words import WRITE_LIMIT, predicted_words
from kind_edge.cli import tables
from kind_edge.cli.plan_view import print_plan
from kind_edge.cli.terminal import Terminal
from kind_edge.errors import NoPlanError
from kind_edge.units import format_share

if TYPE_CHECKING:
    from kind_edge.budget.refusal import Refusal


@contextlib.contextmanager
def shown(terminal: Terminal, as_json: bool) -> Iterator[None]:
    """Show what a refusal knows before it ends the command: as the one JSON object, or beside the error."""
    try:
        yield
    except NoPlanError as error:
        refusal = getattr(error, "refusal", None)
        if as_json:
            terminal.json({"error": str(error), **(refusal.to_dict() if refusal else {})})
        elif refusal:
            _print(terminal, refusal)
        raise


def _print(terminal: Terminal, refusal: Refusal) -> None:
    err = terminal.err
    err.print(tables.heading("No plan fits; this one comes closest"))
    print_plan(err, refusal.closest)
    err.print(tables.heading("What it misses"))
    rows = [
        (f"--{miss.limit.replace('_', '-')}", WRITE_LIMIT[miss.limit](miss.asked), WRITE_LIMIT[miss.limit](miss.needed),
         format_share(miss.over))
        for miss in refusal.misses
    ]  # fmt: skip
    err.print(tables.figures(("", "asked", "needed", "too much"), rows))
    if not refusal.relaxations:
        return
    err.print(tables.heading("What would help", "each was solved; least given up first"))
    helps = [
        (format_share(each.given_up), each.change, predicted_words(
            each.figures["predicted_loss_increase"], each.figures["predicted_frechet"]
        ))
        for each in refusal.relaxations
    ]  # fmt: skip
    err.print(tables.figures(("given up", "", "predicted"), helps, left=(1, 2)))
    err.print()
