"""How figures are laid out: plain tables without lines, a heading in bold, what is secondary dim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kind_edge.units import format_bytes, format_count, format_params, format_share

Cell = str | Text


def heading(text: str, beside: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), (f"  {beside}" if beside else "", "dim"))


def facts(rows: Iterable[tuple[str, Cell]]) -> Padding:
    """Names at the left, values beside them; values may wrap."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, _text(value))
    return Padding(table, (0, 0, 0, 2), expand=False)


def figures(headers: Sequence[str], rows: Iterable[Sequence[Cell]], left: Iterable[int] = (0,)) -> Padding:
    """A table with headers; columns are aligned at the right but for those in `left`."""
    table = Table(box=None, show_header=any(headers), header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    kept_left = set(left)
    for number, header in enumerate(headers):
        aligned_left = number in kept_left
        wraps = number > 0 and aligned_left  # names and numbers stay whole
        table.add_column(header, justify="left" if aligned_left else "right", overflow="fold", no_wrap=not wraps)
    for row in rows:
        table.add_row(*map(_text, row))
    return Padding(table, (0, 0, 0, 2), expand=False)


def _text(cell: Cell) -> Text:
    """As it stands: rich would read a shape such as [batch, 3] as markup."""
    return cell if isinstance(cell, Text) else Text(cell)


def amount(number: float) -> str:
    """240_656 -> "241 K" parameters or multiply-accumulates."""
    return format_params(number)


def size(number: float) -> str:
    return format_bytes(number)


def span(numbers: Sequence[int]) -> str:
    """[24, 48, 30] -> "24-48"; equal numbers are one."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def share(part: float, whole: float | None) -> str:
    """ "36.5 %", in three digits or tenths of a percent, whichever is coarser."""
    if not whole:
        return ""
    return format_share(round(part / whole, 3)) if part / whole >= 0.0005 else "< 0.1 %"


def check(passed: bool) -> Text:
    return Text("✓", "green") if passed else Text("✗", "bold red")


count = format_count
