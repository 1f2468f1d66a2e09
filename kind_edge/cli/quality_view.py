"""What cutting cost on held-out images, as a table, a line and a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kind_edge.budget.words import predicted_words
from kind_edge.cli import tables

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan
    from kind_edge.deploy.quality import Quality

LARGE_INCREASE = 0.25
"""Of held-out loss. Up to a few percent is not to be seen; a quarter is."""

LARGE_SHARE = 0.025
"""Of a distilled model's prediction: cuts that cost an ordinary model a quarter of loss change two to three percent."""


def print_quality(console: Console, quality: Sequence[Quality]) -> None:
    """The table of a bundle; nothing where there were no held-out images."""
    values = {each.name: each.to_dict() for each in quality}
    if not values:
        return
    if _deviates(values):
        beside = "on held-out images, how far the cut model's prediction is from the full model's"
        headers = ("", "images", "energy of the prediction", "of the difference", "share")
        rows = [
            (n, str(v["images"]), f"{v['full']:.4f}", f"{v['difference']:.4f}", _share(v)) for n, v in values.items()
        ]
    else:
        beside = "diffusion loss on held-out images, before and after cutting"
        headers = ("", "images", "full model", "this plan", "change")
        rows = [(n, str(v["images"]), f"{v['full']:.4f}", f"{v['plan']:.4f}", _share(v)) for n, v in values.items()]
    console.print(tables.heading("Quality", beside))
    console.print(tables.figures(headers, rows))


def warning(values: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What to say where cutting will be seen in the pictures of a class; `values` are a manifest's `quality`."""
    if not values:
        return None
    name = max(values, key=lambda each: _change(values[each]))
    if _change(values[name]) <= (LARGE_SHARE if _deviates(values) else LARGE_INCREASE):
        return None
    what = f"the held-out loss of {name} rises by {_change(values[name]):.0%}"
    if _deviates(values):
        what = f"the prediction for {name} is off by {_change(values[name]):.0%} of its energy"
    return f"{what}: its pictures will show it; look at preview.png, and relax a limit or keep fewer classes"


def predicted_warning(plan: Plan) -> str | None:
    """The same before anything is made, of what is predicted."""
    increase = plan.predicted_loss_increase or 0.0
    if increase <= (LARGE_SHARE if plan.inside_guidance is not None else LARGE_INCREASE):
        return None
    told = predicted_words(increase, plan.predicted_frechet)
    return f"predicted {told}: the pictures will show it; relax a limit or keep fewer classes"


def summary(values: Mapping[str, Mapping[str, Any]]) -> str:
    """One line of a manifest's `quality`."""
    changes = ", ".join(f"{name} {_share(each)}" for name, each in values.items())
    what = "difference from the full model" if _deviates(values) else "held-out loss"
    return f"{what} {changes}" if changes else ""


def _deviates(values: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether these are deviations, of a distilled model."""
    return any("share" in each for each in values.values())


def _change(each: Mapping[str, Any]) -> float:
    return float(each.get("share", each.get("increase", 0.0)))


def _share(each: Mapping[str, Any]) -> str:
    return f"{each['share']:.2%}" if "share" in each else f"{each['increase']:+.1%}"
