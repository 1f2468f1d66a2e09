"""A latent model's decoder in ONNX: scaled latents in, pixels in [0, 1] out; in fp32, fp16, and with weights of 8 bits.

Where a plan has tiles, the graph holds the decoder of one tile as the body of a Loop over overlapping tiles, each of
which fades into its neighbours. That is done in the graph, and not by who calls it, so that every runtime and the
sampler's single call get it alike, at the price of control flow: hence only where memory does not allow the whole.

Symbols: B batch, ch x h x w latents, C x H x W pixels, n tiles along a side of s latents, f pixels per latent.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.version_converter
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kind_edge.budget.onnx_writer import OPSET
from kind_edge.budget.precision import decoder_precision
from kind_edge.exporters.onnx_fp16 import halve

if TYPE_CHECKING:
    from kind_edge.deploy.plain import Origin
    from kind_edge.model.autoencoder import Autoencoder
    from kind_edge.model.tiles import Tiles

PREFIX = "decoder."
"""Of every inner name, so that a decoder can stand behind a denoiser in one graph."""

_LARGEST = 127
_EXPORT_OPSET = 20
"""From 21 on group normalisation is an operator of its own, which fewer runtimes have, and which ONNX Runtime takes
apart into many passes over large activations; before, it is an InstanceNormalization: the same in one pass."""


def to_decoders(origin: Origin, precisions: Sequence[str]) -> dict[str, onnx.ModelProto]:
    """The decoders that are loaded beside models of these precisions, by their own, fp32 first; {} without any."""
    if origin.autoencoder is None:
        return {}
    tiles = origin.autoencoder.tiles(int(origin.plan.decoder.get("tiles", 1)))
    plain = to_onnx_decoder(origin.autoencoder, tiles.size)
    wanted = dict.fromkeys(["fp32", *map(decoder_precision, precisions)])
    return {precision: tiled(_stored(plain, precision), tiles, origin.autoencoder.side) for precision in wanted}


def to_onnx_decoder(autoencoder: Autoencoder, size: int) -> onnx.ModelProto:
    """The decoder of size x size latents, dynamic batch: latent float32 [B, ch, s, s] -> image [B, C, s f, s f]."""
    latent = torch.zeros(2, int(autoencoder.config["latent_channels"]), size, size)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            autoencoder.decoder,
            (latent,),
            dynamo=True,
            opset_version=_EXPORT_OPSET,
            input_names=["latent"],
            output_names=["image"],
            dynamic_shapes={"latent": {0: torch.export.Dim("batch", min=1, max=1024)}},
            external_data=False,
            verbose=False,
        )
    return _prefixed(_cleaned(onnx.version_converter.convert_version(program.model_proto, OPSET)))


def _cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without stack traces, paths and stale shapes, so that equal models give equal bytes; the batch is named."""
    del proto.metadata_props[:], proto.functions[:]
    proto.graph.name, proto.producer_name, proto.producer_version, proto.doc_string = "decoder", "kind-edge", "", ""
    del proto.graph.metadata_props[:], proto.graph.value_info[:]
    for node in proto.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout and warns about its own internals; nobody here can act on that."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _prefixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every name but those of input and output starts with PREFIX."""
    outer = {"", "latent", "image"}

    def name(old: str) -> str:
        return old if old in outer or old.startswith(PREFIX) else PREFIX + old

    for node in model.graph.node:
        node.name = name(node.name)
        node.input[:], node.output[:] = [name(old) for old in node.input], [name(old) for old in node.output]
    for tensor in model.graph.initializer:
        tensor.name = name(tensor.name)
    return model


