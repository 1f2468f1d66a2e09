"""No plan fits: which limit is in the way, by how much, and what to do, in the words of the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kind_edge.errors import NoPlanError
from kind_edge.units import Kind, Quantity, format_bytes, format_flops, format_seconds, parse_quantity


@dataclass(frozen=True)
class Infeasible:
    """A limit that cannot be met.

    `conflicts` empty: not even alone, and `smallest` is the exact sum of the cheapest options plus `fixed`.
    Otherwise: not together with the limits named there (none of them can be spared from the conflict); `smallest` is
    what this cost must be allowed while all other limits hold, or, where other conflicts remain, those of this one.
    """

    limit: str
    limit_value: int
    smallest: int
    fixed: int
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Words:
    """How a cost is called and written where the user meets it."""

    flag: str
    kind: Kind
    write: Callable[[float], str]
    per_unit: int  # our integers per unit of `kind`
    ways_out: tuple[str, ...]


_SMALLER = ("keep fewer classes", "take fewer --steps", "lower --precision")

_WORDS: Mapping[str, _Words] = {
    "flops": _Words("--max-flops", "flops", format_flops, 1, ()),
    "weight_bytes": _Words("--max-size", "bytes", format_bytes, 1, _SMALLER),
    "peak_memory_bytes": _Words("--max-memory", "bytes", format_bytes, 1, _SMALLER),
    "latency_ns": _Words(
        "--max-latency", "seconds", format_seconds, 10**9, ("take fewer --steps", "lower --precision")
    ),
}


def limit_flag(cost: str) -> str:
    """ "--max-size" of "weight_bytes"."""
    return _flag(cost)


def raised_limit(cost: str, amount: int) -> tuple[str, Quantity]:
    """A limit that is enough for an amount in the solver's units: as it is written, and as it is asked for."""
    text = _enough(cost, amount)
    return text, parse_quantity(text, _WORDS[cost].kind)


def no_plan_error(diagnosis: tuple[Infeasible, ...]) -> NoPlanError:
    """The refusal in the user's words: what cannot be met, by how much, and the ways out."""
    raises = [f"{_flag(entry.limit)} to at least {_enough(entry.limit, entry.smallest)}" for entry in diagnosis]
    ways_out = list(dict.fromkeys(way for entry in diagnosis for way in _ways_out(entry.limit)))
    if not diagnosis:
        reason, remedies = "the limits cannot hold together", ["relax one of them"]
    elif diagnosis[0].conflicts:
        names = [f"{_flag(entry.limit)} {_amount(entry.limit, entry.limit_value)}" for entry in diagnosis]
        names += [_flag(name) for name in diagnosis[0].conflicts if name not in {entry.limit for entry in diagnosis}]
        reason = f"{' and '.join(names)} cannot hold together, though each can alone"
        remedies = [f"raise {' or '.join(raises)}", *ways_out]
    else:
        reason = "; ".join(map(_below, diagnosis))
        remedies = [f"raise {' and '.join(raises)}", *ways_out]
    last = f", or {remedies[-1]}" if len(remedies) > 1 else remedies[-1]
    error = NoPlanError(f"no plan fits: {reason}; {', '.join(remedies[:-1])}{last}")
    error.diagnosis = diagnosis  # type: ignore[attr-defined]  # for callers that want the figures, not the words
    return error


def _below(entry: Infeasible) -> str:
    limit, smallest = _amount(entry.limit, entry.limit_value), _enough(entry.limit, entry.smallest)
    if limit == smallest:  # the same in three digits
        limit, smallest = _exact(entry.limit, entry.limit_value), _exact(entry.limit, entry.smallest)
    fixed = f" (fixed parts {_amount(entry.limit, entry.fixed)})" if entry.fixed else ""
    return f"{_flag(entry.limit)} {limit} is below the smallest possible {smallest}{fixed}"


def _flag(name: str) -> str:
    if name == "loss":
        return "--max-quality-loss"
    return _WORDS[name].flag if name in _WORDS else name


def _ways_out(name: str) -> tuple[str, ...]:
    return _WORDS[name].ways_out if name in _WORDS else ()


def _share(billionths: int) -> str:
    """A loss that is counted in billionths, in four digits, rounded up."""
    return f"{math.ceil(billionths / 1e4) / 1e3:g} %"


def _amount(name: str, amount: int) -> str:
    if name == "loss":
        return _share(amount)
    return _WORDS[name].write(amount / _WORDS[name].per_unit) if name in _WORDS else str(amount)


def _exact(name: str, amount: int) -> str:
    return str(Quantity(amount / _WORDS[name].per_unit, _WORDS[name].kind)) if name in _WORDS else str(amount)


def _enough(name: str, amount: int) -> str:
    """The amount in three digits, rounded up: a limit of this text is never below the amount."""
    if name not in _WORDS:
        return _share(amount) if name == "loss" else str(amount)
    words = _WORDS[name]
    for permille in range(12):  # half a step of three digits is at most 5 permille
        text = words.write(amount * (1 + permille / 1000) / words.per_unit)
        if amount and int(parse_quantity(text, words.kind).value * words.per_unit) >= amount:
            return text
    return _exact(name, amount)
