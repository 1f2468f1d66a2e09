"""What the exported graph's layout is worth: each feature taken back alone, and all of them, in one interleaved run.

Models have random weights, written by the exporter's own writer: the shipped shape with tailors of two classes, and
blocks of DiT-B/2. A ratio is the time of a graph over that of the graph as exported, round by round, so that what slows
the machine for a while slows both; its spread are the quartiles over the rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from kind_edge.budget.denoiser_graph import BakedModulation, Denoiser, Tailors, Writer, shared_product
from kind_edge.budget.onnx_writer import Floats, Value
from kind_edge.budget.probe_graph import Layer, Network, chain, random_denoiser
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.session import open_session
from kind_edge.exporters.onnx_sampler import to_sampler

FEATURES: Mapping[str, str] = {
    "attention": "attention is one operator",
    "biases": "biases follow their products, tailors come after",
    "modulation": "one split cuts the row of modulation, 1 + scale is stored",
    "tailors": "tailors of all matrices are gathered at once",
}
_BLOCKS: Any = (("attn", "mlp"),)
_SHIPPED = Network(28, 1, 4, 1, 128, 4, 512, _BLOCKS * 6, Layer("fp32"))
_LARGE = Network(32, 4, 2, 8, 768, 12, 3072, _BLOCKS * 3, Layer("fp32"))
MODELS = (
    # name, shape, rank of the matrices (0: dense) and of tailors, batches
    ("shipped shape, 2 classes", _SHIPPED, 0, 8, (1,)),
    ("three blocks of DiT-B/2, dense", _LARGE, 0, 0, (1, 2)),
    ("three blocks of DiT-B/2, rank 154", _LARGE, 154, 0, (1, 2)),
)
PRECISIONS = ("fp32", "int8")
ROUNDS, ROUND_S = 15, 0.15


class Without(Writer):
    """The graph with some features taken back: as one would write it after the formulas."""

    def __init__(self, model: Denoiser, features: Iterable[str]) -> None:
        self.features = frozenset(features)
        if "modulation" in self.features:
            model = dataclasses.replace(model, modulation=_plain_scales(model))
        super().__init__(model, fused_attention="attention" not in self.features)

    def gather_tailors(self, index: Value, is_open: Value | None) -> Tailors:
        kind = _Each if "tailors" in self.features else Tailors
        return kind(self.graph, self.model.linears, index, is_open)

    def cut_modulation(self, row: Value) -> Iterable[Value]:
        if "modulation" not in self.features:
            yield from super().cut_modulation(row)
            return
        graph, width, start = self.graph, self.model.width, 0
        for parts in [*(3 * len(branches) for branches in self.model.blocks), 2]:
            ends = [graph.integers(start), graph.integers(start + parts * width), graph.integers(1)]
            own = graph.node("Unsqueeze", [graph.node("Slice", [row, *ends]), graph.integers(1)])
            for index, vector in enumerate(graph.nodes("Split", [own], parts, axis=2, num_outputs=parts)):
                yield graph.node("Add", [vector, graph.number(1)]) if index % 3 == 1 else vector
            start += parts * width

    def linear(self, x: Value, name: str) -> Value:
        layer = self.model.linears[name]
        if "biases" not in self.features or not layer.shared:
            return super().linear(x, name)
        y = self.tailors.add(name, x, shared_product(self.graph, layer, x, name))
        return self.graph.node("Add", [str(y), self.graph.constant(layer.bias, f"{name}.bias")])


class _Each(Tailors):
    """A table for every factor of every matrix."""

    def tables(self) -> dict[str, dict[str, Floats]]:
        whole = super().tables()
        return {
            f"{table.removesuffix('.int8')}.{name}{'.int8' if table.endswith('.int8') else ''}": {name: rows}
            for table, parts in whole.items()
            for name, rows in parts.items()
        }


def _plain_scales(model: Denoiser) -> BakedModulation:
    """The same modulation, scale in the place of 1 + scale."""
    assert isinstance(model.modulation, BakedModulation)
    branches = sum(map(len, model.blocks))
    ones = np.repeat([*[0.0, 1.0, 0.0] * branches, 0.0, 1.0], model.width)
    return BakedModulation((model.modulation.table - ones).astype(np.float32))


def graph(rounds: int = ROUNDS) -> dict[str, Any]:
    """Every model and precision in turn; about five minutes."""
    rows, samplers = [], []
    with TemporaryDirectory(prefix="kind-edge-graph-") as name:
        for text, shape, rank, tailor_rank, batches in MODELS:
            for precision in PRECISIONS:
                print(f"{text}, {precision} ...", file=sys.stderr)
                layer = Layer(precision, rank, tailor_rank)
                model = random_denoiser(dataclasses.replace(shape, layer=layer))
                files = _write(model, Path(name))
                floor_flops = _product_flops(model)
                rate = _rate(shape.width, precision, Path(name))
                for batch in batches:
                    calls = {key: _call(path, batch) for key, path in files.items()}
                    told = {"model": text, "precision": precision, "batch": batch}
                    floor_ms = 1e3 * batch * floor_flops / rate
                    rows += [told | row | {"products_ms": floor_ms} for row in _compare(calls, rounds)]
        samplers = [row for threads in (1, 2) for row in _sampler(threads, Path(name), rounds)]
    return {"graph": rows, "sampler": samplers}


def _write(model: Denoiser, folder: Path) -> dict[str, Path]:
    """The graph as exported, without each feature that it has, and without all."""
    tailored = any(layer.tailor_v is not None for layer in model.linears.values())
    known = [feature for feature in FEATURES if tailored or feature != "tailors"]
    variants = {"as exported": []} | {f"without {each}": [each] for each in known} | {"without all": known}
    files = {}
    for name, features in variants.items():
        files[name] = folder / f"{name.replace(' ', '-')}.onnx"
        onnx.save_model(Without(model, features).proto(), files[name])
    return files


def _call(path: Path, batch: int, threads: int = 1) -> Callable[[], Any]:
    session, random = open_session(path, threads), np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [batch if isinstance(size, str) else size for size in value.shape]
        whole = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}.get(value.type)
        feeds[value.name] = np.zeros(shape, whole) if whole else random.standard_normal(shape, dtype=np.float32)
    return lambda: session.run(None, feeds)


def _compare(calls: Mapping[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """Times in turn; ratios to the first, round by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    work: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    for _ in range(rounds):
        for name, call in calls.items():
            own_ms, work_ms = _calm_ms(call)
            times[name].append(own_ms)
            work[name].append(work_ms)
    first = times[next(iter(calls))]
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else (ratios[0],) * 3
        spread = {"ratio": statistics.median(ratios), "low": low, "high": high}
        rows.append({"graph": name, "ms": min(own), "processor_ms": min(work[name]), **spread})
    return rows


