"""The TOML file of a device profile: strict reading, and the derivation of what the file leaves out.

    title = "..."   os = "..."   execution_providers = ["..."]
    [memory]            kind = "LPDDR5X"   bandwidth_gb_per_s, activation_gb_per_s, ram_gib, app_limit_gib = FIGURE
    [store]             name = "App Store"   app_gb, pack_gb = FIGURE
    [cpu] [gpu] [npu]   peak_gflops, efficiency = { fp32 = FIGURE, fp16 = FIGURE, int8 = FIGURE }
                        sustained_share, overhead_us = FIGURE
    [cpu.cores]         mark, source, clusters = [{ count, name, ghz, fp32_lanes, little = false }]
    [cpu.operators]     source, and measured microseconds, as `profiles calibrate` writes them:
                        square_dense and so on = [[precision, size, ..., us], ...]
                        attention, mlp, ends = [[size, ..., us], ...]
    [cpu.operators_on_one_thread]   the same, of models that run on a single one

with FIGURE = { value = 76.8, mark = "3P", source = "where it comes from" }. Only title, os, execution_providers,
memory.ram_gib and one unit's peak are required. GFLOPS of int8 are integer operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kind_edge.bounded import parse_toml
from kind_edge.budget.operator_table import KINDS, Key, OperatorTable, is_layer
from kind_edge.budget.precision import ARITHMETICS, Arithmetic, Unit
from kind_edge.budget.profile import MARKS, UNITS, ComputeUnit, DeviceProfile, Figure, Store
from kind_edge.errors import InputError, nearest

T = TypeVar("T")
Table = Mapping[str, Any]

TOP_KEYS = ("title", "os", "execution_providers", "memory", "store", *UNITS)
MEMORY_KEYS = ("kind", "bandwidth_gb_per_s", "activation_gb_per_s", "ram_gib", "app_limit_gib")
STORE_KEYS = ("name", "app_gb", "pack_gb")
UNIT_KEYS = ("peak_gflops", "efficiency", "sustained_share", "overhead_us")
OPERATORS, ONE_THREAD = "operators", "operators_on_one_thread"
OPERATORS_KEYS = ("source", *KINDS)
CORES_KEYS = ("mark", "source", "clusters")
CLUSTER_KEYS = ("count", "name", "ghz", "fp32_lanes", "little")
FIGURE_KEYS = ("value", "mark", "source")

# Megatransfers per second where a file names only the memory's generation: the slowest that is common in devices.
_MEGATRANSFERS = {"LPDDR4X": 4267, "LPDDR5": 6400, "LPDDR5X": 7500}
_BUS_BYTES = 8
_APP_SHARE = 0.35

_EFFICIENCY: Mapping[Unit, tuple[float, str]] = {
    "cpu": (0.5, "derived: a DiT's matrix products reach about half of the peak of a phone's CPU"),
    "gpu": (0.7, "derived: on-device diffusion reached about 0.7 of the GPU's peak"),
    "npu": (0.12, "derived: on-device diffusion reached 7-18 % of the NPU's nominal peak"),
}
_OVERHEAD_US: Mapping[Unit, float] = {"cpu": 5.0, "gpu": 20.0, "npu": 10.0}
_SUSTAINED_DEFAULT = 0.5


@dataclass(frozen=True)
class Cluster:
    """Equal CPU cores; `fp32_lanes` multiply-adds per cycle and core."""

    count: int
    name: str
    ghz: float
    fp32_lanes: int
    little: bool = False


def parse_profile(text: str, name: str, where: str) -> DeviceProfile:
    """The profile that a TOML text describes, complete with derived figures.

    Raises `InputError`, which names `where` and the key: for text that is not TOML, a key that is not known (with the
    nearest known one), a missing or a malformed value.
    """
    top = parse_toml(text, where)
    _check_keys(top, TOP_KEYS, where)
    memory = _table(top, "memory", where)
    _check_keys(memory, MEMORY_KEYS, f"{where}: memory")
    ram = _required(_figure(memory, "ram_gib", f"{where}: memory", 2**30), f"{where}: memory.ram_gib")
    bandwidth = _figure(memory, "bandwidth_gb_per_s", f"{where}: memory", 1e9) or _bandwidth(memory, where)
    uncached = Figure(bandwidth.value, "E", "derived: as fast as memory, cautiously without caches")
    present = [unit for unit in UNITS if unit in top]
    tables = {unit: _table(top, unit, where) for unit in present}
    shares = [_share(table, "sustained_share", f"{where}: {unit}") for unit, table in tables.items()]
    units = [_unit(unit, table, _lowest(shares), f"{where}: {unit}") for unit, table in tables.items()]
    if not units:
        raise InputError(f"{where}: no compute unit; at least one of [{'], ['.join(UNITS)}] is needed")
    return DeviceProfile(
        name=name,
        title=_text(top, "title", where),
        os=_text(top, "os", where),
        execution_providers=tuple(_texts(top, "execution_providers", where)),
        units={unit.name: unit for unit in units},
        memory_bytes_per_s=bandwidth,
        activation_bytes_per_s=_figure(memory, "activation_gb_per_s", f"{where}: memory", 1e9) or uncached,
        ram_bytes=ram,
        app_memory_limit_bytes=_figure(memory, "app_limit_gib", f"{where}: memory", 2**30) or _app_limit(ram),
        store=_store(_table(top, "store", where), f"{where}: store") if "store" in top else None,
    )


def _store(table: Table, where: str) -> Store:
    """Stores count in powers of ten."""
    _check_keys(table, STORE_KEYS, where)
    app = _required(_figure(table, "app_gb", where, 1e9), f"{where}.app_gb")
    return Store(_text(table, "name", where), app, _figure(table, "pack_gb", where, 1e9))


def _unit(name: Unit, table: Table, sustained_default: Figure, where: str) -> ComputeUnit:
    _check_keys(table, (*UNIT_KEYS, OPERATORS, ONE_THREAD, *(("cores",) if name == "cpu" else ())), where)
    peaks_table = _optional_table(table, "peak_gflops", where)
    efficiency_table = _optional_table(table, "efficiency", where)
    for inner, key in ((peaks_table, "peak_gflops"), (efficiency_table, "efficiency")):
        _check_keys(inner, ARITHMETICS, f"{where}.{key}")
    given = {p: _figure(peaks_table, p, f"{where}.peak_gflops", 1e9) for p in ARITHMETICS}
    peaks = _derive_peaks(name, {p: figure for p, figure in given.items() if figure}, _clusters(table, where), where)
    value, source = _EFFICIENCY[name]
    default = Figure(value, "E", source)
    return ComputeUnit(
        name=name,
        peak_flops_per_s=peaks,
        efficiency={p: _share(efficiency_table, p, f"{where}.efficiency") or default for p in peaks},
        sustained_share=_share(table, "sustained_share", where) or sustained_default,
        overhead_us=_figure(table, "overhead_us", where)
        or Figure(_OVERHEAD_US[name], "E", "derived: usual cost of starting one operator"),
        table=_operators(table, OPERATORS, where),
        one_thread=_operators(table, ONE_THREAD, where),
    )


def _operators(unit: Table, key: str, where: str) -> OperatorTable | None:
    """Measured times of operators, if there are any; what each key means is told by `OperatorTable`."""
    if key not in unit:
        return None
    table, where = _table(unit, key, where), f"{where}.{key}"
    _check_keys(table, OPERATORS_KEYS, where)
    times = {kind: _times(table.get(kind), kind, f"{where}.{kind}") for kind in KINDS}
    return OperatorTable(**times, source=_text(table, "source", where))


def _times(rows: object, kind: str, where: str) -> dict[Key, float]:
    """Rows of a precision (of layers), sizes of at least 1 and microseconds."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where}: want a list of measured times")
    names, sizes = int(is_layer(kind)), KINDS[kind]
    times: dict[Key, float] = {}
    for index, row in enumerate(rows):
        sound = isinstance(row, list) and len(row) == names + sizes + 1
        if not sound or not all(type(size) is int and size > 0 for size in row[names:-1]):
            raise InputError(f"{where}[{index}]: got {row!r:.60}, want {sizes} sizes of at least 1, then microseconds")
        if names and row[0] not in ARITHMETICS:
            raise InputError(f"{where}[{index}]: got {row[0]!r:.20}, want one of {', '.join(ARITHMETICS)}")
        times[tuple(row[:-1])] = _positive({"us": row[-1]}, "us", f"{where}[{index}]")
    return times


