"""What the solver's promises are worth: each part measures one, stores its runs, and adds its keys."""

from __future__ import annotations

from typing import Any


def solver() -> dict[str, Any]:
    """All parts; runs that are finished are read."""
    return {**prediction()}


def prediction() -> dict[str, Any]:
    """How well random plans are foreseen, of the shipped model, and in `models` also of its teacher."""
    from studies import prediction
    from studies.documents import RESULTS, ROOT
    from studies.store import subject_of

    from kind_edge.model.shipped import DEFAULT_MODEL

    records = prediction.run(subject_of(DEFAULT_MODEL), ROOT / RESULTS)
    names = list(dict.fromkeys(record["checkpoint"]["model"] for record in records))
    own = {name: [record for record in records if record["checkpoint"]["model"] == name] for name in names}
    rows = [{"model": name, **prediction.summary(own[name])} for name in names]
    return {**prediction.summary(own[names[0]]), "models": rows}
