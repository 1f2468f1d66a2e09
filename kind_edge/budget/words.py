"""A plan in words: what the screen and the report say alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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


def resize_words(resize: Mapping[str, float | str]) -> Iterator[tuple[str, str]]:
    """What a plan says of another depth and width, as a row: nothing where the model keeps its own."""
    if resize:
        size = f"depth {resize['depth']}, width {resize['width']}, by {resize['method']}"
        yield "resized", f"{size}; as good as predicted after {format_seconds(float(resize['heal_s']))} of healing"


_COREML_UNITS = {"npu": "Neural Engine", "gpu": "GPU"}


def coreml_words(coreml: Mapping[str, int | float | str]) -> Iterator[tuple[str, str]]:
    """What a plan says of its Core ML packages, in rows: nothing where it says nothing."""
    if not coreml:
        return
    yield (
        "Core ML",
        (
            f"{format_bytes(float(coreml['app_bytes']))} of packages, predicted: {coreml['weights']} weights, "
            f"{coreml['target']}, {coreml['layout']}"
        ),
    )
    most = float(coreml.get("limit_bytes", "inf"))
    if float(coreml["app_bytes"]) > most:
        yield "", f"an app may have {format_bytes(most)}: with --formats coreml the model is cut until they fit"
    for unit, name in _COREML_UNITS.items():
        if f"{unit}_image_latency_s" in coreml:
            first, lasting = (
                format_seconds(float(coreml[f"{unit}_{key}_s"])) for key in ("image_latency", "sustained_image_latency")
            )
            yield "", f"one image on the {name} {first}, {lasting} sustained: estimate from the profile's figures"
