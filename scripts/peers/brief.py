"""The same comparison in short: a table for the README, and for docs/compare.md what others are better at as well."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from studies.statistics import markdown, paragraph
from studies.store import Record

from peers.distance import MOST
from peers.environments import PEERS
from peers.ours import SMALL, VARIANTS, Variant
from peers.race import EQUAL, GUIDED, ratio
from peers.summary import AT_MOST, BASELINE, Found, best_int8_peer, found_in

NAMES: Mapping[str, str] = {
    "torch eager": "PyTorch fp32",
    "torch compiled": "PyTorch fp32, compiled",
    "onnxruntime fp32": "ONNX Runtime fp32",
    "onnxruntime int8": "ONNX Runtime int8",
    "openvino fp32": "OpenVINO fp32",
    "openvino int8": "OpenVINO int8",
    "litert int8": "LiteRT int8",
    "executorch fp32": "ExecuTorch fp32",
    "executorch int8": "ExecuTorch int8",
}
OURS = Variant(10, "int8", 4)
SHORT = (OURS, Variant(10, "int8", 2), Variant(2, "int8", 4, SMALL[2]))
LARGE_OURS = "kind-edge int8, factored, 10 classes"
_HEADER = (
    "",
    "classes",
    "evaluations an image",
    "time of an image",
    "model file",
    "Fréchet distance, 10 classes",
    "2 classes",
)

_METRICS: Mapping[str, tuple[Callable[[Mapping[str, Any]], float], str]] = {
    "one evaluation of one row": (lambda one: statistics.median(one["evaluation_ms"]["1"]), "{:.2f} ms"),
    "file": (lambda one: one["file_bytes"] / 1e6, "{:.1f} MB"),
    "peak memory": (lambda one: one["peak_bytes"] / 1e6, "{:.1f} MB"),
    "opening and the first call": (lambda one: one["load_ms"], "{:.0f} ms"),
}


def readme_text(records: Sequence[Record]) -> str:
    """The baseline, every int8 engine at its best, and three of ours."""
    found = found_in(records)
    if found is None:
        return ""
    peers = [peer.name for peer in PEERS if peer.int8]
    run = found.run["conditions"]
    told = f"A lower distance is better; measured on {run['cpu']}, {run['cores']} cores. {_equal_words(found)}"
    return f"{_table(found, peers, SHORT)}\n\n{paragraph(told)}"


def compare_text(records: Sequence[Record]) -> str:
    found = found_in(records)
    if found is None:
        return ""
    run = found.run["conditions"]
    parts = [
        paragraph(
            f"On {run['cpu']}, {run['cores']} cores, every engine with as many threads as suit it best; medians of "
            f"{run['rounds']} interleaved rounds; MB are millions of bytes."
        ),
        _table(found, [peer.name for peer in PEERS], [each for each in VARIANTS if each.precision == "int8"]),
        "### What others are better at",
        paragraph(_equal_words(found)),
        paragraph(f"Beside {OURS.name}, at the same shape:"),
        _ahead(found.shipped, OURS.name),
        paragraph(f"At the shape of DiT-B/2, with random weights, beside {LARGE_OURS}:"),
        _ahead(found.large, LARGE_OURS),
    ]
    return "\n\n".join(parts)


def _table(found: Found, peers: Sequence[str], variants: Sequence[Variant]) -> str:
    dense = [_dense_row(found, name, GUIDED) for name in peers if name in found.shipped]
    own = [_own_row(found, variant) for variant in variants if variant.name in found.shipped]
    return markdown(_HEADER, [_dense_row(found, BASELINE, AT_MOST), *dense, *own])


def _dense_row(found: Found, name: str, label: str) -> tuple[str, ...]:
    best = found.run["conditions"]["best"]["int8" if name.endswith("int8") else "fp32"]
    steps, key = (MOST, AT_MOST) if label == AT_MOST else (best["steps"], name)
    return (f"dense, {NAMES[name]}", "10", f"{2 * steps}", *_figures(found, name, label, key))


def _own_row(found: Found, variant: Variant) -> tuple[str, ...]:
    within = f", held to {variant.max_size.replace('MB', ' MB')}" if variant.max_size else ""
    told = f"**kind-edge** {variant.precision}{within}"
    return (told, f"{variant.classes}", f"{variant.steps}", *_figures(found, variant.name, GUIDED, variant.name))


def _figures(found: Found, name: str, label: str, key: str) -> Iterator[str]:
    yield f"{statistics.median(found.times(name, label)):.2f} ms"
    yield f"{found.shipped[name]['file_bytes'] / 1e6:.1f} MB"
    for classes in (10, 2):
        distance = found.frechet.get((key, classes))
        yield "–" if distance is None else f"{distance:.1f}"


def _equal_words(found: Found) -> str:
    """What is left of the lead where all take as many evaluations."""
    fastest = best_int8_peer(found)
    if fastest is None:
        return ""
    share = ratio(found.times(fastest, EQUAL), found.times(OURS.name, EQUAL))
    return (
        "What is gained is gained by fewer evaluations, and in the file by classes left out and ranks cut. For equally "
        f"many evaluations {NAMES[fastest]} takes {share.text(2)} times as long as ours."
    )


def _ahead(measured: Mapping[str, Mapping[str, Any]], ours: str) -> str:
    """A line for every figure in which an engine is better than ours, the best first."""
    lines = []
    for metric, (read, form) in _METRICS.items():
        own = read(measured[ours])
        better = sorted((read(one), name) for name, one in measured.items() if name in NAMES and read(one) < own)
        told = ", ".join(f"{NAMES[name]} {form.format(value)}" for value, name in better)
        lines.append(f"- {metric}: {told or 'none of them'}; ours {form.format(own)}")
    return "\n".join(paragraph(line, indent="  ") for line in lines)
