"""The deployed denoiser as an ONNX graph: what is exported, and, with random weights, what calibration measures.

Few operators, as most of a small model's time is starting them: one gather and one split bring modulation and tailors
to where they are used, 1 + scale is stored, biases follow their products (the runtime then fuses them), and attention
is one operator.

Symbols: B batch (free in the graph), N tokens, D width, K kept classes, S sampler evaluations, m inputs, n outputs,
r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kind_edge.budget.onnx_writer import FLOAT, INT32, INT64, Floats, Graph, Value

TAILORS = "tailors"
"""Names of the tables of tailors start like this."""

_GATHERED_FLOATS = 2**18
"""Of an image's tailors at once: what is gathered stays in the caches next to a core, and takes little memory."""


class Affine(NamedTuple):
    """A layer of its own: weight m x n as it is multiplied, and bias n."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class Linear:
    """A block's layer: a shared weight (m x n, or thin m x r and r x n, or none), tailors, and a bias.

    A tailor's components are rows: `tailor_v` K x r x m, `tailor_u` K x r x n.
    Thin weights that blocks have in `common` are stored once, under that name; `scale` r is what a block has of them.
    """

    shared: tuple[Floats, ...]
    bias: Floats
    tailor_v: Floats | None = None
    tailor_u: Floats | None = None
    precision: str = "fp32"
    common: str = ""
    scale: Floats | None = None


@dataclass(frozen=True)
class BakedModulation:
    """Modulation by step, S x W, or by label and step, labels x S x W. May be fp16."""

    table: Any


@dataclass(frozen=True)
class ModulationNetwork:
    """Timestep embedding and adaLN layers, all in one; with `labels`, rows x D, also the label's."""

    frequencies: Floats
    first: Affine
    second: Affine
    adaln: Affine
    labels: Floats | None = None


@dataclass(frozen=True)
class Denoiser:
    """Everything that a graph holds. `linears` by name ("blocks.0.attn.q"), of the branches that are left.

    `blocks` lists the branches of each block. Modulation has, for every branch that is left, D values of shift, of
    1 + scale and of gate, and in the end shift and 1 + scale of the final layer. `switches`: there is a class index.
    """

    image_size: int
    channels: int
    patch_size: int
    output_channels: int
    width: int
    heads: int
    blocks: tuple[tuple[str, ...], ...]
    linears: Mapping[str, Linear]
    patches: Affine
    positions: Floats
    modulation: BakedModulation | ModulationNetwork
    final: Affine
    switches: bool
    kept_classes: int = 1
    null_branch: bool = False
    mlp_norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def write(model: Denoiser, fused_attention: bool = True) -> Any:
    """The `onnx.ModelProto`; names, shapes and types as in the bundle contract.

    Without `fused_attention` there are the operators that Attention stands for.
    """
    return Writer(model, fused_attention).proto()


@dataclass
class Tailors:
    """The tailors that the class index picks, of as many small layers at once as fit: a table per width and side."""

    graph: Graph
    linears: Mapping[str, Linear]
    index: Value
    is_open: Value | None
    _factors: dict[str, Value] = field(default_factory=dict)

    def tables(self) -> dict[str, dict[str, Floats]]:
        """What is gathered at once: name of a table -> factors by name, K x r x width."""
        tables: dict[str, dict[str, Floats]] = {}
        group = floats = 0
        for name, layer in self.linears.items():
            sides = {side: rows for side, rows in (("v", layer.tailor_v), ("u", layer.tailor_u)) if rows is not None}
            own = sum(rows[0].size for rows in sides.values())
            group, floats = (group + 1, own) if floats and floats + own > _GATHERED_FLOATS else (group, floats + own)
            for side, rows in sides.items():
                what = f"{TAILORS}.{group}.{side}.{rows.shape[2]}" + (".int8" if layer.precision == "int8" else "")
                tables.setdefault(what, {})[f"{name}.{TAILORS}.{side}"] = rows
        return tables

    def _factor(self, name: str) -> Value:
        """A factor of what is gathered when its first is wanted."""
        if name not in self._factors:
            self._gather(*next((table, parts) for table, parts in self._tables.items() if name in parts))
        return self._factors[name]

    @functools.cached_property
    def _tables(self) -> dict[str, dict[str, Floats]]:
        return self.tables()

    def _gather(self, name: str, parts: Mapping[str, Floats]) -> None:
        graph, table = self.graph, np.concatenate(list(parts.values()), 1)
        if name.endswith(".int8"):  # as the quantizer writes it, here of random weights
            steps = np.maximum(np.abs(table).max(2, keepdims=True), 1e-9) / np.float32(127)
            integers = graph.constant(np.rint(table / steps).astype(np.int8), name)
            wide = graph.node("Cast", [graph.node("Gather", [integers, self.index], axis=0)], to=FLOAT)
            scale = graph.node("Gather", [graph.constant(steps, f"{name}.scale"), self.index], axis=0)
            picked = graph.node("Mul", [wide, scale])
        else:
            picked = graph.node("Gather", [graph.constant(table, name), self.index], axis=0)
        if self.is_open is not None and ".v." in name:
            picked = graph.node("Mul", [picked, self.is_open])
        ranks = [rows.shape[1] for rows in parts.values()]
        names = graph.nodes("Split", [picked, graph.integers(*ranks)], list(parts), axis=1)
        self._factors |= dict(zip(parts, names, strict=True))

    def add(self, name: str, x: Value, y: Value | None) -> Value | None:
        """y + (x V) U of a layer's tailor; y, where it has none."""
        if self.linears[name].tailor_v is None:
            return y
        v, u = (self._factor(f"{name}.{TAILORS}.{side}") for side in "vu")
        thin = self.graph.node("MatMul", [x, self.graph.node("Transpose", [v], perm=[0, 2, 1])])
        tailored = self.graph.node("MatMul", [thin, u])
        return tailored if y is None else self.graph.node("Add", [y, tailored])


