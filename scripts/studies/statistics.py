"""One figure over several seeds: its mean and its range. No more than that can be said of three numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of `count` values."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
        """ "5.31 (5.20 to 5.44)"; one value stands alone, and so do equal ones."""
        mean, low, high = (f"{scale * value:.{digits}f}{unit}" for value in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


def spread_of(values: Iterable[float]) -> Spread:
    """At least one value."""
    found = [float(value) for value in values]
    return Spread(sum(found) / len(found), min(found), max(found), len(found))


def spread_of_figure(records: Sequence[dict[str, Any]], name: str) -> Spread | None:
    """The spread of one figure over runs; None if no run has it."""
    values = [record["figures"][name] for record in records if record["figures"].get(name) is not None]
    return spread_of(values) if values else None


def cell(records: Sequence[dict[str, Any]], name: str, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """The spread of one figure as a cell of a table; a dash if no run has it."""
    spread = spread_of_figure(records, name)
    return "–" if spread is None else spread.text(digits, scale, unit)


def in_percent(share: float, digits: int = 0) -> str:
    """ "97.2 %"."""
    return f"{100 * share:.{digits}f} %"


def paragraph(text: str, indent: str = "") -> str:
    """Lines of at most 120 characters; a percent sign stays with its figure."""
    kept = text.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.fill(kept, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table: the first column at the left, figures at the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def conditions_line(records: Sequence[dict[str, Any]]) -> str:
    """What all these figures were measured on, as one sentence; figures that differ are listed."""

    def values(key: str) -> str:
        found = {record["conditions"][key] for record in records if key in record["conditions"]}
        return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(found))

    weights = ", ".join(sorted({record["checkpoint"]["weights_sha256"][:12] for record in records}))
    models = ", ".join(sorted({record["checkpoint"]["model"] for record in records}))
    judges = ", ".join(sorted({key[:12] for record in records if (key := record["conditions"].get("judge_sha256"))}))
    return (
        f"{values('images')} images a run, seeds {values('seed')}; {values('sampler')}, {values('steps')} steps, "
        f"guidance {values('guidance')}; model {models}, weights {weights}; judge {judges}."
    )
