"""Core ML packages in a plan: what they would take as they are asked for, and whether an app may be so large."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kind_edge.budget.breakdown import deployment_of
from kind_edge.budget.coreml import APP_ROLES, Packaging, coreml_estimate
from kind_edge.budget.coreml_weights import WEIGHTS
from kind_edge.budget.plan import Plan
from kind_edge.budget.problem import Deployment, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.deploy.decoder import planned_decoder
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import GateError, NoPlanError
from kind_edge.units import format_bytes

_CHOICES = ("target", "weights", "layout")


@dataclass(frozen=True)
class Packages:
    """What an export makes for Core ML of a source on a device; `choices` are the exporter's own, None: nothing."""

    source: Source
    device: DeviceProfile
    choices: Mapping[str, Any] | None

    def settled(self, plan: Plan) -> Plan:
        """The plan with what its packages would take as they are asked for.

        `NoPlanError` where an app with them would be larger than was asked for, or than the device's store takes.
        """
        if self.choices is None:
            return plan
        asked = {name: self.choices[name] for name in _CHOICES if name in self.choices}
        packaging = Packaging(**asked, functions=len(self.choices.get("functions", ())))
        rows = len(sampler_table(plan.sampler, self.source.spec.objective, plan.steps).timestep)
        deployment = deployment_of(plan, self.source, self.device, rows, planned_decoder(self.source.decoders, plan))
        found = coreml_estimate(deployment, plan.matrices, packaging)
        limit, who = _limit(plan, self.device)
        if (size := int(found["app_bytes"])) > limit:
            ways_out = "; or ".join(_ways_out(deployment, plan, packaging, limit))
            raise NoPlanError(
                f"no plan fits: the Core ML packages ({found['weights']}) would take {format_bytes(size)}, more than "
                f"{who}; {ways_out}"
            )
        return dataclasses.replace(plan, coreml=found)

    def check(self, entries: Mapping[str, Mapping[str, Any]], plan: Plan) -> None:
        """The same of packages that were written: `GateError`, as their size was predicted otherwise."""
        size = sum(entry.get("package_bytes", 0) for entry in entries.values() if entry["role"] in APP_ROLES)
        limit, who = _limit(plan, self.device)
        if size > limit:
            raise GateError(
                f"the Core ML packages take {format_bytes(size)}, more than {who}; take fewer bits or classes"
            )


def _limit(plan: Plan, device: DeviceProfile) -> tuple[float, str]:
    """The most bytes, and who says so."""
    limit, who = plan.limits.get("max_size", float("inf")), "--max-size allows"
    if device.store is not None and int(device.store.model_bytes.value) <= limit:
        figure = device.store.model_bytes
        limit, who = figure.value, f"{device.store.name} allows ({figure.source})"
    return limit, f"the {format_bytes(limit)} that {who}" if limit < float("inf") else ""


def _ways_out(deployment: Deployment, plan: Plan, packaging: Packaging, limit: float) -> Iterator[str]:
    """Other weights that fit, largest first, each with its size; what is left otherwise."""
    sizes = {
        weights: int(
            coreml_estimate(deployment, plan.matrices, dataclasses.replace(packaging, weights=weights))["app_bytes"]
        )
        for weights in WEIGHTS
        if weights != "mixed" and (weights != "int4" or packaging.target == "iOS18")
    }
    for weights, size in sorted(sizes.items(), key=lambda each: -each[1]):
        if size <= limit:
            yield f"take --coreml-weights {weights}, {format_bytes(size)}"
    yield "keep fewer classes" if len(plan.classes) > 1 else "cut the model, with --max-size"
