"""Quantities with units: "300MiB", "4s", "13.2GFLOPs", "40%" to numbers and back.

A limit without a unit is refused: "300" could be bytes or megabytes, and a wrong guess would only show on the phone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kind_edge.errors import UsageError

Kind = Literal["bytes", "seconds", "flops"]
QuantityUnit = Literal["bytes", "seconds", "flops", "share"]

# Scales per kind, as people write them; the first is the base unit.
_SCALES: Mapping[Kind, Mapping[str, float]] = {
    "bytes": {
        "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    },
    "seconds": {"s": 1, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "min": 60, "h": 3600},
    "flops": {"FLOPs": 1, "kFLOPs": 1e3, "MFLOPs": 1e6, "GFLOPs": 1e9, "TFLOPs": 1e12},
}  # fmt: skip

_ALIASES: Mapping[Kind, Mapping[str, str]] = {
    "bytes": {"byte": "B", "bytes": "B"},
    "seconds": {"µs": "us", "μs": "us", "sec": "s", "seconds": "s"},  # the two mu are different code points
    "flops": {"flop": "FLOPs", "kflop": "kFLOPs", "mflop": "MFLOPs", "gflop": "GFLOPs", "tflop": "TFLOPs"},
}

_EXAMPLES: Mapping[Kind, str] = {
    "bytes": "300MiB or 2MB (units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)",
    "seconds": "4s or 250ms (units: ns, us, ms, s, min, h)",
    "flops": "13.2GFLOPs (units: FLOPs, kFLOPs, MFLOPs, GFLOPs, TFLOPs)",
}

_PATTERN = re.compile(r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[^\s\d].*?)?\s*", re.DOTALL)


@dataclass(frozen=True)
class Quantity:
    """A positive number in its base unit: bytes, seconds, FLOPs, or a share (1.0 = all of the dense model)."""

    value: float
    unit: QuantityUnit

    def __str__(self) -> str:
        """Text that parses back to exactly this value, in the unit that makes it shortest."""
        if self.unit == "share":
            percent = f"{self.value * 100:.15g}%"
            return percent if _percent_to_share(percent[:-1]) == self.value else f"{self.value * 100!r}%"
        scales = _SCALES[self.unit]
        numbers = {name: f"{self.value / scale:.15g}" for name, scale in scales.items()}
        exact = [f"{number}{name}" for name, number in numbers.items() if float(number) * scales[name] == self.value]
        return min(exact, key=len) if exact else f"{self.value!r}{next(iter(scales))}"


def parse_quantity(text: str, kind: Kind, allow_share: bool = True, flag: str = "value") -> Quantity:
    """Parse a limit of the given kind, or a percentage where `allow_share`.

    Byte units are decimal (MB = 10^6) or binary (MiB = 2^20); case does not matter, except that "Mb" (megabits) is not
    a number of bytes. Raises `UsageError`, which names `flag`, the fitting units and an example.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise _refusal(flag, text, "that is not a number with a unit", kind, allow_share)
    number, unit = match["number"], match["unit"]
    if unit is None:
        raise _refusal(flag, text, "a bare number says no unit", kind, allow_share)
    if unit == "%":
        if not allow_share:
            raise _refusal(flag, text, "a percentage has nothing to refer to here", kind, allow_share)
        return _positive(_percent_to_share(number), "share", text, kind, allow_share, flag)
    name = _unit_name(unit, kind)
    if name is None:
        raise _refusal(flag, text, f"unknown unit {unit!r}{_hint(unit, kind)}", kind, allow_share)
    return _positive(float(number) * _SCALES[kind][name], kind, text, kind, allow_share, flag)


def parse_duration(text: str, flag: str = "value") -> float:
    """ "90s", "5m", "1h" -> seconds. Unlike a limit of latency, a time to spend may say m for minutes.

    Raises `UsageError`, which names `flag` and an example.
    """
    try:
        return parse_quantity(re.sub(r"(?<=[\d.\s])m\s*$", "min", text), "seconds", allow_share=False).value
    except UsageError as error:
        reason = str(error).split(": ", 1)[1].rsplit("; write for example", 1)[0]
        raise UsageError(f"{flag} {text!r}: {reason}; write for example 90s, 5m or 1h") from error


