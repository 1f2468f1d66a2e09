"""What torch.onnx leaves in a graph, taken out; for what is not written node by node: the decoders of others."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx


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
