"""A plan in words: what the screen and the report say alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kind_edge.units import format_bytes, format_flops, format_seconds, format_share

FORM_WORDS = {
    "switch": "switch: one shared learngene, a tailor per class picked by the class index",
    "single": "single: learngene and tailor folded into one weight",
    "union": "union: all kept tailors folded into one weight, an approximation",
}
WRITE_LIMIT: Mapping[str, Callable[[float], str]] = {
    "max_latency": lambda nanoseconds: format_seconds(nanoseconds / 1e9),
    "max_flops": format_flops,
    "max_size": format_bytes,
    "max_memory": format_bytes,
    "max_quality_loss": format_share,
}
"""How the limits of a plan are written, which are in the solver's units."""


def predicted_words(loss_increase: float | None, frechet: float | None) -> str:
    """ "loss +2.1 %, Fréchet distance 7.4"."""
    loss = f"loss +{format_share(loss_increase or 0.0)}"
    return loss if frechet is None else f"{loss}, Fréchet distance {distance_words(frechet)}"


def distance_words(frechet: float) -> str:
    """ "7.4", "2,852"."""
    return f"{frechet:,.0f}" if frechet >= 1000 else f"{frechet:.3g}"
