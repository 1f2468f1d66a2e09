"""What a roofline estimate needs of a device: rates of products, of weights and of elementwise work, from probes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from kind_edge.budget import probe_graph
from kind_edge.budget.onnx_writer import Graph
from kind_edge.budget.probe_graph import Layer
from kind_edge.budget.probes import ALL_CORES, Latencies, Probe, as_bytes, call_us, operator_us, table_probes

_RATE_SHAPES = ((49, 128), (256, 768))
"""Tokens and width of a DiT's products and elementwise work."""

_RATES = ("fp32", "fp16", "int8")
_CHAIN_WEIGHTS, _FEWEST_PAIRS = 800_000, 1
"""Floats of a chain: more than the caches next to a core hold, as in a model, where a weight is used once a call."""

_STREAMED_BYTES = 2**27
"""Well above the share of a last-level cache that one process gets."""

_STREAM_WIDTH = 4096
_ELEMENTWISE_ROUNDS = 4


def own_probes() -> Iterator[Probe]:
    """What no table needs."""
    yield Probe("stream", "stream.onnx", _stream, {"x": ("float32", (1, _STREAM_WIDTH))})
    for tokens, width in _RATE_SHAPES:
        build, rows = functools.partial(_elementwise, width), {"x": ("float32", (tokens, width))}
        yield Probe(f"elementwise-{tokens}x{width}", f"elementwise-{width}.onnx", build, rows)
        for precision in _RATES:
            build = functools.partial(probe_graph.chain, width, 4 * width, _pairs(width), Layer(precision))
            name = _products_name(precision, tokens, width)
            yield Probe(name, f"{name}.onnx", build, {"x": ("float32", (1, tokens, width))})


def roofline_probes() -> list[Probe]:
    """What a roofline alone needs."""
    return [*own_probes(), *(probe for probe in table_probes(ALL_CORES) if probe.name.startswith("tiny"))]


def throughput_flops_per_s(latency_us: Latencies) -> dict[str, float]:
    """FLOP/s (integer OP/s) of a DiT's products by precision: geometric mean over shapes, none outweighs another."""
    call, least, rates = call_us(latency_us), 2 * operator_us(latency_us), {}
    for precision in _RATES:
        found = []
        for tokens, width in _RATE_SHAPES:
            pairs = _pairs(width)
            pair = max((latency_us[_products_name(precision, tokens, width)] - call) / pairs, least)
            found.append(4 * tokens * width * 4 * width / pair * 1e6)
        rates[precision] = _geometric_mean(found)
    return rates


def memory_bytes_per_s(latency_us: Latencies) -> float:
    """Bytes of weights per second that one row of activations draws through the processor."""
    return _STREAMED_BYTES / latency_us["stream"] * 1e6


def activation_bytes_per_s(latency_us: Latencies) -> float:
    """Bytes that elementwise work reads and writes per second, in a block's own mixture; geometric mean over shapes."""
    rates = []
    for tokens, width in _RATE_SHAPES:
        moved = 11 * _ELEMENTWISE_ROUNDS * tokens * width * 4
        rates.append(moved / latency_us[f"elementwise-{tokens}x{width}"] * 1e6)
    return _geometric_mean(rates)


def _pairs(width: int) -> int:
    """How often D -> 4 D -> D is repeated in a chain."""
    return max(_FEWEST_PAIRS, _CHAIN_WEIGHTS // (8 * width * width))


def _products_name(precision: str, tokens: int, width: int) -> str:
    return f"products-{precision}-{tokens}x{width}"


def _geometric_mean(rates: list[float]) -> float:
    return math.exp(sum(math.log(rate) for rate in rates) / len(rates))


def _stream() -> bytes:
    """A product whose weight does not fit a cache. The weight is made inside: a file of 128 MB would be no probe."""
    graph, outputs = Graph(), _STREAMED_BYTES // 4 // _STREAM_WIDTH
    product = graph.node("MatMul", ["x", graph.filled(_STREAM_WIDTH, outputs)])
    return as_bytes(graph, [("x", 1, [1, _STREAM_WIDTH])], product)


def _elementwise(width: int) -> bytes:
    """Norm, modulation, softmax, activation, residual: each reads one or two arrays and writes one."""
    graph, x = Graph(), "x"
    ones = graph.constant(np.ones(width, np.float32))
    for _ in range(_ELEMENTWISE_ROUNDS):
        norm = graph.node("LayerNormalization", [x, ones])
        x = graph.node("Softmax", [graph.node("Mul", [norm, ones])])
        x = graph.node("Add", [graph.node("Gelu", [x], approximate="tanh"), norm])
    return as_bytes(graph, [("x", 1, ["tokens", width])], x)
