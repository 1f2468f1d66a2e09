"""What calibration runs on a device, and the operator table that follows from its latencies.

A probe is a small model: a chain of products, or a network of few blocks. Times of operators are differences between
probes, so that whatever the runtime fuses, shares or keeps in caches is in them.

    product     m -> n and n -> m are measured as one chain; a pair's time is split by a chain back in fp32
    tailor      what the tailors of a layer add to it
    attention   a block with the attention alone, beyond its four products
    mlp         a whole block beyond one with the attention alone, beyond its two products
    ends        a network without blocks: the call, patches, the gathered row of modulation, the final layer

There is a table for models that run on all cores, and one for those that run on one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kind_edge.budget import probe_graph
from kind_edge.budget.onnx_writer import Ends, Graph, Value
from kind_edge.budget.operator_table import OperatorTable
from kind_edge.budget.probe_graph import Branch, Layer, Network

Inputs = Mapping[str, tuple[str, tuple[int, ...]]]
Key = tuple[str | int, ...]
Latencies = Mapping[str, float]

PRECISIONS = ("fp32", "int8")
BATCHES = (1, 2)


@dataclass(frozen=True)
class Shapes:
    """The sizes that a table is measured at; between them it interpolates.

    `rows` and `sizes` (inputs and outputs) of products; inputs and outputs, and ranks, of `tailors`; `widths` of blocks
    with their heads. `threads`: what the models run with; None: as many as the device has cores.
    """

    threads: int | None
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    tailors: tuple[int, ...]
    widths: Mapping[int, int]

    def named(self, name: str) -> str:
        return name if self.threads is None else f"{name}-threads{self.threads}"


ALL_CORES = Shapes(
    threads=None,
    rows=(49, 98, 256, 512),
    sizes=(8, 16, 32, 64, 128, 256, 384, 512, 768, 1536, 3072),
    tailors=(128, 512, 3072),
    widths={128: 4, 384: 6, 768: 12},
)
ONE_THREAD = Shapes(
    threads=1,
    rows=(49, 98, 256),
    sizes=(4, 8, 16, 32, 64, 128, 256, 512),
    tailors=(64, 128, 512),
    widths={64: 4, 128: 4, 192: 6},
)
"""Of models so small that they run on one: `kind_edge.budget.whole_model.ONE_THREAD_FLOPS`."""

_LARGEST_PRODUCT = 768 * 3072
_TAILOR_RANKS, _TAILOR_BASE = (2, 8, 32), 8
_IMAGES = {49: (28, 1, 4, 1), 256: (32, 4, 2, 8)}
"""Tokens of the measured blocks: image size, channels, patch size, output channels."""

_CHAIN_WEIGHTS, _FEWEST_PAIRS, _MOST_PAIRS = 800_000, 2, 24
"""Floats of a chain: more than the caches next to a core hold, as in a model, where a weight is used once a call."""

_BLOCKS, _BLOCK_RANK = 4, 16
"""Blocks of a probe, and the rank of their matrices: low, so that most of the time is what the difference wants."""

_TINY_OPERATORS = 128
_FEWEST_OPERATORS = 5
"""Of a branch, and of what tailors add: a difference of disturbed times may come out below what these take."""


@dataclass(frozen=True)
class Probe:
    """A model to time: `build` makes its bytes; `inputs` are names with dtype and shape. Probes may share a file.

    `threads` None: as many as there are cores.
    """

    name: str
    file: str
    build: Callable[[], bytes]
    inputs: Inputs
    threads: int | None = None


def table_probes(shapes: Shapes) -> Iterator[Probe]:
    """What a table is made of. Some occur twice."""
    for probe in (*_products(shapes), *_tailors(shapes), *_blocks(shapes), *_calls()):
        yield dataclasses.replace(probe, name=shapes.named(probe.name), threads=shapes.threads)


def operator_table(all_us: Latencies, shapes: Shapes = ALL_CORES) -> OperatorTable:
    """The table of the latencies of `table_probes`, microseconds by probe name."""
    own = shapes.named("")
    latency_us = {name.removesuffix(own): us for name, us in all_us.items() if name.endswith(own)}
    call, least = call_us(latency_us), _FEWEST_OPERATORS * operator_us(latency_us)
    product: dict[Key, float] = {}
    for precision, rows, m, n in _product_points(shapes):
        pair = pair_us(latency_us, call, precision, rows, m, n)
        forth = pair / 2
        if precision == "int8" and m != n:
            mixed = pair_us(latency_us, call, "mixed", rows, m, n)
            forth = min(max(mixed - product["fp32", rows, n, m], pair / 8), pair * 7 / 8)
        product[precision, rows, m, n] = forth
        product[precision, rows, n, m] = pair - forth
    tailor: dict[Key, float] = {}
    for precision, batch, tokens, m, n, rank in _tailor_points(shapes):
        names = [_tailor_name(precision, batch, tokens, m, n, r) for r in (rank, 0)]
        each = (latency_us[names[0]] - latency_us[names[1]]) / pairs(m, n) / 2
        tailor[precision, batch, tokens, m, n, rank] = tailor[precision, batch, tokens, n, m, rank] = max(each, least)
    ends: dict[Key, float] = {(b, t, w): latency_us[_ends_name(b, t, w)] for b, t, w in _block_points(shapes)}
    table = OperatorTable(product, tailor, {}, {}, ends)
    attention: dict[Key, float] = {}
    mlp: dict[Key, float] = {}
    for precision, (batch, tokens, width) in itertools.product(PRECISIONS, _block_points(shapes)):
        key, rows = (precision, batch, tokens, width), batch * tokens
        whole, half = (
            (latency_us[_block_name(precision, batch, tokens, width, only)] - ends[batch, tokens, width]) / _BLOCKS
            for only in (False, True)
        )
        thin = {n: _factored_us(table, precision, rows, width, n) for n in (width, 4 * width)}
        attention[key] = max(half - 4 * thin[width], least)
        mlp[key] = max(whole - half - 2 * thin[4 * width], least)
    return OperatorTable(product, tailor, attention, mlp, ends)


def operator_us(latency_us: Latencies) -> float:
    """What starting one operator costs."""
    return (latency_us[f"tiny-{_TINY_OPERATORS}"] - latency_us["tiny-1"]) / (_TINY_OPERATORS - 1)


def call_us(latency_us: Latencies) -> float:
    """What a call of the runtime costs, with one operator."""
    return latency_us["tiny-1"]


def pair_us(latency_us: Latencies, call: float, precision: str, rows: int, m: int, n: int) -> float:
    """Of a chain m -> n -> m; never below what two operators cost."""
    whole = latency_us[product_name(precision, rows, m, n)] - call
    return max(whole / pairs(m, n), 2 * operator_us(latency_us))


def _product_points(shapes: Shapes) -> Iterator[tuple[str, int, int, int]]:
    """fp32 first: int8 is split with its help."""
    for precision, rows in itertools.product(PRECISIONS, shapes.rows):
        for m, n in itertools.combinations_with_replacement(shapes.sizes, 2):
            if m * n <= _LARGEST_PRODUCT:
                yield precision, rows, m, n


def _tailor_points(shapes: Shapes) -> Iterator[tuple[str, int, int, int, int, int]]:
    for precision, batch, tokens in itertools.product(PRECISIONS, BATCHES, _IMAGES):
        for m, n in itertools.combinations_with_replacement(shapes.tailors, 2):
            for rank in _TAILOR_RANKS:
                yield precision, batch, tokens, m, n, rank


def _block_points(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    return itertools.product(BATCHES, _IMAGES, shapes.widths)


def pairs(m: int, n: int) -> int:
    """How often a pair is repeated in a chain."""
    return max(_FEWEST_PAIRS, min(_MOST_PAIRS, _CHAIN_WEIGHTS // (2 * m * n)))


def _factored_us(table: OperatorTable, precision: str, rows: int, m: int, n: int) -> float:
    """Half of a layer m -> n and one n -> m, of the blocks' rank."""
    ends = ((m, _BLOCK_RANK), (_BLOCK_RANK, n), (n, _BLOCK_RANK), (_BLOCK_RANK, m))
    return sum(table.product_us(precision, rows, inputs, outputs) for inputs, outputs in ends) / 2


