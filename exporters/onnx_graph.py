"""From a plain model to an ONNX graph that holds nothing but the model: opset 20, dynamic batch, weights inside."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnx import helper

from kind_edge.deploy.plain import PlainDiT

OPSET = 20


def to_onnx(model: PlainDiT) -> onnx.ModelProto:
    """Export with a dynamic batch; names, shapes and types as in the bundle contract; weights inside the file."""
    spec = model.spec
    # Two images, not one: a dimension of 1 would be taken for a constant.
    arguments: dict[str, torch.Tensor] = {"sample": torch.zeros(2, spec.channels, spec.image_size, spec.image_size)}
    step = model.input_names[1]
    arguments["step"] = torch.zeros(2, dtype=torch.int32 if step == "step_index" else torch.float32)
    if model.switches:
        arguments["class_index"] = torch.zeros(2, dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            tuple(arguments.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(model.input_names),
            output_names=["prediction"],
            dynamic_shapes={name: {0: batch} for name in arguments},
            external_data=False,
            verbose=False,
        )
    return cleaned(program.model_proto, "denoiser")


def cleaned(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Without stack traces, paths and stale shapes, so that equal models give equal bytes; the batch is named."""
    del proto.metadata_props[:], proto.functions[:]
    proto.graph.name, proto.producer_name, proto.producer_version, proto.doc_string = name, "kind-edge", "", ""
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


def inputs_and_outputs(proto: onnx.ModelProto) -> dict[str, Any]:
    """The manifest's description of inputs and outputs, read from the graph itself."""

    def describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return {"name": value.name, "dtype": dtype, "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim]}

    return {"inputs": [describe(v) for v in proto.graph.input], "outputs": [describe(v) for v in proto.graph.output]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
