"""Dynamic int8 of an exported denoiser: constant matrices per output channel, tailors per component.

ONNX Runtime quantizes products with constant weights only. Tailors are gathered by class at run time, so they are
stored as int8 with one scale per class and component, and widened after the gather: what belongs to one class is
quantized by itself, and changing one tailor changes no other class by a bit.

A plan may keep some block matrices in fp32: their products and their tailors are left as they are.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kind_edge.budget.denoiser_graph import TAILORS
from kind_edge.model.names import SHARED, weight_type

LARGEST = 127
FINAL = "final"
"""The last layer's matrix. It stays in fp32: a few kB, and 2 to 6 dB less error at all but the last steps."""


def quantize_int8(model: onnx.ModelProto, fp32_matrices: Collection[str] = ()) -> onnx.ModelProto:
    """A new model with int8 weights, but for those of `fp32_matrices` ("blocks.0.attn.q"); `model` is not changed.

    Weights that a matrix has in common with those of other blocks stay in fp32 with it.
    Requires: no value_info left (the quantizer would find its shapes contradicted). Ensures: same inputs and outputs.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = tuple(f"{name}." for name in fp32_matrices)
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save_model(model, source)
        with _without_advice():
            quantize_dynamic(
                source,
                target,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_exclude=[_last_product(model), *_products_of(model, weights_of(fp32_matrices))],
                extra_options={"MatMulConstBOnly": True},
            )
        quantized = onnx.load_model(target)
    del quantized.graph.value_info[:], quantized.metadata_props[:]
    quantized.producer_name, quantized.producer_version = model.producer_name, ""
    return quantize_gathered(quantized, kept)


def weights_of(matrices: Collection[str]) -> tuple[str, ...]:
    """What the names of these matrices' weights begin with: their own, or what they have in common with others."""
    own = [f"{name}." for name in matrices]
    return (*own, *dict.fromkeys(f"{SHARED}.{weight_type(name)}." for name in matrices))


def _products_of(model: onnx.ModelProto, prefixes: tuple[str, ...]) -> list[str]:
    """Names of the products whose constant weight's name starts like one of these."""
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    return [str(node.name) for node in products if prefixes and node.input[1].startswith(prefixes)]


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """The quantizer advises, through the root logger, a pre-processing that is a matter of other graphs than ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def _last_product(model: onnx.ModelProto) -> str:
    """The final layer's node, the last that has a constant matrix."""
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]
    return str(products[-1].name)


def quantize_gathered(model: onnx.ModelProto, kept: tuple[str, ...]) -> onnx.ModelProto:
    """Store the tables of tailors (K x rows x width, a component a row) as int8.

    Rows of matrices whose names start like one of `kept` stay as they are, in a table of their own.
    """
    values = {t.name: t for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    splits = {node.name: _gather_of(node, producers) for node in model.graph.node if node.op_type == "Split"}
    replaced = {name for gather, factor in splits.values() if gather for name in (gather.name, factor and factor.name)}
    nodes, initializers = [], [t for t in model.graph.initializer if not t.name.startswith(f"{TAILORS}.")]
    for node in model.graph.node:
        gather, factor = splits.get(node.name, (None, None))
        if gather is None:
            nodes += [node] if node.name not in replaced else []
            continue
        sizes = numpy_helper.to_array(values[node.input[1]])
        rows = np.split(numpy_helper.to_array(values[gather.input[0]]), np.cumsum(sizes)[:-1], axis=1)
        for wide in (False, True):
            own = {name: part for name, part in zip(node.output, rows, strict=True) if name.startswith(kept) == wide}
            if own:
                made, constants = _picked(gather, factor, own, wide)
                nodes, initializers = nodes + made, initializers + constants
    del model.graph.node[:], model.graph.initializer[:]
    used = {name for node in nodes for name in node.input}
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensor for tensor in initializers if tensor.name in used)
    return model


def _gather_of(
    split: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto | None, onnx.NodeProto | None]:
    """What picks the tailors that a Split cuts apart, and the factor of the null class between, where there is one."""
    source, factor = producers.get(split.input[0]), None
    if source is not None and source.op_type == "Mul":
        source, factor = producers.get(source.input[0]), source
    return (source, factor) if source is not None and source.input[0].startswith(f"{TAILORS}.") else (None, None)


def _picked(
    gather: onnx.NodeProto,
    factor: onnx.NodeProto | None,
    rows: Mapping[str, NDArray[np.float32]],
    wide: bool,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants that pick some of a table's rows by class; not `wide`: int8, widened after the gather."""
    table, index, node = f"{gather.input[0]}.{'fp32' if wide else 'int8'}", gather.input[1], helper.make_node
    parts = np.concatenate(list(rows.values()), 1)
    if wide:
        nodes = [node("Gather", [table, index], [f"{table}.picked"], f"{table}.gather", axis=0)]
        constants = {table: parts}
    else:
        values, scale = _per_component(parts)
        constants = {table: values, f"{table}.scale": scale}
        nodes = [
            node("Gather", [table, index], [f"{table}.own"], f"{table}.gather", axis=0),
            node("Gather", [f"{table}.scale", index], [f"{table}.own.scale"], f"{table}.scale.gather", axis=0),
            node("Cast", [f"{table}.own"], [f"{table}.wide"], f"{table}.cast", to=onnx.TensorProto.FLOAT),
            node("Mul", [f"{table}.wide", f"{table}.own.scale"], [f"{table}.picked"], f"{table}.scaled"),
        ]
    picked = f"{table}.picked"
    if factor is not None:
        nodes.append(node(factor.op_type, [picked, factor.input[1]], [f"{table}.open"], f"{table}.opened"))
        picked = f"{table}.open"
    constants[f"{table}.rows"] = np.array([part.shape[1] for part in rows.values()])
    nodes.append(node("Split", [picked, f"{table}.rows"], list(rows), f"{table}.split", axis=1))
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def _per_component(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 values and scales of K thin factors, whose components are rows."""
    scale = np.abs(table).max(axis=2, keepdims=True) / LARGEST
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(table / scale).astype(np.int8), scale