def parse_share(text: str, flag: str = "value") -> float:
    """ "2%" -> 0.02. Raises `UsageError` for anything but a percentage above 0."""
    match = _PATTERN.fullmatch(text)
    if match is None or match["unit"] != "%" or not (share := _percent_to_share(match["number"])) > 0:
        raise UsageError(f"{flag}: got {text!r}, want a percentage above 0 such as 2%")
    return share


def format_count(number: int, singular: str) -> str:
    """1 -> "1 image", 3000 -> "3,000 images"."""
    ending = "" if number == 1 else "es" if singular.endswith("s") else "s"
    return f"{number:,} {singular}{ending}"


def format_bytes(value: float, binary: bool = True) -> str:
    """4_718_592 -> "4.5 MiB"; with `binary` false "4.72 MB". Three significant digits."""
    names = ("B", "KiB", "MiB", "GiB", "TiB") if binary else ("B", "kB", "MB", "GB", "TB")
    return _format(value, [(name, _SCALES["bytes"][name]) for name in names])


def format_seconds(value: float) -> str:
    """0.0123 -> "12.3 ms"; 7.863 -> "7.86 s"; 90 -> "1.5 min"."""
    return _format(value, [(name, _SCALES["seconds"][name]) for name in ("ns", "us", "ms", "s", "min", "h")])


def format_flops(value: float) -> str:
    """13_216_983_552 -> "13.2 GFLOPs": an amount of work, not a rate."""
    return _format(value, list(_SCALES["flops"].items()))


def format_flops_per_second(value: float) -> str:
    """1.907e12 -> "1.91 TFLOP/s": a rate, not an amount of work."""
    return _format(value, [(name.removesuffix("s") + "/s", scale) for name, scale in _SCALES["flops"].items()])


def format_params(value: float) -> str:
    """70_192_160 -> "70.2 M"."""
    return _format(value, [("", 1.0), ("K", 1e3), ("M", 1e6), ("G", 1e9)])


def format_share(value: float) -> str:
    """0.4 -> "40 %", 15.2 -> "1,520 %"."""
    percent = _round3(value * 100)
    return f"{percent:,.0f} %" if abs(percent) >= 1000 else f"{percent:g} %"


def _format(value: float, scales: list[tuple[str, float]]) -> str:
    """The value in the largest unit that leaves at least 1 before the point; three significant digits."""
    if not math.isfinite(value):
        return f"{value} {scales[0][0]}".rstrip()
    # 999.6 MB rounds to 1000: judge the unit by the rounded figure, so that it is printed as 1 GB.
    fitting = [(name, scale) for name, scale in scales if _round3(abs(value) / scale) >= 1]
    name, scale = fitting[-1] if fitting else scales[0]
    return f"{_plain(_round3(value / scale))} {name}".rstrip()


def _round3(value: float) -> float:
    return float(f"{value:.3g}")


def _plain(value: float) -> str:
    """1020.0 -> "1020" (binary units reach 1023), 4.5 -> "4.5"; never an exponent below a million."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:g}"


def _unit_name(text: str, kind: Kind) -> str | None:
    """The canonical name of a unit, or None. Exact spelling first, then without case."""
    scales = _SCALES[kind]
    if text in scales:
        return text
    # "mb" in all lower case is sloppy but clear; "Mb" and "Gb" are how networks write bits.
    if kind == "bytes" and text.endswith("b") and text != text.lower():
        return None
    lowered = {name.lower(): name for name in scales} | dict(_ALIASES[kind])
    return lowered.get(text.lower())


def _percent_to_share(number: str) -> float:
    return float(number) / 100


def _positive(value: float, unit: QuantityUnit, text: str, kind: Kind, allow_share: bool, flag: str) -> Quantity:
    if not (math.isfinite(value) and value > 0):
        raise _refusal(flag, text, "a limit must be more than zero and finite", kind, allow_share)
    return Quantity(value, unit)


def _hint(unit: str, kind: Kind) -> str:
    if kind == "bytes" and unit.endswith("b"):
        return " (bits? write B for bytes)"
    if kind == "bytes" and unit.upper() in ("K", "M", "G", "T"):
        return f" ({unit.upper()}B or {unit.upper()}iB?)"
    if kind == "flops" and unit.lower().endswith(("mac", "macs")):
        return " (one MAC is two FLOPs)"
    return ""


def _refusal(flag: str, text: str, reason: str, kind: Kind, allow_share: bool) -> UsageError:
    share = ", or a share of the dense model such as 40%" if allow_share else ""
    return UsageError(f"{flag} {text!r}: {reason}; write for example {_EXAMPLES[kind]}{share}")