def _derive_peaks(
    name: Unit, given: Mapping[Arithmetic, Figure], clusters: Sequence[Cluster], where: str
) -> dict[Arithmetic, Figure]:
    """What the file says, completed by the usual ratios between precisions; in the order of ARITHMETICS."""
    peaks = dict(given)
    if name == "cpu" and "fp32" not in peaks and clusters:
        peaks["fp32"] = _cores_peak(clusters)
    rules: tuple[tuple[Unit, Arithmetic, Arithmetic, float, str], ...] = (
        ("cpu", "fp16", "fp32", 2.0, "twice fp32: vectors hold twice as many"),
        ("cpu", "int8", "fp32", 4.0, "four times fp32: dot-product instructions"),
        ("gpu", "fp16", "fp32", 2.0, "twice fp32: packed half precision"),
        ("npu", "fp16", "int8", 0.5, "half of int8"),
    )
    for unit, target, base, factor, why in rules:
        if unit == name and target not in peaks and base in peaks:
            peaks[target] = Figure(peaks[base].value * factor, "E", f"derived: {why}")
    if not peaks:
        raise InputError(f"{where}: no peak_gflops; leave the table out where no figure is known")
    return {precision: peaks[precision] for precision in ARITHMETICS if precision in peaks}


def _cores_peak(clusters: Sequence[Cluster]) -> Figure:
    """fp32 FLOP/s: cores x 2 x lanes x clock. Little cores are left out: an even split of a product waits for them."""
    gflops = sum(c.count * 2 * c.fp32_lanes * c.ghz for c in clusters if not c.little)
    return Figure(gflops * 1e9, "E", "derived: cores x 2 x lanes x GHz, little cores left out")


