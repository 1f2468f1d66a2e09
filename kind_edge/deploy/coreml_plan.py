"""Core ML packages in a plan: what they would take as they are asked for, and plans that make them small enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kind_edge.budget.breakdown import deployment_of
from kind_edge.budget.coreml import Packaging, coreml_estimate
from kind_edge.budget.coreml_weights import WEIGHTS
from kind_edge.budget.infeasible import limit_flag, raised_limit
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import Problems, best_answer, make_plan, plan_of
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.budget.refusal import Miss, Refusal
from kind_edge.deploy.decoder import planned_decoder
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import NoPlanError
from kind_edge.units import format_bytes

_CHOICES = ("target", "weights", "layout")

_ATTEMPTS = 8
"""So often at most the model file's limit is lowered until the packages keep theirs."""
_FULL = 0.98
"""Packages that take so much of their limit need not be made larger."""


@dataclass(frozen=True)
class Packages:
    """What an export makes for Core ML of a source on a device; `choices` are the exporter's own, None: nothing."""

    source: Source
    device: DeviceProfile
    choices: Mapping[str, Any] | None

    def best_plan(self, request: Request) -> Plan:
        """The best plan under the request whose packages, too, are no larger than an app may be.

        A model file of fewer bytes makes smaller packages: where those of the best plan are too large, its limit is
        lowered by as little as helps. Raises what `make_plan` does, and `NoPlanError` where nothing helps.
        """
        plan = self._estimated(make_plan(self.source, request))
        if self.choices is None or _keeps(plan, request):
            return plan
        spare_bytes = self._spare_bytes(request, plan)
        return self._estimated(make_plan(self.source, dataclasses.replace(request, spare_bytes=spare_bytes)))

    def checked(self, plan: Plan) -> Plan:
        """A stored plan with what its packages would take as asked for; `NoPlanError` where that is too much."""
        plan = self._estimated(plan)
        if self.choices is not None and _size(plan) > _limit(plan):
            raise self._refused(plan, "plan with --formats coreml")
        return plan

    def _estimated(self, plan: Plan, **changed: Any) -> Plan:
        """The plan with what its packages would take; `changed`: made otherwise than was asked for."""
        if self.choices is None:
            return plan
        asked = {name: self.choices[name] for name in _CHOICES if name in self.choices} | changed
        packaging = Packaging(**asked, functions=len(self.choices.get("functions", ())))
        rows = len(sampler_table(plan.sampler, self.source.spec.objective, plan.steps).timestep)
        deployment = deployment_of(plan, self.source, self.device, rows, planned_decoder(self.source.decoders, plan))
        found = coreml_estimate(deployment, plan.matrices, packaging, plan.limits)
        return dataclasses.replace(plan, coreml=found)

    def _spare_bytes(self, request: Request, plan: Plan) -> int:
        """By how much the model file's limit has to be lowered; `plan` is the best without that.

        Packages grow with the file nearly on a line. It is followed down from the smallest file whose packages are
        known to be too large; below the smallest file that there can be, that one is tried.
        """
        problems, limit, largest = Problems(self.source), int(_limit(plan)), plan
        full = _FULL * (limit - request.spare_bytes)
        aim = (1 + _FULL) / 2 * (limit - request.spare_bytes)
        slope = _size(plan) / plan.weight_bytes
        found_bytes, smallest = None, 0
        for _ in range(_ATTEMPTS):
            budget = max(smallest, int(largest.weight_bytes - (_size(largest) - aim) / slope))
            asked = dataclasses.replace(request, spare_bytes=limit - budget)
            try:
                tried = self._estimated(plan_of(self.source, best_answer(problems, asked), {}))
            except NoPlanError as error:
                smallest = _smallest_file(error) - asked.spare_bytes
                if smallest <= budget or smallest >= largest.weight_bytes:
                    break
                continue
            slope = max(0.1, (_size(largest) - _size(tried)) / (largest.weight_bytes - tried.weight_bytes))
            if _keeps(tried, request):
                found_bytes = asked.spare_bytes
                if _size(tried) >= full:
                    break
            else:
                largest = tried
            if budget == smallest:
                break
        if found_bytes is None:
            raise self._refused(largest)
        return found_bytes

    def _refused(self, plan: Plan, *ways_out: str) -> NoPlanError:
        """Of a plan, the smallest there is unless it is stored: whose limit its packages miss, and what would help."""
        limit, size, store = _limit(plan), _size(plan), self.device.store
        who = "--max-size allows"
        if store is not None and int(store.model_bytes.value) == limit:
            who = f"{store.name} allows ({store.model_bytes.source})"
        elif not ways_out:
            ways_out = (f"raise {limit_flag('weight_bytes')} to at least {raised_limit('weight_bytes', size)[0]}",)
        told = "; or ".join((*ways_out, *self._other_weights(plan), *_smaller(plan)))
        error = NoPlanError(
            f"no plan fits: the Core ML packages ({plan.coreml['weights']}) would take {format_bytes(size)}, more than "
            f"the {format_bytes(limit)} that {who}; {told}"
        )
        error.refusal = Refusal(plan, (Miss("max_size", limit, size),), ())  # type: ignore[attr-defined]
        return error

    def _other_weights(self, plan: Plan) -> Iterator[str]:
        """Other weights with which the plan's packages fit, largest first, each with its size."""
        target = plan.coreml["target"]
        kinds = [each for each in WEIGHTS if each != "mixed" and (each != "int4" or target == "iOS18")]
        sizes = {weights: _size(self._estimated(plan, weights=weights)) for weights in kinds}
        for weights, size in sorted(sizes.items(), key=lambda each: -each[1]):
            if size <= _limit(plan):
                yield f"take --coreml-weights {weights}, {format_bytes(size)}"


def _size(plan: Plan) -> int:
    return int(plan.coreml["app_bytes"])


def _limit(plan: Plan) -> int | float:
    return plan.coreml.get("limit_bytes", float("inf"))  # type: ignore[return-value]  # no text


def _keeps(plan: Plan, request: Request) -> bool:
    """Whether the packages leave of their limit what the request wants spare."""
    return _size(plan) + request.spare_bytes <= _limit(plan)


def _smaller(plan: Plan) -> Iterator[str]:
    yield "keep fewer classes" if len(plan.classes) > 1 else "take fewer --steps"


def _smallest_file(error: NoPlanError) -> int:
    """Bytes of the smallest model file, spare ones included, as a refusal knows them; 0 where it does not."""
    entries = getattr(error, "diagnosis", ()) or ()
    return next((entry.smallest for entry in entries if entry.limit == "weight_bytes"), 0)
