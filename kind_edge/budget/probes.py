"""What calibration runs on a device, and the operator table and roofline figures that follow from its latencies.

A probe is a small model: a chain of products, or a network of few blocks. Times of operators are differences between
probes, so that whatever the runtime fuses, shares or keeps in caches is in them.

    product     m -> n and n -> m are measured as one chain; a pair's time is split by a chain back in fp32
    tailor      what the tailors of a layer add to it
    attention   a block with the attention alone, beyond its four products
    mlp         a whole block beyond one with the attention alone, beyond its two products
    ends        a network without blocks: the call, patches, the gathered row of modulation, the final layer
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kind_edge.budget import probe_graph
from kind_edge.budget.onnx_writer import Ends, Graph, Value
from kind_edge.budget.operator_table import OperatorTable
from kind_edge.budget.probe_graph import Branch, Layer, Network

Inputs = Mapping[str, tuple[str, tuple[int, ...]]]
Key = tuple[str | int, ...]
Latencies = Mapping[str, float]

PRECISIONS = ("fp32", "int8")
BATCHES = (1, 2)
ROWS = (49, 98, 256, 512)
SIZES = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1536, 3072)
"""Rows, inputs and outputs of the measured products; between them the table interpolates."""

_LARGEST_PRODUCT = 768 * 3072
_TAILOR_SIZES, _TAILOR_RANKS, _TAILOR_BASE = (128, 512, 3072), (2, 8, 32), 8
_WIDTHS = {128: 4, 384: 6, 768: 12}
"""Widths of the measured blocks and their heads."""

_IMAGES = {49: (28, 1, 4, 1), 256: (32, 4, 2, 8)}
"""Tokens of the measured blocks: image size, channels, patch size, output channels."""

_CHAIN_WEIGHTS, _FEWEST_PAIRS, _MOST_PAIRS = 800_000, 2, 24
"""Floats of a chain: more than the caches next to a core hold, as in a model, where a weight is used once a call."""

_BLOCKS, _BLOCK_RANK = 4, 16
"""Blocks of a probe, and the rank of their matrices: low, so that most of the time is what the difference wants."""

_RATE_SHAPES = ((49, 128), (256, 768))
_STREAMED_BYTES = 2**27
"""Well above the share of a last-level cache that one process gets."""

_STREAM_WIDTH = 4096
_TINY_OPERATORS = 128
_FEWEST_OPERATORS = 5
"""Of a branch, and of what tailors add: a difference of disturbed times may come out below what these take."""

_ELEMENTWISE_ROUNDS = 4


@dataclass(frozen=True)
class Probe:
    """A model to time: `build` makes its bytes; `inputs` are names with dtype and shape. Probes may share a file."""

    name: str
    file: str
    build: Callable[[], bytes]
    inputs: Inputs


def all_probes() -> list[Probe]:
    """Every probe, each name once; large and small files mixed, so that a disturbance hits no one kind alone."""
    probes = {probe.name: probe for kind in (_products(), _tailors(), _blocks(), _roofline()) for probe in kind}
    by_file: dict[str, list[Probe]] = {}
    for probe in probes.values():
        by_file.setdefault(probe.file, []).append(probe)
    groups = list(by_file.values())
    return [probe for index in np.random.default_rng(0).permutation(len(groups)) for probe in groups[index]]


def roofline_probes() -> list[Probe]:
    """What a roofline alone needs."""
    rates = {_product_name(p, _rows(tokens), w, 4 * w) for p in ("fp32", "fp16", "int8") for tokens, w in _RATE_SHAPES}
    kept = rates | {probe.name for probe in _roofline()}
    return [probe for probe in all_probes() if probe.name in kept]


def operator_table(latency_us: Latencies) -> OperatorTable:
    """The table of the latencies of all probes, microseconds by probe name."""
    call, least = _call_us(latency_us), _FEWEST_OPERATORS * operator_us(latency_us)
    product: dict[Key, float] = {}
    for precision, rows, m, n in _product_points():
        pair = _per_pair(latency_us, call, precision, rows, m, n)
        forth = pair / 2
        if precision == "int8" and m != n:
            mixed = _per_pair(latency_us, call, "mixed", rows, m, n)
            forth = min(max(mixed - product["fp32", rows, n, m], pair / 8), pair * 7 / 8)
        product[precision, rows, m, n] = forth
        product[precision, rows, n, m] = pair - forth
    tailor: dict[Key, float] = {}
    for precision, batch, tokens, m, n, rank in _tailor_points():
        pairs = _pairs(m, n)
        names = [_tailor_name(precision, batch, tokens, m, n, r) for r in (rank, 0)]
        each = (latency_us[names[0]] - latency_us[names[1]]) / pairs / 2
        tailor[precision, batch, tokens, m, n, rank] = tailor[precision, batch, tokens, n, m, rank] = max(each, least)
    ends: dict[Key, float] = {(b, t, w): latency_us[_ends_name(b, t, w)] for b, t, w in _block_points()}
    table = OperatorTable(product, tailor, {}, {}, ends)
    attention: dict[Key, float] = {}
    mlp: dict[Key, float] = {}
    for precision, (batch, tokens, width) in itertools.product(PRECISIONS, _block_points()):
        key, rows = (precision, batch, tokens, width), batch * tokens
        whole, half = (
            (latency_us[_block_name(precision, batch, tokens, width, only)] - ends[batch, tokens, width]) / _BLOCKS
            for only in (False, True)
        )
        thin = {n: _factored_us(table, precision, rows, width, n) for n in (width, 4 * width)}
        attention[key] = max(half - 4 * thin[width], least)
        mlp[key] = max(whole - half - 2 * thin[4 * width], least)
    return OperatorTable(product, tailor, attention, mlp, ends)


def throughput_flops_per_s(latency_us: Latencies) -> dict[str, float]:
    """FLOP/s (integer OP/s) of a DiT's products by precision: geometric mean over shapes, none outweighs another."""
    call, rates = _call_us(latency_us), {}
    for precision in ("fp32", "fp16", "int8"):
        found = []
        for tokens, width in _RATE_SHAPES:
            pair = _per_pair(latency_us, call, precision, _rows(tokens), width, 4 * width)
            found.append(4 * _rows(tokens) * width * 4 * width / pair * 1e6)
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