def product_name(precision: str, rows: int, m: int, n: int) -> str:
    """Of the probe of a chain m -> n -> m."""
    return f"product-{precision}-{rows}x{m}x{n}"


def _tailor_name(precision: str, batch: int, tokens: int, m: int, n: int, rank: int) -> str:
    return f"tailor-{precision}-{batch}x{tokens}x{m}x{n}-rank{rank}"


def _block_name(precision: str, batch: int, tokens: int, width: int, only_attention: bool) -> str:
    return f"{'attention' if only_attention else 'block'}-{precision}-{batch}x{tokens}x{width}"


def _ends_name(batch: int, tokens: int, width: int) -> str:
    return f"ends-{batch}x{tokens}x{width}"


def _products(shapes: Shapes) -> Iterator[Probe]:
    for precision, rows, m, n in _product_points(shapes):
        kinds = [(precision, None)] + ([("mixed", Layer("fp32"))] if precision == "int8" and m != n else [])
        for kind, back in kinds:
            build = functools.partial(probe_graph.chain, m, n, pairs(m, n), Layer(precision), back)
            inputs = {"x": ("float32", (1, rows, m))}
            yield Probe(product_name(kind, rows, m, n), f"product-{kind}-{m}x{n}.onnx", build, inputs)


def _tailors(shapes: Shapes) -> Iterator[Probe]:
    for precision, batch, tokens, m, n, rank in _tailor_points(shapes):
        for tailor_rank in (0, rank):
            layer = Layer(precision, _TAILOR_BASE, tailor_rank)
            inputs: dict[str, tuple[str, tuple[int, ...]]] = {"x": ("float32", (batch, tokens, m))}
            if tailor_rank:
                inputs["class_index"] = ("int64", (batch,))
            build = functools.partial(probe_graph.chain, m, n, pairs(m, n), layer)
            file = f"tailor-{precision}-{m}x{n}-rank{tailor_rank}.onnx"
            yield Probe(_tailor_name(precision, batch, tokens, m, n, tailor_rank), file, build, inputs)


