"""Every error that kind-edge raises on purpose, each with the exit code of the command line.

A message says what was wrong, where, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MANY_NAMES = 20
"""As many known names as a message lists."""


class KindEdgeError(Exception):
    """Base of the tree. Anything else that reaches the command line is a bug of ours (exit code 70)."""

    exit_code = 70


class GateError(KindEdgeError):
    """A check of the result failed: parity, size or latency, or a training that diverged.

    `report` has the figures, where there are any.
    """

    exit_code = 1

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class UsageError(KindEdgeError):
    """The request cannot be understood or contradicts itself."""

    exit_code = 2


class NoPlanError(KindEdgeError):
    """No plan fits the budget."""

    exit_code = 3


class InputError(KindEdgeError):
    """A file is missing, unreadable, corrupt, or not what it claims to be."""

    exit_code = 4


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, as ", "-joined text for a message; all of them if none is close."""
    candidates = list(known)
    return ", ".join(_close(name, candidates, count) or candidates)


def unknown(kind: str, name: str, names: Iterable[str], else_do: str = "") -> UsageError:
    """The refusal of a name that is not known: with the nearest names that are, or, where none is near, with all of
    them and what to do if it is none of these.
    """
    candidates = list(names)
    text = f"unknown {kind} {name!r}"
    if close := _close(name, candidates, count=3):
        return UsageError(f"{text}; did you mean: {', '.join(close)}?")
    more = f" and {len(candidates) - MANY_NAMES} more" if len(candidates) > MANY_NAMES else ""
    known = f"known: {', '.join(candidates[:MANY_NAMES])}{more}" if candidates else ""
    return UsageError("; ".join(filter(None, (text, known, else_do))))


def _close(name: str, candidates: list[str], count: int) -> list[str]:
    lowered = {candidate.lower(): candidate for candidate in candidates}
    return [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)]
