"""What calibration runs on a device, and the operator table that follows from its latencies.

A probe is a whole small model, written as the exporter writes its own. Times of parts are differences between probes,
so that whatever the runtime fuses, shares or keeps in caches is in them, at the place where it happens:

    square      a layer of the attention, D x D: the same model with all of them stored otherwise, or with tailors
    wide        a layer of the MLP, D x 4 D or 4 D x D: likewise
    attention   a model with the attention alone, beyond ends and layers
    mlp         what MLPs add to that, beyond their layers
    ends        a model without blocks: the call, patches, the gathered row of modulation, the final layer

The layers of the lowest measured rank are taken to cost the start of their operators and what one more rank costs, so
often as they have ranks; all else of such a model belongs to attention and mlp. A model of measured storage is thus
predicted as it was measured. There is a table for models that run on all cores, and one for those that run on one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from scipy.optimize import isotonic_regression

from kind_edge.budget import probe_graph
from kind_edge.budget.onnx_writer import Ends, Graph, Value
from kind_edge.budget.operator_table import KINDS, OperatorTable
from kind_edge.budget.probe_graph import Branch, Layer, Network

Inputs = Mapping[str, tuple[str, tuple[int, ...]]]
Key = tuple[str | int, ...]
Latencies = Mapping[str, float]

PRECISIONS = ("fp32", "int8")
BATCHES = (1, 2)
TAILOR_RANKS = (2, 8, 24)
LOWEST = 8
"""Rank of all layers but those that a difference is about."""


@dataclass(frozen=True)
class Width:
    """Of measured models: heads, and so many blocks that their weights are no more at home in caches than a model's."""

    heads: int
    blocks: int


@dataclass(frozen=True)
class Shapes:
    """What a table is measured at, beside BATCHES, tokens and LOWEST; between these it interpolates.

    `threads`: what the models run with; None: as many as the device has cores. `ranks` go up to where two thin matrices
    take as long as a dense one, about. They lie amid blocks of 16 columns, which kernels compute whole: what lies
    between is right in the mean then.
    """

    threads: int | None
    widths: Mapping[int, Width]
    ranks: tuple[int, ...]

    def named(self, name: str) -> str:
        return name if self.threads is None else f"{name}-threads{self.threads}"


ALL_CORES = Shapes(None, {128: Width(4, 6), 384: Width(6, 2), 768: Width(12, 1)}, (40, 104, 248))
ONE_THREAD = Shapes(1, {64: Width(4, 6), 128: Width(4, 6), 192: Width(6, 4)}, (24, 40, 72))
"""Of models so small that they run on one: `kind_edge.budget.whole_model.ONE_THREAD_FLOPS`."""

_IMAGES = {49: (28, 1, 4, 1), 256: (32, 4, 2, 8)}
"""Tokens of the measured models: image size, channels, patch size, output channels."""

_ROLES = ("square", "wide")
_TINY_OPERATORS = 128
_FEWEST_OPERATORS = 5
"""Of a branch: a difference of disturbed times may come out below what these take."""


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


@dataclass(frozen=True)
class Model:
    """A probe's network: its blocks and how their layers are stored. `mlp` None: the attention alone."""

    width: int
    blocks: int
    heads: int
    attention: Layer
    mlp: Layer | None

    @property
    def name(self) -> str:
        if not self.blocks:
            return f"ends-{self.width}"
        return f"blocks-{self.width}-{_stored(self.attention)}-{_stored(self.mlp) if self.mlp else 'none'}"

    def file(self, tokens: int) -> str:
        return f"{self.name}-{tokens}.onnx"

    def at(self, batch: int, tokens: int) -> str:
        """The probe's name."""
        return f"{self.name}-{batch}x{tokens}"

    def build(self, tokens: int) -> bytes:
        side, channels, patch, outputs = _IMAGES[tokens]
        branches: tuple[Branch, ...] = ("attn", "mlp") if self.mlp else ("attn",)
        return probe_graph.network(
            Network(
                side, channels, patch, outputs, self.width, self.heads, 4 * self.width, (branches,) * self.blocks,
                self.attention, self.mlp,
            )
        )  # fmt: skip


def _stored(layer: Layer) -> str:
    own = f"{layer.precision}-{f'rank{layer.rank}' if layer.rank else 'dense'}"
    return own + (f"-tailors{layer.tailor_rank}" if layer.tailor_rank else "")


def table_probes(shapes: Shapes) -> Iterator[Probe]:
    """What a table is made of."""
    for probe in (*_networks(shapes), *_calls()):
        yield dataclasses.replace(probe, name=shapes.named(probe.name), threads=shapes.threads)


def operator_table(all_us: Latencies, shapes: Shapes = ALL_CORES) -> OperatorTable:
    """The table of the latencies of `table_probes`, microseconds by probe name."""
    own = shapes.named("")
    latency_us = {name.removesuffix(own): us for name, us in all_us.items() if name.endswith(own)}
    times: dict[str, dict[Key, float]] = {kind: {} for kind in KINDS}
    for width, batch, tokens in itertools.product(shapes.widths, BATCHES, _IMAGES):
        for kind, found in _Place(latency_us, shapes, width, batch, tokens).times():
            times[kind] |= found
    return OperatorTable(**times, source="measured")


