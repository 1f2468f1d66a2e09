"""What `coreml/verify_on_mac.py` wrote on a Mac: read back for the report of the bundle that it measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.bounded import read_object
from kind_edge.deploy.manifest import MANIFEST_NAME
from kind_edge.errors import InputError

KIND = "kind-edge coreml verification"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MacResult:
    """One package (or function of one) on one compute unit; None where a failure left nothing to measure."""

    package: str
    unit: str
    passed: bool
    gate_db: float
    worst_db: float | None
    p50_ms: float | None
    p90_ms: float | None
    cold_load_s: float | None
    warm_load_s: float | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class MacResults:
    """All of a file, with the conditions of its figures."""

    results: tuple[MacResult, ...]
    conditions: Mapping[str, str]


def read_mac_results(path: Path, folder: Path) -> MacResults:
    """Parse; `InputError` for what is not such a file, or was measured on another bundle than that in `folder`."""
    try:
        values = read_object(path, "what was measured on a Mac")
        if values["kind"] != KIND or values["schema_version"] != SCHEMA_VERSION:
            found = f"{values['kind']}, version {values['schema_version']}"
            raise InputError(f"{path}: is {found}; want {KIND}, version {SCHEMA_VERSION}")
        if values["manifest_sha256"] != hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest():
            raise InputError(f"{path}: was measured on another bundle, {values['bundle']}; measure this one on the Mac")
        machine = values["machine"]
        conditions = {
            "measured on": f"{machine['chip']}, {machine['model']}, {machine['system']}",
            "with": f"coremltools {machine['coremltools']}, {values['runs']} predictions, at {values['measured_at']}",
        }
        results = tuple(_result(name, one) for name, many in values["results"].items() for one in many)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: is not what coreml/verify_on_mac.py writes ({error!r})") from error
    return MacResults(results, conditions)


def _result(package: str, values: Mapping[str, Any]) -> MacResult:
    def number(value: Any) -> float | None:
        return None if value is None else float(value)

    taken = values.get("predict_ms", {})
    return MacResult(
        package=package,
        unit=str(values["unit"]),
        passed=values["passed"] is True,
        gate_db=float(values["gate_db"]),
        worst_db=number(values.get("worst_sqnr_db", values.get("worst_psnr_db"))),
        p50_ms=number(taken.get("p50")),
        p90_ms=number(taken.get("p90")),
        cold_load_s=number(values.get("cold_load_s")),
        warm_load_s=number(values.get("warm_load_s")),
        failures=tuple(str(failure) for failure in values["failures"]),
    )
