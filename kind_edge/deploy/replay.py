"""May a stored plan be carried out as it is: with this model, on this device, with this decoder?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kind_edge.budget.plan import Plan, check_replayable
from kind_edge.deploy.decoder import planned_decoder
from kind_edge.deploy.request import OpenedModel
from kind_edge.deploy.resizing import size_spec
from kind_edge.errors import InputError, UsageError
from kind_edge.model.autoencoder import Autoencoder


def check_replay(plan: Plan, model: OpenedModel, profile: str, choices: Mapping[str, Any]) -> None:
    """A stored plan is replayed as it is: nothing may be asked beside it, and it must be for this very model."""
    if asked := [name for name, value in choices.items() if value not in (None, "auto", False)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in asked)
        raise UsageError(f"--plan has its own {flags}; leave that out, or make another plan with kind-edge plan")
    if profile != plan.profile:
        raise UsageError(f"--profile {profile}: the plan was made for {plan.profile}; leave it out, or plan anew")
    check_replayable(plan, size_spec(model.checkpoint.spec, plan.resize))
    if plan.checkpoint_sha256 != model.sha256:
        raise InputError(
            f"the plan was made for checkpoint {plan.checkpoint_sha256[:12]} ({plan.model}), "
            f"this one is {model.sha256[:12]} ({model.name}); solve again"
        )
    check_planned(plan, model.autoencoder)
    if plan.decoder and planned_decoder(model.decoders, plan) is None:
        raise InputError(
            f"the plan decodes in {plan.decoder['tiles']} tiles along a side, which cannot be; solve again"
        )


def check_planned(plan: Plan, autoencoder: Autoencoder | None) -> None:
    """`UsageError` unless the decoder that a stored plan counts is the one that is given."""
    planned, given = plan.decoder.get("autoencoder_sha256"), autoencoder.sha256 if autoencoder else None
    if planned == given:
        return
    if given is None:
        raise UsageError("the plan counts the decoder of an autoencoder: give that too, with --autoencoder DIR")
    what = "the decoder of another one" if planned else "no decoder that is known"
    raise UsageError(f"--autoencoder: the plan counts {what}; make a plan with this --autoencoder")
