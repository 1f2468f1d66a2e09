"""Source code for apps, and pages, written from a bundle's manifest through templates."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np


def render(template: str, context: Mapping[str, Any], escape: bool = False) -> str:
    """A template of `templates/`, filled in; `escape`: it is HTML. Kotlin, Swift and Markdown have no such escapes."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["float32"] = lambda value: np.format_float_scientific(np.float32(value), trim="0")
    source = files("kind_edge.deploy").joinpath("templates", *template.split("/")).read_text(encoding="utf-8")
    return environment.from_string(source).render(**context)


def is_guided(values: Mapping[str, Any]) -> bool:
    """Whether every step costs a class and a null evaluation."""
    sampler = values["sampler"]
    return sampler["null_index"] is not None and sampler["guidance"] != 1.0


def guidance_words(values: Mapping[str, Any]) -> str:
    sampler = values["sampler"]
    if sampler["inside_guidance"] is not None:
        return f"guidance {sampler['inside_guidance']:g} inside the model"
    return f"guidance {sampler['guidance']:g}" if is_guided(values) else "no guidance"