def _bandwidth(memory: Table, where: str) -> Figure:
    kind = memory.get("kind")
    rate = _MEGATRANSFERS.get(kind) if isinstance(kind, str) else None
    if rate is None:
        known = ", ".join(_MEGATRANSFERS)
        raise InputError(f"{where}: memory: missing bandwidth_gb_per_s, or a kind to derive it from ({known})")
    return Figure(rate * 1e6 * _BUS_BYTES, "E", f"derived: {kind} at {rate} MT/s on a 64-bit bus")


def _app_limit(ram: Figure) -> Figure:
    """iOS ends an ordinary app at about 2.8 of 8 GB; Android names no limit, but kills large apps first."""
    return Figure(ram.value * _APP_SHARE, "E", "derived: 0.35 of RAM, the share that iOS grants")


def _lowest(shares: Iterable[Figure | None]) -> Figure:
    known = [share.value for share in shares if share]
    if known:
        return Figure(min(known), "E", "derived: lowest sustained share of the device's other units")
    return Figure(_SUSTAINED_DEFAULT, "E", "derived: usual for passively cooled devices")


def _clusters(table: Table, where: str) -> list[Cluster]:
    if "cores" not in table:
        return []
    cores, where = _table(table, "cores", where), f"{where}.cores"
    _check_keys(cores, CORES_KEYS, where)
    _mark(cores, where), _text(cores, "source", where)
    clusters = cores.get("clusters")
    if not isinstance(clusters, list) or not clusters:
        raise InputError(f"{where}.clusters: want a list of tables with {', '.join(CLUSTER_KEYS)}")
    return [_cluster(cluster, f"{where}.clusters[{index}]") for index, cluster in enumerate(clusters)]


def _cluster(table: object, where: str) -> Cluster:
    if not isinstance(table, dict):
        raise InputError(f"{where}: got {table!r}, want a table with {', '.join(CLUSTER_KEYS)}")
    _check_keys(table, CLUSTER_KEYS, where)
    numbers = {key: _positive(table, key, where) for key in ("count", "ghz", "fp32_lanes")}
    little = table.get("little", False)
    if not isinstance(little, bool):
        raise InputError(f"{where}.little: got {little!r}, want true or false")
    count, lanes = int(numbers["count"]), int(numbers["fp32_lanes"])
    return Cluster(count, _text(table, "name", where), numbers["ghz"], lanes, little)


def _figure(table: Table, key: str, where: str, scale: float = 1.0) -> Figure | None:
    """The figure under `key` times `scale`, or None where the key is absent."""
    if key not in table:
        return None
    entry, where = _table(table, key, where), f"{where}.{key}"
    _check_keys(entry, FIGURE_KEYS, where)
    mark = _mark(entry, where)
    return Figure(_positive(entry, "value", where) * scale, mark, _text(entry, "source", where))


def _share(table: Table, key: str, where: str) -> Figure | None:
    figure = _figure(table, key, where)
    if figure and figure.value > 1:
        raise InputError(f"{where}.{key}.value: got {figure.value}, want a share of at most 1")
    return figure


def _mark(table: Table, where: str) -> Any:
    mark = table.get("mark")
    if mark not in MARKS:
        raise InputError(f"{where}.mark: got {mark!r}, want one of {', '.join(MARKS)}")
    return mark


def _positive(table: Table, key: str, where: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{where}.{key}: got {value!r}, want a number above zero")
    return float(value)


def _text(table: Table, key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}.{key}: got {value!r}, want some text")
    return value


def _texts(table: Table, key: str, where: str) -> list[str]:
    values = table.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}.{key}: got {values!r}, want a list of texts")
    return values


def _table(table: Table, key: str, where: str) -> Table:
    value = table.get(key)
    if not isinstance(value, dict):
        raise InputError(f"{where}.{key}: got {value!r}, want a table")
    return value


def _optional_table(table: Table, key: str, where: str) -> Table:
    return _table(table, key, where) if key in table else {}


def _required(value: T | None, where: str) -> T:
    if value is None:
        raise InputError(f"{where}: missing")
    return value


def _check_keys(table: Table, known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; nearest known: {nearest(key, known)}")
