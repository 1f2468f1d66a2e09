"""The plan that fits in every format that is asked for: one answer, whether it is only shown or carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kind_edge.budget.plan import Plan
from kind_edge.budget.problem import Request, Source
from kind_edge.budget.profile import DeviceProfile
from kind_edge.deploy.coreml_plan import Packages
from kind_edge.deploy.packs_bundle import check_packable
from kind_edge.deploy.request import Choices

if TYPE_CHECKING:
    from kind_edge.deploy.making import Formats


def choices_for(choices: Choices, formats: Formats) -> Choices:
    """Class packs need the form that keeps classes apart, where another one is not asked for."""
    return {**choices, "form": "switch"} if formats.packs and choices.get("form", "auto") == "auto" else choices


def make_plan_for(source: Source, request: Request, formats: Formats) -> Plan:
    """The best plan under the request that can be made in all `formats`.

    Raises what `make_plan` does; `NoPlanError` too where no Core ML packages can be so small, and `UsageError` for a
    plan that no class packs can be made of.
    """
    plan = Packages(source, request.profile, formats.coreml).best_plan(request)
    if formats.packs:
        check_packable(plan)
    return plan


def check_replayed(source: Source, device: DeviceProfile, plan: Plan, formats: Formats) -> Plan:
    """A stored plan with what its packages would take; refused, as above, where it cannot be made in all `formats`."""
    if formats.packs:
        check_packable(plan)
    return Packages(source, device, formats.coreml).checked(plan)
