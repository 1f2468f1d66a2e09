"""The denoiser as NPUs take it: one fixed batch, indices of 32 bits, constants where a graph for CPUs would compute.

It is built from the truncated checkpoint, and computes the same function as the plain model:

    matrices     two-dimensional constants in Gemm, which NPUs quantize per channel, with the bias in it
    tailors      thin factors picked by class, scaled so that every component spans [-1, 1]; the scales, and a row of
                 zeros for the null class, lie in a small table of their own
    modulation   one table per vector, [S, 1, D], so that each has a range of its own; 1 + scale is stored
    attention    the scale of the scores lies in the queries' weights

Symbols: B batch, N tokens, D width, K kept classes, S sampler evaluations, H heads, n x m a matrix, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.plain import Origin
from kind_edge.exporters.onnx_graph import OPSET
from kind_edge.model.sampling import step_span
from kind_edge.model.spec import ModelSpec

Floats = NDArray[np.float32]


def to_static(origin: Origin) -> onnx.ModelProto:
    """The graph in fp32: sample float32 [B, ch, H, W], step_index int32 [B], class_index int32 [B] where it switches
    -> prediction. B is 2 where every step is guided, else 1.

    With a label embedding modulation is baked per step and class.
    """
    spec, plan = origin.truncated.spec, origin.plan
    build = _Builder(origin, batch=plan.evaluations_per_step)
    x = build.tokens()
    for block in range(spec.depth):
        for kind in spec.block_branches(block):
            x = build.branch(x, block, kind)
    build.unpatchify(x)
    graph = build.graph
    inputs = [
        helper.make_tensor_value_info(
            "sample", TensorProto.FLOAT, [build.batch, spec.channels, spec.image_size, spec.image_size]
        ),
        helper.make_tensor_value_info("step_index", TensorProto.INT32, [build.batch]),
    ]
    if build.switches:
        inputs.append(helper.make_tensor_value_info("class_index", TensorProto.INT32, [build.batch]))
    shape = [build.batch, spec.output_channels, spec.image_size, spec.image_size]
    outputs = [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, shape)]
    proto = helper.make_graph(graph.nodes, "denoiser", inputs, outputs, graph.initializers)
    model = helper.make_model(
        proto, producer_name="kind-edge", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10
    )
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


class _Graph:
    """Nodes and constants in order; every node is named like its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._known: set[str] = set()

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """A constant; a name that is known already stands for the same values."""
        if name not in self._known:
            self._known.add(name)
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    def reshape(self, x: str, shape: Sequence[int], output: str) -> str:
        name = "shape." + "x".join(map(str, shape))
        return self.add("Reshape", [x, self.constant(name, np.array(shape, np.int64))], output)