@dataclass(frozen=True)
class _Place:
    """Differences between the models of one width, batch and number of tokens."""

    latency_us: Latencies
    shapes: Shapes
    width: int
    batch: int
    tokens: int

    def times(self) -> Iterator[tuple[str, dict[Key, float]]]:
        """Microseconds of every kind of part."""
        place, operator = (self.batch, self.tokens, self.width), operator_us(self.latency_us)
        base, least, low_rank = Layer("fp32", LOWEST), _FEWEST_OPERATORS * operator, self.shapes.ranks[0]
        lowest = {}
        for role in _ROLES:
            for_one = self.beyond(role, Layer("fp32", low_rank), base) / (low_rank - LOWEST)
            lowest[role] = 2 * operator + LOWEST * max(for_one, 0.0)
        ends, alone, both = self.us(None, None), self.us(base, None), self.us(base, base)
        blocks = self.shapes.widths[self.width].blocks
        yield "ends", {place: ends}
        yield "attention", {place: max((alone - ends) / blocks - 4 * lowest["square"], least)}
        yield "mlp", {place: max((both - alone) / blocks - 2 * lowest["wide"], least)}
        for precision, role in itertools.product(PRECISIONS, _ROLES):
            low, key = Layer(precision, LOWEST), (precision, *place)
            start = lowest[role] + self.beyond(role, low, base)  # with what int8 quantizes
            thin = {rank: start + self.beyond(role, Layer(precision, rank), low) for rank in self.shapes.ranks}
            tailor = {rank: self.beyond(role, Layer(precision, LOWEST, rank), low) for rank in TAILOR_RANKS}
            yield f"{role}_dense", {key: max(start + self.beyond(role, Layer(precision), low), operator)}
            for part, found in (("factored", {LOWEST: start} | thin), ("tailor", tailor)):
                rising = isotonic_regression(list(found.values())).x  # disturbed times may fall: their mean then
                times = dict(zip(found, rising.tolist(), strict=True))
                yield f"{role}_{part}", {(*key, rank): max(time, 2 * operator) for rank, time in times.items()}

    def beyond(self, role: str, layer: Layer, low: Layer) -> float:
        """What one layer of that role takes more than one that is stored like `low`.

        Those of attention where the MLPs' are like `low`, those of MLPs where attention's are like `layer`: a model of
        nothing but such layers is then the sum of its parts.
        """
        if role == "square":
            more, own = self.us(layer, low) - self.us(low, low), 4
        else:
            more, own = self.us(layer, layer) - self.us(layer, low), 2
        return more / self.shapes.widths[self.width].blocks / own

    def us(self, attention: Layer | None, mlp: Layer | None) -> float:
        return self.latency_us[model_of(self.shapes, self.width, attention, mlp).at(self.batch, self.tokens)]


def operator_us(latency_us: Latencies) -> float:
    """What starting one operator costs."""
    return (latency_us[f"tiny-{_TINY_OPERATORS}"] - latency_us["tiny-1"]) / (_TINY_OPERATORS - 1)


def call_us(latency_us: Latencies) -> float:
    """What a call of the runtime costs, with one operator."""
    return latency_us["tiny-1"]


def model_of(shapes: Shapes, width: int, attention: Layer | None, mlp: Layer | None) -> Model:
    """Without `attention` there are no blocks, without `mlp` the attention is alone."""
    own = shapes.widths[width]
    return Model(width, own.blocks if attention else 0, own.heads, attention or Layer("fp32"), mlp)


def _models(width: int, shapes: Shapes) -> Iterator[Model]:
    """Every model that a table is made of."""
    base = Layer("fp32", LOWEST)
    pairs: list[tuple[Layer | None, Layer | None]] = [(None, None), (base, None)]
    for precision in PRECISIONS:
        low = Layer(precision, LOWEST)
        others = [Layer(precision, rank) for rank in (*shapes.ranks, 0)]
        others += [Layer(precision, LOWEST, rank) for rank in TAILOR_RANKS]
        pairs += [(low, base), (low, low), *((other, mlp) for other in others for mlp in (low, other))]
    yield from (model_of(shapes, width, *pair) for pair in dict.fromkeys(pairs))


def _networks(shapes: Shapes) -> Iterator[Probe]:
    """The file of a batch is that of any other."""
    for width, tokens in itertools.product(shapes.widths, _IMAGES):
        side, channels, *_ = _IMAGES[tokens]
        for model, batch in itertools.product(_models(width, shapes), BATCHES):
            inputs: dict[str, tuple[str, tuple[int, ...]]] = {
                "sample": ("float32", (batch, channels, side, side)), "step_index": ("int32", (batch,))
            }  # fmt: skip
            if model.attention.tailor_rank:
                inputs["class_index"] = ("int64", (batch,))
            build = functools.partial(model.build, tokens)
            yield Probe(model.at(batch, tokens), model.file(tokens), build, inputs)


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
