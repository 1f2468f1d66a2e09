"""`NOTICE`: whose the parts of a bundle are and under which licences, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kind_edge.model.provenance import NOT_STATED, data_words, lineage_words

NOTICE = "NOTICE"


def notice(values: Mapping[str, Any]) -> str:
    """From the manifest's values; bundles of earlier versions say less."""
    told = values.get("provenance") or {"licence": values.get("licence", NOT_STATED), **values["source"]}
    author = f"\n  made by    {told['author']}" if told.get("author") else ""
    lines = [
        f"{values['name']}, written by kind-edge {values['tools']['kind_edge']}",
        f"""Weights
  model      {told["model"]}, sha256 {told["checkpoint_sha256"]}
  licence    {told["licence"]}{author}""",
    ]
    lines += [f"Learned from\n  {data_words(each)}" for each in told.get("data", [])]
    rest = {name: line for name, line in lineage_words(told).items() if name not in ("licence", "data")}
    lines += [f"{name[0].upper()}{name[1:]}\n  {line}" for name, line in rest.items()]
    if told["licence"] == NOT_STATED:
        lines.append(
            "The licence of the weights was not stated by whoever trained them: ask them before you pass this on."
        )
    return "\n\n".join(lines) + "\n"