class _Builder:
    """The parts of one denoiser, in the order of its forward pass."""

    def __init__(self, origin: Origin, batch: int) -> None:
        self.spec: ModelSpec = origin.truncated.spec
        self.tensors, self.plan, self.batch = origin.truncated.tensors, origin.plan, batch
        self.switches = self.plan.form == "switch"
        self.graph = _Graph()
        self.modulation = iter(_modulation_tables(origin))
        self.row = self._table_row() if self.spec.label_embedding and self.switches else "step_index"

    def _table_row(self) -> str:
        """The row of a step and class: step_index * labels + class_index."""
        labels = self.graph.constant("modulation.labels", np.array(self._labels, np.int32))
        start = self.graph.add("Mul", ["step_index", labels], "modulation.step")
        return self.graph.add("Add", [start, "class_index"], "modulation.row")

    @property
    def _labels(self) -> int:
        return len(self.plan.classes) + self.plan.null_branch

    def tokens(self) -> str:
        """sample [B, ch, H, W] -> [B, N, D]."""
        spec, add = self.spec, self.graph.add
        weight = self.graph.constant("patch_embed.weight", _floats(self.tensors["patch_embed.weight"]))
        bias = self.graph.constant("patch_embed.bias", _floats(self.tensors["patch_embed.bias"]))
        side = [spec.patch_size] * 2
        patches = add("Conv", ["sample", weight, bias], "patches", kernel_shape=side, strides=side)  # [B, D, s, s]
        flat = self.graph.reshape(patches, [self.batch, spec.width, spec.tokens], "patches.flat")
        x = add("Transpose", [flat], "patches.tokens", perm=[0, 2, 1])
        position = self.graph.constant("pos_embed", _floats(self.tensors["pos_embed"])[None])
        return add("Add", [x, position], "tokens")

    def branch(self, x: str, block: int, kind: str) -> str:
        """x [B, N, D] -> [B, N, D]: the residual of an attention or an MLP."""
        add, name = self.graph.add, f"blocks.{block}.{kind}"
        shift, scale, gate = (self._modulation(f"{name}.{part}") for part in ("shift", "scale", "gate"))
        h = self._modulated(x, name, shift, scale, 1e-6 if kind == "attn" else self.spec.mlp_norm_eps)
        h = self._attention(h, name) if kind == "attn" else self._mlp(h, name)
        return add("Add", [x, add("Mul", [gate, h], f"{name}.gated")], f"{name}.out")

    def _modulation(self, name: str) -> str:
        values = next(self.modulation)  # [S, D]
        table = self.graph.constant(f"{name}.table", (values + name.endswith(".scale"))[:, None].astype(np.float32))
        return self.graph.add("Gather", [table, self.row], name, axis=0)  # [B, 1, D]

    def _modulated(self, x: str, name: str, shift: str, scale: str, epsilon: float) -> str:
        width = self.spec.width
        ones = self.graph.constant("norm.ones", np.ones(width, np.float32))
        zeros = self.graph.constant("norm.zeros", np.zeros(width, np.float32))
        h = self.graph.add("LayerNormalization", [x, ones, zeros], f"{name}.norm", axis=-1, epsilon=epsilon)
        return self.graph.add("Add", [self.graph.add("Mul", [h, scale], f"{name}.scaled"), shift], f"{name}.in")

    def _attention(self, x: str, name: str) -> str:
        add, spec = self.graph.add, self.spec
        heads = [self.batch, spec.tokens, spec.heads, spec.width // spec.heads]
        orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
        split = {}
        for part, order in orders.items():
            factor = heads[-1] ** -0.5 if part == "q" else 1.0
            apart = self.graph.reshape(self._linear(x, f"{name}.{part}", factor), heads, f"{name}.{part}.apart")
            split[part] = add("Transpose", [apart], f"{name}.{part}.heads", perm=order)
        scores = add("MatMul", [split["q"], split["k"]], f"{name}.scores")  # [B, H, N, N]
        mixed = add("MatMul", [add("Softmax", [scores], f"{name}.softmax", axis=-1), split["v"]], f"{name}.mixed")
        back = add("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
        together = self.graph.reshape(back, [self.batch, spec.tokens, spec.width], f"{name}.together")
        return self._linear(together, f"{name}.o")

    def _mlp(self, x: str, name: str) -> str:
        hidden = self.graph.add("Gelu", [self._linear(x, f"{name}.fc1")], f"{name}.gelu", approximate="tanh")
        return self._linear(hidden, f"{name}.fc2")

    def _linear(self, x: str, name: str, factor: float = 1.0) -> str:
        """x [B, N, m] -> [B, N, n], times `factor`."""
        add, chosen = self.graph.add, self.plan.matrices[name]
        u, s, v = (self.tensors[self.spec.factor_name(name, part)].double().numpy() for part in "UsV")
        rows, bias = self.batch * self.spec.tokens, self.tensors[f"{name}.bias"].double().numpy() * factor
        y = None
        if chosen.storage == "dense" or chosen.shared_rank:
            y = self.graph.reshape(x, [rows, len(v)], f"{name}.rows")
            if chosen.storage == "dense":
                y = self._gemm(y, f"{name}.shared.weight", v * (s * factor) @ u.T, f"{name}.bias", bias)
            else:
                y = self._gemm(y, f"{name}.shared.v", v * (s * factor))
                y = self._gemm(y, f"{name}.shared.u", u.T, f"{name}.bias", bias)
            y = self.graph.reshape(y, [self.batch, self.spec.tokens, len(u)], f"{name}.shared")
        picked = self._tailors(x, name, factor)
        if y is None:
            constant = self.graph.constant(f"{name}.bias", bias.astype(np.float32))
            y, picked = (picked, constant) if picked else (constant, None)
        return y if picked is None else add("Add", [y, picked], f"{name}.out")

    def _gemm(self, x: str, name: str, weight: NDArray[Any], bias_name: str = "", bias: Any = None) -> str:
        """x [B N, m] times a constant m x n, stored n x m as NPUs want it."""
        inputs = [x, self.graph.constant(name, weight.T.astype(np.float32))]
        if bias_name:
            inputs.append(self.graph.constant(bias_name, bias.astype(np.float32)))
        return self.graph.add("Gemm", inputs, f"{name}.product", transB=1)

    def _tailors(self, x: str, name: str, factor: float) -> str | None:
        """The picked tailor of x [B, N, m]: thin factors within [-1, 1], and the scale of each component."""
        add = self.graph.add
        u, s, v = (self.tensors[f"{name}.tailors.{part}"].double().numpy() for part in "UsV")  # K x n x r, K x r
        if not s.shape[-1]:
            return None
        tops = [np.maximum(np.abs(side).max(1), 1e-12) for side in (u, v)]  # K x r each
        parts = {
            "v": v / tops[1][:, None],  # K x m x r
            "scale": (s * tops[0] * tops[1] * factor)[:, None],  # K x 1 x r
            "u": (u / tops[0][:, None]).transpose(0, 2, 1),  # K x r x n
        }
        picked = {}
        for part, values in parts.items():
            if self.plan.null_branch:
                values = np.concatenate([values, np.zeros_like(values[:1])])
            table = self.graph.constant(f"{name}.tailors.{part}", values.astype(np.float32))
            picked[part] = add("Gather", [table, "class_index"], f"{name}.tailors.{part}.picked", axis=0)
        thin = add("MatMul", [x, picked["v"]], f"{name}.tailors.thin")
        scaled = add("Mul", [thin, picked["scale"]], f"{name}.tailors.scaled")
        return add("MatMul", [scaled, picked["u"]], f"{name}.tailors.out")

    def unpatchify(self, x: str) -> None:
        """x [B, N, D] -> prediction [B, ch_out, H, W]; token values are ordered (ch, P, P)."""
        spec, add = self.spec, self.graph.add
        shift, scale = (self._modulation(f"final.{part}") for part in ("shift", "scale"))
        h = self._modulated(x, "final", shift, scale, 1e-6)
        rows = self.graph.reshape(h, [self.batch * spec.tokens, spec.width], "final.rows")
        weight, bias = (self.tensors[f"final.linear.{part}"].double().numpy() for part in ("weight", "bias"))
        y = self._gemm(rows, "final.weight", weight.T, "final.bias", bias)
        apart = self.graph.reshape(y, [self.batch, spec.tokens, spec.patch_values], "final.values")
        values = add("Transpose", [apart], "final.channels", perm=[0, 2, 1])
        side = spec.image_size // spec.patch_size
        patches = self.graph.reshape(values, [self.batch, spec.patch_values, side, side], "final.patches")
        add("DepthToSpace", [patches], "prediction", blocksize=spec.patch_size, mode="CRD")


def _floats(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.float().numpy(), np.float32)


@torch.no_grad()
def _modulation_tables(origin: Origin) -> list[Floats]:
    """Modulation vectors in the order of the forward pass, [S, D] each; rows of every label with a label embedding."""
    model, plan = origin.truncated.model(), origin.plan
    timesteps = origin.timesteps.float()
    labels = torch.zeros(1, dtype=torch.long)
    if origin.truncated.spec.label_embedding:  # a folded model has one label for all, kept where the null label was
        kept = len(plan.classes)
        labels = torch.arange(kept + plan.null_branch) if plan.form == "switch" else torch.full((1,), kept)
    t = timesteps.repeat_interleave(len(labels))
    c = model.condition(t, labels.repeat(len(timesteps)), step_span(origin.truncated.spec, plan.steps, t))
    rows = torch.cat([layer(c) for layer in model.modulators()], -1)  # [S, (3 branches + 2) D]
    return [_floats(part) for part in rows.split(origin.truncated.spec.width, -1)]