def _blocks(shapes: Shapes) -> Iterator[Probe]:
    """The file of a batch is that of any other."""
    both: tuple[Branch, ...] = ("attn", "mlp")
    for batch, tokens, width in _block_points(shapes):
        side, channels, patch, outputs = _IMAGES[tokens]
        inputs = {"sample": ("float32", (batch, channels, side, side)), "step_index": ("int32", (batch,))}
        shape = Network(side, channels, patch, outputs, width, shapes.widths[width], 4 * width, (), Layer("fp32"))
        build = functools.partial(probe_graph.network, shape)
        yield Probe(_ends_name(batch, tokens, width), f"{_ends_name(0, tokens, width)}.onnx", build, inputs)
        for precision, branches in itertools.product(PRECISIONS, (both[:1], both)):
            layer = Layer(precision, _BLOCK_RANK)
            deep = dataclasses.replace(shape, blocks=(branches,) * _BLOCKS, layer=layer)
            name, file = (_block_name(precision, b, tokens, width, branches == both[:1]) for b in (batch, 0))
            yield Probe(name, f"{file}.onnx", functools.partial(probe_graph.network, deep), inputs)


def _calls() -> Iterator[Probe]:
    for count in (1, _TINY_OPERATORS):
        name = f"tiny-{count}"
        yield Probe(name, f"{name}.onnx", functools.partial(_tiny, count), {"x": ("float32", (1, 8))})


def _tiny(count: int) -> bytes:
    """Squares in a chain depend on one another and cannot be folded, fused or run side by side."""
    graph, x = Graph(), "x"
    for _ in range(count):
        x = graph.node("Mul", [x, x])
    return as_bytes(graph, [("x", 1, [1, 8])], x)


def as_bytes(graph: Graph, inputs: Ends, output: Value) -> bytes:
    """The file of a probe."""
    return bytes(graph.model("probe", inputs, {output: None}).SerializeToString())