def operator_us(latency_us: Latencies) -> float:
    """What starting one operator costs."""
    return (latency_us[f"tiny-{_TINY_OPERATORS}"] - latency_us["tiny-1"]) / (_TINY_OPERATORS - 1)


def _call_us(latency_us: Latencies) -> float:
    return latency_us["tiny-1"]


def _per_pair(latency_us: Latencies, call: float, precision: str, rows: int, m: int, n: int) -> float:
    """Of a chain m -> n -> m; never below what two operators cost."""
    whole = latency_us[_product_name(precision, rows, m, n)] - call
    return max(whole / _pairs(m, n), 2 * operator_us(latency_us))


def _rows(tokens: int) -> int:
    return min(ROWS, key=lambda rows: abs(rows - tokens))


def _geometric_mean(rates: list[float]) -> float:
    return math.exp(sum(math.log(rate) for rate in rates) / len(rates))


def _product_points() -> Iterator[tuple[str, int, int, int]]:
    """fp32 first: int8 is split with its help."""
    for precision, rows in itertools.product(PRECISIONS, ROWS):
        for m, n in itertools.combinations_with_replacement(SIZES, 2):
            if m * n <= _LARGEST_PRODUCT:
                yield precision, rows, m, n


def _tailor_points() -> Iterator[tuple[str, int, int, int, int, int]]:
    for precision, batch, tokens in itertools.product(PRECISIONS, BATCHES, _IMAGES):
        for m, n in itertools.combinations_with_replacement(_TAILOR_SIZES, 2):
            for rank in _TAILOR_RANKS:
                yield precision, batch, tokens, m, n, rank


def _block_points() -> Iterator[tuple[int, int, int]]:
    return itertools.product(BATCHES, _IMAGES, _WIDTHS)