def shared_product(graph: Graph, layer: Linear, x: Value, name: str | None = None) -> Value | None:
    """x times the shared weight, one product or two; None where there is none."""
    if not layer.shared:
        return None
    parts = ("weight",) if len(layer.shared) == 1 else ("v", "u")
    where = layer.common or (f"{name}.shared" if name else "")
    for part, weight in zip(parts, layer.shared, strict=True):
        x = graph.product(x, weight, layer.precision, f"{where}.{part}" if where else None)
        if part == "v" and layer.scale is not None:
            x = graph.node("Mul", [x, graph.constant(layer.scale, f"{name}.shared.s")])
    return x


class Writer:
    """Writes one graph, from the inputs to the prediction."""

    def __init__(self, model: Denoiser, fused_attention: bool = True) -> None:
        self.model, self.graph, self.fused_attention = model, Graph(), fused_attention
        self.tailors = self.gather_tailors(*self._classes())
        self.modulation = iter(self.cut_modulation(self._modulation()))

    def proto(self) -> Any:
        model, side = self.model, self.model.image_size
        baked = isinstance(model.modulation, BakedModulation)
        inputs: list[tuple[str, int, Sequence[int | str]]] = [
            ("sample", FLOAT, ["batch", model.channels, side, side]),
            ("step_index", INT32, ["batch"]) if baked else ("timestep", FLOAT, ["batch"]),
        ]
        if model.switches:
            inputs.append(("class_index", INT64, ["batch"]))
        x = self._patches()
        for block, branches in enumerate(model.blocks):
            for kind in branches:
                x = self._branch(x, block, kind)
        self._unpatchify(x)
        return self.graph.model("denoiser", inputs, {"prediction": ["batch", model.output_channels, side, side]})

    def gather_tailors(self, index: Value, is_open: Value | None) -> Tailors:
        return Tailors(self.graph, self.model.linears, index, is_open)

    def cut_modulation(self, row: Value) -> Iterable[Value]:
        """[B, W] in vectors [B, 1, D], in the order in which they are used."""
        count = 3 * sum(map(len, self.model.blocks)) + 2
        row = self.graph.node("Unsqueeze", [row, self.graph.integers(1)])
        return self.graph.nodes("Split", [row], count, axis=2, num_outputs=count)

    def _classes(self) -> tuple[Value, Value | None]:
        """The row of every image's tailor, and 0 for the null class or 1, [B, 1, 1]; None: there is no null class."""
        graph, tailored = self.graph, any(layer.tailor_v is not None for layer in self.model.linears.values())
        if not (tailored and self.model.null_branch):
            return "class_index", None
        null = graph.constant(np.array(self.model.kept_classes, np.int64), "null_index")
        known = graph.node("Less", ["class_index", null])
        index = graph.node("Where", [known, "class_index", graph.constant(np.array(0, np.int64), "first_index")])
        return index, graph.node("Reshape", [graph.node("Cast", [known], to=FLOAT), graph.integers(-1, 1, 1)])

    def _modulation(self) -> Value:
        """[B, W]."""
        graph, given = self.graph, self.model.modulation
        if isinstance(given, ModulationNetwork):
            return self._conditioned(given)
        table = graph.constant(given.table, "modulation.table")
        if given.table.ndim == 3:
            step = graph.node("Cast", ["step_index"], to=INT64)
            both = [graph.node("Unsqueeze", [each, graph.integers(1)]) for each in ("class_index", step)]
            row = graph.node("GatherND", [table, graph.node("Concat", both, axis=1)])
        else:
            row = graph.node("Gather", [table, "step_index"], axis=0)
        return row if given.table.dtype == np.float32 else graph.node("Cast", [row], to=FLOAT)

    def _conditioned(self, network: ModulationNetwork) -> Value:
        graph = self.graph
        timestep = graph.node("Unsqueeze", ["timestep", graph.integers(1)])
        angles = graph.node("Mul", [timestep, graph.constant(network.frequencies, "modulation.frequencies")])
        x = graph.node("Concat", [graph.node("Cos", [angles]), graph.node("Sin", [angles])], axis=1)
        x = self._silu(self._affine(x, network.first, "modulation.t_embed.fc1"))
        x = self._affine(x, network.second, "modulation.t_embed.fc2")
        if network.labels is not None:
            labels = graph.constant(network.labels, "modulation.y_embed.weight")
            x = graph.node("Add", [x, graph.node("Gather", [labels, "class_index"], axis=0)])
        return self._affine(self._silu(x), network.adaln, "modulation.adaln")

    def _affine(self, x: Value, layer: Affine, name: str) -> Value:
        """Of rows [B, m]."""
        constants = [self.graph.constant(values, f"{name}.{part}") for part, values in layer._asdict().items()]
        return self.graph.node("Gemm", [x, *constants])

    def _silu(self, x: Value) -> Value:
        return self.graph.node("Mul", [x, self.graph.node("Sigmoid", [x])])

    def _patches(self) -> Value:
        """sample [B, ch, H, W] -> tokens [B, N, D]."""
        graph, patch = self.graph, self.model.patch_size
        constants = [graph.constant(v, f"patch_embed.{part}") for part, v in self.model.patches._asdict().items()]
        x = graph.node(
            "Conv", ["sample", *constants],
            strides=[patch, patch], kernel_shape=[patch, patch], dilations=[1, 1], group=1, pads=[0, 0, 0, 0],
        )  # fmt: skip
        x = graph.node("Reshape", [x, graph.integers(-1, self.model.width, self.model.tokens)])
        x = graph.node("Transpose", [x], perm=[0, 2, 1])
        return graph.node("Add", [x, graph.constant(self.model.positions, "pos_embed")])

    def _branch(self, x: Value, block: int, kind: str) -> Value:
        """x + gate * branch(x)."""
        shift, factor, gate = (next(self.modulation) for _ in range(3))
        y = self._modulate(x, shift, factor, self.model.mlp_norm_eps if kind == "mlp" else 1e-6)
        name = f"blocks.{block}.{kind}"
        y = self._attention(y, name) if kind == "attn" else self._mlp(y, name)
        return self.graph.node("Add", [x, self.graph.node("Mul", [y, gate])])

    def _modulate(self, x: Value, shift: Value, factor: Value, eps: float) -> Value:
        graph = self.graph
        ones = graph.constant(np.ones(self.model.width, np.float32), "ones")
        norm = graph.node("LayerNormalization", [x, ones], axis=-1, epsilon=eps)
        return graph.node("Add", [graph.node("Mul", [norm, factor]), shift])

    def _attention(self, x: Value, name: str) -> Value:
        graph, heads = self.graph, self.model.heads
        q, k, v = (self.linear(x, f"{name}.{part}") for part in "qkv")
        if self.fused_attention:
            y = graph.node("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads)
        else:
            split = graph.integers(0, 0, heads, -1)
            orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
            q, k, v = (
                graph.node("Transpose", [graph.node("Reshape", [part, split])], perm=order)
                for part, order in zip((q, k, v), orders, strict=True)
            )
            scores = graph.node("Mul", [graph.node("MatMul", [q, k]), graph.number((self.model.width / heads) ** -0.5)])
            y = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), v])
            y = graph.node("Reshape", [graph.node("Transpose", [y], perm=[0, 2, 1, 3]), graph.integers(0, 0, -1)])
        return self.linear(y, f"{name}.o")

    def _mlp(self, x: Value, name: str) -> Value:
        hidden = self.graph.node("Gelu", [self.linear(x, f"{name}.fc1")], approximate="tanh")
        return self.linear(hidden, f"{name}.fc2")

    def linear(self, x: Value, name: str) -> Value:
        """x [B, N, m] -> [B, N, n]. The bias comes first, to be fused with the product."""
        graph, layer = self.graph, self.model.linears[name]
        bias = graph.constant(layer.bias, f"{name}.bias")
        y = shared_product(graph, layer, x, name)
        if y is not None:
            return self.tailors.add(name, x, graph.node("Add", [y, bias])) or y
        y = self.tailors.add(name, x, None)
        if y is not None:
            return graph.node("Add", [y, bias])
        rows = graph.node("Concat", [graph.node("Shape", [x], end=2), graph.integers(len(layer.bias))], axis=0)
        return graph.node("Expand", [bias, rows])

    def _unpatchify(self, x: Value) -> None:
        graph, model = self.graph, self.model
        values, side = model.output_channels * model.patch_size**2, model.image_size // model.patch_size
        x = self._modulate(x, next(self.modulation), next(self.modulation), 1e-6)
        x = graph.node(
            "Add",
            [graph.product(x, model.final.weight, name="final.weight"), graph.constant(model.final.bias, "final.bias")],
        )
        x = graph.node(
            "Reshape", [graph.node("Transpose", [x], perm=[0, 2, 1]), graph.integers(-1, values, side, side)]
        )
        graph.node("DepthToSpace", [x], "prediction", blocksize=model.patch_size, mode="CRD")
