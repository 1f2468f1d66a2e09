"""From an ONNX file to ORT format, with the same bytes in every process; and what a small build needs to run it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kind_edge.deploy.graph_facts import all_nodes
from kind_edge.deploy.ort import quiet_tools, require_onnxruntime
from kind_edge.errors import UsageError

_ALIGNMENT = 16
_IDENTIFIER = b"ORTM"


def convert(source: Path, target: Path) -> None:
    """Write an ONNX file in ORT format, style Fixed; the same file gives the same bytes in every process."""
    runtime = require_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    # Signed QDQ stays signed, as Arm has kernels for it; x86 would rather have it unsigned.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as scratch:
        readable = _without_4_bit_types(source, Path(scratch))
        runtime.InferenceSession(str(readable), options, providers=["CPUExecutionProvider"])
    target.write_bytes(_in_one_order(target.read_bytes()))


def build_config(models: Sequence[Path], folder: Path) -> str:
    """For ONNX Runtime's `build.sh --include_ops_by_config`: operators by domain and version, with their types.

    `folder` is what the models are named relative to.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models

    with tempfile.TemporaryDirectory(prefix="kind-edge-") as scratch, quiet_tools():
        written = Path(scratch, "operators.config")
        create_config_from_models(models, written, True)
        lines = [line for line in written.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    names = [f"#   {model.relative_to(folder).as_posix()}" for model in models]
    return "\n".join(["# What a reduced build of ONNX Runtime needs for", *names, *lines]) + "\n"


def _without_4_bit_types(source: Path, scratch: Path) -> Path:
    """The file itself, or a copy in `scratch` with its signed 4-bit tables as bytes of two values each.

    ORT format has no 4-bit type. GatherBlockQuantized reads both: in bytes values are 0 to 15 with 8 for zero, the
    first of a pair in the low half. `UsageError` for 4-bit values that another operator reads.
    """
    import numpy as np
    import onnx

    model = onnx.load_model(source)
    kinds = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    tables = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in kinds}
    readers = [node for node in all_nodes(model) if tables.keys() & set(node.input)]
    for node in readers:
        table = tables.get(node.input[0])
        packable = table is not None and table.data_type == onnx.TensorProto.INT4 and table.dims[-1] % 2 == 0
        if node.op_type != "GatherBlockQuantized" or len(node.input) > 3 or not packable:
            raise UsageError(
                f"{source.name}: {node.op_type} {node.name!r} reads 4-bit values, which ORT format cannot hold; "
                "leave ort out of --formats, or take another --precision"
            )
        node.attribute.append(onnx.helper.make_attribute("bits", 4))
    for name, table in tables.items():
        values = (onnx.numpy_helper.to_array(table).astype(np.int8) + 8).astype(np.uint8)
        table.CopyFrom(onnx.numpy_helper.from_array(values[..., 0::2] | (values[..., 1::2] << 4), name))
    if not tables:
        return source
    onnx.save_model(model, scratch / source.name)
    return scratch / source.name


def _in_one_order(content: bytes) -> bytes:
    """The same model with the table of kernel types written in the order of its keys.

    ONNX Runtime writes that table in the order of a hash map that is seeded anew in every process. It stands before all
    else (FlatBuffers are written from the back, and refer forwards alone), so the rest is kept as it is.
    """
    import flatbuffers
    from onnxruntime.tools import ort_format_model  # noqa: F401 - puts the next package on the path
    from ort_flatbuffers_py.fbs import InferenceSession as sessions

    session = sessions.InferenceSession.GetRootAs(content, 0)
    model, session_at = session.Model()._tab, session._tab
    kept = model.Pos - model.Get(flatbuffers.number_types.SOffsetTFlags, model.Pos)  # its vtable stands before it
    builder = flatbuffers.Builder(0)
    builder.Bytes, builder.head, builder.minalign = bytearray(content[kept:]), 0, _ALIGNMENT
    resolver = _write_resolver(builder, session.KernelTypeStrResolver())
    version_at = session_at.Indirect(session_at.Pos + session_at.Offset(4))
    sessions.Start(builder)
    sessions.AddOrtVersion(builder, len(content) - version_at)
    sessions.AddModel(builder, len(content) - model.Pos)
    sessions.AddKernelTypeStrResolver(builder, resolver)
    builder.Finish(sessions.End(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _write_resolver(builder: Any, resolver: Any) -> int:
    """Operator -> type's name -> where that type occurs among its inputs and outputs."""
    from ort_flatbuffers_py.fbs import ArgTypeAndIndex as places
    from ort_flatbuffers_py.fbs import KernelTypeStrArgsEntry as types
    from ort_flatbuffers_py.fbs import KernelTypeStrResolver as resolvers
    from ort_flatbuffers_py.fbs import OpIdKernelTypeStrArgsEntry as operators

    def write_place(place: Any) -> int:
        places.Start(builder)
        places.AddArgType(builder, place.ArgType())
        places.AddIndex(builder, place.Index())
        return int(places.End(builder))

    def write_type(entry: Any) -> int:
        written = [write_place(entry.Args(i)) for i in range(entry.ArgsLength())]
        vector = _vector(builder, types.StartArgsVector, written)
        name = builder.CreateString(entry.KernelTypeStr())
        types.Start(builder)
        types.AddKernelTypeStr(builder, name)
        types.AddArgs(builder, vector)
        return int(types.End(builder))

    def write_operator(entry: Any) -> int:
        found = sorted(
            (entry.KernelTypeStrArgs(i) for i in range(entry.KernelTypeStrArgsLength())),
            key=lambda each: each.KernelTypeStr(),
        )
        vector = _vector(builder, operators.StartKernelTypeStrArgsVector, [write_type(each) for each in found])
        name = builder.CreateString(entry.OpId())
        operators.Start(builder)
        operators.AddOpId(builder, name)
        operators.AddKernelTypeStrArgs(builder, vector)
        return int(operators.End(builder))

    found = sorted(
        (resolver.OpKernelTypeStrArgs(i) for i in range(resolver.OpKernelTypeStrArgsLength())),
        key=lambda each: each.OpId(),
    )
    vector = _vector(builder, resolvers.StartOpKernelTypeStrArgsVector, [write_operator(each) for each in found])
    resolvers.Start(builder)
    resolvers.AddOpKernelTypeStrArgs(builder, vector)
    return int(resolvers.End(builder))


def _vector(builder: Any, start: Any, offsets: list[int]) -> int:
    start(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
