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
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

LARGEST = 127
FINAL = "final"
"""The last layer's matrix. It stays in fp32: a few kB, and 2 to 6 dB less error at all but the last steps."""


def quantize_int8(model: onnx.ModelProto, fp32_matrices: Collection[str] = ()) -> onnx.ModelProto:
    """A new model with int8 weights, but for those of `fp32_matrices` ("blocks.0.attn.q"); `model` is not changed.

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
                nodes_to_exclude=[_last_product(model), *_products_of(model, kept)],
                extra_options={"MatMulConstBOnly": True},
            )
        quantized = onnx.load_model(target)
    del quantized.graph.value_info[:], quantized.metadata_props[:]
    quantized.producer_name, quantized.producer_version = model.producer_name, ""
    return quantize_gathered(quantized, kept)


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
    """Store every 3-D table that is gathered along its classes (K x m x r or K x r x n) as int8.

    Tables whose names start like one of `kept` stay as they are.
    """
    floats = [t for t in model.graph.initializer if len(t.dims) == 3 and t.data_type == onnx.TensorProto.FLOAT]
    tables = {t.name: t for t in floats if not (kept and t.name.startswith(kept))}
    nodes, done = [], set()
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables:
            nodes.append(node)
            continue
        name, index, output = node.input[0], node.input[1], node.output[0]
        done.add(name)
        nodes += [
            helper.make_node("Gather", [f"{name}.int8", index], [f"{output}.int8"], f"{node.name}.int8", axis=0),
            helper.make_node("Gather", [f"{name}.scale", index], [f"{output}.scale"], f"{node.name}.scale", axis=0),
            helper.make_node(
                "Cast", [f"{output}.int8"], [f"{output}.wide"], f"{node.name}.wide", to=onnx.TensorProto.FLOAT
            ),
            helper.make_node("Mul", [f"{output}.wide", f"{output}.scale"], [output], node.name),
        ]
    initializers = [t for t in model.graph.initializer if t.name not in done]
    for name in sorted(done):
        values, scale = _per_component(numpy_helper.to_array(tables[name]))
        initializers += [
            numpy_helper.from_array(values, f"{name}.int8"),
            numpy_helper.from_array(scale, f"{name}.scale"),
        ]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)
    return model


def _per_component(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 values and scales of K thin factors; the components lie along the shorter of the last two axes."""
    long_axis = 1 if table.shape[1] >= table.shape[2] else 2
    scale = np.abs(table).max(axis=long_axis, keepdims=True) / LARGEST
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(table / scale).astype(np.int8), scale