def _pairs(m: int, n: int) -> int:
    """How often a pair is repeated in a chain."""
    return max(_FEWEST_PAIRS, min(_MOST_PAIRS, _CHAIN_WEIGHTS // (2 * m * n)))


def _factored_us(table: OperatorTable, precision: str, rows: int, m: int, n: int) -> float:
    """Half of a layer m -> n and one n -> m, of the blocks' rank."""
    ends = ((m, _BLOCK_RANK), (_BLOCK_RANK, n), (n, _BLOCK_RANK), (_BLOCK_RANK, m))
    return sum(table.product_us(precision, rows, inputs, outputs) for inputs, outputs in ends) / 2


def _product_name(precision: str, rows: int, m: int, n: int) -> str:
    return f"product-{precision}-{rows}x{m}x{n}"


def _tailor_name(precision: str, batch: int, tokens: int, m: int, n: int, rank: int) -> str:
    return f"tailor-{precision}-{batch}x{tokens}x{m}x{n}-rank{rank}"


def _block_name(precision: str, batch: int, tokens: int, width: int, only_attention: bool) -> str:
    return f"{'attention' if only_attention else 'block'}-{precision}-{batch}x{tokens}x{width}"


def _ends_name(batch: int, tokens: int, width: int) -> str:
    return f"ends-{batch}x{tokens}x{width}"


def _products() -> Iterator[Probe]:
    for precision, rows, m, n in _product_points():
        kinds = [(precision, None)] + ([("mixed", Layer("fp32"))] if precision == "int8" and m != n else [])
        for kind, back in kinds:
            build = functools.partial(probe_graph.chain, m, n, _pairs(m, n), Layer(precision), back)
            inputs = {"x": ("float32", (1, rows, m))}
            yield Probe(_product_name(kind, rows, m, n), f"product-{kind}-{m}x{n}.onnx", build, inputs)
    for tokens, width in _RATE_SHAPES:
        rows, n = _rows(tokens), 4 * width
        build = functools.partial(probe_graph.chain, width, n, _pairs(width, n), Layer("fp16"))
        inputs = {"x": ("float32", (1, rows, width))}
        yield Probe(_product_name("fp16", rows, width, n), f"product-fp16-{width}x{n}.onnx", build, inputs)


def _tailors() -> Iterator[Probe]:
    for precision, batch, tokens, m, n, rank in _tailor_points():
        for tailor_rank in (0, rank):
            layer = Layer(precision, _TAILOR_BASE, tailor_rank)
            inputs: dict[str, tuple[str, tuple[int, ...]]] = {"x": ("float32", (batch, tokens, m))}
            if tailor_rank:
                inputs["class_index"] = ("int64", (batch,))
            build = functools.partial(probe_graph.chain, m, n, _pairs(m, n), layer)
            file = f"tailor-{precision}-{m}x{n}-rank{tailor_rank}.onnx"
            yield Probe(_tailor_name(precision, batch, tokens, m, n, tailor_rank), file, build, inputs)


def _blocks() -> Iterator[Probe]:
    """The file of a batch is that of any other."""
    both: tuple[Branch, ...] = ("attn", "mlp")
    for batch, tokens, width in _block_points():
        side, channels, patch, outputs = _IMAGES[tokens]
        inputs = {"sample": ("float32", (batch, channels, side, side)), "step_index": ("int32", (batch,))}
        shape = Network(side, channels, patch, outputs, width, _WIDTHS[width], 4 * width, (), Layer("fp32"))
        build = functools.partial(probe_graph.network, shape)
        yield Probe(_ends_name(batch, tokens, width), f"{_ends_name(0, tokens, width)}.onnx", build, inputs)
        for precision, branches in itertools.product(PRECISIONS, (both[:1], both)):
            layer = Layer(precision, _BLOCK_RANK)
            deep = dataclasses.replace(shape, blocks=(branches,) * _BLOCKS, layer=layer)
            name, file = (_block_name(precision, b, tokens, width, branches == both[:1]) for b in (batch, 0))
            yield Probe(name, f"{file}.onnx", functools.partial(probe_graph.network, deep), inputs)


def _roofline() -> Iterator[Probe]:
    yield Probe("stream", "stream.onnx", _stream, {"x": ("float32", (1, _STREAM_WIDTH))})
    for tokens, width in _RATE_SHAPES:
        build = functools.partial(_elementwise, width)
        inputs = {"x": ("float32", (tokens, width))}
        yield Probe(f"elementwise-{tokens}x{width}", f"elementwise-{width}.onnx", build, inputs)
    for count in (1, _TINY_OPERATORS):
        name = f"tiny-{count}"
        yield Probe(name, f"{name}.onnx", functools.partial(_tiny, count), {"x": ("float32", (1, 8))})


def _stream() -> bytes:
    """A product whose weight does not fit a cache. The weight is made inside: a file of 128 MB would be no probe."""
    graph, outputs = Graph(), _STREAMED_BYTES // 4 // _STREAM_WIDTH
    return _bytes(
        graph, [("x", 1, [1, _STREAM_WIDTH])], graph.node("MatMul", ["x", graph.filled(_STREAM_WIDTH, outputs)])
    )


def _elementwise(width: int) -> bytes:
    """Norm, modulation, softmax, activation, residual: each reads one or two arrays and writes one."""
    graph, x = Graph(), "x"
    ones = graph.constant(np.ones(width, np.float32))
    for _ in range(_ELEMENTWISE_ROUNDS):
        norm = graph.node("LayerNormalization", [x, ones])
        x = graph.node("Softmax", [graph.node("Mul", [norm, ones])])
        x = graph.node("Add", [graph.node("Gelu", [x], approximate="tanh"), norm])
    return _bytes(graph, [("x", 1, ["tokens", width])], x)


def _tiny(count: int) -> bytes:
    """Squares in a chain depend on one another and cannot be folded, fused or run side by side."""
    graph, x = Graph(), "x"
    for _ in range(count):
        x = graph.node("Mul", [x, x])
    return _bytes(graph, [("x", 1, [1, 8])], x)


def _bytes(graph: Graph, inputs: Ends, output: Value) -> bytes:
    return bytes(graph.model("probe", inputs, {output: None}).SerializeToString())
