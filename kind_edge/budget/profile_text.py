"""A measured profile as the text of its TOML file: what `parse_profile` reads back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from kind_edge.budget.operator_table import KINDS, OperatorTable
from kind_edge.budget.profile import ComputeUnit, DeviceProfile, Figure
from kind_edge.budget.profile_file import ONE_THREAD, OPERATORS

_ROWS_PER_LINE = 6


def profile_text(profile: DeviceProfile) -> str:
    """Every figure, derived ones included, and the operator tables."""
    return "\n".join(_lines(profile)) + "\n"


def _lines(profile: DeviceProfile) -> Iterator[str]:
    yield "# Measured by kind-edge profiles calibrate."
    yield f"title = {_text(profile.title)}"
    yield f"os = {_text(profile.os)}"
    yield f"execution_providers = [{', '.join(map(_text, profile.execution_providers))}]"
    yield "\n[memory]"
    yield f"bandwidth_gb_per_s = {_figure(profile.memory_bytes_per_s, 1e9)}"
    yield f"activation_gb_per_s = {_figure(profile.activation_bytes_per_s, 1e9)}"
    yield f"ram_gib = {_figure(profile.ram_bytes, 2**30)}"
    yield f"app_limit_gib = {_figure(profile.app_memory_limit_bytes, 2**30)}"
    if profile.store is not None:
        yield "\n[store]"
        yield f"name = {_text(profile.store.name)}"
        yield f"app_gb = {_figure(profile.store.app_bytes, 1e9)}"
        if profile.store.pack_bytes is not None:
            yield f"pack_gb = {_figure(profile.store.pack_bytes, 1e9)}"
    for unit in profile.units.values():
        yield from _unit(unit)


def _unit(unit: ComputeUnit) -> Iterator[str]:
    yield f"\n[{unit.name}]"
    yield f"sustained_share = {_figure(unit.sustained_share)}"
    yield f"overhead_us = {_figure(unit.overhead_us)}"
    figures: tuple[tuple[str, Mapping[str, Figure], float], ...] = (
        ("peak_gflops", {str(name): each for name, each in unit.peak_flops_per_s.items()}, 1e9),
        ("efficiency", {str(name): each for name, each in unit.efficiency.items()}, 1.0),
    )
    for name, values, scale in figures:
        yield from (f"{name}.{precision} = {_figure(figure, scale)}" for precision, figure in values.items())
    for key, table in ((OPERATORS, unit.table), (ONE_THREAD, unit.one_thread)):
        if table is not None:
            yield f"\n[{unit.name}.{key}]"
            yield from _operators(table)


def _operators(table: OperatorTable) -> Iterator[str]:
    yield f"source = {_text(table.source)}"
    for kind in KINDS:
        yield f"{kind} = ["
        rows = [f"[{', '.join(map(_value, (*key, time)))}]" for key, time in getattr(table, kind).items()]
        for start in range(0, len(rows), _ROWS_PER_LINE):
            yield f"  {', '.join(rows[start : start + _ROWS_PER_LINE])},"
        yield "]"


def _figure(figure: Figure, scale: float = 1.0) -> str:
    value, mark, source = _value(figure.value / scale), _text(figure.mark), _text(figure.source)
    return f"{{ value = {value}, mark = {mark}, source = {source} }}"


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return _text(value)
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _text(text: str) -> str:
    """A basic string of TOML; JSON's escapes are among its own, but for the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
