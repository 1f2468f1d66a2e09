"""Device profiles: what each compute unit of a device affords, and how far every figure is to be trusted.

A profile is one TOML file. Every figure carries a value, a mark and a source; what a file leaves out is derived here,
marked E, with "derived" in its source, or the unit is refused when it is asked for. Marks: P published by the vendor,
3P third-party page, M measured, E derived or estimated, G general knowledge.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kind_edge.bounded import read_text
from kind_edge.budget.operator_table import OperatorTable
from kind_edge.budget.precision import PRECISIONS, Arithmetic, Precision, Unit
from kind_edge.errors import UsageError, unknown

Mark = Literal["P", "3P", "M", "E", "G"]
MARKS: tuple[Mark, ...] = get_args(Mark)
UNITS: tuple[Unit, ...] = get_args(Unit)

Artefact = Literal["onnx", "coreml"]
ARTEFACT_UNITS: Mapping[tuple[Artefact, Precision], tuple[Unit, ...]] = {
    **{("onnx", name): tuple(traits.units) for name, traits in PRECISIONS.items()},
    ("coreml", "fp32"): ("gpu", "cpu"),
    ("coreml", "fp16"): ("npu", "gpu", "cpu"),
    ("coreml", "int8"): ("npu", "gpu", "cpu"),  # int8 weights, widened to fp16 where activations are not quantized
}
"""Which units can run a precision of a format, fastest kind first where it is known."""

NPU_PROVIDERS = ("qnn-", "coreml-ane")
"""Beginnings of the execution providers through which ONNX and Core ML files reach an NPU."""

PACKAGE = "kind_edge.profiles"
HOST = "host"
OWN_DEVICE = "for another device give a TOML file of its figures: docs/profiles.md"
"""What to do about a device that has no profile here."""


@dataclass(frozen=True)
class Figure:
    """A number, how far to trust it, and where it comes from. Its unit is in the name of the field that holds it."""

    value: float
    mark: Mark
    source: str


@dataclass(frozen=True)
class ComputeUnit:
    """CPU, GPU or NPU of a device: peak FLOP/s (or integer OP/s) and the share of it that a DiT reaches, by arithmetic.

    `sustained_share`: speed after minutes of load over speed at first; `overhead_us`: what starting one operator costs.
    `table`: what the operators of our models really take, where that was measured; `one_thread`: those of models that
    run on a single one.
    """

    name: Unit
    peak_flops_per_s: Mapping[Arithmetic, Figure]
    efficiency: Mapping[Arithmetic, Figure]
    sustained_share: Figure
    overhead_us: Figure
    table: OperatorTable | None = None
    one_thread: OperatorTable | None = None

    def has(self, precision: Precision) -> bool:
        """Whether there is a figure for a precision."""
        return PRECISIONS[precision].arithmetic(self.name) in self.peak_flops_per_s

    def peak(self, precision: Precision) -> Figure:
        """Nominal peak in FLOP/s; `UsageError` where the profile neither holds nor derives one."""
        arithmetic = PRECISIONS[precision].arithmetic(self.name)
        if arithmetic not in self.peak_flops_per_s:
            known = ", ".join(self.peak_flops_per_s)
            raise UsageError(f"--unit {self.name}: the profile has no {arithmetic} figure for it; it has: {known}")
        return self.peak_flops_per_s[arithmetic]

    def throughput(self, precision: Precision, sustained: bool) -> float:
        """FLOP/s that a DiT gets: peak x efficiency (x sustained share)."""
        share = self.sustained_share.value if sustained else 1.0
        peak, efficiency = self.peak(precision), self.efficiency[PRECISIONS[precision].arithmetic(self.name)]
        return peak.value * efficiency.value * share


@dataclass(frozen=True)
class Store:
    """Where apps for a device come from, and how large it lets them be: a whole app, and one pack of models in it."""

    name: str
    app_bytes: Figure
    pack_bytes: Figure | None = None

    @property
    def model_bytes(self) -> Figure:
        """The most that the model files of one app may take: of one pack, where there are packs."""
        return self.pack_bytes or self.app_bytes


@dataclass(frozen=True)
class DeviceProfile:
    """A device as the planner sees it. Memory figures are those of the smallest model that is sold.

    Weights stream from memory at `memory_bytes_per_s`; activations of one operator mostly stay in caches, and
    elementwise operators move them at `activation_bytes_per_s`.
    """

    name: str
    title: str
    os: str
    execution_providers: tuple[str, ...]
    units: Mapping[Unit, ComputeUnit]
    memory_bytes_per_s: Figure
    activation_bytes_per_s: Figure
    ram_bytes: Figure
    app_memory_limit_bytes: Figure
    store: Store | None = None

    def unit(self, name: Unit) -> ComputeUnit:
        """The compute unit of that name; `UsageError` where the device has none, or no figure for it is known."""
        if name not in self.units:
            raise UsageError(
                f"--unit {name}: profile {self.name!r} has no figure for that unit; it has: {', '.join(self.units)}"
            )
        return self.units[name]

    def throughput(self, unit: Unit, precision: Precision, sustained: bool = True) -> float:
        """FLOP/s (or integer OP/s) that a DiT gets on a unit: peak x efficiency, times the share that lasts."""
        return self.unit(unit).throughput(precision, sustained)

    def operators(self, unit: Unit, precision: Precision) -> OperatorTable | None:
        """The measured table of a unit, if it has one with that precision."""
        table = self.unit(unit).table
        return table if table is not None and table.has(precision) else None

    def on_one_thread(self) -> DeviceProfile:
        """The device as a model sees it that runs on one thread: with the tables for that, where there are any."""
        own = {
            name: dataclasses.replace(unit, table=unit.one_thread or unit.table) for name, unit in self.units.items()
        }
        return dataclasses.replace(self, units=own)

    def speed_share(self, unit: Unit, sustained: bool) -> float:
        """The share of a unit's speed at first: 1, or what lasts."""
        return self.unit(unit).sustained_share.value if sustained else 1.0

    def units_for(self, precision: Precision, artefact: Artefact = "onnx") -> tuple[Unit, ...]:
        """The units of this device that can run a precision of a format and have a figure for it.

        An NPU counts only where an execution provider reaches it. Raises `UsageError` for a precision that the format
        does not have, or that nothing here can run.
        """
        if (artefact, precision) not in ARTEFACT_UNITS:
            raise UsageError(f"--precision {precision}: not a precision of {artefact}")
        able = ARTEFACT_UNITS[artefact, precision]
        reached = any(provider.startswith(NPU_PROVIDERS) for provider in self.execution_providers)
        usable = [self.units[name] for name in able if name in self.units and (name != "npu" or reached)]
        found = tuple(unit.name for unit in usable if unit.has(precision))
        if not found:
            raise UsageError(
                f"--precision {precision}: {artefact} runs it on {' or '.join(able)}, "
                f"and profile {self.name!r} has no {precision} figure for that"
            )
        return found

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its dotted name, derived ones included: "gpu.peak_flops_per_s.fp16"."""
        for name in ("memory_bytes_per_s", "activation_bytes_per_s", "ram_bytes", "app_memory_limit_bytes"):
            yield name, getattr(self, name)
        if self.store is not None:
            yield "store.app_bytes", self.store.app_bytes
            if self.store.pack_bytes is not None:
                yield "store.pack_bytes", self.store.pack_bytes
        for unit in self.units.values():
            for precision, figure in unit.peak_flops_per_s.items():
                yield f"{unit.name}.peak_flops_per_s.{precision}", figure
            for precision, figure in unit.efficiency.items():
                yield f"{unit.name}.efficiency.{precision}", figure
            yield f"{unit.name}.sustained_share", unit.sustained_share
            yield f"{unit.name}.overhead_us", unit.overhead_us
            for name, table in (("measured_times", unit.table), ("measured_times_on_one_thread", unit.one_thread)):
                if table is not None:
                    yield f"{unit.name}.{name}", Figure(float(len(table)), "M", table.source)


def profile_names() -> tuple[str, ...]:
    """Names of the packaged profiles, sorted, `host` among them."""
    files = importlib.resources.files(PACKAGE).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """A profile by packaged name or by the path of a TOML file.

    `host` is this machine: its figures are measured on first use and kept in the user's cache. Raises `UsageError` for
    a name that is not known and `InputError` for a file that cannot be read or does not say what it must.
    """
    from kind_edge.budget.profile_file import parse_profile  # knows this module's classes, so it is imported late

    text = str(name_or_path)
    if text.endswith(".toml") or "/" in text:
        path = Path(name_or_path)
        return parse_profile(read_text(path, "the profile"), path.stem, str(path))
    if text not in profile_names():
        raise unknown("profile", text, profile_names(), OWN_DEVICE)
    if text == HOST:
        from kind_edge.budget.host import host_profile  # onnx and onnxruntime only where this machine is measured

        return host_profile()
    return parse_profile(packaged_text(text), text, f"profiles/{text}.toml")


def packaged_text(name: str) -> str:
    """The TOML text of a packaged profile."""
    return importlib.resources.files(PACKAGE).joinpath(f"{name}.toml").read_text(encoding="utf-8")