def _stored(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    if precision == "int8-weights":
        return weights_in_int8(model)
    return model if precision == "fp32" else to_fp16(model)


def weights_in_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Kernels of convolutions as int8 with a scale per output, widened when they are used; `model` is not changed.

    The few matrices (of attention, if there is any) stay: ONNX Runtime would fuse their widening, and fails in a Loop.
    """
    result = _copied(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    done: dict[str, list[onnx.TensorProto]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        kernel = node.input[1] if node.op_type == "Conv" else ""
        if kernel in constants:
            if kernel not in done:
                codes, scales = _per_output(numpy_helper.to_array(constants[kernel]))
                names = [f"{kernel}.int8", f"{kernel}.scale"]
                done[kernel] = [numpy_helper.from_array(codes, names[0]), numpy_helper.from_array(scales, names[1])]
                widen = helper.make_node("DequantizeLinear", names, [f"{kernel}.wide"], f"{kernel}.widen", axis=0)
                nodes.append(widen)
            node.input[1] = f"{kernel}.wide"
        nodes.append(node)
    rest = [tensor for tensor in result.graph.initializer if tensor.name not in done]
    stored = [tensor for pair in done.values() for tensor in pair]
    return _with_graph(result, nodes, [*rest, *stored])


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Computed in fp16, with float32 inputs and outputs. What adds up whole groups or rows stays in fp32."""
    return _prefixed(halve(model, ("norms", "softmax")))


def _per_output(kernel: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [C, ...] and scales [C] of a kernel [C, ...]."""
    scales = np.abs(kernel).reshape(len(kernel), -1).max(1) / np.float32(_LARGEST)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    return np.rint(kernel / scales.reshape(-1, *[1] * (kernel.ndim - 1))).astype(np.int8), scales


def tiled(model: onnx.ModelProto, tiles: Tiles, side: int) -> onnx.ModelProto:
    """The decoder of side x side latents, one tile after the other; `model` decodes one tile and is not changed."""
    if tiles.count == 1:
        return model
    source = model.graph
    channels = source.input[0].type.tensor_type.shape.dim[1].dim_value
    colours, pixels = (source.output[0].type.tensor_type.shape.dim[i].dim_value for i in (1, 2))
    f = pixels // tiles.size
    body = helper.make_graph(
        list(_tile_step(source)),
        "tile",
        [
            helper.make_tensor_value_info("decoder.tile", TensorProto.INT64, []),
            helper.make_tensor_value_info("decoder.going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("decoder.image", TensorProto.FLOAT, ["batch", colours, side * f, side * f]),
        ],
        [
            helper.make_tensor_value_info("decoder.still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("decoder.image'", TensorProto.FLOAT, ["batch", colours, side * f, side * f]),
        ],
        [tensor for tensor in source.initializer if tensor.data_type == TensorProto.INT64],
    )
    node = helper.make_node
    nodes = [
        node("Shape", ["latent"], ["decoder.batch"], end=1),
        node("Concat", ["decoder.batch", "decoder.picture"], ["decoder.canvas"], axis=0),
        node("Expand", ["decoder.zero", "decoder.canvas"], ["decoder.blank"]),
        node("Loop", ["decoder.tiles", "", "decoder.blank"], ["image"], body=body),
    ]
    constants = [numpy_helper.from_array(value, PREFIX + name) for name, value in _tables(tiles, f, side).items()]
    constants.append(numpy_helper.from_array(np.array([colours, side * f, side * f]), "decoder.picture"))
    floats = [tensor for tensor in source.initializer if tensor.data_type != TensorProto.INT64]
    graph = helper.make_graph(
        nodes,
        source.name,
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["batch", channels, side, side])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", colours, side * f, side * f])],
        [*constants, *floats],
    )
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name=model.producer_name
    )


def _tables(tiles: Tiles, f: int, side: int) -> dict[str, NDArray[Any]]:
    """What the loop looks up for each tile: where it starts and ends, its weights along both sides, and its margins."""
    n = tiles.count
    starts = np.array([[top, left] for top in tiles.starts for left in tiles.starts], np.int64)
    before, after = starts * f, (side - tiles.size - starts) * f
    nothing = np.zeros_like(before)
    return {
        "tiles": np.array(n * n, np.int64),
        "zero": np.zeros((1, 1, 1, 1), np.float32),
        "axes": np.array([2, 3], np.int64),
        "starts": starts,
        "ends": starts + tiles.size,
        "rows": np.repeat(tiles.weights, n, 0).reshape(n * n, 1, 1, -1, 1),
        "columns": np.tile(tiles.weights, (n, 1)).reshape(n * n, 1, 1, 1, -1),
        "margins": np.concatenate([nothing, before, nothing, after], 1),
    }


def _tile_step(source: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """One tile: cut it out, decode it, weigh it, add it to the image."""
    node = helper.make_node
    for table in ("starts", "ends", "rows", "columns", "margins"):
        yield node("Gather", [PREFIX + table, "decoder.tile"], [f"decoder.tile.{table}"])
    yield node("Slice", ["latent", "decoder.tile.starts", "decoder.tile.ends", "decoder.axes"], ["decoder.piece"])
    for original in source.node:
        inner = onnx.NodeProto()
        inner.CopyFrom(original)
        inner.input[:] = ["decoder.piece" if name == "latent" else name for name in original.input]
        inner.output[:] = ["decoder.part" if name == "image" else name for name in original.output]
        yield inner
    yield node("Mul", ["decoder.part", "decoder.tile.rows"], ["decoder.faded"])
    yield node("Mul", ["decoder.faded", "decoder.tile.columns"], ["decoder.weighed"])
    yield node("Pad", ["decoder.weighed", "decoder.tile.margins"], ["decoder.placed"])
    yield node("Add", ["decoder.image", "decoder.placed"], ["decoder.image'"])
    yield node("Identity", ["decoder.going"], ["decoder.still"])


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _with_graph(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], initializers: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    """`model`, which is changed, with other nodes and constants."""
    nodes, initializers = list(nodes), list(initializers)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)
    return model