def _calm_ms(call: Callable[[], Any]) -> tuple[float, float]:
    """The first quintile of single calls, as what disturbs them for a moment does not count; processor time of each."""
    own, until, worked = [], time.perf_counter() + ROUND_S, time.process_time()
    while time.perf_counter() < until or len(own) < 3:
        start = time.perf_counter()
        call()
        own.append(1e3 * (time.perf_counter() - start))
    return sorted(own)[len(own) // 5], 1e3 * (time.process_time() - worked) / len(own)


def _product_flops(model: Denoiser) -> int:
    """Of the products with block matrices and tailors, at batch 1."""
    values = 0
    for layer in model.linears.values():
        values += sum(weight.size for weight in layer.shared)
        values += sum(side[0].size for side in (layer.tailor_v, layer.tailor_u) if side is not None)
    return 2 * model.tokens * values


def _rate(width: int, precision: str, folder: Path) -> float:
    """FLOP/s of products alone at that width: what the runtime's kernels can do."""
    pairs, tokens = 4, 49 if width < 512 else 256
    path = folder / "chain.onnx"
    path.write_bytes(chain(width, 4 * width, pairs, Layer(precision)))
    session, x = open_session(path, 1), np.ones((1, tokens, width), np.float32)
    best_ms = min(_calm_ms(lambda: session.run(None, {"x": x}))[0] for _ in range(3))
    return 2 * pairs * 2 * tokens * width * 4 * width / best_ms * 1e3


def _sampler(threads: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """sampler.onnx beside a loop in Python over denoiser.onnx, at the shipped shape."""
    rows, table = [], sampler_table("euler", "flow", 4)
    for precision in PRECISIONS:
        layer = Layer(precision, 0, 8)
        proto = Writer(random_denoiser(dataclasses.replace(_SHIPPED, layer=layer))).proto()
        onnx.save_model(proto, folder / "denoiser.onnx")
        onnx.save_model(to_sampler(proto, table, None), folder / "sampler.onnx")
        one = _call(folder / "denoiser.onnx", 1, threads)
        calls = {
            "loop in Python": lambda one=one: [one() for _ in range(len(table.timestep))],
            "sampler.onnx": _call(folder / "sampler.onnx", 1, threads),
        }
        rows += [{"precision": precision, "threads": threads, **row} for row in _compare(calls, rounds)]
    return rows
